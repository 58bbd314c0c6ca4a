"""Folders of checkpoints: an intact one is left whatever goes wrong in the next save."""

import collections
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth.files import checkpoint_folders
from dreambooth.io.errors import UserError
from dreambooth.training import checkpoints
from tests.checkpointing import FILES, FLAG, STATE, change, content, latest, names, read_state, small
from tests.faults import checkpoint_faults
from tests.running import ROOT


def steps(output_dir: Path) -> list[int]:
    return [step for step, _ in checkpoint_folders.list_checkpoints(output_dir)]


# --- which there are


def test_checkpoints_are_listed_by_number_not_by_letter(tmp_path):
    for step in (10, 9, 100):
        small(tmp_path, step)
    assert steps(tmp_path) == [9, 10, 100]
    assert latest(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [2, 4, 6, 8]), (1, [8]), (2, [6, 8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])]
)
def test_the_limit_keeps_the_newest(limit, kept, tmp_path):
    for step in (2, 4, 6, 8):
        small(tmp_path, step, limit=limit)
    assert steps(tmp_path) == kept
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


def test_a_lower_limit_removes_several_at_once(tmp_path):
    for step in (2, 4, 6):
        small(tmp_path, step)
    small(tmp_path, 8, limit=2)
    assert names(tmp_path) == {"checkpoint-6", "checkpoint-8"}


@pytest.mark.parametrize(
    ("damaged", "limit", "kept"), [({4}, 2, {4, 6, 8}), ({4, 6}, 2, {2, 4, 6, 8}), ({2, 6}, 1, {2, 6, 8})]
)
def test_a_damaged_checkpoint_neither_counts_nor_is_removed(damaged, limit, kept, tmp_path):
    """It is left to be examined, and does not count toward the limit."""
    for step in (2, 4, 6):
        small(tmp_path, step)
    for step in damaged:
        change(tmp_path / f"checkpoint-{step}" / "state.json")
    small(tmp_path, 8, limit=limit)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


def test_pruning_touches_nothing_that_is_no_checkpoint(tmp_path):
    others = {
        "logs",
        "checkpoint-old",
        "my-checkpoint-2",
        "run.yaml",
        "checkpoint-1",
        "checkpoint-03",
        "checkpoint-2\n",
    }
    for name in others - {"run.yaml"}:
        (tmp_path / name).mkdir()
    (tmp_path / "run.yaml").write_text("")
    for step in (2, 4):
        small(tmp_path, step, limit=1)
    assert names(tmp_path) == others | {"checkpoint-4"}


def test_the_same_checkpoint_is_not_written_twice(tmp_path):
    """A run resumed from an older checkpoint writes the newer ones again, the same in every byte."""
    folder = small(tmp_path, 2)
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES} | {"": folder.stat().st_ino}
    assert small(tmp_path, 2) == folder
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} | {"": folder.stat().st_ino} == before
    assert names(tmp_path) == {"checkpoint-2"}


def test_a_checkpoint_of_an_overwritten_run_is_replaced(tmp_path):
    small(tmp_path, 2, mark=1)
    assert content(small(tmp_path, 2, mark=2)) == (2, 2)
    assert names(tmp_path) == {"checkpoint-2"}


def test_the_same_files_of_another_run_are_replaced_too(tmp_path):
    """On resume the recorded runs are compared."""
    for run in ("one", "other"):
        folder = checkpoints.save(tmp_path, 2, b"adapter", {}, STATE, limit=None, identity={"run": run})
    assert checkpoint_folders.read(folder).identity == {"run": "other"}
    assert names(tmp_path) == {"checkpoint-2"}


def test_a_damaged_checkpoint_of_the_same_step_is_kept_aside(tmp_path):
    for _ in range(3):
        change(small(tmp_path, 2) / "state.json")
    assert content(small(tmp_path, 2, limit=1)) == (2, 0)
    assert names(tmp_path) == {"checkpoint-2", ".bad-step-2", ".bad-step-2-2", ".bad-step-2-3"}


