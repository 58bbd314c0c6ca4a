"""Files and folders that are written whole or not at all. Imports no torch.

The data lies on the disk before the file or folder gets its name, so a crash leaves the old one or the new
one, and at most a temporary beside it. After a power cut the old one may still have the name;
checkpoint_folders.py, which must know, flushes the name as well.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dreambooth.errors import UserError

_TEMPORARY = re.compile(r"\.(.+?)(?:\.[0-9]+){1,2}\.tmp")


def write(path: Path, data: bytes) -> None:
    """Write the file beside `path`, flush it and rename it. A reader sees the old file or the new one, never
    a part of one."""
    temporary = _temporary(path)
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`; it becomes `target` if the block ends well, and is removed if not.

    Raises OSError if `target` exists and is no empty folder. Files in it must be flushed by the block, see
    `write_new` and `flush`.
    """
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder with these files, by their paths in it. Raises OSError as `new_folder` does."""
    with new_folder(target) as temporary:
        for name, data in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_new(path, data)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, with the mode that the umask leaves of 0666, and flush it."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]  # a call may write less than it is given
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Flush a file's data, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def target_of(name: str) -> str | None:
    """The name of the file or folder for which `name` is a temporary of this module; None if `name` is no
    temporary."""
    match = _TEMPORARY.fullmatch(name)
    return match and match[1]


def _temporary(path: Path) -> Path:
    # the process id alone is not enough where containers share a folder: each of them counts from 1
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.randbelow(10**18)}.tmp")


def make_output_folder(path: Path, flag: str) -> None:
    """Make the folder that `flag` names. Called at the start of a run: a folder that cannot be written to
    must not cost hours of work.

    Raises UserError if it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be made: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {path} cannot be written to")
