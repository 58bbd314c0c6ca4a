"""A wheel has the six commands, the embedded base and the recipes, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = {
    "dreambooth-train": "train",
    "dreambooth-class-images": "class_images",
    "dreambooth-infer": "infer",
    "dreambooth-evaluate": "evaluate",
    "dreambooth-check-photos": "check_photos",
    "dreambooth-convert": "convert",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds, as `pip install` would lay it out."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for folder in ("dreambooth", "picturebook", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_command(installed: Path, folder: Path, name: str, *words: str) -> subprocess.CompletedProcess:
    """Run a console script as the file does that pip writes for it."""
    code = f"from dreambooth.runtime.commands import {COMMANDS[name]} as run; run()"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def files_below(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_a_wheel_has_every_module_the_base_and_the_recipes_and_nothing_else(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "dreambooth",
        "picturebook",
    }
    scripts = {f"scripts/{path.name}" for path in ROOT.glob("*.py")}
    recipes = {f"scripts/configs/{name}" for name in files_below(ROOT / "configs")}
    assert files_below(installed / "dreambooth") == files_below(ROOT / "dreambooth") | scripts | recipes
    assert files_below(installed / "picturebook") == files_below(ROOT / "picturebook")


@pytest.mark.slow
def test_the_commands_answer_help_in_an_empty_folder(installed, tmp_path):
    (info,) = installed.glob("*.dist-info")
    entry_points = metadata.Distribution.at(info).entry_points.select(group="console_scripts")
    assert {point.name: point.attr for point in entry_points} == COMMANDS
    for name in COMMANDS:
        result = run_command(installed, tmp_path, name, "--help")
        assert (result.returncode, result.stderr) == (0, ""), name
        assert result.stdout, name


@pytest.mark.trains
def test_the_demo_trains_in_an_empty_folder(installed, tmp_path):
    """The recipe, the embedded base and its photos are found in the installed copy."""
    words = "--config configs/demo.yaml --max_train_steps 1 --train_batch_size 1 --no_with_prior_preservation"
    words += " --output_dir adapter --report_to none --num_threads 1"
    result = run_command(installed, tmp_path, "dreambooth-train", *words.split())
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def test_the_tested_versions_are_within_the_ranges():
    """requirements.txt pins one version of each dependency, and pyproject.toml allows it."""
    pins = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    allowed = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
    assert {pin.name for pin in pins} == set(allowed)
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "=="
        assert allowed[pin.name].specifier.contains(version.version), pin.name