def foreign_folder(path: Path, *names: str) -> None:
    path.mkdir()
    for name in names:
        (path / name).write_text("a user's")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("a file"),
        Path.mkdir,
        lambda path: path.symlink_to("nowhere"),
        lambda path: foreign_folder(path, "optimizer.bin", "pytorch_lora_weights.safetensors"),
        lambda path: foreign_folder(path, "holiday.png", "manifest.json"),
        lambda path: (small(path.parent, 2, mark=7) / "notes.txt").write_text("a user's"),
        lambda path: (small(path.parent, 2, mark=7) / "pictures").mkdir(),
    ],
    ids=["file", "empty", "link", "accelerate", "manifest", "notes", "folder"],
)
def test_what_this_program_did_not_write_is_neither_moved_nor_replaced(make, tmp_path):
    make(tmp_path / "checkpoint-2")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(checkpoint_folders.SaveFailed, match="is not this program's; move it away"):
        small(tmp_path, 2)
    small(tmp_path, 4, limit=1)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_an_unfinished_checkpoint_is_never_found(tmp_path, monkeypatch):
    """Its folder's name has no "checkpoint" in it: other programs take every such name for a finished one."""
    small(tmp_path, 2)
    seen: list[set[str]] = []
    flush = os.fsync

    def look(descriptor: int) -> None:
        flush(descriptor)
        seen.append(names(tmp_path))
        if "checkpoint-4" not in names(tmp_path):
            assert latest(tmp_path) == tmp_path / "checkpoint-2"

    monkeypatch.setattr(os, "fsync", look)
    small(tmp_path, 4)
    assert len(seen) == 6  # four files, their folder, and the folder it lies in
    for there in seen[:-1]:
        assert len(there) == 2
        assert [name for name in there if "checkpoint" in name] == ["checkpoint-2"]
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def test_a_missing_folder_has_no_checkpoints(tmp_path):
    assert checkpoint_folders.list_checkpoints(tmp_path / "nowhere") == []


# --- in which order


def test_everything_is_on_the_disk_before_its_name_says_so(tmp_path, monkeypatch):
    """Files, their manifest, their folder, the rename, the folder above, and then the removals.

    Another order would withstand a kill, but not a power cut.
    """
    small(tmp_path, 2)
    done: list[tuple[str, ...]] = []
    paths: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "rename")}

    def kind(path: Any) -> str:
        return re.sub(r"-\d+-[0-9a-f]{8}$", "", Path(path).name) if Path(path) != tmp_path else "parent"

    def opened(path: Any, *rest: Any, **named: Any) -> int:
        descriptor = real["open"](path, *rest, **named)
        paths[descriptor] = kind(path)
        return descriptor

    def closed(descriptor: int) -> None:
        paths.pop(descriptor, None)
        real["close"](descriptor)

    def wrote(descriptor: int, data: Any) -> int:
        done.append(("write", paths[descriptor]))
        return real["write"](descriptor, data)

    def flushed(descriptor: int) -> None:
        done.append(("fsync", paths[descriptor]))
        real["fsync"](descriptor)

    def renamed(old: Any, new: Any) -> None:
        done.append(("rename", kind(old), kind(new)))
        real["rename"](old, new)

    for name, replacement in zip(real, (opened, wrote, flushed, closed, renamed), strict=True):
        monkeypatch.setattr(os, name, replacement)
    small(tmp_path, 4, limit=1)
    files = ["pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert done == [
        *[(call, name) for name in files for call in ("write", "fsync")],
        ("fsync", ".tmp-step-4"),
        ("rename", ".tmp-step-4", "checkpoint-4"),
        ("fsync", "parent"),
        ("rename", "checkpoint-2", ".trash-step-2"),
    ]


def test_a_file_that_takes_several_writes_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    assert content(small(tmp_path, 2)) == (2, 0)


# --- when saving fails


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
@pytest.mark.parametrize("step", [4, 6], ids=["again", "new"])
def test_a_disk_that_does_not_take_a_checkpoint_leaves_the_older_ones_and_nothing_else(
    step, call, number, tmp_path, monkeypatch
):
    """The last intact one is never removed, even if the save replaces one or the limit removes one."""
    for older in (2, 4):
        small(tmp_path, older)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(OSError(number, os.strerror(number))))
        with pytest.raises(checkpoint_folders.SaveFailed) as failed:
            small(tmp_path, step, limit=1, mark=1)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    assert [content(path) for _, path in checkpoint_folders.list_checkpoints(tmp_path)] == [(2, 0), (4, 0)]
    assert os.strerror(number) in str(failed.value)
    needed = checkpoint_folders.size(small(tmp_path, step, limit=1, mark=1))
    assert f"checkpoint-{step} could not be saved" in str(failed.value)
    assert f"it needs {needed:,} bytes, {tmp_path} has " in str(failed.value)
    assert re.search(r"has [\d,]+ free\. Older checkpoints are as they were$", str(failed.value))
    assert names(tmp_path) == {f"checkpoint-{step}"}  # the next try takes it


