"""--estimate: what a run will take, from three of its steps, one validation and one checkpoint.

The steps are those of a real run, in a temporary folder that is removed. They are taken at the largest
resolution, with the text encoder trained if it is trained in any step, and with class images drawn anew, a
few. Nothing is written elsewhere.
"""

import contextlib
import dataclasses
import io
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreambooth.data import class_images
from dreambooth.io import console, reader
from dreambooth.io.errors import UserError
from dreambooth.options.reports import ReportOptions
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import memory, stops
from dreambooth.training import metrics, prepare, run_folder

_STEPS = 3
_NEVER = 10**9  # steps between two validations
_UNITS = ((3600, "h"), (60, "min"), (1, "s"))


def estimate(options: TrainOptions, train_one: Callable[[TrainOptions], None]) -> None:
    """Print what a run with these options will take. `train_one` trains a run. Raises UserError for a mistake
    in the options or the input, and on several processes."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"--estimate measures one process, and the launcher started {processes}: start it with python. "
            f"{processes} processes take {processes} times the rows of a step in about the time of one"
        )
    with stops.stoppable() as watch:
        plan = prepare.plan(options, watch)
    before = memory.reading(plan.device)["seconds"]
    with tempfile.TemporaryDirectory(prefix="dreambooth-") as name:
        folder = Path(name)
        # what the run prints names files that are gone in a moment
        with contextlib.redirect_stdout(io.StringIO()), memory.clock_restarted():
            train_one(_trial(options, plan, folder))
        trial = _Trial.read(folder)
    console.say("\n".join(_lines(plan, trial, before)))


def _trial(options: TrainOptions, plan: prepare.Plan, folder: Path) -> TrainOptions:
    """The options of the run that is measured."""
    instance, prior, speed = options.instance, options.prior, options.speed
    if instance.sides:
        instance = dataclasses.replace(instance, resolution=max(instance.sides))
    if plan.class_images is not None:
        few = min(prior.generation.num_class_images, prior.generation.sample_batch_size)
        generation = dataclasses.replace(prior.generation, num_class_images=few)
        prior = dataclasses.replace(prior, class_data_dir=str(folder / "class"), generation=generation)
    if speed.encoded_dir is not None:
        speed = dataclasses.replace(speed, encoded_dir=str(folder / "run" / "encoded"))
    run = dataclasses.replace(
        options.run,
        output_dir=str(folder / "run"),
        max_train_steps=_STEPS,
        checkpointing_steps=_STEPS,
        resume_from_checkpoint=None,
        overwrite=False,
        estimate=False,
    )
    is_measured = options.meter.meter_steps > 0
    meter = dataclasses.replace(options.meter, meter_steps=_NEVER) if is_measured else options.meter
    return dataclasses.replace(
        options,
        instance=instance,
        prior=prior,
        speed=speed,
        run=run,
        meter=meter,
        text=dataclasses.replace(options.text, train_text_encoder_frac=1.0),
        validation=dataclasses.replace(
            options.validation, validation_steps=_NEVER, skip_final_inference=True
        ),
        reports=ReportOptions(report_to="none"),
    )


@dataclasses.dataclass(frozen=True)
class _Trial:
    """What the measured run has taken."""

    phases: Mapping[str, Mapping[str, Any]]
    """The readings at the end of each phase, by its name."""
    seconds_of_step: float
    seconds_of_meter: float
    """Of one measurement; 0 without --meter_steps."""
    bytes_of: Mapping[str, int]
    """Sizes of the checkpoint, the pictures of one validation, the adapter, and what is encoded."""
    pictures: int
    """Photos and class images, of which encodings are kept."""
    class_images: int
    passes: Mapping[str, Any]
    """The entry of that name in status.json."""

    @classmethod
    def read(cls, folder: Path) -> "_Trial":
        """Reads the files of the run that is in `folder`."""
        run = folder / "run"
        lines = reader.read_bytes(run / run_folder.METRICS, run_folder.METRICS).splitlines()
        records = [record for line in lines if (record := metrics.record_of(line)) is not None]
        phases = {r["memory"]["phase"]: r["memory"] for r in records if "memory" in r}
        # after the first step, which is slower
        rates = [r["images_per_second"] for r in records if "loss" in r and r["step"] > 1]
        identity = reader.read_json_table(run / run_folder.IDENTITY, run_folder.IDENTITY)
        status = reader.read_json_table(run / run_folder.STATUS, run_folder.STATUS)
        counts = {source: len(names) for source, names in identity["pictures"].items() if source != "mask"}
        batch = identity["slots"] * identity["flags"]["train_batch_size"]
        rows = batch * (2 if identity["flags"]["with_prior_preservation"] else 1)
        meters = [r["meter"]["seconds"] for r in records if "meter" in r]
        return cls(
            phases=phases,
            seconds_of_step=rows * len(rates) / sum(rates),
            seconds_of_meter=sum(meters) / len(meters) if meters else 0.0,
            bytes_of={
                name: _size(run / part)
                for name, part in (
                    ("checkpoint", f"checkpoint-{_STEPS}"),
                    ("pictures", run_folder.VALIDATION),
                    ("encoded", "encoded"),
                )
            },
            pictures=max(1, sum(counts.values())),
            class_images=counts.get("class", 0),
            passes=status.get("passes", {}),
        )

    def between(self, start: str, end: str) -> float:
        """Seconds from the end of phase `start` to the end of phase `end`; 0 if there is none."""
        if not {start, end} <= self.phases.keys():
            return 0.0
        return max(0.0, self.phases[end]["seconds"] - self.phases[start]["seconds"])


def _size(path: Path) -> int:
    """Bytes of a folder's files; 0 if it does not exist."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _lines(plan: prepare.Plan, trial: _Trial, before: float) -> list[str]:
    """The table that is printed. `before` are the seconds until the run was started."""
    run, steps = plan.options.run, plan.max_steps
    parts = [(name, count, each) for name, count, each in _times(plan, trial, before) if count]
    lines = [f"estimate, from {_STEPS} steps in a temporary folder:"]
    lines += [f"  {name}: {count} x {each:.3g} s = {_duration(count * each)}" for name, count, each in parts]
    lines.append(f"  total: about {_duration(sum(count * each for _, count, each in parts))}")
    lines.append(f"  {memory.summary(trial.phases)}")  # type: ignore[arg-type]
    if trial.passes:
        checkpointing = ", with gradient checkpointing" if trial.passes["gradient_checkpointing"] else ""
        lines.append(f"  passes: {trial.passes['rows']} rows each{checkpointing}")
    disk = _disk(plan, trial)
    shares = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in disk.items() if size)
    lines.append(f"  disk: about {sum(disk.values()) / 2**20:.1f} MiB ({shares})")
    rows = run.train_batch_size * run.gradient_accumulation_steps
    visits = f"{steps} steps x {rows} rows, {plan.photos} photos"
    lines.append(f"  exposures per photo: {steps * rows / plan.photos:.1f} ({visits})")
    return lines


