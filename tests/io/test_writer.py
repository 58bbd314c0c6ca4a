"""Files and folders that are written whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from dreambooth.io import writer
from dreambooth.io.errors import UserError


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o000, 0o666)])
def test_the_file_has_the_mode_that_the_umask_asks_for(umask, mode, tmp_path):
    """Temporary files have 0600; a file that a web server or a colleague cannot read is a bug."""
    before = os.umask(umask)
    try:
        writer.write(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_writing_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    for data in (b"old", b"", b"new" * 1000):
        writer.write(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"]
)
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(call, error, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        writer.write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_data_is_on_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    """Renamed first, a power cut would leave an empty file under the good name."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def recorded_replace(*names):
        calls.append(("replace", 0))
        replace(*names)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    writer.write(tmp_path / "file", b"12345")
    assert calls[:2] == [("fsync", 5), ("replace", 0)]


def test_a_folder_appears_with_all_its_files(tmp_path):
    writer.write_folder(tmp_path / "new", {"unet/a.bin": b"a", "b.json": b"b"})
    assert (tmp_path / "new" / "unet" / "a.bin").read_bytes() == b"a"
    assert (tmp_path / "new" / "b.json").read_bytes() == b"b"
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"]
)
def test_a_folder_whose_making_fails_is_not_there(error, tmp_path):
    def make() -> None:
        with writer.new_folder(tmp_path / "new") as temporary:
            writer.write_new(temporary / "file", b"data")
            raise error

    with pytest.raises(type(error)):
        make()
    assert os.listdir(tmp_path) == []


def test_a_folder_with_files_is_not_replaced(tmp_path):
    writer.write_folder(tmp_path / "there", {"file": b"old"})
    with pytest.raises(OSError, match="not empty"):
        writer.write_folder(tmp_path / "there", {"file": b"new"})
    assert (tmp_path / "there" / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["there"]


def test_a_new_file_never_replaces_one(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        writer.write_new(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["file", "images.json", "photo.1", ".hidden"])
def test_a_temporary_is_recognized_with_its_target(name, tmp_path, monkeypatch):
    """What a process that died left is removed by the next one, and nothing else is."""
    temporaries: list[Path] = []
    monkeypatch.setattr(os, "replace", lambda source, target: temporaries.append(Path(source)))
    writer.write(tmp_path / name, b"data")
    (temporary,) = temporaries
    assert writer.target_of(temporary.name) == name
    assert writer.target_of(name) is None


@pytest.mark.parametrize("name", ["notes.tmp", ".notes.tmp", "notes.1.2.tmp", ".1.tmp", ".notes.1.tmp~"])
def test_other_programs_files_are_no_temporaries(name):
    assert writer.target_of(name) is None


def test_an_output_folder_that_cannot_be_made_is_refused_with_its_flag(tmp_path):
    writer.make_output_folder(tmp_path / "a" / "b", "--output_dir")
    writer.make_output_folder(tmp_path / "a" / "b", "--output_dir")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"^--output_dir: .*file cannot be made: "):
        writer.make_output_folder(tmp_path / "file", "--output_dir")
