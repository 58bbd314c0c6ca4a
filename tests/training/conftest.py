"""Fixtures of this folder."""

import os
import types
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tests.checkpointing import Run
from tests.live_adapters import Models, load_models
from tests.training.fake_hub import UPLOADED, Hub, card


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    return load_models(tiny_base)


@pytest.fixture
def run(loaded) -> Run:
    made = Run(loaded)
    made.step(1)
    made.step(2)
    return made


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A checkpoint of step 2."""
    return run.save(tmp_path, 2)


@pytest.fixture
def connected(monkeypatch, tmp_path):
    """The library online, without a login, with an empty home, and not waiting between its tries."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that only the real hub speaks
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    _http.close_session()
    yield
    _http.close_session()


@pytest.fixture
def server(connected, monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    yield server
    server.close()


@pytest.fixture
def out(tmp_path) -> Path:
    """The output folder of a run, with much that must not be uploaded."""
    folder = tmp_path / "dog-lora"
    for name in (
        *UPLOADED,
        *("metrics.jsonl", "run.yaml", "run.json", "status.json", ".lock", "image_7.png", "notes.txt"),
        *(
            "checkpoint-4/optimizer.safetensors",
            "checkpoint-4/state.json",
            "logs/dreambooth-lora/events.out.tfevents.1",
            "validation/step-000004-00.png",
        ),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 50 + os.urandom(100))
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (folder / "README.md").write_text(card(base_folder=base), encoding="utf-8")
    return folder
