"""One run per output folder: what the run is, and how it ended.

`run.json` says what the run is, `status.json` how far it came and why it ended. A run goes on only with the options, the base and the pictures
that its steps so far were trained with; anything else is another run, and is refused with the difference.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dreambooth.adapter_files import native
from dreambooth.errors import UserError
from dreambooth.files import atomic, checkpoint_folders
from dreambooth.options.command_line import as_table, fields_of
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.options.rules import EXIT_USAGE
from dreambooth.options.training import ReportOptions, RunOptions, ValidationOptions
from dreambooth.runtime.environment import environment
from dreambooth.runtime.stops import EXIT_FAILED, Stop

IDENTITY, STATUS, OPTIONS, METRICS = "run.json", "status.json", "run.yaml", "metrics.jsonl"
LIBRARIES = ("torch", "diffusers", "transformers", "peft")  # they make the numbers

# Flags that leave the steps already done as they were, so that they may change between them.
_FREE = {
    *fields_of(ValidationOptions),
    *fields_of(ReportOptions),
    # where things lie: their contents are compared
    *(
        "output_dir",
        "instance_data_dir",
        "class_data_dir",
        "pretrained_model_name_or_path",
        "revision",
        "variant",
        "init_adapter",
    ),
    *(
        "dataset_name",
        "dataset_config_name",
        "cache_dir",
        "image_column",
        "caption_column",
        "pretrained_vae_model_name_or_path",
    ),
    *("output_kohya_format", "repeats", "dry_run"),
    # how class images are made: the pictures are compared
    *(
        "num_class_images",
        "sample_batch_size",
        "prior_generation_precision",
        "class_guidance_scale",
        "class_inference_steps",
    ),
    *("class_scheduler", "class_seed"),
    *(
        "max_train_steps",
        "num_train_epochs",
        "max_train_minutes",
        "checkpointing_steps",
        "checkpoints_total_limit",
    ),
    *(
        "resume_from_checkpoint",
        "overwrite",
        "allow_data_change",
        "dataloader_num_workers",
        "gradient_checkpointing",
    ),
    *(
        "encoded_dir",
        "cache_latents",
        "compile",
        "offload",
    ),  # with varying crops, where they may begin is compared as `crops`
    *("pre_compute_text_embeddings", "peer_timeout", "local_rank"),
    *("max_image_pixels", "allow_odd_photos", "follow_symlinks"),  # which photos are refused
    "gradient_accumulation_steps",  # times the processes, it is compared as `slots`
    *(
        "num_threads",
        "allow_tf32",
        "enable_xformers_memory_efficient_attention",
    ),  # other last bits: noted on resume, see `environment_of`
}
_PRIOR = ("prior_loss_weight", "class_prompt")
# Whose learning rate at a step depends on how many steps there are to be.
_SCHEDULES_WITH_AN_END = ("linear", "cosine", "cosine_with_restarts", "polynomial")


def identity(
    options: ResolvedTrainOptions,
    *,
    slots: int,
    base: str,
    pictures: Mapping[str, Mapping[str, str]],
    captions: Mapping[str, str],
    max_steps: int,
    start: str | None,
    crops: Literal["latents", "pixels"] | None = None,
) -> dict[str, Any]:
    """What a run is, as JSON takes it: flags, slots, fingerprint of the base, hash of every picture by source and name, captions by name, the
    hash of the adapter that it started from, and what random crops are cut from; None if all crops are fixed."""
    flags = {name: value for name, value in as_table(options).items() if name not in _FREE}
    if not options.prior.with_prior_preservation:
        flags = {name: value for name, value in flags.items() if name not in _PRIOR}
    if options.optimization.lr_scheduler in _SCHEDULES_WITH_AN_END:
        flags["max_train_steps"] = max_steps
    if options.text.train_text_encoder and options.text.train_text_encoder_frac < 1:
        flags["text_encoder_steps"] = options.text_steps(max_steps)
    flags["crops"] = crops or "fixed"
    # a round trip, so that what was read from a file compares equal to what was not
    found = {
        "flags": flags,
        "slots": slots,
        "base": base,
        "pictures": pictures,
        "captions": captions,
        "start": start,
    }
    return json.loads(json.dumps(found))


def environment_of(run: RunOptions, device: torch.device, *, is_compiled: bool) -> dict[str, Any]:
    """What changes the last bits of a run on `device`, but not which run it is."""
    return environment(
        device,
        LIBRARIES,
        threads=torch.get_num_threads(),
        tf32=run.allow_tf32,
        xformers=run.enable_xformers_memory_efficient_attention,
        compile=is_compiled,
    )


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(differences of flags, base and slots; differences of pictures), each a phrase that shows both values."""
    flags, other = there["flags"], now["flags"]
    found = [
        f"--{name} was {flags.get(name, 'not given')} and is {other.get(name, 'not given')}"
        for name in sorted({*flags, *other} - {"crops"})
        if flags.get(name) != other.get(name)
    ]
    if there["slots"] != now["slots"]:
        found.append(
            f"--gradient_accumulation_steps times the processes was {there['slots']} and is {now['slots']}"
        )
    if there["base"] != now["base"]:
        found.append(f"the base's weights were {there['base']} and are {now['base']}")
    if there.get("start") != now.get("start"):
        found.append("the adapter of --init_adapter was another one")
    changed = []
    for source in sorted(now["pictures"]):  # class images may not be known yet
        before, after = there["pictures"].get(source, {}), now["pictures"][source]
        for what, names in (
            ("removed", before.keys() - after.keys()),
            ("added", after.keys() - before.keys()),
            ("changed", {name for name in before.keys() & after.keys() if before[name] != after[name]}),
        ):
            if names:
                shown = ", ".join(ascii(name)[1:-1] for name in sorted(names)[:3]) + (
                    ", ..." if len(names) > 3 else ""
                )
                changed.append(f"{len(names)} {source} pictures {what} ({shown})")
    before, after = there.get("captions", {}), now.get("captions", {})
    if other_captions := sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
        shown = ", ".join(ascii(name)[1:-1] for name in other_captions[:3]) + (
            ", ..." if len(other_captions) > 3 else ""
        )
        changed.append(f"{len(other_captions)} captions changed ({shown})")
    # older versions cut pixels, and named nothing; all are fixed while class images that vary are not known yet, or where other pictures are square
    was_cut, now_cut = flags.get("crops", "pixels"), other.get("crops", "pixels")
    if was_cut != now_cut and "fixed" not in (was_cut, now_cut):
        found.append(
            f"random crops were cut from {was_cut} and are cut from {now_cut}: --cache_latents off cuts pixels, any other latents"
        )
    return found, changed


