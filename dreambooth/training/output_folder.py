"""The output folder of a run, before it trains: apart from what is read, locked, with its checkpoint."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from dreambooth.data import class_images, encoding_cache, subject_table
from dreambooth.files import checkpoint_folders, locks
from dreambooth.files.ownership import WrittenFiles, check_apart
from dreambooth.io import writer
from dreambooth.io.errors import UserError, shown
from dreambooth.options.training import RunOptions, TrainOptions
from dreambooth.runtime.processes import Peers
from dreambooth.training import checkpoints, checks, run_folder, trackers


def check_apart_from_input(options: TrainOptions, tracker_names: list[str]) -> Path:
    """The output folder. Raises UserError unless folders that the run writes to lie apart from those that it
    reads, and from folders of class images."""
    prior = options.prior
    classes = prior.class_data_dir if prior.with_prior_preservation else None
    drawn_classes = classes if prior.draws_class_images else None
    output_dir, photo_folder = options.run.output_dir, options.instance.instance_data_dir
    encoded_dir = options.speed.encoded_dir if options.speed.cache_latents in ("auto", "disk") else None
    logs = logs_dir(options, tracker_names)
    inputs = {
        "--instance_data_dir": photo_folder,
        "--class_data_dir": classes,
        "--mask_dir": options.instance.masks.mask_dir,
        "--holdout_data_dir": options.meter.holdout_data_dir,
    }
    rows = subject_table.read(options.instance.subjects) if options.instance.subjects else []
    inputs |= {f"{row.where}: photos": row.photos for row in rows}
    inputs |= {f"{row.where}: masks": row.masks for row in rows}
    sources = {"--dataset_name": options.instance.dataset_name, **options.base.sources()}
    written = {"--output_dir": output_dir, "--class_data_dir": drawn_classes, "--encoded_dir": encoded_dir}
    if logs is not None:
        check_apart({"--logging_dir": str(logs)}, inputs, sources)
        written["--logging_dir"] = str(logs / trackers.PROJECT)
    check_apart(written, inputs | {"--cache_dir": options.instance.cache_dir}, sources)
    # folders that the run makes itself, which must hold nothing else
    for flag in ("--encoded_dir", "--logging_dir"):
        path = Path(os.path.realpath(written.get(flag) or os.devnull))
        for folder in (path, *path.parents):
            if folder.parent == Path(os.path.realpath(output_dir)) and run_folder.is_made(folder.name):
                raise UserError(
                    f"{flag}: {shown(path)} lies in {shown(folder)} of --output_dir; name another"
                )
    class_images.check_outside(Path(output_dir), "--output_dir")
    return Path(output_dir)


@dataclasses.dataclass(frozen=True)
class Claim:
    """The locked output folder, and the checkpoint to resume from."""

    folder: Path
    checkpoint: checkpoint_folders.Content | None
    state: dict[str, Any]
    """State of the checkpoint; {} without one."""
    earlier_seeds: list[int | None]
    """Seeds of the checkpoint, and of the run that the folder holds."""

    @property
    def first_step(self) -> int:
        return self.state.get("step", 0)

    @property
    def continues_folder(self) -> bool:
        """Whether the checkpoint is one of the output folder."""
        return (
            self.checkpoint is not None and self.checkpoint.folder.resolve().parent == self.folder.resolve()
        )


def logs_dir(options: TrainOptions, tracker_names: list[str]) -> Path | None:
    """The folder that trackers write to; None without trackers."""
    return Path(options.run.output_dir) / options.reports.logging_dir if tracker_names else None


def claim(
    run: RunOptions, cache: checks.Cache, peers: Peers, stack: contextlib.ExitStack, logs: Path | None
) -> Claim:
    """Lock the output folder, remove half-written files of dead runs, read the checkpoint to resume from.

    Raises UserError if a folder cannot be written to, another run works in it, or the checkpoint is damaged.
    """
    resume_from, folder = run.resume_from_checkpoint, Path(run.output_dir)
    writer.make_output_folder(folder, "--output_dir")
    if logs is not None:
        writer.make_output_folder(logs / trackers.PROJECT, "--logging_dir")
    if cache.mode == "disk":
        writer.make_output_folder(cache.folder, "--encoded_dir")
        if swept := peers.on_main(lambda: encoding_cache.sweep(cache.folder)):
            names = ", ".join(swept)
            peers.say(
                f"note: removed half-written files of runs that died from {shown(cache.folder)}: {names}"
            )
    peers.say_notes(locks.hold_for(peers, stack, folder, "--output_dir"))
    if swept := peers.on_main(lambda: checkpoint_folders.sweep(folder) + WrittenFiles(folder).sweep()):
        peers.say(f"note: removed half-written files of a run that died: {', '.join(swept)}")
    if resume_from is None:
        return Claim(folder, None, {}, [])
    source = peers.on_main(lambda: find_checkpoint(resume_from, run, peers))
    checkpoint = checkpoint_folders.read(source) if source else None
    state = checkpoints.read_state(checkpoint) if checkpoint else {}
    identity = peers.on_main(lambda: run_folder.read_identity(folder))
    seeds = [state.get("seed"), identity["flags"].get("seed") if identity else None]
    return Claim(folder, checkpoint, state, seeds)


def find_checkpoint(resume_from: str, run: RunOptions, peers: Peers) -> Path | None:
    """The checkpoint folder that --resume_from_checkpoint names. None, with a message, if there is no run.
    Raises UserError if the output folder has the record of a run and no checkpoint, although one was due."""
    choice = checkpoint_folders.choose(resume_from, Path(run.output_dir))
    for reason in choice.skipped:
        peers.say(f"warning: passed over {reason}")
    if choice.folder is None:
        checks.check_no_steps_lost(resume_from, run)
        peers.say(f"Checkpoint '{resume_from}' does not exist. Starting a new training run.")
    return choice.folder
