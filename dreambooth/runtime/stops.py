"""How a run ends before its last step: signals, a time limit, a launcher that died, peers that are lost.

A signal only sets a flag; `Watch.check` raises `Stop` where nothing is half done. It is called between the passes of a step, between the
sampling steps of a picture and between the photos of a cache, so that a stop takes one of them at most.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

EXIT_FAILED = 1
EXIT_TIME = 75  # "temporary failure, try again" of sysexits.h: the run goes on when it is started again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stop(BaseException):
    """The run ends here for `reason`. `state` is `stopped` if somebody wanted it, else `failed`.

    Not an Exception: no library between the check and the script may take it for a trouble of its own.
    """

    def __init__(self, reason: str, exit_code: int = EXIT_FAILED, state: str = "failed"):
        super().__init__(reason)
        self.reason, self.exit_code, self.state = reason, exit_code, state


_PARENT = os.getppid()  # read before the seconds of imports, in which a launcher may die


class Watch:
    """Listens for signals from now until `close`. The second signal, a second or more after the first, ends the process at once.

    While `is_immediate`, a signal raises Stop wherever the program is: for the time before training, in which every file is written whole or
    not at all and a check may be minutes away.
    """

    def __init__(self, max_minutes: float | None = None):
        self.is_immediate = False
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.max_minutes = max_minutes
        self.launcher = _PARENT if _has_launcher() else None
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.previous = {number: signal.signal(number, self._receive) for number in _heeded()}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # launchers and batch systems send one request several times over
        if self.received is not None and time.monotonic() - self.received_at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
            if self.is_immediate:
                self.check()

    def pending(self) -> Stop | None:
        """Why the run is to end; None if it is not."""
        if self.received is not None:
            return Stop(f"stopped by {self.received.name}", 128 + self.received, "stopped")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return Stop(f"--max_train_minutes {self.max_minutes:g} are over", EXIT_TIME, "stopped")
        # `accelerate launch` with one process passes no signal on: killed, it would leave this one training for nobody
        if self.launcher is not None and os.getppid() != self.launcher:
            return Stop("the launcher died", EXIT_FAILED, "stopped")
        return None

    def check(self) -> None:
        """Raise Stop if the run is to end."""
        if stop := self.pending():
            raise stop

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _has_launcher() -> bool:
    """True under `accelerate launch` and `torchrun`. A shell is no launcher: a run started with nohup outlives it."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def stoppable(max_minutes: float | None = None, *, advice: str = "") -> Iterator[Watch]:
    """The Watch of a script. A Stop within the block becomes one line on stderr, with `advice`, and SystemExit with its status."""
    watch = Watch(max_minutes)
    watch.is_immediate = True
    try:
        yield watch
    except Stop as stop:
        kind = "error" if stop.state == "failed" else "note"
        print(f"{kind}: {stop.reason}{advice and '; '}{advice}", file=sys.stderr, flush=True)
        raise SystemExit(stop.exit_code) from None
    finally:
        watch.close()


def default_signals() -> None:
    """From now on a signal ends the process at once, without a traceback."""
    for number in _heeded():
        signal.signal(number, signal.SIG_DFL)


def _heeded() -> list[signal.Signals]:
    """The signals, less those that whoever started the process wants ignored: nohup does so with SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def memory_errors_explained() -> Iterator[None]:
    """Turn an error about memory that ran out into a Stop that says what helps."""
    try:
        yield
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch's own, for GPUs, is a RuntimeError; for the CPU it has none
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error)
        ):
            advice = "lower --train_batch_size or --resolution, or add --gradient_checkpointing or --mixed_precision bf16"
            raise Stop(f"out of memory: {advice}") from error
        raise
