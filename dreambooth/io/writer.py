"""Files and folders that are written whole or not at all. Imports no torch.

The data is flushed to the disk before the file or folder gets its name. A crash therefore leaves the old
version or the new one, and at most a temporary file beside it. The rename is not flushed: after a power cut
the old version may be back. checkpoint_folders.py flushes the rename too.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dreambooth.io.errors import UserError, shown

_TEMPORARY = re.compile(r"\.(.+?)(?:\.[0-9]+){1,2}\.tmp")


def write(path: Path, data: bytes, beside: Path | None = None) -> None:
    """Write the file beside `path`, flush it and rename it. A reader sees the old file or the new one, never
    a part of one.

    An older file of that name is replaced, also another program's; ownership.py replaces only this program's.
    `beside` is the path that is written first, a new `temporary` by default.
    """
    beside = beside or temporary(path)
    try:
        write_new(beside, data)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `target`. At the end of the block it is renamed to `target`; if the
    block raises, it is removed.

    The block must flush the files in the folder, see `write_new` and `flush`. Raises OSError if `target`
    exists and is not an empty folder.
    """
    beside = temporary(target)
    try:
        beside.mkdir()
        yield beside
        os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder with `files`, whose keys are paths in it. Raises OSError as `new_folder` does."""
    with new_folder(target) as folder:
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_new(path, data)


def write_new(path: Path, data: bytes) -> None:
    """Write and flush a new file, with mode 0666 less the umask. Raises FileExistsError if it exists."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`. Raises OSError."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]  # a call may write a part only


def flush(path: Path) -> None:
    """Flush a file's data, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def target_of(name: str) -> str | None:
    """The name of the file or folder that the temporary `name` was to become; None if `name` is not that of a
    temporary of this module."""
    match = _TEMPORARY.fullmatch(name)
    return match and match[1]


def temporary(path: Path) -> Path:
    """A new name beside `path`, which `target_of` recognizes."""
    # the process id alone is not enough where containers share a folder: each of them counts from 1
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.randbelow(10**18)}.tmp")


def make_output_folder(path: Path, flag: str) -> None:
    """Make the output folder `path`, the value of `flag`, unless it exists.

    Raises UserError if it cannot be made or written to. Called at the start of a run, so that the error does
    not come after hours of work.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag}: {shown(path)} cannot be made: {reason}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {path} cannot be written to")
