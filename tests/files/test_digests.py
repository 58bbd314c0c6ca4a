"""Hashes of large files, computed once."""

import hashlib
import threading
import time
from pathlib import Path

import pytest

from dreambooth.files import digests
from dreambooth.runtime.stops import Stop


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(digests, "_digests", {})


def test_digests_are_those_of_hashlib_and_follow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_CHUNK", 1000)
    path = tmp_path / "file"
    for content in (b"", b"a" * 999, b"b" * 1000, b"c" * 12345):
        path.write_bytes(content)
        assert digests.of(path) == hashlib.sha256(content).digest()


def test_a_digest_is_computed_once_for_all_who_ask_at_the_same_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    calls = []

    def computed(path: Path, size: int) -> bytes:
        calls.append(path)
        time.sleep(0.2)
        return b"digest"

    monkeypatch.setattr(digests, "_sha256", computed)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(digests.of(tmp_path / "file"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, len(calls)) == ([b"digest"] * 4, 1)


def test_a_digest_that_was_broken_off_is_computed_anew(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    real = digests._sha256

    def stopped(path: Path, size: int) -> bytes:
        raise Stop("stopped by SIGTERM")

    monkeypatch.setattr(digests, "_sha256", stopped)
    with pytest.raises(Stop):
        digests.of(tmp_path / "file")
    monkeypatch.setattr(digests, "_sha256", real)
    assert digests.of(tmp_path / "file") == hashlib.sha256(b"content").digest()
