"""What a run says of itself: metrics.jsonl, trackers, and the progress bar."""

import contextlib
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

TRACKER_NAME = "dreambooth-lora"


def trackers(report_to: str) -> tuple[list[str], list[str]]:
    """(names for Accelerator, notes for the user). A tracker that was asked for by name and is missing is refused with the flags."""
    installed = {
        "tensorboard": any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")),
        "wandb": importlib.util.find_spec("wandb") is not None,
        "comet_ml": importlib.util.find_spec("comet_ml") is not None,
    }
    if report_to == "none":
        return [], []
    wanted = list(installed) if report_to == "all" else [report_to]
    notes = []
    if report_to == "tensorboard" and not installed["tensorboard"]:
        notes.append(
            "tensorboard is not installed, so only metrics.jsonl is written: pip install '.[tensorboard]', or --report_to none"
        )
    return [name for name in wanted if installed[name]], notes


class Progress:
    """Progress of one run, on the main process: a bar, `metrics.jsonl` (a JSON object a line) and the accelerator's trackers."""

    def __init__(
        self, accelerator: Accelerator, path: Path, *, first_step: int, last_step: int, images_per_step: int
    ):
        self.accelerator, self.images_per_step = accelerator, images_per_step
        self.main = accelerator.is_main_process
        self.bar = tqdm(
            total=last_step, initial=first_step, desc="training", unit="step", disable=not self.main
        )
        self.file = self._open(path, first_step) if self.main else None
        self.since, self.since_step = time.monotonic(), first_step
        self.has_failed = False

    @staticmethod
    def _open(path: Path, first_step: int) -> TextIO:
        """The file with the records up to `first_step`: a resumed run replaces what an interrupted one wrote after its checkpoint."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and first_step > 0 else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
        file = path.open("w", encoding="utf-8")
        file.writelines(line + "\n" for line in kept)
        return file

    def restart_clock(self, step: int) -> None:
        """Leave out of images per second what happened since the last step (validation, a checkpoint)."""
        self.since, self.since_step = time.monotonic(), step

    def steps(self, records: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Record what steps (counted from 1) gave; the bar shows time left, the record images per second since the clock was restarted."""
        if self.file is None or not records:
            return
        last = records[-1][0]
        rate = (last - self.since_step) * self.images_per_step / max(time.monotonic() - self.since, 1e-9)
        for step, values in records:
            self._write(json.dumps({"step": step, **values, "images_per_second": round(rate, 3)}) + "\n")
            self.accelerator.log(values, step=step)
        learning_rate = next(value for name, value in values.items() if name.startswith("lr"))
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{learning_rate:.2e}", images_s=f"{rate:.1f}")
        self.bar.update(last - self.bar.n)

    def memory(self, step: int, phase: str, reading: Mapping[str, float]) -> None:
        """Record what the main process takes of memory at the end of a phase, after `step` steps."""
        if self.file is not None:
            self._write(json.dumps({"step": step, "memory": {"phase": phase, **reading}}) + "\n")

    def _write(self, line: str) -> None:
        """A full disk costs records, not the run."""
        assert self.file is not None
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            if not self.has_failed:
                tqdm.write(
                    f"warning: metrics.jsonl cannot be written: {error.strerror or error}; the run goes on"
                )
            self.has_failed = True

    def images(self, step: int, name: str, images: list[Image.Image], prompt: str) -> None:
        """Send pictures to the trackers that take them."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images(
                    name, np.stack([np.asarray(image) for image in images]), step, dataformats="NHWC"
                )
            elif tracker.name == "wandb":
                import wandb

                tracker.log({name: [wandb.Image(image, caption=prompt) for image in images]}, step=step)

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            with contextlib.suppress(OSError):  # said when it was written
                self.file.close()


def jsonable(table: dict[str, Any]) -> dict[str, Any]:
    """Options as trackers take them: numbers, strings and booleans."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in table.items()
    }


def start_trackers(accelerator: Accelerator, options: Mapping[str, Any]) -> None:
    """Tell the run's trackers, if there are any, the options by name."""
    if accelerator.log_with:
        accelerator.init_trackers(TRACKER_NAME, config=jsonable(dict(options)))
