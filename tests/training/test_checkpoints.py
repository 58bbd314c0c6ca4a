"""Checkpoints: what is restored is what was saved, and there is a whole one whatever goes wrong while the next is written."""

import collections
import copy
import errno
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dreambooth.adapters.inject import Component
from dreambooth.errors import UserError
from dreambooth.files import checkpoint_folders
from dreambooth.training import checkpoints, optimizers
from tests.adapters.test_adapters import Models, inject, load_models, packed, trained
from tests.faults import checkpoint_faults

STATE = {"seed": 5, "train_batch_size": 2, "slots": 1}
FILES = {"pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
ROOT = Path(__file__).parent.parent.parent
FLAG = "--resume_from_checkpoint"


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    return load_models(tiny_base)


class Run:
    """Adapters on fresh models and an optimizer that takes steps with made-up gradients."""

    def __init__(
        self,
        loaded: Models,
        *,
        rank: int = 4,
        seed: int = 7,
        names: tuple[str, ...] = ("unet", "text_encoder"),
    ):
        self.components = trained(inject(copy.deepcopy({name: loaded[name] for name in names}), rank, seed))
        pairs = [pair for component in self.components for pair in component.named_parameters()]
        self.names = {id(parameter): name for name, parameter in pairs}
        self.optimizer = torch.optim.AdamW([parameter for _, parameter in pairs], lr=1e-2)

    def step(self, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def moments(self) -> dict[str, torch.Tensor]:
        return optimizers.state_tensors(self.optimizer, self.names)

    def save(self, folder: Path, step: int, limit: int | None = None) -> Path:
        return checkpoints.save(folder, step, packed(self.components), self.moments(), STATE, limit=limit)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint must bring back, copied."""
        adapter = {
            f"{component.name}.{key}": tensor
            for component in self.components
            for key, tensor in component.state_dict().items()
        }
        return {key: tensor.detach().clone() for key, tensor in (adapter | self.moments()).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[key]) and tensor.dtype == other[key].dtype for key, tensor in one.items()
    )


@pytest.fixture
def run(loaded) -> Run:
    made = Run(loaded)
    made.step(1)
    made.step(2)
    return made


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A checkpoint of step 2."""
    return run.save(tmp_path, 2)


def small(output_dir: Path, step: int, *, limit: int | None = None, mark: int = 0) -> Path:
    """A checkpoint without models: its files can be told apart by step and mark."""
    moments = {"unet.a|exp_avg": torch.tensor([step, mark])}
    return checkpoints.save(
        output_dir, step, f"adapter {step} {mark}".encode(), moments, {**STATE, "mark": mark}, limit=limit
    )


def content(folder: Path) -> tuple[int, int]:
    """(step, mark) of a whole checkpoint that `small` wrote; fails if it is not whole."""
    assert {path.name for path in folder.iterdir()} == FILES
    state = read_state(folder)
    found = (state["step"], state["mark"])
    assert (folder / "pytorch_lora_weights.safetensors").read_text() == f"adapter {found[0]} {found[1]}"
    assert load((folder / "optimizer.safetensors").read_bytes())["unet.a|exp_avg"].tolist() == list(found)
    return found


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def change(path: Path) -> None:
    """Damage that leaves name and size."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def read_state(folder: Path) -> dict[str, Any]:
    return checkpoints.read_state(checkpoint_folders.read(folder))


def restore(folder: Path, components: list[Component], optimizer: torch.optim.Optimizer) -> None:
    checkpoints.restore(checkpoint_folders.read(folder), components, optimizer)


def latest(output_dir: Path) -> Path | None:
    return checkpoint_folders.choose("latest", output_dir).folder


def steps(output_dir: Path) -> list[int]:
    return [step for step, _ in checkpoint_folders.list_checkpoints(output_dir)]


# --- there and back


def test_adapter_and_optimizer_come_back_bit_for_bit(run, loaded, tmp_path):
    wanted = run.tensors()
    folder = run.save(tmp_path, 2)
    other = Run(loaded, seed=8)
    assert not equal(other.tensors(), wanted)
    restore(folder, other.components, other.optimizer)
    assert equal(other.tensors(), wanted)
    assert len(wanted) == 4 * len(run.names)  # each parameter, its two moments and its count of steps
    assert {key.rpartition("|")[2] for key in run.moments()} == {"step", "exp_avg", "exp_avg_sq"}


def test_the_steps_after_a_restore_are_those_of_an_unbroken_run(run, loaded, tmp_path):
    other = Run(loaded, seed=8)
    restore(run.save(tmp_path, 2), other.components, other.optimizer)
    for number in (3, 4):
        run.step(number)
        other.step(number)
    assert equal(other.tensors(), run.tensors())


def test_moments_count(run, loaded):
    """The control of the test above: with the adapter alone the next step is another one."""
    other = Run(loaded, seed=8)
    for component, saved in zip(other.components, run.components, strict=True):
        component.load_state_dict(saved.state_dict())
    run.step(3)
    other.step(3)
    assert not equal(other.tensors(), run.tensors())


def test_training_on_does_not_change_a_checkpoint(run, loaded, tmp_path):
    """What was read from a file must not be the file."""
    folder = run.save(tmp_path, 2)
    before = {name: (folder / name).read_bytes() for name in FILES}
    other = Run(loaded, seed=8)
    restore(folder, other.components, other.optimizer)
    other.step(3)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_the_state_comes_back_with_its_step(run, tmp_path):
    assert read_state(run.save(tmp_path, 2)) == {**STATE, "step": 2}


def test_what_run_it_is_comes_back_from_the_manifest(tmp_path):
    identity = {
        "data": {"photos": 3, 5: [1.5, None]},
        "versions": ("2.13", "0.8"),
        "prompt": "a \u00e9 \ud800",
    }
    folder = checkpoints.save(tmp_path, 2, b"adapter", {}, STATE, limit=None, identity=identity)
    content = checkpoint_folders.read(folder)
    assert content.identity == json.loads(json.dumps(identity))
    assert (content.step, content.folder) == (2, folder)
    assert content.fingerprint == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_the_manifest_lists_size_and_sha256_of_every_other_file(tmp_path):
    folder = small(tmp_path, 2)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed.keys() == FILES - {"manifest.json"}
    for name, entry in listed.items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert checkpoint_folders.size(folder) == sum(len((folder / name).read_bytes()) for name in FILES)


def test_a_checkpoint_holds_no_pickle(run, tmp_path):
    """Pickle runs code when it is read; safetensors and JSON do not."""
    folder = run.save(tmp_path, 2)
    assert names(folder) == FILES
    for path in folder.iterdir():
        data = path.read_bytes()
        assert path.suffix in (".safetensors", ".json")
        assert not data.startswith((b"\x80", b"PK"))
    load((folder / "pytorch_lora_weights.safetensors").read_bytes())
    load((folder / "optimizer.safetensors").read_bytes())
    json.loads((folder / "state.json").read_text())


def test_the_same_state_gives_the_same_bytes(run, tmp_path):
    (tmp_path / "again").mkdir()
    first, again = run.save(tmp_path, 2), run.save(tmp_path / "again", 2)
    for name in FILES:
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_files_have_the_mode_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o022)
    try:
        folder = small(tmp_path, 2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


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
    """It is left to be looked at, and is no reason to remove a whole one."""
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
    """A run that goes on from an older checkpoint comes by the newer ones again, and they are the same in every byte."""
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
    """What run it was is compared when it goes on."""
    for run in ("one", "other"):
        folder = checkpoints.save(tmp_path, 2, b"adapter", {}, STATE, limit=None, identity={"run": run})
    assert checkpoint_folders.read(folder).identity == {"run": "other"}
    assert names(tmp_path) == {"checkpoint-2"}


def test_a_damaged_checkpoint_of_the_same_step_is_kept_aside(tmp_path):
    for _ in range(3):
        change(small(tmp_path, 2) / "state.json")
    assert content(small(tmp_path, 2, limit=1)) == (2, 0)
    assert names(tmp_path) == {"checkpoint-2", ".bad-step-2", ".bad-step-2-2", ".bad-step-2-3"}


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("a file"), Path.mkdir, lambda path: path.symlink_to("nowhere")]
)
def test_whatever_has_the_name_of_a_checkpoint_is_moved_not_lost(make, tmp_path):
    make(tmp_path / "checkpoint-2")
    assert content(small(tmp_path, 2)) == (2, 0)
    assert names(tmp_path) == {"checkpoint-2", ".bad-step-2"}


def test_an_unfinished_checkpoint_is_never_found(tmp_path, monkeypatch):
    """While it is written its folder's name has no "checkpoint" in it: other programs take every such name for a finished one."""
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
    """Files, then the manifest that vouches for them, then their folder, then the name, then the folder with the name, then the rest goes.

    Another order would hold against a kill, and not against a power cut.
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
    """Even where it would have replaced one, and where the limit would have removed one: the last whole checkpoint is never removed."""
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
    """The save says so or was done; the newest whole one is found; the next save works."""
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
    """Some disks take everything and keep something else."""
    small(tmp_path, 2)
    small(tmp_path, 4)
    write = os.write
    for step in (4, 6):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(len(data))))
            with pytest.raises(checkpoint_folders.SaveFailed, match="what was written reads back damaged"):
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
    """Half as much again as the last checkpoint took must be free."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1500, 1500))
    assert checkpoint_folders.room_note(tmp_path, 1000) is None
    note = checkpoint_folders.room_note(tmp_path, 1001)
    assert (
        note
        == f"{tmp_path} has 1,500 bytes free; the last checkpoint took 1,001, the next may not fit. Make room"
    )


# --- when the process dies


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    """What the fault report counts; in a process without torch, which forks faster."""
    words = [sys.executable, "-m", "tests.faults.checkpoint_faults"]
    return json.loads(
        subprocess.run(
            words, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
        ).stdout.splitlines()[-1]
    )


@pytest.mark.slow
def test_whenever_the_process_is_killed_there_is_a_whole_checkpoint_and_it_is_found(counts):
    """Before each call to the file system and in the middle of each write, keeping 1, 2 and 3: saving a new step, one that is there, sweeping."""
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
    kept = {".bad-step-2", "logs", "checkpoint-old"}
    for name in leftovers | kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    (tmp_path / ".trash-link").symlink_to(tmp_path / "logs")
    assert set(checkpoint_folders.sweep(tmp_path)) == leftovers | {".replaced-step-2", ".trash-link"}
    assert names(tmp_path) == kept | {"checkpoint-2", ".replaced-step-4"}
    assert names(tmp_path / "logs") == {"half"}
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
    """It would write over what may still be saved, and nobody would notice."""
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
    """Not one that happens to lie in the folder where the command was typed."""
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
    """Its optimizer is a pickle, and its state cannot go on exactly; its adapter can be used."""
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


# --- damage


def test_any_damage_to_the_newest_is_noticed_and_the_one_before_is_chosen(counts):
    """A bit, the end, a part in zeros, all of it, the file itself; in every file."""
    assert counts["damaged"] >= 200
    assert counts["detected"] == counts["damaged_skipped"] == counts["damaged"]


def test_the_count_of_detected_damage_can_be_less(tmp_path, monkeypatch):
    """The control of the test above: names and sizes alone let a flipped bit pass."""
    monkeypatch.setattr(
        checkpoint_folders, "verify", lambda folder: ["missing"] if names(folder) != FILES else []
    )
    assert checkpoint_faults.damage_newest(tmp_path, count=48)["damaged_skipped"] < 48


def make_extra_folder(folder: Path) -> None:
    (folder / "more").mkdir()


def make_link(folder: Path) -> None:
    """To the very bytes that belong there: what it points to can change later."""
    (folder / "state.json").rename(folder.parent / "elsewhere.json")
    (folder / "state.json").symlink_to(folder.parent / "elsewhere.json")


def make_pipe(folder: Path) -> None:
    """Reading one would wait for ever."""
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def make_folder(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda folder: (folder / "state\x1b[2J.json").write_text(""),
            "'state\\x1b[2J.json' does not belong there",
        ),
        (make_extra_folder, "'more' does not belong there"),
        (make_link, "state.json is a symbolic link"),
        (make_pipe, "state.json is not a regular file"),
        (make_folder, "state.json is not a regular file"),
        (lambda folder: (folder / "state.json").write_text(""), "state.json has 0 bytes instead of "),
    ],
    ids=["file more", "folder more", "link", "pipe", "folder", "empty"],
)
def test_a_checkpoint_is_exactly_its_plain_files(damage, reason, tmp_path):
    folder = small(tmp_path, 2)
    damage(folder)
    (problem,) = checkpoint_folders.verify(folder)
    assert problem.startswith(reason)
    with pytest.raises(UserError, match=re.escape(f"{FLAG}: {folder} cannot be used: {reason}")):
        checkpoint_folders.read(folder)