def check_resume(
    checkpoint: checkpoint_folders.Content,
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    around: Mapping[str, Any],
    *,
    allow_data_change: bool,
) -> list[str]:
    """Notes for the user on going on from `checkpoint`, whose state is `state`.

    Raises UserError, with every difference, if it was trained with other options, another base or other pictures.
    """
    folder = checkpoint.folder
    if not _is_identity(checkpoint.identity):
        raise UserError(f"--resume_from_checkpoint: the manifest of {folder} does not say what run it is of")
    found, changed = differences(checkpoint.identity, now)
    more_steps = [phrase for phrase in found if phrase.startswith("--max_train_steps ")]
    found = [phrase for phrase in found if phrase not in more_steps]
    if changed and not allow_data_change:
        found += [*changed, "(--allow_data_change goes on with other pictures)"]
    if found:
        raise UserError(f"--resume_from_checkpoint: {folder} is of another run:\n  " + "\n  ".join(found))
    notes = [
        f"{phrase}: --lr_scheduler depends on it, so a run that had so many steps from the start would be another"
        for phrase in more_steps
    ]
    notes += [f"{phrase}; the run goes on with what is there now" for phrase in changed]
    before = state.get("surroundings", {})
    notes += [
        f"{name} was {before.get(name)} and is {value}: the result may differ in its last bits"
        for name, value in around.items()
        if before.get(name, False if name == "compile" else None)
        != value  # checkpoints from before there was the flag
    ]
    notes += [
        f"{name} was {value} and is gone from this version: the result may differ in its last bits"
        for name, value in before.items()
        if name not in around
    ]
    return notes


