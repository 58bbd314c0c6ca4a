"""The seconds of imports: no garbage collection in them, and weights hashed meanwhile."""

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dreambooth.bases import families, folders
from dreambooth.files import digests
from dreambooth.options.training import BaseOptions
from dreambooth.runtime.stops import Stop

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ["train_dreambooth_lora", "generate_class_images", "infer", "convert_adapter"]
IMPORTS = """
import gc
from dreambooth.runtime import startup

startup.begin()
assert not gc.isenabled()
import json

def main(options):
    assert options == "options" and gc.isenabled() and gc.get_freeze_count() > 0

startup.run(main, "options")
"""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(digests, "_known", {})


def test_imports_are_made_without_garbage_collection_and_what_they_made_is_not_looked_through_again():
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_neither_torch_nor_diffusers(script):
    """And so is there in less than half a second on a machine with nothing else to do."""
    code = "import runpy, sys; sys.argv = [sys.argv[1], '--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit: print('slow:', {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules))"
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
    assert {path for path, *_ in digests._known} == weights
    read: list[Path] = []
    real = digests._computed

    def noted(path: Path, size: int) -> bytes:
        read.append(path)
        return real(path, size)

    monkeypatch.setattr(digests, "_computed", noted)
    first = families.find(BaseOptions(str(tiny_xl))).fingerprint()
    assert read
    assert not weights & set(read)
    monkeypatch.setattr(digests, "_known", {})
    assert families.find(BaseOptions(str(tiny_xl))).fingerprint() == first


@pytest.mark.parametrize("name", ["nowhere", "\ud800", "x" * 5000])
def test_what_is_wrong_with_a_base_is_not_said_by_the_thread(name, capfd):
    folders.hash_ahead(BaseOptions(name))
    for thread in threading.enumerate():
        if thread.name == "hash_ahead":
            thread.join()
    assert capfd.readouterr() == ("", "")


def test_digests_are_those_of_hashlib_and_follow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_CHUNK", 1000)
    path = tmp_path / "file"
    for content in (b"", b"a" * 999, b"b" * 1000, b"c" * 12345):
        path.write_bytes(content)
        assert digests.of(path) == hashlib.sha256(content).digest()


def test_a_digest_is_computed_once_for_all_who_ask_at_the_same_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    calls = []

    def computed(path: Path, size: int) -> bytes:
        calls.append(path)
        time.sleep(0.2)
        return b"digest"

    monkeypatch.setattr(digests, "_computed", computed)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(digests.of(tmp_path / "file"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, len(calls)) == ([b"digest"] * 4, 1)


def test_a_digest_that_was_broken_off_is_computed_anew(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    real = digests._computed

    def stopped(path: Path, size: int) -> bytes:
        raise Stop("stopped by SIGTERM")

    monkeypatch.setattr(digests, "_computed", stopped)
    with pytest.raises(Stop):
        digests.of(tmp_path / "file")
    monkeypatch.setattr(digests, "_computed", real)
    assert digests.of(tmp_path / "file") == hashlib.sha256(b"content").digest()
