"""A lock on a folder, so that only one process at a time works in it, and only in that folder.

The lock is a POSIX lock of the file `.lock`, which describes its owner. Closing any descriptor of that file
releases the lock: nothing else in the process may open it, and a folder is not locked twice.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from dreambooth.io import reader, writer
from dreambooth.io.errors import UserError, shortened, shown

NAME = ".lock"
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LARGEST = 65536  # bytes
_ADVICE = "this program did not write it; move it away, or name another folder"
_HELD: list["_Lock"] = []


@contextlib.contextmanager
def hold(folder: Path, flag: str, wait: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Hold the lock of `folder`, the value of `flag`, until the block ends or the process dies. Yields notes
    for the user.

    Before each write into the folder, `writer` checks that it still is the one that was locked. While another
    process holds the lock, `wait` is called once a second with a description of that process. Raises
    UserError if another process holds it and there is no `wait`, if this process holds it already, or if
    `.lock` cannot be written or is another program's.
    """
    with _directory(folder, flag) as directory:
        lock = _Lock(folder, flag, directory)
        try:
            notes = lock.acquire(wait)
            _HELD.append(lock)
            with writer.guarded(folder, lock.check):
                yield notes
        finally:
            # closing releases the lock; the file stays, because a waiting process may have it open
            os.close(lock.file)
            if lock in _HELD:
                _HELD.remove(lock)


@contextlib.contextmanager
def follow(folder: Path, flag: str) -> Iterator[None]:
    """For the other processes of a job whose first process holds the lock of `folder`: check before each
    write that it still does."""
    with _directory(folder, flag) as directory:
        owner = _owner_at(folder / NAME)

        def check() -> None:
            _check_directory(folder, directory)
            present = _owner_at(folder / NAME)
            # None: the file was removed, and the first process will make it again
            if present is not None and owner is not None and present != owner:
                raise _lost(folder, f"was locked by {_described(present)}")

        with writer.guarded(folder, check):
            yield


class Job(Protocol):
    """The processes of a job; `runtime.processes.Peers` is one."""

    is_main: bool

    def on_main(self, work: Callable[[], list[str]]) -> list[str]: ...


def hold_for(
    job: Job,
    stack: contextlib.ExitStack,
    folder: Path,
    flag: str,
    wait: Callable[[str], None] | None = None,
) -> list[str]:
    """`hold` on the first process of a job, and `follow` on the others, until `stack` is closed. Returns
    notes."""
    notes = job.on_main(lambda: stack.enter_context(hold(folder, flag, wait)))
    if not job.is_main:
        stack.enter_context(follow(folder, flag))
    return notes


