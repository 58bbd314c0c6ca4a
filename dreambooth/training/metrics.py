"""Records of a run's progress: metrics.jsonl, the trackers, and the progress bar."""

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader, writer
from dreambooth.io.errors import UserError, shown
from dreambooth.runtime import memory
from dreambooth.training.meter import BANDS

_EVALUATIONS = ("meter", "judge", "best")  # keys of the records of an evaluation


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
        phases: dict[str, memory.Reading],
    ):
        """`path` is the path of metrics.jsonl. `phases` holds the readings of time and memory at the end of
        each phase before the first step. Later readings are added to it."""
        self.accelerator, self.images_per_step = accelerator, images_per_step
        self.is_main = accelerator.is_main_process
        self.path, self.files = path, WrittenFiles(path.parent)
        self.size, self.sha256 = 0, hashlib.sha256()  # of what was written
        self.phases = phases
        self.evaluations: list[dict[str, Any]] = []
        """The records of evaluations, in the order of metrics.jsonl, those of earlier starts included. Empty
        on all processes but the main one."""
        if self.is_main:
            self._begin(first_step)
        self.bar = tqdm(
            total=last_step, initial=first_step, desc="training", unit="step", disable=not self.is_main
        )
        self.clock_start, self.clock_step = time.monotonic(), first_step
        self.has_failed = False

    def _begin(self, first_step: int) -> None:
        """Write the file new. Of an earlier start it keeps the records up to `first_step`. A file that holds
        anything else is moved aside. Raises OSError if it cannot be written."""
        lines = []
        if first_step > 0 and self.files.begins_as_written(self.path.name):
            data = reader.read_bytes(self.path, str(self.path), reader.LARGEST_LOG)
            *complete, _ = data.split(b"\n")  # after the last line end: nothing, or half a record
            records = [record_of(line) for line in complete]
            kept = [
                (line, record)
                for line, record in zip(complete, records, strict=True)
                if record is not None and record["step"] <= first_step
            ]
            if None in records or not self.files.is_written(self.path.name):
                aside = self.files.set_aside(self.path.name)
                note = (
                    f"{shown(self.path)} was damaged or edited: its {len(kept)} records up to step"
                    f" {first_step} are kept; the file itself is now {shown(aside.name)}"
                )
                console.notes([note])
            lines = [line for line, _ in kept]
            self.evaluations += [record for _, record in kept if not record.keys().isdisjoint(_EVALUATIONS)]
        lines += [json.dumps(self._phase_record(phase, first_step)).encode() for phase in self.phases]
        data = b"".join(line + b"\n" for line in lines)
        self.files.write(self.path.name, data, grows=True)
        self.size = len(data)
        self.sha256.update(data)

    def restart_clock(self, step: int) -> None:
        """Leave the time since the last step (validation, a checkpoint) out of images per second."""
        self.clock_start, self.clock_step = time.monotonic(), step

    def steps(self, records: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Record steps, each as (step counted from 1, values by name). Images per second are those since the
        clock was restarted."""
        if not self.is_main or not records:
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

    def event(self, record: dict[str, Any]) -> None:
        """Record what happened in a step."""
        if self.is_main:
            self._write(record)

    def end_phase(self, phase: str, step: int) -> None:
        """Record time and memory of this process at the end of `phase`, after `step` steps."""
        self.phases[phase] = memory.reading(self.accelerator.device)
        if self.is_main:
            self._write(self._phase_record(phase, step))

    def _phase_record(self, phase: str, step: int) -> dict[str, Any]:
        return {"step": step, "memory": {"phase": phase, **self.phases[phase]}}

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record. If the disk is full, the record is lost, with a warning; the run goes on."""
        data = json.dumps(record).encode() + b"\n"
        try:
            writer.append(self.path, data, flushed=False)
            self.size += len(data)
            self.sha256.update(data)
        except OSError as error:
            if not self.has_failed:
                reason = error.strerror or error
                console.warn(f"metrics.jsonl cannot be written: {reason}; the run goes on")
            self.has_failed = True

    def is_evaluated(self, step: int, kind: str) -> bool:
        """Whether there is a record of `kind` (meter, judge, best) after `step` steps: a run that is resumed
        at `step` may have it from an earlier start. Always false on all processes but the main one."""
        return any(record["step"] == step and kind in record for record in self.evaluations)

    def evaluation(self, step: int, kind: str, values: dict[str, Any], **more: Any) -> None:
        """Record the result of an evaluation after `step` steps. `kind` is meter, judge or best."""
        if self.is_main:
            self.evaluations.append({"step": step, kind: values, **more})
            self._write(self.evaluations[-1])

    def images(self, step: int, name: str, images: list[Image.Image], prompt: str) -> None:
        """Send pictures to the trackers that take them."""
        for tracker in self.accelerator.trackers:
            tracker.images(name, images, prompt, step)

    def close(self) -> None:
        self.bar.close()
        if self.is_main:
            with contextlib.suppress(OSError):  # a full disk: reported by `_write`
                self.files.record(self.path.name, self.size, self.sha256.hexdigest())


# --- what a record may hold


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl; None if the line is no record, or one that no run writes."""
    try:
        record = reader.parsed_json_table(line, "")
    except UserError:
        return None
    step = record.get("step")
    is_valid = type(step) is int and step >= 0
    is_valid = is_valid and all(check(record[name]) for name, check in _CHECKS.items() if name in record)
    return record if is_valid else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_meter(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_measure, value.values()))


def _is_measure(value: Any) -> bool:
    """Seconds, or a measure with its mean and its bands."""
    if not isinstance(value, dict):
        return _is_number(value)
    lists = {name: value.get(name) for name in ("bands", "noise_bands")}
    scalars = {name: value.get(name) for name in ("mean", "noise")}
    return _are_numbers(scalars) and all(
        isinstance(bands, list) and len(bands) == BANDS and all(map(_is_number, bands))
        for bands in lists.values()
    )


def _is_reading(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("phase"), str)
        and _are_numbers({name: number for name, number in value.items() if name != "phase"})
    )


def _is_choice(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and (value.get("step") is None or type(value["step"]) is int)
        and isinstance(value.get("why"), str)
    )


_CHECKS = {
    "loss": _is_number,
    "images_per_second": _is_number,
    "memory": _is_reading,
    "meter": _is_meter,
    "judge": _are_numbers,
    "best": _is_choice,
}
