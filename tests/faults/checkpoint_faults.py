"""Counts of faults under checkpoints: a process killed at each call to the file system, a damaged newest
checkpoint.

`python -m tests.faults.checkpoint_faults` prints the counts as its last line;
tests/files/test_checkpoint_folders.py asserts them. The module imports no torch, so that a child is forked in
a moment. Data that the kernel has taken survives SIGKILL. Only a power cut would show the order of the
flushes, which has a test of its own.
"""

import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dreambooth.files import checkpoint_folders
from dreambooth.io.errors import UserError

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir", "close")
FILES = ("pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json")
Damage = Callable[[Path, random.Random], None]


def publish(output_dir: Path, step: int, *, limit: int | None = None, mark: int = 0) -> Path:
    """Publish a checkpoint whose bytes are a function of step and mark."""
    draw = random.Random(f"{step} {mark}")
    files = {name: draw.randbytes(200 + 100 * number) for number, name in enumerate(FILES)}
    return checkpoint_folders.publish(output_dir, step, files, {"mark": mark}, limit=limit)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds what `publish` writes for its step and one of the marks. The manifest is not
    read."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    for mark in (0, 1):
        draw = random.Random(f"{folder.name.rpartition('-')[2]} {mark}")
        wanted = {name: draw.randbytes(200 + 100 * number) for number, name in enumerate(FILES)}
        manifest = contents.get(checkpoint_folders.MANIFEST)
        if {**wanted, checkpoint_folders.MANIFEST: manifest} == contents:
            return True
    return False


# --- killed