def check_new(output_dir: Path, now: Mapping[str, Any], *, overwrite: bool, again: bool) -> None:
    """Raise UserError if a run that starts anew would mix with what is in `output_dir`; with `overwrite` that will go.

    The very same run may start `again` where it left nothing to go on from; its results are not trained over unasked.
    """
    if overwrite:
        return
    there = read_identity(output_dir)
    if there is not None:
        found, changed = differences(there, now)
        if found or changed:
            raise UserError(
                f"--output_dir: {output_dir} holds another run:\n  " + "\n  ".join(found + changed) + "\n"
                "Name another folder, or give --resume_from_checkpoint latest with that run's flags to go on with it, or --overwrite to remove it"
            )
        if not again and (
            checkpoint_folders.list_checkpoints(output_dir) or (output_dir / native.ADAPTER_NAME).exists()
        ):
            raise UserError(
                f"--output_dir: {output_dir} holds this very run; --resume_from_checkpoint latest goes on with it, --overwrite starts anew"
            )
    elif foreign := sorted(path.name for path in output_dir.glob("checkpoint-*")):
        raise UserError(
            f"--output_dir: {output_dir} holds {foreign[0]}, which no run there accounts for; name another folder, or move it away"
        )


def begin(output_dir: Path, now: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make `output_dir` that of the run `now`, which starts from nothing; with `overwrite` what another run wrote is removed first."""
    if overwrite:
        _clear(output_dir)
    atomic.write(output_dir / IDENTITY, (json.dumps(now, indent=1) + "\n").encode())


def read_identity(output_dir: Path) -> dict[str, Any] | None:
    """What run the folder holds; None if none. Raises UserError if its record is damaged."""
    path = output_dir / IDENTITY
    try:
        there = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--output_dir: {path} cannot be read ({error}); --overwrite removes the run that is there"
        ) from None
    if not _is_identity(there):
        raise UserError(f"--output_dir: {path} is damaged; --overwrite removes the run that is there")
    return there


def _is_identity(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), dict) for name in ("flags", "pictures"))
        and {"slots", "base"} <= value.keys()
    )


def _clear(output_dir: Path) -> None:
    for _, folder in checkpoint_folders.list_checkpoints(output_dir):
        shutil.rmtree(folder)
    names = (native.ADAPTER_NAME, native.KOHYA_NAME, IDENTITY, STATUS, OPTIONS, METRICS)
    for path in [
        *(output_dir / name for name in names),
        *output_dir.glob("validation/step-*.png"),
        *output_dir.glob("image_[0-9]*.png"),
    ]:
        path.unlink(missing_ok=True)


@dataclasses.dataclass
class Status:
    """`status.json`: state running, finished, stopped or failed, last completed step, why, and exit status. It is for scripts: torchrun turns
    every exit status but 0 into 1. `step` tells the last completed step."""

    path: Path
    step: Callable[[], int]

    def write(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        host = socket.gethostname()
        record = {
            "state": state,
            "step": self.step(),
            "reason": reason,
            "exit_code": exit_code,
            "pid": os.getpid(),
            "host": host,
        }
        try:
            atomic.write(self.path, (json.dumps(record, indent=1) + "\n").encode())
        except OSError as error:  # a full disk must not take the place of what is being reported
            print(f"warning: {self.path} cannot be written: {error.strerror or error}", file=sys.stderr)


@contextlib.contextmanager
def recorded(output_dir: Path, first_step: int, *, is_main: bool) -> Iterator[Status]:
    """Keep `status.json` while the block runs, and say in it how the block ended."""
    status = Status(output_dir / STATUS, lambda: first_step)
    write = status.write if is_main else lambda *args: None
    write("running")
    try:
        yield status
    except Stop as stop:
        write(stop.state, stop.reason, stop.exit_code)
        raise
    except UserError as error:
        write("failed", str(error), EXIT_USAGE)
        raise
    except BaseException as error:
        write("failed", f"{type(error).__name__}: {error}", EXIT_FAILED)
        raise
    write("finished", "", 0)