def refuse(error: BaseException) -> Callable[..., None]:
    def refused(*_: object, **__: object) -> None:
        raise error

    return refused


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("step", [4, 6], ids=["again", "new"])
def test_ctrl_c_while_saving_leaves_the_older_ones_and_nothing_else(step, call, tmp_path, monkeypatch):
    for older in (2, 4):
        small(tmp_path, older)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, step, limit=1, mark=1)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    assert [content(path) for _, path in checkpoint_folders.list_checkpoints(tmp_path)] == [(2, 0), (4, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6], ids=["again", "new"])
def test_one_error_of_the_disk_at_any_call_costs_no_whole_checkpoint(step, tmp_path, monkeypatch):
    """The save fails or was done; the newest intact one is found; the next save works."""
    failures: collections.Counter[str] = collections.Counter()
    for moment in itertools.count():
        output_dir = tmp_path / str(moment)
        output_dir.mkdir()
        for older in (2, 4):
            small(output_dir, older)
        left = itertools.count(moment, -1)

        def failing(call: Any, left: Any = left) -> Any:
            def called(*arguments: Any, **named: Any) -> Any:
                if next(left) == 0:
                    raise OSError(errno.EIO, "Input/output error")
                return call(*arguments, **named)

            return called

        with monkeypatch.context() as patch:
            for name in set(checkpoint_faults.CALLS) - {"close"}:  # the kernel closes whatever it answers
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                small(output_dir, step, limit=1, mark=1)
                failures["none"] += 1
            except checkpoint_folders.SaveFailed as error:
                failures[type(error).__name__] += 1
                done = isinstance(error, checkpoint_folders.PruneFailed)
                assert latest(output_dir) == output_dir / (
                    f"checkpoint-{step}" if done else "checkpoint-4"
                ), moment
                assert content(latest(output_dir) or Path()) == ((step, 1) if done else (4, 0)), moment
        assert content(small(output_dir, 8, limit=1)) == (8, 0)
        checkpoint_folders.sweep(output_dir)
        kept = {name for name in names(output_dir) if not name.startswith(".bad-step-")}
        assert kept == {"checkpoint-8"}, moment
        if next(left) > 0:
            break
    assert failures["SaveFailed"] >= 12
    assert failures["PruneFailed"] >= 3


def test_what_reads_back_damaged_is_no_reason_to_remove_an_older_one(tmp_path, monkeypatch):
    """Some disks accept every byte and keep others."""
    small(tmp_path, 2)
    small(tmp_path, 4)
    write = os.write
    for step in (4, 6):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(len(data))))
            with pytest.raises(checkpoint_folders.SaveFailed, match="the checkpoint reads back damaged"):
                small(tmp_path, step, limit=1, mark=1)
        assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
        assert content(tmp_path / "checkpoint-4") == (4, 0)


def test_an_older_one_that_cannot_be_removed_is_no_lost_save(tmp_path, monkeypatch):
    small(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse(OSError(errno.EACCES, "Permission denied")))
        with pytest.raises(
            checkpoint_folders.PruneFailed,
            match=r"^checkpoint-4 is saved, but an older checkpoint in .* could not be removed",
        ):
            small(tmp_path, 4, limit=1)
    assert content(tmp_path / "checkpoint-4") == (4, 0)
    assert latest(tmp_path) == tmp_path / "checkpoint-4"


