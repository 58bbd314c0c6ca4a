"""Every command in the README runs: hub ids become a tiny local base, and the runs are made short. Nothing else is changed."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

import convert_adapter
import generate_class_images
import infer
import train_dreambooth_lora
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from picturebook import score, score_sets
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
XL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
IF_ID = "DeepFloyd/IF-I-XL-v1.0"
SCRIPTS: dict[str, Any] = {
    "train_dreambooth_lora.py": (train_dreambooth_lora.main, TrainOptions),
    "generate_class_images.py": (generate_class_images.main, ClassImageOptions),
    "infer.py": (infer.main, InferOptions),
    "convert_adapter.py": (convert_adapter.main, None),
}
SHORT = {
    "train_dreambooth_lora.py": "--max_train_steps 2 --num_class_images 2 --class_inference_steps 1 --report_to none",
    "generate_class_images.py": "--num_class_images 2 --class_inference_steps 1",
    "infer.py": "--num_inference_steps 1 --seeds 0 1 --mixed_precision no",
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [command for block in blocks for command in block.replace("\\\n", " ").strip().splitlines()]


def make_recipe(target: str) -> list[str]:
    result = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def run_script(words: list[str], *more: str, base: Path | None = None) -> None:
    """Run a command line of ours in this process, shortened; `base` stands in for the hub id, on the line or in its config."""
    AcceleratorState._reset_state(reset_partial_state=True)
    script = next(word for word in words if word in SCRIPTS)
    own = words[words.index(script) + 1 :]
    if script == "convert_adapter.py":
        replaced = [str(base) if base is not None and word == HUB_ID else word for word in own]
        tiny_width = (
            ["--pretrained_model_name_or_path", str(base)] if own[0] == "convert" else []
        )  # no width of a known base tells what it is
        convert_adapter.main(convert_adapter.parse_command([*replaced, *tiny_width]))
        return
    main, options = SCRIPTS[script]
    if base is not None:
        more = ("--pretrained_model_name_or_path", str(base), *more)
    main(parse(options, "", [*own, *shlex.split(SHORT[script]), *more]))


def test_readme_has_the_two_commands_first():
    assert readme_commands()[:2] == ["make demo", "make test"]


def test_make_test_runs_what_ci_runs():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    recipe = "\n".join(make_recipe("test"))
    for tool in ("pip install", "ruff check", "ruff format --check", "mypy", "pytest"):
        assert tool in recipe


def test_own_photo_commands_run_in_order(tmp_path, monkeypatch):
    """The README's story, from training to going on with a run, in a folder where the user's photos lie."""
    bases = {
        XL_ID: tiny.build_xl(tmp_path / "xl"),
        IF_ID: tiny.build_if(tmp_path / "if"),
        HUB_ID: tiny.build_pipeline(tmp_path / "base"),
    }
    tiny.make_photos(tmp_path / "my_dog", 5, (80, 64))
    (tmp_path / "my_dog" / "photo-0.txt").write_text("a photo of sks dog on grass")
    tiny.make_photos(tmp_path / "my_face", 5, (64, 72), seed=1)
    for name in ("configs", "picturebook"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in readme_commands():
        words = shlex.split(command)
        script = next((word for word in words if word in SCRIPTS), None)
        if script is None or "--help" in words:
            continue
        for flag, place in (("--config_file", "accelerate"), ("--config", "recipe")):
            if flag in words:
                content = yaml.safe_load(Path(words[words.index(flag) + 1]).read_text())
                assert content, f"{place} of {command}"
        recipe = Path(words[words.index("--config") + 1]).read_text() if "--config" in words else ""
        base = next((base for name, base in bases.items() if name in command + recipe), bases[HUB_ID])
        assert any(name in command for name in bases) or "--config" in words or script == "convert_adapter.py"
        run_script(
            words, *(["--resolution", "64"] if script == "train_dreambooth_lora.py" else []), base=base
        )
        ran.append(script)
    assert set(SCRIPTS) == set(ran)
    assert (tmp_path / "my_dog_lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "my_dog_base" / "model_index.json").is_file()
    for name in ("my_face_lora", "my_dog_xl", "my_dog_if", "my_dog_captioned", "my_dog_6gb", "my_dog_12gb"):
        assert (tmp_path / name / "pytorch_lora_weights.safetensors").is_file()


def test_every_readme_command_is_known():
    """A command of a new kind needs a test of its own."""
    for command in readme_commands():
        words = shlex.split(command)
        known = words[0] == "make" or any(word in SCRIPTS for word in words)
        assert known, command
        if words[0] == "make":
            assert make_recipe(words[1])


def test_make_demo_runs_from_class_images_to_scores(tmp_path, monkeypatch):
    """The demo's own command lines on the embedded base, with fewer steps, pictures and seeds."""
    commands = [
        shlex.split(line)
        for line in make_recipe("demo")
        if any(name in line for name in (*SCRIPTS, "picturebook.score"))
    ]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "picturebook"):
        (tmp_path / name).symlink_to(ROOT / name)
    for words in commands[:3]:
        run_script(words)
    arguments = dict(zip(commands[3][3::2], commands[3][4::2], strict=True))
    options = score.Options(
        Path(arguments["--subject"]),
        Path(arguments["--pictures"]),
        Path(arguments["--class_pictures"]),
        Path(arguments["--output"]),
    )
    scores = score.main(options)
    assert scores["subject prompts, adapter"]["pictures"] == 16
    assert scores["class prompts, base"]["pictures"] == 2
    demo = tmp_path / "runs" / "demo"
    for name in (
        "pytorch_lora_weights.safetensors",
        "scores.json",
        "subject/contact_sheet.png",
        "class/contact_sheet.png",
    ):
        assert (demo / name).is_file(), name


