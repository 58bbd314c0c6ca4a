"""The reader of the text files that a user names: prompts, captions, tables in YAML and in JSON.

Every such file is read by `read`, so that equal bytes give equal text, and equal faults equal messages.
"""

import codecs
import errno
import os
import re
import stat
from pathlib import Path

from dreambooth.errors import UserError, reason_of

LARGEST = 16 * 2**20  # bytes, of a file whose caller sets no smaller limit
_LINE_END = re.compile(r"\r\n|\n|\r")
# A byte-order mark at the start of the file, or of a line where one file was appended to another.
_MARKS = re.compile(r"(?:\A|(?<=[\r\n]))\ufeff+")
# The marks of UTF-32 come first: that of its little-endian form begins with the mark of UTF-16.
_ENCODING_OF = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read(path: Path, where: str, largest: int = LARGEST) -> str:
    """The text of a file, without byte-order marks. Line ends are those of the file.

    The file is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. Messages begin with `where`. Raises
    UserError if it is not a regular file, has more than `largest` bytes, cannot be read, or is not text.
    """
    return decoded(read_bytes(path, where, largest), where)


def read_bytes(path: Path, where: str, largest: int = LARGEST) -> bytes:
    """The content of a regular file of at most `largest` bytes. Raises UserError as `read` does."""
    try:
        # without O_NONBLOCK, opening a pipe would wait until another program writes to it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise UserError(f"{where}: not a regular file")
            data = file.read(largest + 1)
    # ValueError: a NUL in the path
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENXIO:  # a socket
            raise UserError(f"{where}: not a regular file") from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise UserError(f"{where}: {reason}") from None
    if len(data) > largest:
        raise UserError(f"{where}: over {largest:,} bytes, which is too much for such a text file")
    return data


def decoded(data: bytes, where: str) -> str:
    """The text that the bytes of a file encode; see `read`. Raises UserError with the place of the first byte
    that is not text."""
    mark = next((mark for mark in _ENCODING_OF if data.startswith(mark)), None)
    encoding = _ENCODING_OF[mark] if mark else "utf-8"
    name = encoding.upper()
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(data[: error.start].decode(encoding, errors="replace"))) + 1
        values = " ".join(f"{byte:02x}" for byte in data[error.start : error.start + 4])
        raise UserError(
            f"{where}: not {name} text (byte {error.start}, in line {line}: {values}); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = len(_LINE_END.findall(text[: text.index("\0")])) + 1
        raise UserError(f"{where}: not a text file, line {line} has a NUL character; save it as UTF-8")
    return _MARKS.sub("", text)


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end with \n, \r\n or \r.

    `str.splitlines` would also split at form feeds, U+0085, U+2028 and others, which a line may hold.
    """
    parts = _LINE_END.split(text)
    return parts if parts[-1] else parts[:-1]
