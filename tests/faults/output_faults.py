"""Counts of faults in what a run prints to: terminal, log, pipe and tracker."""

import errno
import fcntl
import json
import os
import signal
import sys
import termios
from collections.abc import Callable, Sequence
from typing import Any

import train_dreambooth_lora as train
from dreambooth.io import console
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.training import trackers
from tests.faults import inject
from tests.faults.jobs import World, ended, forked, hashes, is_running, steps_done, wait_for_step

STEPS = 4


def print_to(descriptor: int | None, *, is_protected: bool = True) -> None:
    """This process prints to `descriptor` as if a shell had started it so. None: to closed descriptors."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if descriptor is None:
            os.close(number)
        else:
            os.dup2(descriptor, number)
        stream = None if descriptor is None else os.fdopen(number, "w", buffering=1, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if is_protected:
        console.protect()


def outputs_lost(world: World) -> dict[str, Any]:
    """What is printed goes nowhere: the run ends with status 0 and the bytes of a run whose log was written.

    A lost terminal stops a run with its last step saved, unless the run was started with nohup. The control
    is a run whose streams are not protected: a full log ends it.
    """
    read, closed = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    null = os.open(os.devnull, os.O_WRONLY)
    codes = {
        "log written": _run(world, "written", lambda: print_to(null)),
        "log full": _run(world, "log-full", lambda: print_to(full)),
        "pipe closed": _run(world, "pipe", lambda: print_to(closed)),
        "streams closed": _run(world, "closed", lambda: print_to(None)),
        "tracker full": _run(world, "tracker", _fill_tracker, "--report_to", "tensorboard"),
        "terminal lost": _in_terminal(world, "terminal", signal.SIG_DFL),
        "terminal lost, nohup": _in_terminal(world, "nohup", signal.SIG_IGN),
    }
    names = {"written", "log-full", "pipe", "closed", "tracker", "nohup"}
    same_bytes = {name: hashes(world.folder / name, STEPS) for name in names if codes_of(world, name) == 0}
    control = _run(world, "control", lambda: print_to(full, is_protected=False))
    for descriptor in (closed, full, null):
        os.close(descriptor)
    stopped = world.folder / "terminal"
    done = json.loads((stopped / "status.json").read_text())["step"]
    is_saved = 0 < done < STEPS and (stopped / f"checkpoint-{done}" / "manifest.json").exists()
    right = [
        code == (129 if kind == "terminal lost" else 0) and (kind != "terminal lost" or is_saved)
        for kind, code in codes.items()
    ]
    return {
        "outputs_lost": len(codes),
        "outputs_lost_right": sum(right),
        "outputs_lost_equal": len(same_bytes) == len(names) and len(set(same_bytes.values())) == 1,
        "outputs_lost_control": control != 0,
    }


def codes_of(world: World, name: str) -> int | None:
    """The exit status in status.json."""
    code = json.loads((world.folder / name / "status.json").read_text())["exit_code"]
    return code if isinstance(code, int) else None


def _start(world: World, name: str, output: Callable[[], object], more: Sequence[str], slow: float) -> int:
    words = [*world.words(world.folder / name, steps=STEPS), *more]

    def work() -> None:
        output()
        inject.install({"slow": slow}, train.Training)
        train.main(parse(TrainOptions, "", words))

    return forked(work, world.folder / f"{name}.log")


def _run(world: World, name: str, output: Callable[[], object], *more: str) -> int:
    return ended(_start(world, name, output, more, 0))


def _in_terminal(world: World, name: str, at_hangup: signal.Handlers) -> int:
    """The status of a run whose terminal is closed after a step."""
    main, terminal = os.openpty()

    def output() -> None:
        os.close(main)
        signal.signal(signal.SIGHUP, at_hangup)
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        print_to(terminal)

    child = _start(world, name, output, (), 0.1)
    os.close(terminal)
    wait_for_step(world.folder / name, 2, alive=lambda: is_running(child))
    assert steps_done(world.folder / name) < STEPS
    os.close(main)
    return ended(child)


def _fill_tracker() -> None:
    """TensorBoard's writer finds the disk full after some records."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    real, count = RecordWriter.write, []

    def write(self: Any, data: bytes) -> None:
        count.append(data)
        if len(count) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), trackers.PROJECT)
        real(self, data)

    RecordWriter.write = write


WORKS = (outputs_lost,)
