"""The output folder of a run: its files, its last step, and why it ended.

A folder holds one run. `run.json` identifies the run (run_identity.py), `status.json` records its last step
and its end, and `run.yaml` has its flags for --config. files/ownership.py records which files the run wrote:
no other one is replaced or removed.
"""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.adapter_files import native
from dreambooth.files import checkpoint_folders
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader, writer
from dreambooth.io.errors import UserError, few, shown
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.options.rules import EXIT_USAGE
from dreambooth.runtime.stops import EXIT_FAILED, Stop
from dreambooth.training import run_identity

IDENTITY, STATUS, OPTIONS, METRICS = "run.json", "status.json", "run.yaml", "metrics.jsonl"
VALIDATION = "validation"  # the folder of the run's pictures
SWEEP = (0.5, 0.75, 1.25)  # weights of the finished adapter in pictures at the end, beside 1
BEST, BEST_WHY = "best", "why.json"  # the folder of the best checkpoint, and the file that says why it is
CARD = "README.md"
REPORT = "report.html"
CHECKPOINT = (native.ADAPTER_NAME, "optimizer.safetensors", "state.json")  # the files of one
_FILES = (IDENTITY, STATUS, OPTIONS, METRICS, native.ADAPTER_NAME, native.KOHYA_NAME, CARD, REPORT)

# --- whether a run may begin


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


def names_to_write(options: ResolvedTrainOptions, validation_prompts: int) -> list[str]:
    """The names of all files but checkpoints that the run writes into its folder. `validation_prompts` is
    the number of prompts of its validation pictures."""
    output_dir, validation = Path(options.run.output_dir), options.validation
    names = [IDENTITY, STATUS, OPTIONS, METRICS, REPORT, native.ADAPTER_NAME]
    names += [native.KOHYA_NAME] if options.adapter.output_kohya_format else []
    names += [CARD] if options.reports.push_to_hub else []
    names += [
        final_picture(prompt, number, validation_prompts)
        for prompt in range(validation_prompts)
        for number in range(validation.num_validation_images)
    ]
    if validation_prompts:
        drawn = (output_dir / VALIDATION).glob("step-*.png")
        names += [f"{VALIDATION}/{path.name}" for path in drawn]
        names += [swept_picture(weight) for weight in (0.0, *SWEEP)]
    if options.meter.meter_steps:
        candidates = (output_dir / BEST).glob("candidate-*")
        names += [f"{BEST}/{name}" for name in (native.ADAPTER_NAME, BEST_WHY)]
        names += [f"{BEST}/{path.name}" for path in candidates]
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


def step_picture(step: int, prompt: int, number: int, prompts: int) -> str:
    """The name of a picture drawn after `step` steps: of prompt number `prompt`, of `prompts`."""
    number_of_prompt = f"{prompt:02d}-" if prompts > 1 else ""
    return f"{VALIDATION}/step-{step:06d}-{number_of_prompt}{number:02d}.png"


def final_picture(prompt: int, number: int, prompts: int) -> str:
    """The name of a picture of the finished adapter: of prompt number `prompt`, of `prompts`."""
    number_of_prompt = f"{prompt:02d}_" if prompts > 1 else ""
    return f"{VALIDATION}/image_{number_of_prompt}{number}.png"


def swept_picture(weight: float) -> str:
    """The name of a picture of the first prompt, drawn with the finished adapter at `weight`."""
    return f"{VALIDATION}/weight-{weight:.2f}.png"


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
    elif phrases := [difference.phrase for difference in run_identity.differences(before, now)]:
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


def is_finished(output_dir: Path, max_steps: int) -> bool:
    """Whether the run in the folder has taken `max_steps` steps, or has ended earlier by its own rule, and
    its adapter is as it was written. Raises UserError if status.json is damaged."""
    if not WrittenFiles(output_dir).is_written(native.ADAPTER_NAME):
        return False
    status = reader.read_json_table(output_dir / STATUS, shown(output_dir / STATUS))
    step = status.get("step")
    has_ended = bool(status.get("reason")) or (isinstance(step, int) and step >= max_steps)
    return status.get("state") == "finished" and has_ended


def is_made(name: str) -> bool:
    """Whether a run makes folders of that name in its output folder."""
    return name in (VALIDATION, BEST) or name.startswith("checkpoint-")


def _removable_files(files: WrittenFiles) -> list[str]:
    # not status.json, which this start has replaced; pictures of infer.py are no files of the run
    return [
        name
        for name in files.written()
        if (name in _FILES and name != STATUS) or name.startswith((f"{VALIDATION}/", f"{BEST}/"))
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
    if not run_identity.is_identity(record):
        raise UserError(f"--output_dir: {shown(path)} is damaged; {advice}")
    return record


@dataclasses.dataclass
class Status:
    """`status.json`: state (running, finished, stopped or failed), last completed step, reason, exit status,
    and whether steps were replayed from CUDA graphs or else why not. Scripts can read the exit status there:
    torchrun turns every status other than 0 into 1."""

    files: WrittenFiles
    step: int
    cuda_graph: str = "no step yet"
    at_end: Callable[[], None] = lambda: None
    """Called once the end of the run is recorded."""
    early_end: str = ""
    """Why a finished run ended before its last step."""
    passes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """With --auto_batch, the rows that a pass takes, and whether gradients are checkpointed."""

    def write(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        record = {
            "state": state,
            "step": self.step,
            "reason": console.without_tokens(reason),
            "exit_code": exit_code,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "cuda_graph": self.cuda_graph,
            **({"passes": self.passes} if self.passes else {}),
        }
        try:
            self.files.write(STATUS, (json.dumps(record, indent=1) + "\n").encode())
        except OSError as error:  # a full disk must not hide the error that is being recorded
            path = self.files.folder / STATUS
            console.warn(f"{path} cannot be written: {error.strerror or error}")
        if state != "running":
            self.at_end()


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
    write("finished", status.early_end, 0)
