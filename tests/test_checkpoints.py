"""Checkpoints: what is restored is what was saved, and there is a whole one whatever goes wrong while the next is written."""

import copy
import errno
import itertools
import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dreambooth import adapter_files, checkpoints
from dreambooth.errors import UserError
from tests.test_adapters import Models, inject, load_models, packed, trained

STATE = {"seed": 5, "train_batch_size": 2, "slots": 1}
FILES = {"pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json"}
FLAG = "--resume_from_checkpoint"


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    return load_models(tiny_base)


class Run:
    """Adapters on fresh models and an optimizer that takes steps with made-up gradients."""

    def __init__(self, loaded: Models, *, rank: int = 4, seed: int = 7, names: tuple[str, ...] = ("unet", "text_encoder")):
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
        return checkpoints.optimizer_tensors(self.optimizer, self.names)

    def save(self, folder: Path, step: int, limit: int | None = None) -> Path:
        return checkpoints.save(folder, step, packed(self.components), self.moments(), STATE, limit=limit)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint must bring back, copied."""
        adapter = {f"{component.name}.{key}": tensor for component in self.components for key, tensor in component.state_dict().items()}
        return {key: tensor.detach().clone() for key, tensor in (adapter | self.moments()).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) and tensor.dtype == other[key].dtype for key, tensor in one.items())


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
    """A checkpoint without models: its three files can be told apart by step and mark."""
    moments = {"unet.a|exp_avg": torch.tensor([step, mark])}
    return checkpoints.save(output_dir, step, f"adapter {step} {mark}".encode(), moments, {**STATE, "mark": mark}, limit=limit)


def content(folder: Path) -> tuple[int, int]:
    """(step, mark) of a whole checkpoint that `small` wrote; fails if it is not whole."""
    assert {path.name for path in folder.iterdir()} == FILES
    state = checkpoints.read_state(folder)
    found = (state["step"], state["mark"])
    assert (folder / "pytorch_lora_weights.safetensors").read_text() == f"adapter {found[0]} {found[1]}"
    assert load((folder / "optimizer.safetensors").read_bytes())["unet.a|exp_avg"].tolist() == list(found)
    return found


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def steps(output_dir: Path) -> list[int]:
    return [step for step, _ in checkpoints.list_checkpoints(output_dir)]


# --- there and back


def test_adapter_and_optimizer_come_back_bit_for_bit(run, loaded, tmp_path):
    wanted = run.tensors()
    folder = run.save(tmp_path, 2)
    other = Run(loaded, seed=8)
    assert not equal(other.tensors(), wanted)
    checkpoints.restore(folder, other.components, other.optimizer)
    assert equal(other.tensors(), wanted)
    assert len(wanted) == 4 * len(run.names)  # each parameter, its two moments and its count of steps
    assert {key.rpartition("|")[2] for key in run.moments()} == {"step", "exp_avg", "exp_avg_sq"}


def test_the_steps_after_a_restore_are_those_of_an_unbroken_run(run, loaded, tmp_path):
    other = Run(loaded, seed=8)
    checkpoints.restore(run.save(tmp_path, 2), other.components, other.optimizer)
    for number in (3, 4):
        run.step(number)
        other.step(number)
    assert equal(other.tensors(), run.tensors())


def test_moments_count(run, loaded, tmp_path):
    """The control of the test above: with the adapter alone the next step is another one."""
    other = Run(loaded, seed=8)
    state, _ = adapter_files.read(run.save(tmp_path, 2) / adapter_files.ADAPTER_NAME)
    for component in other.components:
        component.load_state_dict(state[component.name])
    run.step(3)
    other.step(3)
    assert not equal(other.tensors(), run.tensors())


def test_training_on_does_not_change_a_checkpoint(run, loaded, tmp_path):
    """What was read from a file must not be the file."""
    folder = run.save(tmp_path, 2)
    before = {name: (folder / name).read_bytes() for name in FILES}
    other = Run(loaded, seed=8)
    checkpoints.restore(folder, other.components, other.optimizer)
    other.step(3)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_the_state_comes_back_with_its_step(run, tmp_path):
    assert checkpoints.read_state(run.save(tmp_path, 2)) == {**STATE, "step": 2}


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
    assert checkpoints.find("latest", tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(("limit", "kept"), [(None, [2, 4, 6, 8]), (1, [8]), (2, [6, 8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])])
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


def test_pruning_touches_nothing_that_is_no_checkpoint(tmp_path):
    others = {"logs", "checkpoint-old", "my-checkpoint-2", "run.yaml", "checkpoint-1"}
    for name in others - {"run.yaml"}:
        (tmp_path / name).mkdir()
    (tmp_path / "run.yaml").write_text("")
    for step in (2, 4):
        small(tmp_path, step, limit=1)
    assert names(tmp_path) == others | {"checkpoint-4"}


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    small(tmp_path, 2, mark=1)
    assert content(small(tmp_path, 2, mark=2)) == (2, 2)
    assert names(tmp_path) == {"checkpoint-2"}


def test_an_unfinished_checkpoint_is_never_found(tmp_path, monkeypatch):
    """While it is written its folder's name has no "checkpoint" in it: other programs take every such name for a finished one."""
    small(tmp_path, 2)
    seen: list[set[str]] = []
    write = adapter_files.write_atomically

    def look(path: Path, data: bytes) -> None:
        write(path, data)
        seen.append(names(tmp_path))
        assert steps(tmp_path) == [2]
        assert checkpoints.find("latest", tmp_path) == tmp_path / "checkpoint-2"

    monkeypatch.setattr(adapter_files, "write_atomically", look)
    small(tmp_path, 4)
    assert len(seen) == 3
    for there in seen:
        assert len(there) == 2
        assert [name for name in there if "checkpoint" in name] == ["checkpoint-2"]
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def test_a_folder_without_its_state_is_not_listed(tmp_path):
    small(tmp_path, 2)
    (small(tmp_path, 4) / "state.json").unlink()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert steps(tmp_path) == [2]


