"""One process at work in a folder."""

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
    """Keep others out of `folder` until the block ends or the process dies. Gives notes for the user.

    If another process is at work there, `wait` is called with its name, once a second until it is gone. Raises UserError, naming flag and
    owner, if there is no `wait`.
    """
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        notes = []
        while True:
            try:
                # lockf, not flock: forked loader workers inherit the latter, and would hold it for seconds after the run was killed
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    notes.append(
                        f"{folder} cannot be locked ({error.strerror}): take care that nothing else writes there"
                    )
                    break
            owner = _owner(descriptor)
            if wait is None:
                raise UserError(
                    f"{flag}: another run is at work in {folder}: {owner}. Wait for it, stop it, or name another folder"
                )
            wait(owner)
            time.sleep(1)
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": sys.argv,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        yield notes
    finally:
        os.close(
            descriptor
        )  # and with it the lock; the file stays, since removing it could pull it from under the next owner


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 65536, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it holds the lock, and has not written who it is yet
        return "a process that has only just started"
