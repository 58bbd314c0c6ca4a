"""A lock on a folder, so that only one process at a time works in it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dreambooth.errors import UserError

NAME = ".lock"


@contextlib.contextmanager
def hold(folder: Path, flag: str, wait: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Hold the lock of `folder`, the value of `flag`, until the block ends or the process dies. Yields notes
    for the user.

    While another process holds the lock, `wait` is called once a second with a description of that process.
    Raises UserError if another process holds it and there is no `wait`.
    """
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
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


def _holder(descriptor: int) -> str:
    """The process that holds the lock, in words."""
    try:
        owner = json.loads(os.pread(descriptor, 65536, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it holds the lock and has not written its name yet
        return "a process that has only just started"
