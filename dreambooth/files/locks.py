"""A lock on a folder, so that only one process at a time works in it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dreambooth.io import reader
from dreambooth.io.errors import UserError, shortened

NAME = ".lock"


@contextlib.contextmanager
def hold(folder: Path, flag: str, wait: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Hold the lock of `folder`, the value of `flag`, until the block ends or the process dies. Yields notes
    for the user.

    While another process holds the lock, `wait` is called once a second with a description of that process.
    Raises UserError if another process holds it and there is no `wait`, or if another program wrote the file
    `.lock` there.
    """
    descriptor, is_new = _open(folder / NAME, flag)
    try:
        notes = []
        while True:
            try:
                # not flock, which forked loader workers inherit and hold for seconds after the run was killed
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    notes.append(
                        f"{folder} cannot be locked ({error.strerror}): "
                        "make sure that no other run writes there"
                    )
                    break
            holder = _holder(descriptor)
            if wait is None:
                raise UserError(
                    f"{flag}: another run is at work in {folder}: {holder}. "
                    "Wait for it, stop it, or name another folder"
                )
            wait(holder)
            time.sleep(1)
        if not is_new and _owner(descriptor) is None:  # an empty file may be another program's
            yield notes
            return
        # describe this process in the file
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": sys.argv,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield notes
    finally:
        # closing releases the lock; the file stays, because a waiting process may have it open
        os.close(descriptor)


def _open(path: Path, flag: str) -> tuple[int, bool]:
    """(the lock file, opened; whether it is new). Raises UserError if it has other content than a lock."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    reason = "this program did not write it; move it away, or name another folder"
    try:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            descriptor = os.open(path, flags)
    except OSError as error:
        reason = reason if os.path.lexists(path) else error.strerror or str(error)
        raise UserError(f"{flag}: {path} cannot be used as a lock: {reason}") from None
    info = os.fstat(descriptor)
    if stat.S_ISREG(info.st_mode) and (info.st_size == 0 or _owner(descriptor) is not None):
        return descriptor, False
    os.close(descriptor)
    raise UserError(f"{flag}: {path} cannot be used as a lock: {reason}")


def _owner(descriptor: int) -> dict[str, Any] | None:
    """The description of a process in a lock file; None if there is none."""
    try:
        owner = reader.parsed_json_table(os.pread(descriptor, 65536, 0), NAME)
    except UserError:
        return None
    return owner if {"pid", "host", "since", "command"} <= owner.keys() else None


def _holder(descriptor: int) -> str:
    """The process that holds the lock, in words."""
    owner = _owner(descriptor)
    if owner is None:  # it holds the lock and has not written its name yet
        return "a process that has only just started"
    pid, host, since = (shortened(owner[name]) for name in ("pid", "host", "since"))
    return f"process {pid} on {host}, since {since}"
