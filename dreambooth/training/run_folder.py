"""The output folder of a run: which run it holds, its last step, and why it ended.

A folder holds one run. `run.json` identifies the run, `status.json` records its last step and its end, and
`run.yaml` has its flags for --config. A run is resumed only with the flags, base and pictures of its earlier
steps. Otherwise an error lists every difference. files/ownership.py records which files the run wrote: no
other one is replaced or removed.
"""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dreambooth.adapter_files import native
from dreambooth.files import checkpoint_folders
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader, writer
from dreambooth.io.errors import UserError, few, shown
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.options.rules import EXIT_USAGE
from dreambooth.options.training import ReportOptions, RunOptions, ValidationOptions
from dreambooth.runtime.environment import environment
from dreambooth.runtime.stops import EXIT_FAILED, Stop

IDENTITY, STATUS, OPTIONS, METRICS = "run.json", "status.json", "run.yaml", "metrics.jsonl"
VALIDATION = "validation"  # the folder of the run's pictures
CARD = "README.md"
CHECKPOINT = (native.ADAPTER_NAME, "optimizer.safetensors", "state.json")  # the files of one
_FILES = (IDENTITY, STATUS, OPTIONS, METRICS, native.ADAPTER_NAME, native.KOHYA_NAME, CARD)
LIBRARIES = ("torch", "diffusers", "transformers", "peft")  # another version may give other last bits

# Flags that may change when a run is resumed, since they have no effect on the steps already done.
_FREE_FLAGS = {
    *(field.name for field in dataclasses.fields(ValidationOptions)),
    *(field.name for field in dataclasses.fields(ReportOptions)),
    # Paths and hub ids: the contents are compared.
    *("output_dir", "instance_data_dir", "class_data_dir", "pretrained_model_name_or_path", "revision"),
    *("variant", "pretrained_vae_model_name_or_path", "init_adapter", "dataset_name", "dataset_config_name"),
    *("cache_dir", "image_column", "caption_column"),
    # Which photos are refused, and how class images are generated: the pictures are compared.
    *("max_image_pixels", "allow_odd_photos", "follow_symlinks", "num_class_images", "sample_batch_size"),
    *("prior_generation_precision", "class_guidance_scale", "class_inference_steps", "class_scheduler"),
    "class_seed",
    # Length of the run, and which files are written.
    *("max_train_steps", "num_train_epochs", "max_train_minutes", "repeats", "dry_run"),
    *("checkpointing_steps", "checkpoints_total_limit", "output_kohya_format"),
    *("resume_from_checkpoint", "overwrite", "allow_data_change"),
    # Speed and memory. What random crops are cut from is compared as `crops`.
    *("encoded_dir", "cache_latents", "pre_compute_text_embeddings", "dataloader_num_workers", "compile"),
    *("cuda_graph", "offload", "gradient_checkpointing", "peer_timeout", "local_rank"),
    # Compared as `slots`: this flag times the number of processes.
    "gradient_accumulation_steps",
    # Other last bits: noted on resume, see `environment_of`.
    *("num_threads", "allow_tf32", "enable_xformers_memory_efficient_attention"),
}
_PRIOR_FLAGS = ("prior_loss_weight", "class_prompt")
# With these a step's learning rate depends on the number of steps.
_SCHEDULES_WITH_AN_END = ("linear", "cosine", "cosine_with_restarts", "polynomial")


# --- which run


def identity(
    flags: Mapping[str, Any],
    *,
    slots: int,
    base: str,
    pictures: Mapping[str, Mapping[str, str]],
    captions: Mapping[str, str],
    max_steps: int,
    text_steps: int,
    start: str | None,
    crops: Literal["latents", "pixels"] | None = None,
) -> dict[str, Any]:
    """The record by which two runs are compared, as JSON types.

    `flags` are all flags of the run. `slots` is the number of micro-batches a step, `base` the fingerprint of
    the base. `pictures` are SHA-256 hashes by source and file name, `captions` are by file name. `text_steps`
    is the number of steps that train the text encoder. `start` is the hash of the adapter that training
    starts from, None for random values. `crops` is what random crops are cut from, None if all crops are
    fixed.
    """
    compared = {name: value for name, value in flags.items() if name not in _FREE_FLAGS}
    if not flags["with_prior_preservation"]:
        compared = {name: value for name, value in compared.items() if name not in _PRIOR_FLAGS}
    if flags["lr_scheduler"] in _SCHEDULES_WITH_AN_END:
        compared["max_train_steps"] = max_steps
    if flags["train_text_encoder"] and flags["train_text_encoder_frac"] < 1:
        compared["text_encoder_steps"] = text_steps
    compared["crops"] = crops or "fixed"
    record = {
        "flags": compared,
        "slots": slots,
        "base": base,
        "pictures": pictures,
        "captions": captions,
        "start": start,
    }
    # tuples become lists, as in a record that was read from a file
    return reader.parsed_json_table(json.dumps(record), IDENTITY)


