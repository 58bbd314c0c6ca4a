"""What the user is told while a script runs. No other module prints. Imports no torch.

A message that cannot be printed is lost, and nothing else: the terminal may be gone, the log's disk full, the
reader of a pipe away.
"""

import io
import os
import sys
from collections.abc import Iterable

from dreambooth.io.errors import printable


class _Lossy(io.FileIO):
    """A descriptor whose writes do not fail: bytes that it does not take are dropped."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        try:
            return super().write(data) or len(data)  # None: a pipe that does not block, and is full
        except OSError:
            return len(data)


def protect() -> None:
    """Make standard output and standard error lose what cannot be written. Call this first.

    Closed descriptors of the three standard streams become /dev/null: otherwise the next file that is opened
    gets the number, and with it whatever a library writes to standard error.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name, descriptor in {"stdout": 1, "stderr": 2}.items():
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody captures it
        if stream is not None:
            stream.flush()
        raw = _Lossy(descriptor, "w", closefd=False)
        is_terminal = raw.isatty()
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding if stream else None,
                errors="backslashreplace",  # a name may have characters that the terminal's encoding lacks
                line_buffering=is_terminal or name == "stderr",
                write_through=stream.write_through if stream else False,
            ),
        )


def say(text: str) -> None:
    """Print a line on standard output, above the progress bar if there is one."""
    from tqdm import tqdm  # not needed by --help

    tqdm.write(printable(text))


def notes(texts: Iterable[str]) -> None:
    """Print each text as a note."""
    for text in texts:
        say(f"note: {text}")


def warn(text: str) -> None:
    """Print a warning."""
    say(f"warning: {text}")


def error(text: str) -> None:
    """Print, on standard error, why the script ends."""
    print(f"error: {printable(text)}", file=sys.stderr, flush=True)