def test_every_problem_is_named_at_once(tmp_path):
    folder = small(tmp_path, 2)
    change(folder / "state.json")
    (folder / "optimizer.safetensors").unlink()
    (folder / "more").write_text("")
    assert checkpoint_folders.verify(folder) == [
        "'more' does not belong there",
        "optimizer.safetensors is missing",
        "state.json is not as it was written (its SHA-256 differs)",
    ]


def test_a_checkpoint_under_another_step_s_name_is_refused(tmp_path):
    """It would go on from a step that it is not of."""
    folder = small(tmp_path, 2)
    for name in ("checkpoint-4", "my_best"):
        folder = folder.rename(tmp_path / name)
        assert checkpoint_folders.verify(folder) == ["its manifest is that of checkpoint-2"]


def test_a_link_to_a_checkpoint_is_refused_with_its_target(tmp_path):
    """Pruning must not take away what lies elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    folder = small(tmp_path / "elsewhere", 2)
    (tmp_path / "checkpoint-2").symlink_to(folder)
    assert checkpoint_folders.verify(tmp_path / "checkpoint-2") == [
        f"it is a symbolic link; name the folder itself, {folder.resolve()}"
    ]


def sealed(**changes: Any) -> Callable[[bytes], bytes]:
    """The manifest with other values and a hash of itself that holds."""

    def with_changes(data: bytes) -> bytes:
        body = {**json.loads(data), **changes}
        del body["sha256_of_the_rest"]
        return checkpoint_folders._sealed(body)

    return with_changes


ENTRY = {"size": 1, "sha256": "0" * 64}
MANIFESTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is damaged"),
    "not text": (lambda data: b"\xff\xfe", "is damaged"),
    "list": (lambda data: b"[]", "is damaged"),
    "nested too deep": (lambda data: b"[" * 100_000, "is damaged"),
    "without its end": (lambda data: data[:-1], "is damaged"),
    "step changed": (lambda data: data.replace(b'"step": 2', b'"step": 3'), "is damaged"),
    "setting changed": (lambda data: data.replace(b'"seed": 5', b'"seed": 7'), "is damaged"),
    "key twice": (lambda data: data.replace(b'"step": 2', b'"step": 2,\n "step": 2'), "is damaged"),
    "too large": (lambda data: data + b" " * 2**22, "bytes instead of at most"),
    "newer format": (sealed(format_version=2), "is of format 2; this program reads up to 1"),
    "format of no kind": (sealed(format_version="1"), "is damaged"),
    "no step": (sealed(step=None), "lacks step, identity or files"),
    "yes for a step": (sealed(step=True), "lacks step, identity or files"),
    "identity of no kind": (sealed(identity=[]), "lacks step, identity or files"),
    "no files": (sealed(files={}), "lacks step, identity or files"),
    "path for a name": (
        sealed(files={"../checkpoint-1/state.json": ENTRY}),
        "has an entry '../checkpoint-1/state.json' that is none",
    ),
    "itself": (sealed(files={"manifest.json": ENTRY}), "has an entry 'manifest.json' that is none"),
    "size below 0": (
        sealed(files={"state.json": {**ENTRY, "size": -1}}),
        "has an entry 'state.json' that is none",
    ),
    "hash of no kind": (
        sealed(files={"state.json": {**ENTRY, "sha256": "0"}}),
        "has an entry 'state.json' that is none",
    ),
    "entry of no kind": (sealed(files={"state.json": 5}), "has an entry 'state.json' that is none"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_is_as_it_was_written_and_well_formed(what, tmp_path):
    folder = checkpoints.save(tmp_path, 2, b"adapter", {}, STATE, limit=None, identity={"seed": 5})
    path, (damage, reason) = folder / "manifest.json", MANIFESTS[what]
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    (problem,) = checkpoint_folders.verify(folder)
    assert problem.startswith("manifest.json ")
    assert reason in problem


def test_what_was_checked_is_what_is_loaded(run, folder, loaded, monkeypatch):
    """Each file is read once: one that is exchanged after its hash was compared cannot come in."""
    wanted, opened, real = run.tensors(), collections.Counter[str](), os.open

    def count(path: Any, *rest: Any, **named: Any) -> int:
        opened[Path(path).name] += 1
        return real(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", count)
        read = checkpoint_folders.read(folder)
    assert opened == dict.fromkeys(FILES, 1)
    shutil.rmtree(folder)
    other = Run(loaded, seed=8)
    assert not equal(other.tensors(), wanted)
    checkpoints.restore(read, other.components, other.optimizer)
    assert equal(other.tensors(), wanted)
    assert checkpoints.read_state(read)["step"] == 2


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.slow
def test_a_pickle_in_a_checkpoint_is_never_loaded(folder, loaded, tmp_path):
    """Under any name: as a file too many, in the place of one, and in the place of one with hashes that hold."""
    marker = tmp_path / "marker"
    trap = pickle.dumps(Trap(marker))
    pickle.loads(trap)
    assert marker.exists()  # it does work
    marker.unlink()
    refusals = 0
    more = {
        "optimizer.bin",
        "optimizer.pt",
        "scheduler.bin",
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "pytorch_model.bin",
        "more.json",
    }
    for name, kind in [
        *itertools.product(FILES, ("in place", "with hashes")),
        *itertools.product(more, ("too many",)),
    ]:
        output_dir = tmp_path / f"{name} {kind}"
        shutil.copytree(folder, output_dir / "checkpoint-2")
        if kind == "with hashes" and name != "manifest.json":
            rewrite(output_dir / "checkpoint-2", name, lambda data: trap)
        else:
            (output_dir / "checkpoint-2" / name).write_bytes(trap)
        other = Run(loaded, seed=8)
        for attempt in (
            lambda output_dir=output_dir: checkpoint_folders.choose("latest", output_dir),
            lambda output_dir=output_dir, other=other: restore(
                output_dir / "checkpoint-2", other.components, other.optimizer
            ),
            lambda output_dir=output_dir: read_state(output_dir / "checkpoint-2"),
        ):
            try:
                attempt()
            except UserError:
                refusals += 1
    assert not marker.exists()
    assert refusals >= 2 * (len(FILES) + len(more))


def test_the_product_has_no_reader_of_pickles():
    """Nor any of the functions, of torch and accelerate, that are one inside."""
    reader = r"pickle|torch\.load|(import|from)\s+(marshal|shelve|dill|joblib)|\.load_state\("
    files = [
        *ROOT.glob("*.py"),
        *(
            path
            for folder in ("dreambooth", "picturebook", "benchmarks")
            for path in (ROOT / folder).rglob("*.py")
        ),
    ]
    assert len(files) > 10
    assert [str(path.relative_to(ROOT)) for path in files if re.search(reader, path.read_text())] == []
    assert re.search(reader, Path(__file__).read_text())


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"step": 3}', b"[" * 100_000]
)
def test_a_state_that_the_program_cannot_have_written_is_refused_by_name(data, tmp_path):
    folder = small(tmp_path, 2)
    rewrite(folder, "state.json", lambda _: data)
    with pytest.raises(UserError) as refused:
        read_state(folder)
    assert f"{FLAG}: {folder / 'state.json'} is damaged" in str(refused.value)


def without_one(moments: dict[str, torch.Tensor]) -> None:
    del moments[next(iter(moments))]


def without_one_parameter(moments: dict[str, torch.Tensor]) -> None:
    for field in ("step", "exp_avg", "exp_avg_sq"):
        del moments[f"{sorted({key.rpartition('|')[0] for key in moments})[0]}|{field}"]


def of_another_shape(moments: dict[str, torch.Tensor]) -> None:
    key = next(key for key in moments if key.endswith("|exp_avg"))
    moments[key] = torch.zeros(2, 3)


def of_an_unknown_parameter(moments: dict[str, torch.Tensor]) -> None:
    moments["unet.elsewhere.lora_A.weight|exp_avg"] = torch.zeros(2, 3)


def not_finite(moments: dict[str, torch.Tensor]) -> None:
    moments[next(key for key in moments if key.endswith("|exp_avg"))].view(-1)[0] = float("nan")


DAMAGE = {
    "optimizer cut": lambda folder: rewrite(folder, "optimizer.safetensors", lambda data: data[:-50]),
    "optimizer empty": lambda folder: rewrite(folder, "optimizer.safetensors", lambda data: b""),
    "optimizer missing": lambda folder: rewrite(folder, "optimizer.safetensors", lambda data: None),
    "adapter cut": lambda folder: rewrite(
        folder, "pytorch_lora_weights.safetensors", lambda data: data[:-50]
    ),
    "adapter missing": lambda folder: rewrite(folder, "pytorch_lora_weights.safetensors", lambda data: None),
    "a moment missing": lambda folder: edit(folder, "optimizer.safetensors", without_one),
    "a parameter's moments missing": lambda folder: edit(
        folder, "optimizer.safetensors", without_one_parameter
    ),
    "all moments missing": lambda folder: edit(folder, "optimizer.safetensors", dict.clear),
    "a moment of another shape": lambda folder: edit(folder, "optimizer.safetensors", of_another_shape),
    "a moment of no parameter": lambda folder: edit(folder, "optimizer.safetensors", of_an_unknown_parameter),
    "a moment not finite": lambda folder: edit(folder, "optimizer.safetensors", not_finite),
    "the second adapter incomplete": lambda folder: edit(
        folder, "pytorch_lora_weights.safetensors", without_one_of_the_text_encoder
    ),
    "the adapter not finite": lambda folder: edit(
        folder, "pytorch_lora_weights.safetensors", lambda t: next(iter(t.values())).fill_(float("inf"))
    ),
    "the adapter changed on the disk": lambda folder: change(folder / "pytorch_lora_weights.safetensors"),
    "the optimizer changed on the disk": lambda folder: change(folder / "optimizer.safetensors"),
    "the optimizer gone from the disk": lambda folder: (folder / "optimizer.safetensors").unlink(),
}


def without_one_of_the_text_encoder(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if key.startswith("text_encoder."))]


def rewrite(folder: Path, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """The same checkpoint with another file, or without it, and hashes that hold: as a mistake of the program would write it."""
    content = checkpoint_folders.read(folder)
    files = dict(content.files)
    changed = change(files.pop(name))
    shutil.rmtree(folder)
    checkpoint_folders.publish(
        folder.parent, content.step, files if changed is None else {**files, name: changed}, {}, limit=None
    )


def edit(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    def changed(data: bytes) -> bytes:
        tensors = load(data)
        change(tensors)
        return save(tensors)

    rewrite(folder, name, changed)


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(what, folder, loaded):
    """Half of a checkpoint would train on from a state that no run was ever in."""
    DAMAGE[what](folder)
    other = Run(loaded, seed=8)
    other.step(9)
    before = other.tensors()
    with pytest.raises(UserError) as refused:
        restore(folder, other.components, other.optimizer)
    assert equal(other.tensors(), before)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"names": ("unet",)}, "holds an adapter of text_encoder and unet; this run trains unet"),
        (
            {"names": ("text_encoder",)},
            "holds an adapter of text_encoder and unet; this run trains text_encoder",
        ),
        ({"rank": 8}, "of shape ("),
    ],
    ids=["UNet alone", "text encoder alone", "another rank"],
)
def test_a_checkpoint_of_another_adapter_is_refused_before_anything_is_changed(
    settings, reason, folder, loaded
):
    other = Run(loaded, **settings)
    before = other.tensors()
    with pytest.raises(UserError) as refused:
        restore(folder, other.components, other.optimizer)
    assert reason in str(refused.value)
    assert equal(other.tensors(), before)


def test_a_checkpoint_of_less_than_is_trained_is_refused(loaded, tmp_path):
    alone = Run(loaded, names=("unet",))
    alone.step(1)
    both = Run(loaded)
    with pytest.raises(UserError, match="holds an adapter of unet; this run trains text_encoder and unet"):
        restore(alone.save(tmp_path, 1), both.components, both.optimizer)
