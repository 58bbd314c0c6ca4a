"""A lock on a folder: one process at a time works in it."""

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
    """Hold the lock of `folder`, which `flag` names, until the block ends or the process dies. Yields notes
    for the user.

    If another process holds it, `wait` is called once a second with that process's name. Without `wait`,
    raises UserError.
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
                        "take care that nothing else writes there"
                    )
                    break
            name = _owner(descriptor)
            if wait is None:
                raise UserError(
                    f"{flag}: another run is at work in {folder}: {name}. "
                    "Wait for it, stop it, or name another folder"
                )
            wait(name)
            time.sleep(1)
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
        # this ends the lock; the file stays, because a process that waits may have it open already
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 65536, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it holds the lock and has not written its name yet
        return "a process that has only just started"