def die_at(moment: int, work: Callable[[], object]) -> bool:
    """Do the work in a child process that is killed before its `moment`-th call to the file system.

    Returns False if the work ended before. Each write has a second moment, when half of it is done.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must end too
        left = itertools.count(moment, -1)

        def counted(name: str, call: Any) -> Any:
            def counting(*arguments: Any, **named: Any) -> Any:
                if next(left) <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == "write" and next(left) <= 0:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)

            return counting

        for name in CALLS:
            setattr(os, name, counted(name, getattr(os, name)))
        code = 3
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # the child must not go on with the parent's work
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child failed with {code} when it was to die at call {moment}")
    return code != 0


def kills(
    folder: Path, prepare: Callable[[Path], object], work: Callable[[Path], object]
) -> Iterator[tuple[int, Path]]:
    """(moment, output folder) for every moment at which the work can be killed. Each moment gets a prepared
    folder."""
    template = folder / "template"
    template.mkdir(parents=True)
    prepare(template)
    for moment in itertools.count():
        output_dir = folder / str(moment)
        shutil.copytree(template, output_dir, symlinks=True)
        if not die_at(moment, lambda output_dir=output_dir: work(output_dir)):  # type: ignore[misc]
            return
        yield moment, output_dir
        shutil.rmtree(output_dir)


def after_a_kill(output_dir: Path, keep: int) -> list[str]:
    """One phrase for each problem after a process has died while saving: of `latest`, of the sweep, of the
    next save."""
    wrong = []
    try:
        found = checkpoint_folders.choose("latest", output_dir)
        if found.folder is None or found.skipped or not is_whole(found.folder):
            wrong.append(f"latest finds {found}")
        for path in output_dir.iterdir():
            if "checkpoint" in path.name and not is_whole(path):
                wrong.append(f"{path.name} is not whole")
        checkpoint_folders.sweep(output_dir)
        after = checkpoint_folders.choose("latest", output_dir)
        if (
            after.folder is None
            or after.folder.name.rpartition("-")[2] != (found.folder or Path()).name.rpartition("-")[2]
        ):
            wrong.append(f"latest finds {after} after the leftovers were swept")
        publish(output_dir, 99, limit=keep)
        names = {path.name for path in output_dir.iterdir()}
        if (
            "checkpoint-99" not in names
            or len(names) != keep
            or any(not name.startswith(("checkpoint-", ".replaced-step-")) for name in names)
        ):
            wrong.append(f"after the next save there are {sorted(names)}")
    except (UserError, OSError) as error:
        wrong.append(f"{type(error).__name__}: {error}")
    return wrong


def kill_everywhere(folder: Path, *, keeps: tuple[int, ...] = (1, 2, 3)) -> dict[str, int]:
    """Kill saving and sweeping at each call to the file system, for each number of checkpoints that are kept.

    A new step is saved, and an existing one with other content. Returns `kill_points` and `violations`. A
    violation is a kill point after which no whole checkpoint existed, `latest` did not find it, or the next
    run could not go on.
    """
    points, violations = 0, 0
    for keep, what in itertools.product(keeps, ("new", "again", "sweep")):

        def prepare(output_dir: Path, keep: int = keep, what: str = what) -> None:
            for older in range(1, keep + 1):
                publish(output_dir, older)
            for leftover in (
                (f".replaced-step-{keep}", ".tmp-step-9-1-0123abcd", ".trash-step-9-1-0123abcd")
                if what == "sweep"
                else ()
            ):
                shutil.copytree(output_dir / f"checkpoint-{keep}", output_dir / leftover)

        def work(output_dir: Path, keep: int = keep, what: str = what) -> None:
            if what == "sweep":
                checkpoint_folders.sweep(output_dir)
            else:
                publish(output_dir, keep + 1 if what == "new" else keep, limit=keep, mark=1)

        for moment, output_dir in kills(folder / f"{keep}-{what}", prepare, work):
            points += 1
            if wrong := after_a_kill(output_dir, keep):
                violations += 1
                print(f"keep {keep}, {what}, call {moment}: {'; '.join(wrong)}")
    return {"kill_points": points, "violations": violations}


# --- damaged


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(1, len(data))])


def _empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def _delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def _extend(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def _zero(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    start = draw.randrange(len(data))
    path.write_bytes(data[:start] + bytes(len(data) - start))


DAMAGES: dict[str, Damage] = {
    "flip": _flip,
    "truncate": _truncate,
    "empty": _empty,
    "delete": _delete,
    "extend": _extend,
    "zero": _zero,
}


def damage_newest(folder: Path, *, count: int = 200, seed: int = 0) -> dict[str, int]:
    """Damage one file of the newest of two checkpoints, `count` times, over all files and kinds of damage.

    Returns `damaged`, `detected` (the damaged file was named), and `damaged_skipped` (`latest` chose the
    older checkpoint and gave the reason).
    """
    detected, skipped = 0, 0
    template = folder / "template"
    template.mkdir(parents=True)
    for step in (1, 2):
        publish(template, step)
    kinds = list(itertools.product(DAMAGES, (*FILES, checkpoint_folders.MANIFEST)))
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        kind, name = kinds[number % len(kinds)]
        output_dir = folder / str(number)
        shutil.copytree(template, output_dir)
        path = output_dir / "checkpoint-2" / name
        before = path.read_bytes()
        DAMAGES[kind](path, draw)
        if path.exists() and path.read_bytes() == before:  # for example zeros written over zeros
            raise RuntimeError(f"{kind} of {name} did nothing")
        problems = checkpoint_folders.verify(path.parent)
        detected += any(name in problem for problem in problems)
        found = checkpoint_folders.choose("latest", output_dir)
        chosen = found.folder == output_dir / "checkpoint-1" and is_whole(output_dir / "checkpoint-1")
        skipped += chosen and found.skipped == [f"checkpoint-2: {'; '.join(problems)}"]
        shutil.rmtree(output_dir)
    return {"damaged": count, "detected": detected, "damaged_skipped": skipped}


def count_all() -> dict[str, int]:
    """All counts of this module."""
    with tempfile.TemporaryDirectory() as folder:
        return {**kill_everywhere(Path(folder) / "killed"), **damage_newest(Path(folder) / "damaged")}


if __name__ == "__main__":
    print(json.dumps(count_all()))
