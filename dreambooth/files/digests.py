"""SHA-256 of files that may be gigabytes long: once in a process for as long as a file stays as it is, whichever threads ask for it."""

import hashlib
import threading
from concurrent.futures import Future
from pathlib import Path

# Long enough that a thread is not for ever waiting for its turn: Python gives it one each 5 ms while another computes, as imports do.
_CHUNK = 32 * 2**20

_known: dict[tuple[object, ...], Future[bytes]] = {}
_lock = threading.Lock()


def of(path: Path) -> bytes:
    """The digest; a thread that asks while another computes it waits for that one. Raises OSError if the file cannot be read."""
    info = path.stat()
    key = (path.absolute(), info.st_ino, info.st_size, info.st_mtime_ns)
    with _lock:
        is_new = key not in _known
        found = _known.setdefault(key, Future())
    if is_new:
        try:
            found.set_result(_computed(path, info.st_size))
        except BaseException as error:
            with _lock:
                del _known[key]
            found.set_exception(error)
            raise
    return found.result()


def _computed(path: Path, size: int) -> bytes:
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(min(_CHUNK, size + 1)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return digest.digest()
