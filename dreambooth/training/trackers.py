"""The trackers of --report_to. A tracker that fails costs its records, never the run."""

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from dreambooth.io import console
from dreambooth.io.errors import shown, type_and_reason

PROJECT = "dreambooth-lora"


def installed(report_to: str) -> tuple[list[str], list[str]]:
    """(names of the trackers to use, notes for the user). `report_to` is a tracker, all or none."""
    is_installed = {
        "tensorboard": any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")),
        "wandb": importlib.util.find_spec("wandb") is not None,
        "comet_ml": importlib.util.find_spec("comet_ml") is not None,
    }
    names = [name for name in is_installed if report_to in (name, "all") and is_installed[name]]
    if report_to != "tensorboard" or names:
        return names, []
    note = (
        "tensorboard is not installed, so only metrics.jsonl is written: pip install '.[tensorboard]', "
        "or --report_to none"
    )
    return [], [note]


class Tracker(GeneralTracker):
    """One of accelerate's trackers. At its first error it is dropped, with a warning. Accelerator calls the
    methods on the main process only."""

    requires_logging_directory = False  # accelerate's tracker gets the folder from here

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.has_failed = name, folder, False
        self.tracker: Any = None  # accelerate's; it is made by `start`
        super().__init__()  # checks that these exist

    def start(self) -> None:
        if self.name == "tensorboard":
            # its writing thread would print a traceback of an error that the next call raises again
            report = threading.excepthook
            threading.excepthook = lambda failure: None if _is_writer(failure.thread) else report(failure)
        self._do(self._start)

    def _start(self) -> None:
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        self.tracker = kind(PROJECT, *([self.folder] if kind.requires_logging_directory else []))
        self.tracker.start()

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Record options, as numbers, strings and booleans."""
        table = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
        self._do(lambda: self.tracker.store_init_configuration(table))

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self._do(lambda: self.tracker.log(values, step=step, **kwargs))

    def images(self, name: str, images: Sequence[Image.Image], prompt: str, step: int) -> None:
        """Record pictures, if the tracker takes them."""
        if self.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            self._do(lambda: self.tracker.writer.add_images(name, pixels, step, dataformats="NHWC"))
        elif self.name == "wandb":
            self._do(lambda: self.tracker.log({name: _captioned(images, prompt)}, step=step))

    def finish(self) -> None:
        self._do(lambda: self.tracker.finish())

    def _do(self, work: Callable[[], object]) -> None:
        """Call `work`, unless the tracker has failed. An error makes it fail, with a warning."""
        try:
            if not self.has_failed:
                work()
        except (Exception, SystemExit) as error:  # a library may also exit
            self.has_failed = True
            console.warn(
                f"--report_to {self.name}: {shown(self.folder)} gets no more records"
                f" ({type_and_reason(error)}); the run goes on"
            )
            with contextlib.suppress(Exception, SystemExit):
                self.tracker.finish()  # ends its threads, which might wait at the end of the run


def _captioned(images: Sequence[Image.Image], prompt: str) -> list[Any]:
    import wandb

    return [wandb.Image(image, caption=prompt) for image in images]


def _is_writer(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard")
