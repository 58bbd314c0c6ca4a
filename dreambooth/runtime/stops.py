"""How a run ends before its last step: by a signal, at the time limit, or because its launcher or another
process died.

A signal only sets a flag. `Watch.check` then raises Stop: it is called between the passes of a step, between
the sampling steps of a picture, and between the photos that are encoded. A stop thus waits for one of these
at most, and leaves nothing half done.
"""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from dreambooth.io import console
from dreambooth.io.errors import is_memory_error, shown
from dreambooth.io.writer import FolderLost, WriteError

EXIT_FAILED = 1
EXIT_TIME = 75  # EX_TEMPFAIL of sysexits.h: the user may start the run again to continue it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stop(BaseException):
    """The run ends, for `reason` and with `exit_code`. `state` is `stopped` if the user or the system stopped
    it, else `failed`. A BaseException, so that no library's `except Exception` swallows it."""

    def __init__(self, reason: str, exit_code: int = EXIT_FAILED, state: str = "failed"):
        super().__init__(reason)
        self.reason, self.exit_code, self.state = reason, exit_code, state


_PARENT = os.getppid()  # read before the slow imports, during which a launcher may die


class Watch:
    """Receives signals from its construction until `close`. A second signal, more than a second after the
    first, ends the process at once.

    While `is_immediate` is true, a signal raises Stop at once, anywhere in the program. It is true before
    training, where the next check may be minutes away. All files are written whole or not at all, so that
    this leaves nothing half done.
    """

    def __init__(self, max_minutes: float | None = None):
        self.is_immediate = False
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.max_minutes = max_minutes
        self.launcher = _PARENT if _has_launcher() else None
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.previous = {number: signal.signal(number, self._receive) for number in _handled_signals()}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # launchers and batch systems send the same request several times within a second
        if self.received is not None and time.monotonic() - self.received_at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
            if self.is_immediate:
                self.check()

    def pending(self) -> Stop | None:
        """The Stop with the reason why the run must end; None if it may go on."""
        if self.received is not None:
            return Stop(f"stopped by {self.received.name}", 128 + self.received, "stopped")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return Stop(f"--max_train_minutes {self.max_minutes:g} are over", EXIT_TIME, "stopped")
        # `accelerate launch` with one process passes no signal on: if it is killed, this process runs on
        if self.launcher is not None and os.getppid() != self.launcher:
            return Stop("the launcher died", EXIT_FAILED, "stopped")
        return None

    def check(self) -> None:
        """Raise Stop if the run must end."""
        if stop := self.pending():
            raise stop

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stoppable(max_minutes: float | None = None, *, advice: str = "") -> Iterator[Watch]:
    """The Watch of a script, with `is_immediate` set. A Stop within the block becomes one line on stderr, its
    reason and `advice`, and SystemExit with its exit code."""
    watch = Watch(max_minutes)
    watch.is_immediate = True
    try:
        with write_errors_explained():
            yield watch
    except Stop as stop:
        kind = "error" if stop.state == "failed" else "note"
        console.error(f"{stop.reason}{advice and '; '}{advice}", f"{kind}: ")
        raise SystemExit(stop.exit_code) from None
    finally:
        watch.close()


def default_signals() -> None:
    """From now on a signal ends the process at once, without a traceback."""
    for number in _handled_signals():
        signal.signal(number, signal.SIG_DFL)


def _has_launcher() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process. A shell is no launcher: a run started
    with nohup outlives it."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _handled_signals() -> list[signal.Signals]:
    """SIGNALS without those that the parent process ignores, as nohup does with SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def write_errors_explained() -> Iterator[None]:
    """Turn a failed write within the block into a Stop that names the file and the reason. Libraries write
    too: their errors are told from others by what only a disk reports."""
    try:
        yield
    except FolderLost as error:
        raise Stop(str(error)) from None
    except OSError as error:
        name = shown(error.filename or "a file")
        if isinstance(error, WriteError | FileExistsError):
            raise Stop(f"{name} cannot be written: {error.strerror}") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise Stop(f"{name}: {error.strerror}") from None
        raise


@contextlib.contextmanager
def memory_errors_explained() -> Iterator[None]:
    """Turn a memory error within the block into a Stop whose reason names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise Stop(
            "out of memory: go on with --resume_from_checkpoint latest and --auto_batch or "
            "--gradient_checkpointing; or start anew with --mixed_precision bf16 or a lower --resolution"
        ) from error
