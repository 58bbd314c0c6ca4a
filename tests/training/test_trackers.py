"""A tracker that fails costs its records; the run trains all steps and its adapter has the same bytes."""

import errno
import json
import os
import sys
import threading
import types
from pathlib import Path
from typing import ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from PIL import Image

from dreambooth.training import trackers
from tests.running import adapter_after, digest, run_train

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events")
CALLS = ["__init__", "start", "store_init_configuration", "log", "log pictures", "finish"]


class Failing(GeneralTracker):
    """A tracker of --report_to wandb that raises `error` in the call `failing`."""

    name = "wandb"
    requires_logging_directory = False
    tracker = None
    failing, error = "", Exception()
    calls: ClassVar[list[str]] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise self.error

    def __init__(self, project: str):
        super().__init__()
        self._call("__init__")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict) -> None:
        self._call("store_init_configuration")

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        self._call("log pictures" if "validation" in values else "log")

    def finish(self) -> None:
        self._call("finish")


@pytest.fixture
def failing(monkeypatch) -> type[Failing]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Image=lambda image, caption: image))
    monkeypatch.setattr(Failing, "calls", [])
    return Failing


@pytest.mark.parametrize("error", [FULL, RuntimeError("hf_0123456789abcdef is refused"), SystemExit(1)])
@pytest.mark.parametrize("call", CALLS)
def test_a_tracker_that_fails_is_dropped_with_one_warning(failing, monkeypatch, capsys, call, error):
    monkeypatch.setattr(failing, "failing", call)
    monkeypatch.setattr(failing, "error", error)
    tracker = trackers.Tracker("wandb", Path("records"))
    tracker.start()
    tracker.store_init_configuration({"seed": 1, "betas": [0.9, 0.99]})
    tracker.log({"loss": 1.0}, step=1)
    tracker.images("validation", [Image.new("RGB", (8, 8))], "a dog", 1)
    tracker.log({"loss": 1.0}, step=2)
    tracker.finish()
    said = capsys.readouterr().out
    assert said.count("warning: --report_to wandb: records gets no more records") == said.count("\n") == 1
    assert type(error).__name__ in said
    assert "hf_0" not in said
    assert failing.calls[-1] in ("finish", call)
    assert failing.calls[: CALLS.index(call) + 1] == CALLS[: CALLS.index(call) + 1] or call == "finish"


@pytest.mark.trains
def test_a_full_disk_of_tensorboard_costs_its_records_and_nothing_else(
    tiny_base, photos_dir, tmp_path, monkeypatch, capfd, plain_run
):
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    real, count = writer.RecordWriter.write, []

    def write(self, data):
        count.append(data)
        if len(count) > 6:
            raise FULL
        return real(self, data)

    monkeypatch.setattr(writer.RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    words = "--max_train_steps 2 --report_to tensorboard --validation_epochs 1 --num_validation_images 1"
    out = tmp_path / "out"
    adapter = run_train(tiny_base, photos_dir, out, *words.split(), "--validation_prompt", "a dog")
    assert digest(adapter) == digest(adapter_after(plain_run, 2))
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    said = capfd.readouterr()
    assert said.out.count(f"--report_to tensorboard: {out / 'logs'} gets no more records") == 1
    assert "No space left on device" in said.out
    assert "Traceback" not in said.err


def test_every_method_of_a_tracker_is_guarded():
    """A method that accelerate calls and that is not here would raise on its own."""
    calls = {"start", "store_init_configuration", "log", "finish"}
    assert calls <= vars(trackers.Tracker).keys()
    assert {name for name, value in vars(GeneralTracker).items() if callable(value)} - {"__init__"} == calls
    assert isinstance(TensorBoardTracker.requires_logging_directory, bool)
