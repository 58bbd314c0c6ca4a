"""What the user is told while a script runs. No other module prints. Imports no torch.

A message that cannot be printed is lost, and nothing else: the terminal may be gone, the log's disk full, the
reader of a pipe away. No message shows a token of the hub.
"""

import contextlib
import io
import os
import re
import select
import sys
from collections.abc import Iterable
from urllib.parse import quote

from dreambooth.io.errors import printable

_PATIENCE = 1.0  # seconds in which a full pipe that does not block must get room
# At least 8 letters and digits; lower-case letters alone may be the name of a folder, unless they are many.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_(?=[a-z]*[A-Z0-9]|[a-z]{16})[A-Za-z0-9]{8,}")
_SOURCES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_secrets: set[str] = set()


# --- tokens of the hub


def hide(secret: str | None) -> None:
    """From now on no message shows `secret`."""
    if secret:
        _secrets.update((secret, quote(secret, safe="", errors="replace")))


def without_tokens(text: str) -> str:
    """The text with `<token>` in place of hidden secrets, and of what has the form of a token."""
    for secret in _secrets:
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "<token>", text, flags=re.IGNORECASE)
    return _TOKEN.sub("<token>", text)


# --- streams


class _Lossy(io.FileIO):
    """A descriptor whose writes do not fail: bytes that it does not take are dropped."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        with contextlib.suppress(OSError):
            written = super().write(data)
            if written is None and select.select([], [self], [], _PATIENCE)[1]:
                written = super().write(data)
            return written or len(data)
        return len(data)


class _Stream(io.TextIOWrapper):
    """Text without tokens, also where a library prints it, or Python a traceback."""

    def write(self, text: str) -> int:
        super().write(without_tokens(text))
        return len(text)


def protect() -> None:
    """Make standard output and standard error lose what cannot be written. Call this first.

    Closed descriptors of the three standard streams become /dev/null: otherwise the next file that is opened
    gets the number, and with it whatever a library writes to standard error.
    """
    for name in _SOURCES:
        hide(os.environ.get(name))
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # gets the lowest free number, which is this one; child processes have it too
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, descriptor in {"stdout": 1, "stderr": 2}.items():
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody captures it
        if stream is not None:
            stream.flush()
        buffer = io.BufferedWriter(_Lossy(descriptor, "w", closefd=False))
        # a name may have characters that the terminal's encoding lacks
        encoding, escapes = stream.encoding if stream else None, "backslashreplace"
        setattr(sys, name, _Stream(buffer, encoding, escapes, line_buffering=True))


# --- messages


def say(text: str) -> None:
    """Print a line on standard output, above the progress bar if there is one."""
    progress_bars = sys.modules.get("tqdm")  # not imported for --help
    write = progress_bars.tqdm.write if progress_bars else print
    write(without_tokens(printable(text)))


def notes(texts: Iterable[str]) -> None:
    """Print each text as a note."""
    for text in texts:
        say(f"note: {text}")


def warn(text: str) -> None:
    """Print a warning."""
    say(f"warning: {text}")


def error(text: str, kind: str = "error: ") -> None:
    """Print, on standard error, why the script ends."""
    print(f"{kind}{without_tokens(printable(text))}", file=sys.stderr)