def environment_of(run: RunOptions, device: torch.device, *, is_compiled: bool) -> dict[str, Any]:
    """Settings and versions that change the last bits of a run on `device`, but not its identity."""
    return environment(
        device,
        LIBRARIES,
        threads=torch.get_num_threads(),
        tf32=run.allow_tf32,
        xformers=run.enable_xformers_memory_efficient_attention,
        compile=is_compiled,
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """One difference between two runs."""

    subject: str
    """The name of a flag, or slots, base, start, pictures, captions or crops."""
    phrase: str
    """The difference in words, with both values."""

    @property
    def is_of_data(self) -> bool:
        """Whether --allow_data_change allows it."""
        return self.subject in ("pictures", "captions")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Every difference between two records of `identity`."""
    return [
        *_flag_differences(before["flags"], now["flags"]),
        *_input_differences(before, now),
        *_crop_differences(before["flags"], now["flags"]),
        *_picture_differences(before["pictures"], now["pictures"]),
        *_caption_differences(before.get("captions", {}), now.get("captions", {})),
    ]


def _flag_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(name, f"--{name} was {before.get(name, 'not given')} and is {now.get(name, 'not given')}")
        for name in sorted({*before, *now} - {"crops"})
        if before.get(name) != now.get(name)
    ]


def _input_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    if before["slots"] != now["slots"]:
        slots = "--gradient_accumulation_steps times the processes"
        yield Difference("slots", f"{slots} was {before['slots']} and is {now['slots']}")
    if before["base"] != now["base"]:
        yield Difference("base", f"the base's weights were {before['base']} and are {now['base']}")
    if before.get("start") != now.get("start"):
        yield Difference("start", "the adapter of --init_adapter was another one")


def _crop_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    # Older versions cut crops from pixels and recorded nothing. `fixed` is equal to both others: crops may
    # become random when class images are added, or fixed with other pictures.
    was, is_now = before.get("crops", "pixels"), now.get("crops", "pixels")
    if was != is_now and "fixed" not in (was, is_now):
        advice = "--cache_latents off cuts pixels, any other latents"
        yield Difference("crops", f"random crops were cut from {was} and are cut from {is_now}: {advice}")


def _picture_differences(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> Iterator[Difference]:
    for source in sorted(now):  # before class images are generated, `now` lacks them: not compared then
        old, new = before.get(source, {}), now[source]
        for change, names in (
            ("removed", old.keys() - new.keys()),
            ("added", new.keys() - old.keys()),
            ("changed", {name for name in old.keys() & new.keys() if old[name] != new[name]}),
        ):
            if names:
                phrase = f"{len(names)} {source} pictures {change} ({_first_three(names)})"
                yield Difference("pictures", phrase)


def _caption_differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    if names := {name for name in {*before, *now} if before.get(name) != now.get(name)}:
        yield Difference("captions", f"{len(names)} captions changed ({_first_three(names)})")


def _first_three(names: Collection[str]) -> str:
    """The first three names, with escapes spelled out."""
    return ", ".join(ascii(name)[1:-1] for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


# --- whether a run may go on, or begin


def check_resume(
    checkpoint: checkpoint_folders.Content,
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    allow_data_change: bool,
) -> list[str]:
    """Check that the run with the record `now` may resume from `checkpoint`. Returns notes.

    `state` is the checkpoint's state, and `environment` that of this run. Raises UserError, with every
    difference, if the checkpoint is of another run.
    """
    folder = checkpoint.folder
    if not _is_identity(checkpoint.identity):
        raise UserError(f"--resume_from_checkpoint: the manifest of {folder} has no record of its run")
    refused, notes = [], []
    for difference in differences(checkpoint.identity, now):
        if difference.subject == "max_train_steps":
            effect = "--lr_scheduler depends on it, so the result is not that of an unbroken run"
            notes.append(f"{difference.phrase}: {effect}")
        elif difference.is_of_data and allow_data_change:
            notes.append(f"{difference.phrase}; the run goes on with the present ones")
        else:
            refused.append(difference)
    if refused:
        phrases = [difference.phrase for difference in refused]
        if any(difference.is_of_data for difference in refused):
            phrases.append("(--allow_data_change allows other pictures)")
        raise UserError(f"--resume_from_checkpoint: {folder} is of another run:\n  " + "\n  ".join(phrases))
    return notes + _environment_notes(state.get("surroundings", {}), environment)


def _environment_notes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A note for each difference between two environments."""
    effect = "the result may differ in its last bits"
    before = {"compile": False, **before}  # checkpoints older than --compile do not record it
    changes = {name: f"is {value}" for name, value in now.items() if before.get(name) != value}
    changes |= {name: "is not recorded by this version" for name in before if name not in now}
    return [f"{name} was {before.get(name)} and {change}: {effect}" for name, change in changes.items()]


def check_names(output_dir: Path, names: Sequence[str], steps: range) -> None:
    """Check that the run may write the files `names` and checkpoints after `steps` in `output_dir`. Raises
    UserError if one of these names is taken by something that this program did not write."""
    files = WrittenFiles(output_dir)
    if not files.has_record and (output_dir / IDENTITY).exists() and read_identity(output_dir):
        raise UserError(
            f"--output_dir: {output_dir} holds a run without the record of its files (.written.jsonl), which"
            " older versions did not keep: continue it in another --output_dir, with --resume_from_checkpoint"
            f" {output_dir}/checkpoint-N, or name another folder"
        )
    files.check_free(names, "--output_dir")
    folders = [folder for step, folder in checkpoint_folders.list_checkpoints(output_dir) if step in steps]
    if foreign := [folder.name for folder in folders if checkpoint_folders.is_foreign(folder, CHECKPOINT)]:
        raise UserError(
            f"--output_dir: {output_dir} holds {few(foreign)}, to be written now, and this program did not"
            " write all that is in there: move it away or rename it, or name another folder"
        )


def names_to_write(options: ResolvedTrainOptions) -> list[str]:
    """The names of all files but checkpoints that the run writes into its folder."""
    output_dir, validation = Path(options.run.output_dir), options.validation
    names = [IDENTITY, STATUS, OPTIONS, METRICS, native.ADAPTER_NAME]
    names += [native.KOHYA_NAME] if options.adapter.output_kohya_format else []
    names += [CARD] if options.reports.push_to_hub else []
    if validation.validation_prompt is not None:
        names += [
            f"{VALIDATION}/{final_picture(number)}" for number in range(validation.num_validation_images)
        ]
        names += [f"{VALIDATION}/{path.name}" for path in (output_dir / VALIDATION).glob("step-*.png")]
    return names


def replaced(output_dir: Path, names: Sequence[str], *, is_resumed: bool) -> list[str]:
    """Those of `names` that are written over what has the name. A resumed run keeps an edited run.yaml, and
    moves a damaged metrics.jsonl aside."""
    if not is_resumed:
        return list(names)
    kept = {
        OPTIONS: is_edited(output_dir),
        METRICS: WrittenFiles(output_dir).begins_as_written(METRICS),
    }
    return [name for name in names if not kept.get(name, False)]


def final_picture(number: int) -> str:
    """The file name of a picture of the finished adapter, in the folder VALIDATION."""
    return f"image_{number}.png"


def check_new(output_dir: Path, now: Mapping[str, Any], *, overwrite: bool, is_resumed: bool) -> None:
    """Check that the run with the record `now` may start at step 0 in `output_dir`.

    Raises UserError if the folder holds another run, results of this run, or checkpoints without run.json.
    With `is_resumed`, results of this run are allowed. With `overwrite`, everything is.
    """
    if overwrite:
        return
    before = read_identity(output_dir)
    if before is None:
        if names := sorted(path.name for path in output_dir.glob("checkpoint-*")):
            raise UserError(
                f"--output_dir: {output_dir} holds {names[0]} and no {IDENTITY} of its run; "
                "name another folder, or move it away"
            )
    elif phrases := [difference.phrase for difference in differences(before, now)]:
        raise UserError(
            f"--output_dir: {output_dir} holds another run:\n  " + "\n  ".join(phrases) + "\n"
            "Name another folder, or give --resume_from_checkpoint latest with that run's flags to continue "
            "it, or --overwrite to remove it"
        )
    elif not is_resumed and (
        checkpoint_folders.list_checkpoints(output_dir) or (output_dir / native.ADAPTER_NAME).exists()
    ):
        raise UserError(
            f"--output_dir: {output_dir} holds this run already; --resume_from_checkpoint latest continues "
            "it, --overwrite starts it again"
        )


# --- the files


def begin(
    output_dir: Path, identity: Mapping[str, Any], run_yaml: str, *, is_resumed: bool, overwrite: bool
) -> None:
    """Write run.json and run.yaml. A run resumed in its folder keeps its run.json, and an edited run.yaml.

    `overwrite` first removes `removable`. Raises OSError if a file cannot be removed or written, UserError as
    `removable` does, before anything is changed.
    """
    files = WrittenFiles(output_dir)
    if not is_resumed:
        if overwrite:
            removable(output_dir)  # the folder may have changed while class images were made
            files.check_free((IDENTITY, OPTIONS), "--output_dir")
            checkpoint_folders.remove(output_dir)
            for name in _removable_files(files):
                files.remove(name)
        files.write(IDENTITY, (json.dumps(identity, indent=1) + "\n").encode())
    if not (is_resumed and is_edited(output_dir)):
        files.write(OPTIONS, run_yaml.encode())


def is_edited(output_dir: Path) -> bool:
    """Whether the folder's run.yaml was changed since this program wrote it."""
    return bool(WrittenFiles(output_dir).foreign([OPTIONS]))


def removable(output_dir: Path) -> list[str]:
    """The names of what --overwrite removes: files of a run as this program wrote them, whole checkpoints.
    Raises UserError if something else than a file or a folder has such a name, or cannot be removed."""
    checkpoints = [path for _, path in checkpoint_folders.list_checkpoints(output_dir)]
    undamaged = [path.name for path in checkpoints if not checkpoint_folders.verify(path)]
    present = [path for name in _FILES if os.path.lexists(path := output_dir / name)]
    odd = [path for path in present if path.is_symlink() or not (path.is_file() and os.access(path, os.R_OK))]
    odd += [path for path in checkpoints if path.is_symlink() or not path.is_dir()]
    if odd:
        raise UserError(
            f"--overwrite: {shown(output_dir)} holds {few([path.name for path in odd])}, which is no plain"
            " file or folder; nothing was removed: move it away"
        )
    names = [*_removable_files(WrittenFiles(output_dir)), *undamaged]
    paths = {path for name in names for path in ((output_dir / name).parent, output_dir / name)}
    if locked := [path for path in sorted(paths) if path.is_dir() and not os.access(path, os.W_OK | os.X_OK)]:
        raise UserError(
            f"--overwrite: {shown(locked[0])} cannot be emptied, and nothing was removed:"
            f" {writer.why_not_writable(locked[0])}"
        )
    return names


def is_made(name: str) -> bool:
    """Whether a run makes folders of that name in its output folder."""
    return name == VALIDATION or name.startswith("checkpoint-")


def _removable_files(files: WrittenFiles) -> list[str]:
    # not status.json, which this start has replaced; pictures of infer.py are no files of the run
    return [
        name
        for name in files.written()
        if (name in _FILES and name != STATUS) or name.startswith(f"{VALIDATION}/")
    ]


def read_identity(output_dir: Path) -> dict[str, Any] | None:
    """The record of the run in the folder; None if there is none. Raises UserError if it is damaged."""
    path = output_dir / IDENTITY
    if not os.path.lexists(path):
        return None
    advice = "move it away, or name another folder"
    try:
        record = reader.read_json_table(path, f"--output_dir: {shown(path)}", reader.LARGEST_RECORD)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    if not _is_identity(record):
        raise UserError(f"--output_dir: {shown(path)} is damaged; {advice}")
    return record


def _is_identity(record: Mapping[str, Any]) -> bool:
    pictures = record.get("pictures")
    tables = [record.get("flags"), record.get("captions", {}), pictures]
    if isinstance(pictures, dict):
        tables += pictures.values()
    return all(isinstance(table, dict) for table in tables) and {"slots", "base"} <= record.keys()


@dataclasses.dataclass
class Status:
    """`status.json`: state (running, finished, stopped or failed), last completed step, reason, exit status,
    and whether steps were replayed from CUDA graphs or else why not. Scripts can read the exit status there:
    torchrun turns every status other than 0 into 1."""

    files: WrittenFiles
    step: int
    cuda_graph: str = "no step yet"

    def write(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        record = {
            "state": state,
            "step": self.step,
            "reason": console.without_tokens(reason),
            "exit_code": exit_code,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "cuda_graph": self.cuda_graph,
        }
        try:
            self.files.write(STATUS, (json.dumps(record, indent=1) + "\n").encode())
        except OSError as error:  # a full disk must not hide the error that is being recorded
            path = self.files.folder / STATUS
            console.warn(f"{path} cannot be written: {error.strerror or error}")


@contextlib.contextmanager
def recorded(output_dir: Path, first_step: int, *, is_main: bool) -> Iterator[Status]:
    """Write `status.json` at the begin and at the end of the block, on the main process only. Yields the
    record; set its `step` before the block ends."""
    status = Status(WrittenFiles(output_dir), first_step)
    write = status.write if is_main else lambda *args: None
    write("running")
    try:
        yield status
    except Stop as stop:
        write(stop.state, stop.reason, stop.exit_code)
        raise
    except UserError as error:
        if status.step > first_step:  # a file of this run, lost since it was written, is no mistake in a flag
            write("failed", str(error), EXIT_FAILED)
            raise Stop(str(error)) from None
        write("failed", str(error), EXIT_USAGE)
        raise
    except BaseException as error:
        write("failed", f"{type(error).__name__}: {error}", EXIT_FAILED)
        raise
    write("finished", "", 0)
