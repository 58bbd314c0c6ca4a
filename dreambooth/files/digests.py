"""SHA-256 of large files. A process hashes each file once, and again only if the file has changed."""

import hashlib
import threading
from concurrent.futures import Future
from pathlib import Path

from dreambooth.io import reader

# Large chunks, because after each chunk the thread waits up to 5 ms for Python's lock while imports run.
_CHUNK = 32 * 2**20

_digests: dict[tuple[object, ...], Future[bytes]] = {}
_lock = threading.Lock()


def of(path: Path) -> bytes:
    """The SHA-256 of the file, 32 bytes. If another thread is computing it, this one waits for the result.
    Raises OSError if the file cannot be read."""
    info = path.stat()
    key = (path.absolute(), info.st_ino, info.st_size, info.st_mtime_ns)
    with _lock:
        is_new = key not in _digests
        digest = _digests.setdefault(key, Future())
    if is_new:
        try:
            digest.set_result(_sha256(path, info.st_size))
        except BaseException as error:
            with _lock:
                del _digests[key]
            digest.set_exception(error)
            raise
    return digest.result()


def _sha256(path: Path, size: int) -> bytes:
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(min(_CHUNK, size + 1)))
    with reader.opened(path) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return digest.digest()
