"""The writer of files and folders, which are written whole or not at all. Imports no torch.

The data is flushed to the disk before the file or folder gets its name. A crash therefore leaves the old
version or the new one, and at most a temporary file beside it. The rename is not flushed: after a power cut
the old version may be back. checkpoint_folders.py flushes the rename too.

Before each write into a `guarded` folder its guard checks that the folder is still the one that was locked:
somebody may have moved it, and another run may have begun in its place. No file is opened through a link.

Every function raises WriteError if the disk is full, or something else forbids the write.
"""

import contextlib
import os
import pwd
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dreambooth.io import reader
from dreambooth.io.errors import UserError, shown

_CHUNK = 2**26  # bytes that a copy holds in memory
_GUARDS: dict[Path, Callable[[], None]] = {}  # by folder, as its flag names it and as an absolute path
_TEMPORARY = re.compile(r"\.(.+?)(?:\.[0-9]+){1,2}\.tmp")


class WriteError(OSError):
    """A file or folder cannot be written or removed."""

    def __str__(self) -> str:
        return f"{shown(self.filename)} cannot be written: {self.strerror}"


class FolderLost(BaseException):
    """The folder that this process has locked was moved or removed, or another run works in its place.

    The message says which. A BaseException, since the run must end: it would write into another run's folder.
    """


# --- guards


@contextlib.contextmanager
def guarded(folder: Path, guard: Callable[[], None]) -> Iterator[None]:
    """Until the block ends, call `guard` before each write into `folder`. What it raises ends the write."""
    keys = {folder, folder.absolute()}
    _GUARDS.update(dict.fromkeys(keys, guard))
    try:
        yield
    finally:
        for key in keys:
            _GUARDS.pop(key, None)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Call the guards of the folders that `path` is or lies in. An OSError of the block becomes a WriteError
    with `path`; FileExistsError stays."""
    try:
        for folder in (path, *path.parents):
            if folder in _GUARDS:
                _GUARDS[folder]()
        yield
    except (FileExistsError, WriteError):
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from None


# --- files


def write(path: Path, data: bytes, beside: Path | None = None) -> None:
    """Write the file beside `path`, flush it and rename it. A reader sees the old file or the new one, never
    a part of one.

    An older file of that name is replaced, also another program's; ownership.py replaces only this program's.
    `beside` is the path that is written first, a new `temporary` by default.
    """
    beside = beside or temporary(path)
    try:
        write_new(beside, data)
        with _writing(path):
            os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is reported
            beside.unlink(missing_ok=True)
        raise


def write_new(path: Path, data: bytes) -> None:
    """Write and flush a new file, with mode 0666 less the umask. Raises FileExistsError if it exists."""
    with _writing(path), _opened(path, os.O_CREAT | os.O_EXCL) as descriptor:
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is reported
                path.unlink()
            raise


def copy_new(source: Path, path: Path) -> None:
    """Copy a regular file to a new one, and flush it. Raises OSError if `source` cannot be read."""
    with reader.opened(source) as file:
        write_new(path, file.read(_CHUNK))
        while data := file.read(_CHUNK):
            append(path, data)


def append(path: Path, data: bytes, *, flushed: bool = True) -> None:
    """Write at the end of an existing file, and flush it. A failure leaves the file as it was."""
    with _writing(path), _opened(path, os.O_APPEND) as descriptor:
        size = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, data)
            if flushed:
                os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """The descriptor of a file that is open for writing. A link is not followed, and no pipe waited for."""
    flags |= os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`. Raises OSError."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]  # a call may write a part only


def flush(path: Path) -> None:
    """Flush a file's data, or the names in a folder, to the disk."""
    with _writing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- folders, names


def make_folder(path: Path, *, parents: bool = False) -> None:
    """Make the folder unless it exists; with `parents` also those above it."""
    with _writing(path):
        path.mkdir(parents=parents, exist_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder."""
    with _writing(source), _writing(target):
        os.rename(source, target)


def unused(path: Path) -> Path:
    """`path` if nothing has that name, else `path-2`, `path-3`, ..."""
    number, name = 1, path
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f"{path.name}-{number}")
    return name


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that it holds."""
    with _writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `target`. At the end of the block it is renamed to `target`; if the
    block raises, it is removed.

    The block must flush the files in the folder, see `write_new` and `flush`. Fails if `target` exists and is
    not an empty folder.
    """
    beside = temporary(target)
    try:
        make_folder(beside)
        yield beside
        move(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder with `files`, whose keys are paths in it. Fails as `new_folder` does."""
    with new_folder(target) as folder:
        for name, data in files.items():
            path = folder / name
            make_folder(path.parent, parents=True)
            write_new(path, data)


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
        raise UserError(f"{flag}: {shown(path)} cannot be written to: {why_not_writable(path)}")


def why_not_writable(path: Path) -> str:
    """Why this user may not write to a file or folder that exists, and what to do."""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return "its file system is read-only; name another folder"
    uid = path.lstat().st_uid
    try:
        owner = pwd.getpwuid(uid).pw_name
    except KeyError:  # a user of another machine
        owner = str(uid)
    return (
        f"it is user {shown(owner)}'s; give a group of both users the right to write there (chmod -R g+ws,"
        " and umask 002 before each run), or name another folder"
    )
