"""A locked folder: who holds it, and that nothing is written once it is another one."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.files import checkpoint_folders, locks
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import writer
from dreambooth.io.errors import UserError
from dreambooth.io.writer import FolderLost
from tests.faults.ownership_faults import snapshot

OWNER = {"pid": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00"}


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a child that does the work: 0, 2 for a UserError, 3 for FolderLost."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except UserError:
            status = 2
        except FolderLost:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def take(folder: Path) -> None:
    with locks.hold(folder, "--output_dir"):
        pass


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# --- the file


def test_the_lock_file_names_process_host_and_time_and_no_command_line(out):
    with locks.hold(out, "--output_dir"):
        pass
    owner = json.loads((out / ".lock").read_text())
    assert owner.keys() == {"pid", "host", "since"}
    assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())


@pytest.mark.parametrize("command", [{"command": ["--hub_token", "hf_x"]}, {}])
def test_the_lock_of_an_older_version_is_taken_and_its_command_line_removed(command, out):
    (out / ".lock").write_text(json.dumps(OWNER | command))
    take(out)
    assert "hf_x" not in (out / ".lock").read_text()
    assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_zeros_is_one_after_a_power_cut(out):
    (out / ".lock").write_bytes(bytes(100))
    take(out)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "deep", "not UTF-8", "a list", "unfinished"])
def test_an_odd_entry_in_place_of_the_lock_is_refused_and_left(kind, out):
    path = out / ".lock"
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(".lock"),
        "deep": lambda: path.write_bytes(b"[" * 60_000),
        "not UTF-8": lambda: path.write_bytes(b"\xff\xfe\xfd"),
        "a list": lambda: path.write_bytes(b"[1]"),
        "unfinished": lambda: path.write_bytes(json.dumps(OWNER).encode()[:20]),
    }[kind]()
    before = snapshot(out)
    with pytest.raises(UserError, match=r"^--output_dir: .*\.lock cannot be used as a lock: this program"):
        take(out)
    assert snapshot(out) == before
    assert os.path.lexists(path)


@pytest.mark.parametrize("spelling", [".", "../out", "link", "there/../out"])
def test_a_folder_is_not_locked_twice_by_one_process(spelling, out):
    """Closing the second lock would release the first."""
    (out / "link").symlink_to(out)
    (out.parent / "there").mkdir()
    second = out / spelling if spelling != "there/../out" else out.parent / spelling
    with locks.hold(out, "--output_dir"):
        with (
            pytest.raises(UserError, match=r"^--class_data_dir: .* is --output_dir of this run too"),
            locks.hold(second, "--class_data_dir"),
        ):
            pass
        assert in_child(lambda: _fresh(out)) == 2
    take(out)


def _fresh(folder: Path) -> None:
    """Take the lock as another program would, without what this process remembers."""
    locks._HELD.clear()
    take(folder)


# --- the folder is moved, removed or taken over


WRITES: dict[str, Callable[[Path], object]] = {
    "file": lambda out: writer.write(out / "a", b"1"),
    "new file": lambda out: writer.write_new(out / "new", b"1"),
    "appended": lambda out: writer.append(out / "metrics.jsonl", b"1"),
    "folder": lambda out: writer.make_folder(out / "validation"),
    "the folder itself": lambda out: writer.make_folder(out, parents=True),
    "many files": lambda out: writer.write_folder(out / "many", {"a/b": b"1"}),
    "copy": lambda out: writer.copy_new(Path(__file__), out / "copied"),
    "renamed": lambda out: writer.move(out / "metrics.jsonl", out / "other"),
    "removed": lambda out: writer.remove(out / "metrics.jsonl"),
    "deeper": lambda out: writer.write(out / "encoded" / "a", b"1"),
    "recorded": lambda out: WrittenFiles(out).write("run.json", b"1"),
    "status of a picture": lambda out: WrittenFiles(out).write("validation/a.png", b"1"),
    "checkpoint": lambda out: checkpoint_folders.publish(out, 1, {"a": b"1"}, {}, limit=1),
    "pruned": lambda out: checkpoint_folders.remove(out),
}


def put_another_run(out: Path) -> None:
    """What a run that begins in the folder's place leaves there."""
    out.mkdir()
    (out / ".lock").write_text(json.dumps(OWNER))
    (out / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    (out / "encoded").mkdir()
    checkpoint_folders.publish(out, 5, {"a": b"1"}, {}, limit=None)


def moved(out: Path) -> None:
    out.rename(out.with_name("moved"))


def replaced(out: Path) -> None:
    moved(out)
    shutil.copytree(out.with_name("x"), out)


def replaced_by_a_file(out: Path) -> None:
    moved(out)
    out.write_bytes(b"a user's")


def replaced_by_a_link(out: Path) -> None:
    moved(out)
    put_another_run(out.with_name("b"))
    out.symlink_to("b")


def replaced_by_a_loop(out: Path) -> None:
    moved(out)
    out.symlink_to(out)


def restored_from_a_copy(out: Path) -> None:
    shutil.copytree(out, out.with_name("b"))
    shutil.rmtree(out)
    out.with_name("b").rename(out)


def locked_by_another_run(out: Path) -> None:
    (out / ".lock").unlink()
    (out / ".lock").write_text(json.dumps(OWNER))


def an_odd_lock(out: Path) -> None:
    (out / ".lock").unlink()
    (out / ".lock").mkdir()


GONE, ANOTHER = "out was moved or removed while", "out was moved or removed, and another folder has its name"
CHANGES: dict[Callable[[Path], object], str] = {
    moved: GONE,
    shutil.rmtree: GONE,
    replaced: ANOTHER,
    replaced_by_a_file: "out was moved or removed",
    replaced_by_a_link: ANOTHER,
    replaced_by_a_loop: GONE,
    restored_from_a_copy: ANOTHER,
    locked_by_another_run: "out was locked by process 1 on elsewhere, since 2026-01-01 00:00:00 while",
    an_odd_lock: "out got another file .lock while",
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_written_once_the_folder_is_another_one(change, out):
    put_another_run(out.with_name("x"))
    shutil.copytree(out.with_name("x"), out, dirs_exist_ok=True)
    with locks.hold(out, "--output_dir"):
        change(out)
        before = snapshot(out.parent)
        for name, write in WRITES.items():
            if name == "pruned" and not out.is_dir():
                continue  # there are no checkpoints
            with pytest.raises(FolderLost, match=CHANGES[change]):
                write(out)
            assert snapshot(out.parent) == before, name
        writer.write(out.with_name("x") / "beside", b"1")  # other folders are not guarded
    if out.is_dir():
        writer.write(out / "a", b"1")  # nor is this one when the run has ended


@pytest.mark.parametrize("spelling", ["relative", "absolute"])
def test_a_folder_is_guarded_however_it_is_spelled(spelling, out, monkeypatch):
    monkeypatch.chdir(out.parent)
    with locks.hold(Path("out"), "--output_dir"):
        out.rename(out.with_name("moved"))
        with pytest.raises(FolderLost):
            writer.write((Path("out") if spelling == "relative" else out) / "a", b"1")


@pytest.mark.parametrize("name", WRITES)
def test_control_every_write_is_done_in_a_folder_that_stays(name, out):
    put_another_run(out.with_name("x"))
    shutil.copytree(out.with_name("x"), out, dirs_exist_ok=True)
    with locks.hold(out, "--output_dir"):
        before = snapshot(out)
        WRITES[name](out)
        assert name in ("folder", "the folder itself") or snapshot(out) != before


@pytest.mark.parametrize("change", ["moved and back", "behind a link"])
def test_the_same_folder_by_another_way_is_written_to(change, out):
    with locks.hold(out, "--output_dir"):
        out.rename(out.with_name("moved"))
        if change == "behind a link":
            out.symlink_to("moved")
        else:
            out.with_name("moved").rename(out)
        writer.write(out / "a", b"1")
    assert (out / "a").read_bytes() == b"1"


def test_a_lock_that_alone_is_removed_is_made_again_and_held(out):
    with locks.hold(out, "--output_dir"):
        (out / ".lock").unlink()
        writer.write(out / "a", b"1")
        assert in_child(lambda: _fresh(out)) == 2  # another run is refused
        (out / ".lock").unlink()
        writer.write(out / "a", b"2")
        assert in_child(lambda: _fresh(out)) == 2
    assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
    assert in_child(lambda: _fresh(out)) == 0


def test_a_run_that_takes_a_folder_whose_lock_was_removed_ends_the_first(out):
    with locks.hold(out, "--output_dir"):
        (out / ".lock").unlink()
        assert in_child(lambda: _fresh(out)) == 0
        with pytest.raises(FolderLost, match=r"out was locked by process \d+ on "):
            writer.write(out / "a", b"1")
    assert not (out / "a").exists()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda out: None, 0),
        (lambda out: (out / ".lock").unlink(), 0),
        (moved, 3),
        (locked_by_another_run, 3),
    ],
    ids=["nothing", "lock removed", "moved", "locked by another run"],
)
def test_the_other_processes_of_a_job_follow_the_first_ones_lock(change, status, out):
    ready, go = os.pipe(), os.pipe()

    def work() -> None:
        locks._HELD.clear()
        writer._GUARDS.clear()
        with locks.follow(out, "--output_dir"):
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            writer.write(out / "a", b"1")

    with locks.hold(out, "--output_dir"):
        child = os.fork()
        if child == 0:
            os._exit(in_child(work))
        os.read(ready[0], 1)
        change(out)
        os.write(go[1], b"1")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert (out / "a").exists() == (status == 0)


# --- full disks


@pytest.mark.parametrize("number", [28, 122, 30, 5], ids=["ENOSPC", "EDQUOT", "EROFS", "EIO"])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "rename", "mkdir"])
@pytest.mark.parametrize("name", ["file", "new file", "appended", "many files", "recorded", "copy"])
def test_a_disk_that_takes_nothing_is_one_error_with_file_and_reason(name, call, number, out, monkeypatch):
    (out / "metrics.jsonl").write_bytes(b"1")
    WRITES["recorded"](out)
    before = snapshot(out) | {".written.jsonl": ""}
    real, calls = getattr(os, call), []

    def fail(*arguments: object, **named: object) -> object:
        if call == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):  # type: ignore[operator]
            return real(*arguments, **named)
        calls.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    wrong = None
    try:
        WRITES[name](out)
    except writer.WriteError as error:
        wrong = str(error)
    monkeypatch.undo()
    assert (wrong is None) == (not calls or (call == "mkdir" and name == "recorded"))  # the folder exists
    if wrong is not None:
        assert wrong.startswith(str(out))
        assert wrong.endswith(f"cannot be written: {os.strerror(number)}")
        assert snapshot(out) | {".written.jsonl": ""} == before
