"""The seconds of imports: no garbage collection in them, and weights hashed meanwhile. What is set before."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dreambooth.bases import families, folders
from dreambooth.files import digests
from dreambooth.options.training import BaseOptions

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ["train_dreambooth_lora", "generate_class_images", "infer", "convert_adapter"]
IMPORTS = """
import gc, os
from dreambooth.runtime import startup

startup.begin()
assert not gc.isenabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
import json

def main(options):
    assert options == "options" and gc.isenabled() and gc.get_freeze_count() > 0

startup.run(main, "options")
"""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(digests, "_digests", {})


def test_imports_are_made_without_garbage_collection_and_what_they_made_is_not_looked_through_again():
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_neither_torch_nor_diffusers(script):
    """So --help takes less than half a second on an idle machine."""
    code = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    print("slow:", {"torch", "diffusers", "transformers", "numpy", "PIL"} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, f"{script}.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("slow: set()\n")


def test_weights_are_hashed_ahead_and_not_again(tiny_xl, monkeypatch):
    folders.hash_ahead(BaseOptions(str(tiny_xl)))
    for thread in threading.enumerate():
        if thread.name == "hash_ahead":
            assert thread.daemon
            thread.join()
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    weights = {path for part in parts for path in (tiny_xl / part).glob("*.safetensors")}
    assert {path for path, *_ in digests._digests} == weights
    read: list[Path] = []
    real = digests._sha256

    def noted(path: Path, size: int) -> bytes:
        read.append(path)
        return real(path, size)

    monkeypatch.setattr(digests, "_sha256", noted)
    first = families.find(BaseOptions(str(tiny_xl))).fingerprint()
    assert read
    assert not weights & set(read)
    monkeypatch.setattr(digests, "_digests", {})
    assert families.find(BaseOptions(str(tiny_xl))).fingerprint() == first


def test_what_is_wrong_with_a_base_is_not_said_by_the_thread(capfd):
    folders.hash_ahead(BaseOptions("nowhere"))
    for thread in threading.enumerate():
        if thread.name == "hash_ahead":
            thread.join()
    assert capfd.readouterr() == ("", "")