class _Lock:
    """The lock file of a folder, open."""

    def __init__(self, folder: Path, flag: str, directory: int):
        """Opens the file. Raises UserError if it cannot be written, or has other content than a lock."""
        self.folder, self.flag, self.directory, self.pid = folder, flag, directory, os.getpid()
        for other in _HELD:
            if other.pid == self.pid and os.path.sameopenfile(other.directory, directory):
                raise UserError(
                    f"{flag}: {shown(folder)} is {other.flag} of this run too; name another folder"
                )
        self.path = folder / NAME
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.owner = {"pid": self.pid, "host": socket.gethostname(), "since": since}
        self.file, self.is_described = self._open()

    def _open(self) -> tuple[int, bool]:
        """(the descriptor of the file; whether the owner is described in it)."""
        where = f"{self.flag}: {shown(self.path)} cannot be used as a lock"
        try:
            try:
                descriptor = self._make()
                return descriptor, True
            except FileExistsError:
                descriptor = os.open(self.path, _FLAGS)
        except PermissionError:
            blocking = self.path if os.path.lexists(self.path) else self.folder
            raise UserError(f"{where}: {writer.why_not_writable(blocking)}") from None
        except OSError as error:
            reason = _ADVICE if os.path.lexists(self.path) else error.strerror or str(error)
            raise UserError(f"{where}: {reason}") from None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            content = os.pread(descriptor, _LARGEST, 0).strip(b"\0")  # after a power cut it may hold zeros
            is_described = _owner_in(content) is not None
            if is_described or not content:
                return descriptor, is_described  # an empty file may be another program's: it stays empty
        os.close(descriptor)
        raise UserError(f"{where}: {_ADVICE}")

    def _make(self) -> int:
        """Make the file, and open it. Raises FileExistsError if there is one."""
        descriptor = os.open(self.path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # the file system may have no modes
            # whoever may write to the folder may lock it, whatever the umask
            os.fchmod(descriptor, os.fstat(self.directory).st_mode & 0o666)
        return descriptor

    def acquire(self, wait: Callable[[str], None] | None) -> list[str]:
        """Lock the file; see `hold`. Returns notes."""
        notes = []
        while True:
            try:
                # not flock, which forked loader workers inherit and hold for seconds after the run was killed
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    self._wait(wait)
                    continue
                notes.append(
                    f"{self.folder} cannot be locked ({error.strerror}): make sure that no other run writes"
                    " there"
                )
            if self._is_in_place():
                break
            os.close(self.file)  # its name was removed, or given to another file, in the meantime
            self.file, self.is_described = self._open()
        self._describe()
        return notes

    def _wait(self, wait: Callable[[str], None] | None) -> None:
        """Wait a second for the process that holds the lock."""
        owner = _owner_in(os.pread(self.file, _LARGEST, 0))
        holder = "a process that has only just started" if owner is None else _described(owner)
        if wait is None:
            raise UserError(
                f"{self.flag}: another run is at work in {self.folder}: {holder}. "
                "Wait for it, stop it, or name another folder"
            )
        wait(holder)
        time.sleep(1)

    def _is_in_place(self) -> bool:
        """Whether the lock file of the folder is the open one."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.file))
        except OSError:
            return False

    def _describe(self) -> None:
        """Write this process into the file."""
        if self.is_described:
            with contextlib.suppress(OSError):  # a full disk; the first write of the run reports it
                os.ftruncate(self.file, 0)
                os.pwrite(self.file, json.dumps(self.owner).encode(), 0)

    def check(self) -> None:
        """Raise FolderLost unless the folder is the one that was locked, by this process still. If only the
        lock file was removed, it is made again. Raises OSError if that fails."""
        if self._is_in_place():
            return
        _check_directory(self.folder, self.directory)
        try:
            file = self._make()
        except FileExistsError:
            owner = _owner_at(self.path)
            what = f"was locked by {_described(owner)}" if owner else "got another file .lock"
            raise _lost(self.folder, what) from None
        os.close(self.file)
        self.file, self.is_described = file, True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # another process was faster
                raise _lost(self.folder, "was locked by another run") from None
        self._describe()


@contextlib.contextmanager
def _directory(folder: Path, flag: str) -> Iterator[int]:
    """A descriptor of the folder. While it is open, no other folder gets the same device and inode."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{flag}: {shown(folder)} cannot be read: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_directory(folder: Path, directory: int) -> None:
    """Raise FolderLost unless the path `folder` still leads to the open directory."""
    try:
        info = os.stat(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        raise _lost(folder, "was moved or removed") from None
    if not os.path.samestat(info, os.fstat(directory)):
        raise _lost(folder, "was moved or removed, and another folder has its name")


def _lost(folder: Path, what: str) -> writer.FolderLost:
    return writer.FolderLost(
        f"{shown(folder)} {what} while this run was at work there: the run ends, and writes nothing more"
    )


def _owner_at(path: Path) -> dict[str, Any] | None:
    """The description of a process in the file, which this process does not hold; None if there is none."""
    try:
        return _owner_in(reader.read_bytes(path, NAME, _LARGEST, follow_links=False))
    except UserError:
        return None


def _owner_in(content: bytes) -> dict[str, Any] | None:
    """The description of a process that a lock file holds; None if it holds something else."""
    try:
        owner = reader.parsed_json_table(content, NAME)
    except UserError:
        return None
    # older versions wrote the command line too, which may hold a token: it is not kept
    return owner if {"pid", "host", "since"} <= owner.keys() else None


def _described(owner: dict[str, Any]) -> str:
    """The owner of a lock in words."""
    pid, host, since = (shortened(owner[key]) for key in ("pid", "host", "since"))
    return f"process {pid} on {host}, since {since}"
