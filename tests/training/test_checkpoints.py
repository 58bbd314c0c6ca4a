"""Checkpoints: what was saved is restored; what does not fit is refused before anything is changed."""

import collections
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dreambooth.adapters.inject import Component
from dreambooth.files import checkpoint_folders
from dreambooth.io.errors import UserError
from dreambooth.training import checkpoints
from tests.checkpointing import (
    FILES,
    FLAG,
    ROOT,
    STATE,
    Run,
    change,
    names,
    read_state,
    rewrite,
    small,
)
from tests.faults import checkpoint_faults


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[key]) and tensor.dtype == other[key].dtype for key, tensor in one.items()
    )


def restore(folder: Path, components: list[Component], optimizer: torch.optim.Optimizer) -> None:
    checkpoints.restore(checkpoint_folders.read(folder), components, optimizer)


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
    """The control of the test above: the adapter alone gives another next step."""
    other = Run(loaded, seed=8)
    for component, saved in zip(other.components, run.components, strict=True):
        component.load_state_dict(saved.state_dict())
    run.step(3)
    other.step(3)
    assert not equal(other.tensors(), run.tensors())


def test_training_on_does_not_change_a_checkpoint(run, loaded, tmp_path):
    """Tensors that were read must not map the file."""
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


# --- damage


def test_the_count_of_detected_damage_can_be_less(tmp_path, monkeypatch):
    """The control of the test above: names and sizes alone let a flipped bit pass."""
    monkeypatch.setattr(
        checkpoint_folders,
        "verify",
        lambda folder: [] if folder.is_dir() and names(folder) == FILES else ["missing"],
    )
    assert checkpoint_faults.damage_newest(tmp_path, count=48)["damaged_skipped"] < 48


def make_extra_folder(folder: Path) -> None:
    (folder / "more").mkdir()


def make_link(folder: Path) -> None:
    """Even a link to the right bytes: its target can change later."""
    (folder / "state.json").rename(folder.parent / "elsewhere.json")
    (folder / "state.json").symlink_to(folder.parent / "elsewhere.json")


def make_pipe(folder: Path) -> None:
    """Reading a pipe would wait for ever."""
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
            "'state\\x1b[2J.json' is not in its manifest",
        ),
        (make_extra_folder, "'more' is not in its manifest"),
        (make_link, "state.json is a symbolic link"),
        (make_pipe, "state.json is not a regular file"),
        (make_folder, "state.json cannot be read (Is a directory)"),
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
        "'more' is not in its manifest",
        "optimizer.safetensors is missing",
        "state.json is not as it was written (its SHA-256 differs)",
    ]


def test_a_checkpoint_under_another_step_s_name_is_refused(tmp_path):
    """The run would be resumed at a wrong step."""
    folder = small(tmp_path, 2)
    for name in ("checkpoint-4", "my_best"):
        folder = folder.rename(tmp_path / name)
        assert checkpoint_folders.verify(folder) == ["its manifest is that of checkpoint-2"]


def test_a_link_to_a_checkpoint_is_refused_with_its_target(tmp_path):
    """Pruning must not remove files elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    folder = small(tmp_path / "elsewhere", 2)
    (tmp_path / "checkpoint-2").symlink_to(folder)
    assert checkpoint_folders.verify(tmp_path / "checkpoint-2") == [
        f"it is a symbolic link; name the folder itself, {folder.resolve()}"
    ]


def sealed(**changes: Any) -> Callable[[bytes], bytes]:
    """The manifest with other values and a correct hash of itself."""

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
        "has an invalid entry '../checkpoint-1/state.json'",
    ),
    "itself": (sealed(files={"manifest.json": ENTRY}), "has an invalid entry 'manifest.json'"),
    "size below 0": (
        sealed(files={"state.json": {**ENTRY, "size": -1}}),
        "has an invalid entry 'state.json'",
    ),
    "hash of no kind": (
        sealed(files={"state.json": {**ENTRY, "sha256": "0"}}),
        "has an invalid entry 'state.json'",
    ),
    "entry of no kind": (sealed(files={"state.json": 5}), "has an invalid entry 'state.json'"),
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
    """Each file is read once: replacing it after its hash was compared has no effect."""
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
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.slow
def test_a_pickle_in_a_checkpoint_is_never_loaded(folder, loaded, tmp_path):
    """Under any name: as an extra file, in place of another, and in place of another with correct hashes."""
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
    """Nor calls of torch's and accelerate's functions that unpickle."""
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
    assert re.search(reader, "torch.load(path)")


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


def edit(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    def changed(data: bytes) -> bytes:
        tensors = load(data)
        change(tensors)
        return save(tensors)

    rewrite(folder, name, changed)


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(what, folder, loaded):
    """Half of a checkpoint would be a state that no run was ever in."""
    DAMAGE[what](folder)
    other = Run(loaded, seed=8)
    other.step(9)
    before = other.tensors()
    with pytest.raises(UserError) as refused:
        restore(folder, other.components, other.optimizer)
    assert equal(other.tensors(), before)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
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