def _times(plan: prepare.Plan, trial: _Trial, before: float) -> list[tuple[str, int, float]]:
    """The parts of the run: (name, how often, seconds each)."""
    options, steps = plan.options, plan.max_steps
    meters = 1 + math.ceil(steps / options.meter.meter_steps) if options.meter.meter_steps else 0
    missing = 0
    if plan.class_images is not None:
        total, folder = options.prior.generation.num_class_images, str(options.prior.class_data_dir)
        missing = len(class_images.missing_numbers(Path(folder), plan.class_images, total))
    of_class_images = trial.between("checks", "class images")
    of_validation = trial.between("adapters injected", "first evaluation") - trial.seconds_of_meter
    # the last step is followed by a checkpoint and by a measurement
    of_steps = (_STEPS - 1) * trial.seconds_of_step + trial.seconds_of_meter
    of_checkpoint = max(0.0, trial.between("first step", "training") - of_steps)
    return [
        ("start", 1, before + trial.phases["adapters injected"]["seconds"] - of_class_images),
        ("class images", missing, of_class_images / max(1, trial.class_images)),
        ("steps", steps, trial.seconds_of_step),
        ("validation pictures", _pictures(plan), max(0.0, of_validation) / max(1, _drawn(plan))),
        ("measurements", meters, trial.seconds_of_meter),
        ("checkpoints", steps // options.run.checkpointing_steps, of_checkpoint),
    ]


def _disk(plan: prepare.Plan, trial: _Trial) -> dict[str, float]:
    """Bytes that the run writes, by what they are."""
    run, sides = plan.options.run, max(1, len(plan.options.instance.sides))
    saves = plan.max_steps // run.checkpointing_steps
    kept = min(saves, run.checkpoints_total_limit or saves)
    encoded = plan.photos * sides + plan.class_count
    return {
        f"{kept} checkpoints": kept * trial.bytes_of["checkpoint"],
        "validation pictures": _pictures(plan) * trial.bytes_of["pictures"] / max(1, _drawn(plan)),
        "encoded photos": encoded * trial.bytes_of["encoded"] / trial.pictures,
    }


def _drawn(plan: prepare.Plan) -> int:
    """The number of pictures of one validation."""
    return plan.prompts * plan.options.validation.num_validation_images


def _pictures(plan: prepare.Plan) -> int:
    """The number of validation pictures of the run, with those of the finished adapter."""
    options, steps = plan.options.validation, plan.max_steps
    if not plan.prompts:
        return 0
    if options.validation_steps:
        validations = math.ceil(steps / options.validation_steps)
    else:  # before the first step, after the first pass, and then after every --validation_epochs passes
        validations = 1 + math.ceil((steps - 1) // plan.steps_of_pass / options.validation_epochs)
    of_finished = 0 if options.skip_final_inference else _drawn(plan) + len(run_folder.SWEEP)
    return validations * _drawn(plan) + of_finished


def _duration(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= 2 * size), _UNITS[-1])
    return f"{seconds / size:.1f} {unit}"