def test_make_two_subjects_runs_from_training_to_scores(tmp_path, monkeypatch):
    """Its own command lines on the embedded base, made short; the demo's adapter is made here as well."""
    commands = [
        shlex.split(line)
        for line in make_recipe("two_subjects")
        if any(name in line for name in (*SCRIPTS, "picturebook.score_sets"))
    ]
    assert [
        next(word for word in words if word in (*SCRIPTS, "picturebook.score_sets")) for words in commands
    ][-3:] == [
        "train_dreambooth_lora.py",
        "infer.py",
        "picturebook.score_sets",
    ]
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "picturebook"):
        (tmp_path / name).symlink_to(ROOT / name)
    demo = [shlex.split(line) for line in make_recipe("demo") if "train_dreambooth_lora.py" in line]
    for words in (*demo, *commands[-3:-1]):
        run_script(words)
    words = commands[-1]
    subjects = tuple(Path(word) for word in words[words.index("--subjects") + 1 : words.index("--output")])
    output = Path(words[words.index("--output") + 1])
    scores = score_sets.main(score_sets.Options(Path(words[words.index("--pictures") + 1]), subjects, output))
    assert list(scores) == ["base", "the dog", "the cat", "both"]
    assert all(values["pictures"] == 4 for of_set in scores.values() for values in of_set.values())
    assert output.is_file()
    assert (tmp_path / "runs" / "two_subjects" / "pictures" / "contact_sheet.png").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configs_are_short_and_every_flag_in_them_exists(path):
    assert len(path.read_text().splitlines()) <= 25
    content = yaml.safe_load(path.read_text())
    kind: Any = InferOptions if "prompt" in content or "prompts_file" in content else TrainOptions
    rest = {
        TrainOptions: "--instance_data_dir d --instance_prompt p --class_prompt c --class_data_dir e",
        InferOptions: "--output_dir o" if "adapters_file" in content else "--adapter a --output_dir o",
    }[kind]
    parse(kind, "", ["--config", str(path), *rest.split()])


def test_readme_names_every_package_and_no_other():
    tree = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"^    (\w+)/", tree, re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "dreambooth").glob("*/__init__.py")}
