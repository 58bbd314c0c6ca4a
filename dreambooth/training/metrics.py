"""Records of a run's progress: metrics.jsonl, the trackers, and the progress bar."""

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader
from dreambooth.runtime import memory
from dreambooth.runtime.stops import Stop


class Progress:
    """Writes metrics.jsonl (one JSON object a line), trackers and progress bar, on the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        *,
        first_step: int,
        last_step: int,
        images_per_step: int,
        memory_by_phase: dict[str, memory.Reading],
    ):
        """`path` is the path of metrics.jsonl.

        `memory_by_phase` holds the readings of the phases before the first step. Later readings are added to
        it.
        """
        self.accelerator, self.images_per_step = accelerator, images_per_step
        self.is_main = accelerator.is_main_process
        self.bar = tqdm(
            total=last_step, initial=first_step, desc="training", unit="step", disable=not self.is_main
        )
        self.path, self.files = path, WrittenFiles(path.parent)
        self.size, self.sha256 = 0, hashlib.sha256()  # of what was written
        self.memory_by_phase = memory_by_phase
        self.file = self._open(first_step) if self.is_main else None
        self.clock_start, self.clock_step = time.monotonic(), first_step
        self.has_failed = False

    def _open(self, first_step: int) -> BinaryIO:
        """The file, opened to append. Of an earlier start it keeps the records up to `first_step`.

        Raises Stop if it cannot be written.
        """
        lines = []
        if first_step > 0 and self.files.is_written(self.path.name):
            lines = reader.read_text(self.path, str(self.path), reader.LARGEST_LOG).split("\n")[:-1]
        lines = [
            line for line in lines if reader.parsed_json_table(line, str(self.path))["step"] <= first_step
        ]
        lines += [json.dumps(self._memory_record(phase, first_step)) for phase in self.memory_by_phase]
        data = "".join(f"{line}\n" for line in lines).encode()
        try:
            self.files.write(self.path.name, data, grows=True)
            file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise Stop(f"{self.path} cannot be written: {error.strerror or error}") from None
        self.size = len(data)
        self.sha256.update(data)
        return file

    def restart_clock(self, step: int) -> None:
        """Leave the time since the last step (validation, a checkpoint) out of images per second."""
        self.clock_start, self.clock_step = time.monotonic(), step

    def steps(self, records: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Record steps, each as (step counted from 1, values by name).

        Images per second are those since the clock was restarted.
        """
        if self.file is None or not records:
            return
        last = records[-1][0]
        seconds = max(time.monotonic() - self.clock_start, 1e-9)
        rate = (last - self.clock_step) * self.images_per_step / seconds
        for step, values in records:
            self._write({"step": step, **values, "images_per_second": round(rate, 3)})
            self.accelerator.log(values, step=step)
        learning_rate = next(value for name, value in values.items() if name.startswith("lr"))
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{learning_rate:.2e}", images_s=f"{rate:.1f}")
        self.bar.update(last - self.bar.n)

    def note_memory(self, phase: str, step: int) -> None:
        """Record the memory of this process at the end of `phase`, after `step` steps."""
        self.memory_by_phase[phase] = memory.reading(self.accelerator.device)
        if self.file is not None:
            self._write(self._memory_record(phase, step))

    def _memory_record(self, phase: str, step: int) -> dict[str, Any]:
        return {"step": step, "memory": {"phase": phase, **self.memory_by_phase[phase]}}

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record. If the disk is full, the record is lost, with a warning; the run goes on."""
        assert self.file is not None
        data = json.dumps(record).encode() + b"\n"
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            self.size += len(data)
            self.sha256.update(data)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(self.size)  # no half line stays
            if not self.has_failed:
                reason = error.strerror or error
                console.warn(f"metrics.jsonl cannot be written: {reason}; the run goes on")
            self.has_failed = True

    def images(self, step: int, name: str, images: list[Image.Image], prompt: str) -> None:
        """Send pictures to the trackers that take them."""
        for tracker in self.accelerator.trackers:
            tracker.images(name, images, prompt, step)

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk: reported by `_write`
                self.file.close()
                self.files.record(self.path.name, self.size, self.sha256.hexdigest())