def test_a_disk_that_will_soon_be_full_is_told_before(tmp_path, monkeypatch):
    """1.5 times the size of the last checkpoint must be free."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1500, 1500))
    last = tmp_path / "checkpoint-1"
    assert checkpoint_folders.room_note(last) is None  # somebody moves finished ones elsewhere
    last.mkdir()
    (last / "state.json").write_bytes(b"x" * 1000)
    assert checkpoint_folders.room_note(last) is None
    (last / "state.json").write_bytes(b"x" * 1001)
    note = checkpoint_folders.room_note(last)
    assert (
        note
        == f"{tmp_path} has 1,500 bytes free; the last checkpoint took 1,001, the next may not fit. Make room"
    )


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    """The counts of the fault report; from a process without torch, which forks faster."""
    words = [sys.executable, "-m", "tests.faults.checkpoint_faults"]
    return json.loads(
        subprocess.run(
            words, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
        ).stdout.splitlines()[-1]
    )


@pytest.mark.slow
def test_any_damage_to_the_newest_is_noticed_and_the_one_before_is_chosen(counts):
    """A flipped bit, a missing end, a part in zeros, an empty file, no file; for every file."""
    assert counts["damaged"] >= 200
    assert counts["detected"] == counts["damaged_skipped"] == counts["damaged"]


@pytest.mark.slow
def test_whenever_the_process_is_killed_there_is_a_whole_checkpoint_and_it_is_found(counts):
    """Kills before each call to the file system and in the middle of each write, keeping 1, 2 and 3.

    The process saves a new step, saves one that exists, or sweeps.
    """
    assert counts["kill_points"] >= 100
    assert counts["violations"] == 0


@pytest.mark.slow
def test_the_count_of_violations_can_be_other_than_0(tmp_path, monkeypatch):
    """The control of the test above: the order of the reference script, which removes before it saves."""
    publish = checkpoint_faults.publish

    def remove_first(output_dir: Path, step: int, *, limit: int | None = None, mark: int = 0) -> Path:
        there = checkpoint_folders.list_checkpoints(output_dir)
        for _, old in there[: len(there) - limit + 1] if limit else ():
            shutil.rmtree(old)
        return publish(output_dir, step, mark=mark)

    monkeypatch.setattr(checkpoint_faults, "publish", remove_first)
    assert checkpoint_faults.kill_everywhere(tmp_path, keeps=(1,))["violations"] > 0


def test_leftovers_of_a_process_that_died_are_swept_and_nothing_else(tmp_path):
    small(tmp_path, 2)
    small(tmp_path, 4)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".replaced-step-2")  # its successor stands
    (tmp_path / "checkpoint-4").rename(tmp_path / ".replaced-step-4")  # the process died before it did
    leftovers = {f".tmp-step-6-{os.getpid()}-0123abcd", ".trash-step-1-7-0123abcd"}
    kept = {".bad-step-2", "logs", "checkpoint-old", ".trash-1000", ".tmp-step-6", ".trash-step-1-7-0000abcd"}
    for name in leftovers | kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("")
    (tmp_path / ".trash-step-1-7-0000abcd" / "holiday.png").write_text("")
    (tmp_path / ".holiday.1.tmp").write_text("")
    kept |= {".trash-link", ".holiday.1.tmp"}
    (tmp_path / ".trash-link").symlink_to(tmp_path / "logs")
    assert set(checkpoint_folders.sweep(tmp_path)) == leftovers | {".replaced-step-2"}
    assert names(tmp_path) == kept | {"checkpoint-2", ".replaced-step-4"}
    assert names(tmp_path / "logs") == {"state.json"}
    assert latest(tmp_path) == tmp_path / ".replaced-step-4"
    assert read_state(tmp_path / ".replaced-step-4")["step"] == 4
    small(tmp_path, 6, limit=1)
    assert names(tmp_path) == kept | {"checkpoint-6"}


def test_leftovers_that_cannot_be_removed_are_named(tmp_path, monkeypatch):
    (tmp_path / ".trash-step-2-1-0123abcd").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse(OSError(errno.EACCES, "Permission denied")))
    with pytest.raises(
        UserError,
        match=r"^--output_dir: .*\.trash-step-2-1-0123abcd.* cannot be removed \(Permission denied\)$",
    ):
        checkpoint_folders.sweep(tmp_path)


# --- which one is meant


@pytest.mark.parametrize("word", ["latest", "auto"])
def test_where_there_is_no_checkpoint_at_all_a_new_run_starts(word, tmp_path):
    (tmp_path / "logs").mkdir()
    for output_dir in (tmp_path, tmp_path / "nowhere"):
        assert checkpoint_folders.choose(word, output_dir) == (None, [])


@pytest.mark.parametrize("word", ["latest", "auto"])
def test_the_newest_whole_one_is_chosen_and_each_newer_one_named_with_its_reason(word, tmp_path):
    for step in (2, 4, 6, 8):
        small(tmp_path, step)
    change(tmp_path / "checkpoint-6" / "optimizer.safetensors")
    (tmp_path / "checkpoint-8" / "state.json").unlink()
    assert checkpoint_folders.choose(word, tmp_path) == (
        tmp_path / "checkpoint-4",
        [
            "checkpoint-8: state.json is missing",
            "checkpoint-6: optimizer.safetensors is not as it was written (its SHA-256 differs)",
        ],
    )


@pytest.mark.parametrize("word", ["latest", "auto"])
def test_where_every_checkpoint_is_damaged_no_new_run_starts(word, tmp_path):
    """It would overwrite, without a word, what may still be repaired."""
    for step in (2, 4):
        change(small(tmp_path, step) / "state.json")
    with pytest.raises(UserError) as refused:
        checkpoint_folders.choose(word, tmp_path)
    first, *reasons, advice = str(refused.value).splitlines()
    assert first == f"{FLAG} {word}: {tmp_path} has 2 checkpoint(s) and none is whole:"
    assert reasons == [
        f"  checkpoint-{step}: state.json is not as it was written (its SHA-256 differs)" for step in (4, 2)
    ]
    assert advice == "Name another checkpoint, or move these away to start a new run"
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def test_a_damaged_checkpoint_that_is_named_is_refused_whatever_else_there_is(tmp_path):
    small(tmp_path, 2)
    damaged = small(tmp_path, 4)
    change(damaged / "state.json")
    for named in ("checkpoint-4", str(damaged)):
        with pytest.raises(UserError) as refused:
            checkpoint_folders.choose(named, tmp_path)
        assert (
            str(refused.value)
            == f"{FLAG}: {damaged} cannot be used: state.json is not as it was written (its SHA-256 differs)"
        )


def test_a_checkpoint_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    there = small(tmp_path / "out", 4)
    assert checkpoint_folders.choose("checkpoint-4", tmp_path / "out") == (there, [])
    assert checkpoint_folders.choose(str(there), tmp_path / "other") == (there, [])
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folders.choose("out/checkpoint-4", Path("out")) == (Path("out/checkpoint-4"), [])
    monkeypatch.chdir(there)
    assert checkpoint_folders.choose(".", tmp_path / "other") == (Path("."), [])


def test_a_bare_name_means_the_run_s_own_checkpoint(tmp_path, monkeypatch):
    """Not one in the working folder."""
    (tmp_path / "out").mkdir()
    small(tmp_path, 4)
    own = small(tmp_path / "out", 4, mark=1)
    monkeypatch.chdir(tmp_path)
    found = checkpoint_folders.choose("checkpoint-4", tmp_path / "out").folder
    assert found is not None
    assert found.resolve() == own


def test_an_unknown_name_lists_what_there_is(tmp_path):
    for step in (10, 2):
        small(tmp_path, step)
    with pytest.raises(UserError) as refused:
        checkpoint_folders.choose("checkpoint-99", tmp_path)
    assert (
        str(refused.value)
        == f"{FLAG}: no checkpoint 'checkpoint-99'; {tmp_path} has: checkpoint-2, checkpoint-10"
    )


def test_an_unknown_name_where_there_is_none_says_so(tmp_path):
    with pytest.raises(UserError, match=r"has: none$"):
        checkpoint_folders.choose("checkpoint-99", tmp_path)


@pytest.mark.parametrize("named", ["checkpoint-500", "latest", "auto"])
def test_a_checkpoint_of_the_reference_script_is_refused_with_what_can_be_done(named, tmp_path):
    """Its optimizer state is a pickle, and a resume would not be exact; its adapter can be used."""
    theirs = tmp_path / "checkpoint-500"
    theirs.mkdir()
    for name in ("pytorch_lora_weights.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (theirs / name).write_bytes(b"")
    with pytest.raises(UserError) as refused:
        checkpoint_folders.choose(named, tmp_path)
    assert "it was written by accelerate, as in diffusers' script of this name" in str(refused.value)
    assert f"--init_adapter {theirs} starts a new run from its LoRA" in str(refused.value)
    small(tmp_path, 2)
    found = checkpoint_folders.choose("latest", tmp_path)
    assert found.folder == tmp_path / "checkpoint-2"
    assert len(found.skipped) == 1


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_reason(tmp_path):
    with pytest.raises(
        UserError,
        match=r"it has no manifest\.json, so it is not a checkpoint of this program or was never finished",
    ):
        checkpoint_folders.choose(str(tmp_path), tmp_path)