def test_a_missing_folder_has_no_checkpoints(tmp_path):
    assert checkpoints.list_checkpoints(tmp_path / "nowhere") == []


# --- when saving fails

ERRORS = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("step", [4, 6], ids=["again", "new"])
def test_a_save_that_fails_leaves_the_older_checkpoints_and_nothing_else(step, call, error, tmp_path, monkeypatch):
    """Even where the checkpoint that could not be written would have replaced one, and where the limit would have removed one."""
    for older in (2, 4):
        small(tmp_path, older)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            small(tmp_path, step, limit=1, mark=1)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    assert [content(path) for _, path in checkpoints.list_checkpoints(tmp_path)] == [(2, 0), (4, 0)]
    small(tmp_path, step, limit=1, mark=1)
    assert names(tmp_path) == {f"checkpoint-{step}"}


CALLS = ("mkdir", "open", "write", "fsync", "replace", "rename", "unlink", "rmdir")


def die_at(output_dir: Path, moment: int, step: int, limit: int) -> bool:
    """Save in a child process that is gone before its `moment`-th call to the file system; False if it got to the end."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a test that fails is better than one that hangs
        left = [moment]

        def counted(call: Any) -> Any:
            def counting(*arguments: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)  # no handler, no clean-up
                return call(*arguments, **named)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        small(output_dir, step, limit=limit, mark=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def deaths(tmp_path: Path, step: int) -> Iterator[tuple[int, Path]]:
    """(moment, output folder) for every moment at which saving `step` over checkpoints 2 and 4 can be cut short, then once not cut."""
    for moment in itertools.count():
        output_dir = tmp_path / str(moment)
        output_dir.mkdir()
        for older in (2, 4):
            small(output_dir, older)
        died = die_at(output_dir, moment, step, limit=1)
        if not died:
            assert moment > 10
            assert content(output_dir / f"checkpoint-{step}") == (step, 1)
        yield moment, output_dir
        if not died:
            return


@pytest.mark.parametrize("step", [4, 6], ids=["again", "new"])
def test_whenever_the_process_dies_the_newest_checkpoint_is_whole(step, tmp_path):
    """Killed before every single call to the file system."""
    for moment, output_dir in deaths(tmp_path, step):
        newest = checkpoints.find("latest", output_dir)
        assert newest is not None, f"nothing is left after call {moment}"
        assert content(newest), f"after call {moment}"


@pytest.mark.parametrize("step", [4, 6], ids=["again", "new"])
def test_whenever_the_process_dies_every_folder_that_is_called_a_checkpoint_is_one(step, tmp_path):
    """One that was being removed is not left half there under its name, where no later save would take it away."""
    for moment, output_dir in deaths(tmp_path, step):
        for name in names(output_dir):
            if "checkpoint" in name:
                assert names(output_dir / name) == FILES, f"{name} after call {moment}"
        small(output_dir, 8, limit=1)
        assert {name for name in names(output_dir) if "checkpoint" in name} == {"checkpoint-8"}, f"after call {moment}"


def test_leftovers_of_a_process_that_died_do_not_stop_the_next(tmp_path):
    """A container starts its program under the same process id every time."""
    leftover = tmp_path / f".tmp-step-2-{os.getpid()}"
    leftover.mkdir()
    (leftover / "half").write_text("")
    assert content(small(tmp_path, 2)) == (2, 0)
    assert names(tmp_path) == {"checkpoint-2"}


# --- which one is meant


def test_latest_is_none_where_there_is_none(tmp_path):
    assert checkpoints.find("latest", tmp_path) is None
    assert checkpoints.find("latest", tmp_path / "nowhere") is None


def test_a_checkpoint_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    there = small(tmp_path / "out", 4)
    assert checkpoints.find("checkpoint-4", tmp_path / "out") == there
    assert checkpoints.find(str(there), tmp_path / "other") == there
    monkeypatch.chdir(tmp_path)
    assert checkpoints.find("out/checkpoint-4", Path("out")) == Path("out/checkpoint-4")


def test_a_bare_name_means_the_run_s_own_checkpoint(tmp_path, monkeypatch):
    """Not one that happens to lie in the folder where the command was typed."""
    (tmp_path / "out").mkdir()
    small(tmp_path, 4)
    own = small(tmp_path / "out", 4, mark=1)
    monkeypatch.chdir(tmp_path)
    found = checkpoints.find("checkpoint-4", tmp_path / "out")
    assert found is not None
    assert found.resolve() == own


def test_an_unknown_name_lists_what_there_is(tmp_path):
    for step in (10, 2):
        small(tmp_path, step)
    with pytest.raises(UserError) as refused:
        checkpoints.find("checkpoint-99", tmp_path)
    assert str(refused.value) == f"{FLAG}: no checkpoint 'checkpoint-99'; {tmp_path} has: checkpoint-2, checkpoint-10"


def test_an_unknown_name_where_there_is_none_says_so(tmp_path):
    with pytest.raises(UserError, match=r"has: none$"):
        checkpoints.find("checkpoint-99", tmp_path)


def test_a_checkpoint_of_the_reference_script_is_refused_with_the_reason(tmp_path):
    """Its optimizer is a pickle, and its state cannot go on exactly."""
    theirs = tmp_path / "checkpoint-500"
    theirs.mkdir()
    for name in ("pytorch_lora_weights.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (theirs / name).write_bytes(b"")
    with pytest.raises(UserError) as refused:
        checkpoints.find("checkpoint-500", tmp_path)
    assert str(refused.value) == f"{FLAG}: {theirs} is not a checkpoint of this program: it was written by another program"
    assert checkpoints.find("latest", tmp_path) is None


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"is not a checkpoint of this program: it has no state\.json"):
        checkpoints.find(str(tmp_path), tmp_path)


# --- damage


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}"], ids=["empty", "cut", "not text", "list", "null", "no step"])
def test_a_damaged_state_is_refused_by_name(data, tmp_path):
    folder = small(tmp_path, 2)
    (folder / "state.json").write_bytes(data)
    with pytest.raises(UserError) as refused:
        checkpoints.read_state(folder)
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


DAMAGE = {
    "optimizer cut": lambda folder: cut(folder / "optimizer.safetensors"),
    "optimizer empty": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "optimizer missing": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "adapter cut": lambda folder: cut(folder / "pytorch_lora_weights.safetensors"),
    "adapter missing": lambda folder: (folder / "pytorch_lora_weights.safetensors").unlink(),
    "a moment missing": lambda folder: edit_moments(folder, without_one),
    "a parameter's moments missing": lambda folder: edit_moments(folder, without_one_parameter),
    "all moments missing": lambda folder: edit_moments(folder, dict.clear),
    "a moment of another shape": lambda folder: edit_moments(folder, of_another_shape),
    "a moment of no parameter": lambda folder: edit_moments(folder, of_an_unknown_parameter),
    "the second adapter incomplete": lambda folder: edit_adapter(folder),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def edit_moments(folder: Path, change: Any) -> None:
    path = folder / "optimizer.safetensors"
    moments = load(path.read_bytes())
    change(moments)
    path.write_bytes(save(moments))


def edit_adapter(folder: Path) -> None:
    path = folder / "pytorch_lora_weights.safetensors"
    tensors = load(path.read_bytes())
    del tensors[next(key for key in tensors if key.startswith("text_encoder."))]
    path.write_bytes(save(tensors))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(what, folder, loaded):
    """Half of a checkpoint would train on from a state that no run was ever in."""
    DAMAGE[what](folder)
    other = Run(loaded, seed=8)
    other.step(9)
    before = other.tensors()
    with pytest.raises(UserError) as refused:
        checkpoints.restore(folder, other.components, other.optimizer)
    assert equal(other.tensors(), before)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"names": ("unet",)}, "holds an adapter of text_encoder and unet; this run trains unet"),
        ({"names": ("text_encoder",)}, "holds an adapter of text_encoder and unet; this run trains text_encoder"),
        ({"rank": 8}, "of shape ("),
    ],
    ids=["UNet alone", "text encoder alone", "another rank"],
)
def test_a_checkpoint_of_another_adapter_is_refused_before_anything_is_changed(settings, reason, folder, loaded):
    other = Run(loaded, **settings)
    before = other.tensors()
    with pytest.raises(UserError) as refused:
        checkpoints.restore(folder, other.components, other.optimizer)
    assert reason in str(refused.value)
    assert equal(other.tensors(), before)


def test_a_checkpoint_of_less_than_is_trained_is_refused(loaded, tmp_path):
    alone = Run(loaded, names=("unet",))
    alone.step(1)
    both = Run(loaded)
    with pytest.raises(UserError, match="holds an adapter of unet; this run trains text_encoder and unet"):
        checkpoints.restore(alone.save(tmp_path, 1), both.components, both.optimizer)
