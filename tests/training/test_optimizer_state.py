"""State of an optimizer that does not fit: refused before anything is changed."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dreambooth.io.errors import UserError
from dreambooth.options.optimizer import OPTIMIZERS
from tests.checkpointing import rewrite
from tests.training.optimizing import EACH, PRODIGY, SCHEDULE_FREE, Run, assert_same, needs

COUNTING = [needs("adamw8bit"), needs("prodigy"), needs("adafactor")]


# --- what does not fit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "theirs"),
    [needs(*pair) for pair in zip(OPTIMIZERS, [*OPTIMIZERS[1:], OPTIMIZERS[0]], strict=True)],
)
def test_the_state_of_one_optimizer_is_refused_by_another(own, theirs, loaded, tmp_path):
    first, second = Run(loaded, theirs), Run(loaded, own, seed=8)
    first.step(1)
    folder = first.save(tmp_path, 1)
    before = second.everything()
    with pytest.raises(UserError) as refused:
        second.restore(folder)
    expected = (
        f"{folder / 'state.json'} has the state of --optimizer {theirs}; this run has --optimizer {own}"
    )
    assert str(refused.value) == f"--resume_from_checkpoint: {expected}"
    assert_same(second.everything(), before)


def assert_refused(run: Run, folder: Path, reason: str) -> None:
    """The message has one line, and nothing is changed."""
    run.step(9, factor=1e-3)
    before = run.everything()
    with pytest.raises(UserError) as refused:
        run.restore(folder)
    assert reason in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)
    assert_same(run.everything(), before)


def edit_numbers(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    def changed(data: bytes) -> bytes:
        state = json.loads(data)
        change(state["optimizer"])
        return json.dumps(state).encode()

    rewrite(folder, "state.json", changed)


def put_number(folder: Path, table: str, name: str, field: str, value: Any) -> None:
    def put(numbers: dict[str, Any]) -> None:
        numbers[table][name][field] = value

    edit_numbers(folder, put)


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    rewrite(folder, "optimizer.safetensors", lambda _: save(tensors))


WRONG: list[Any] = ["\x1b[2J", None, True, [], float("nan"), 10**30]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTING)
def test_a_count_of_steps_that_is_none_is_refused(name, loaded, tmp_path):
    first, second = Run(loaded, name), Run(loaded, name, seed=8)
    first.step(1)
    folder = first.save(tmp_path, 1)
    name_of_one = first.named[0][0]
    for value in [*WRONG, 1.5, -1, 2**31]:
        put_number(folder, "parameters", name_of_one, "step", value)
        assert_refused(
            second,
            folder,
            f"state.json is damaged: step of {name_of_one} must be a whole number, at least 0, got ",
        )
    put_number(folder, "parameters", name_of_one, "step", 1)
    second.restore(folder)
    assert_same(second.everything(), first.everything())


@pytest.mark.slow
@pytest.mark.parametrize("name", [PRODIGY, SCHEDULE_FREE])
def test_a_group_s_number_that_is_none_is_refused(name, loaded, tmp_path):
    first, second = Run(loaded, name), Run(loaded, name, seed=8)
    first.step(1)
    folder = first.save(tmp_path, 1)
    fields = json.loads((folder / "state.json").read_text())["optimizer"]["groups"]["unet"]
    assert fields.keys() >= {"k"}
    # every field and every wrong value at least once
    for (field, right), value in zip(itertools.cycle(fields.items()), WRONG, strict=False):
        put_number(folder, "groups", "unet", field, value)
        assert_refused(second, folder, f"state.json is damaged: {field} of group unet must be a")
        put_number(folder, "groups", "unet", field, right)
    second.restore(folder)
    assert_same(second.everything(), first.everything())


NUMBERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no kind": (lambda numbers: numbers.pop("kind"), "its optimizer lacks kind"),
    "a kind of no kind": (
        lambda numbers: numbers.update(kind=["\x1b"]),
        "has the state of --optimizer ['\\x1b']; this run has --optimizer prodigy",
    ),
    "more": (
        lambda numbers: numbers.update({"\x1bmore": 1}),
        "its optimizer has '\\x1bmore', which does not belong there",
    ),
    "groups of no kind": (
        lambda numbers: numbers.update(groups=[]),
        "its groups of the optimizer must be a table, got []",
    ),
    "a group missing": (
        lambda numbers: numbers["groups"].pop("unet"),
        "its groups of the optimizer lacks unet",
    ),
    "a group more": (
        lambda numbers: numbers["groups"].update(more={}),
        "its groups of the optimizer has more, which does not belong there",
    ),
    "a group of no kind": (
        lambda numbers: numbers["groups"].update(unet=1.0),
        "its group unet must be a table, got 1.0",
    ),
    "a number missing": (
        lambda numbers: numbers["groups"]["unet"].pop("d_max"),
        "its group unet lacks d_max",
    ),
    "a number more": (
        lambda numbers: numbers["groups"]["unet"].update(lr=1.0),
        "its group unet has lr, which does not belong there",
    ),
    "a parameter missing": (
        lambda numbers: numbers["parameters"].popitem(),
        "its parameters of the optimizer lacks ",
    ),
    "a parameter more": (
        lambda numbers: numbers["parameters"].update(more={"step": 1}),
        "has more, which does not belong there",
    ),
    "a parameter of no kind": (
        lambda numbers: numbers["parameters"].update(dict.fromkeys(numbers["parameters"], 1)),
        "must be a table, got 1",
    ),
    "no parameters": (
        lambda numbers: numbers.update(parameters={}),
        "its parameters of the optimizer lacks ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("name", [PRODIGY])
def test_numbers_that_the_program_cannot_have_written_are_refused(name, what, loaded, tmp_path):
    first = Run(loaded, name)
    first.step(1)
    folder = first.save(tmp_path, 1)
    change, reason = NUMBERS[what]
    edit_numbers(folder, change)
    assert_refused(Run(loaded, name, seed=8), folder, reason)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_tensors_that_are_not_exactly_the_optimizer_s_are_refused(name, loaded, tmp_path):
    """A field missing, of another shape or dtype; a field or a parameter too many; a parameter missing."""
    # only large parameters have 8-bit moments
    rank, least = (64, 4096) if name == "adamw8bit" else (4, 1)
    first, second = Run(loaded, name, rank=rank), Run(loaded, name, rank=rank, seed=8)
    first.step(1)
    folder = first.save(tmp_path, 1)
    whole = load((folder / "optimizer.safetensors").read_bytes())
    parameter = next(key for key, value in first.named if value.numel() >= least)
    fields = [key for key in whole if key.startswith(f"{parameter}|")]
    assert len(fields) >= 2

    def refused(reason: str, more: dict[str, torch.Tensor], lacks: Sequence[str] = ()) -> None:
        put_tensors(folder, {key: tensor for key, tensor in (whole | more).items() if key not in lacks})
        assert_refused(second, folder, reason)

    for key in fields:
        refused(f"optimizer.safetensors is damaged: {parameter} lacks {key.rpartition('|')[2]}", {}, [key])
        refused(f"has {key} of shape ", {key: torch.zeros(3, 5, dtype=whole[key].dtype)})
        refused("torch.float16", {key: whole[key].to(torch.float16)})
    refused(
        f"has '{parameter}|\\x1b', which --optimizer {name} does not have",
        {f"{parameter}|\x1b": torch.zeros(1)},
    )
    refused(
        "has optimizer state for 'unet.\\x1b', which this run does not train",
        {"unet.\x1b|exp_avg": torch.zeros(1)},
    )
    refused(f"is damaged: it has no state of {parameter}", {}, fields)
    put_tensors(folder, whole)
    second.restore(folder)
    assert_same(second.everything(), first.everything())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", SCHEDULE_FREE])
def test_parameters_beside_the_adapter_are_all_there_and_fit(name, loaded, tmp_path):
    """A component has all or none. AdamW needs none: the adapter has them. Schedule-free AdamW needs all."""
    first, second = Run(loaded, name, alpha=2.0), Run(loaded, name, alpha=2.0, seed=8)
    first.step(1)
    folder = first.save(tmp_path, 1)
    whole = load((folder / "optimizer.safetensors").read_bytes())
    raw = [f"{key}|param" for key, _ in first.named]
    assert whole.keys() >= set(raw)

    put_tensors(folder, {key: tensor for key, tensor in whole.items() if key != raw[0]})
    assert_refused(second, folder, f"{first.named[0][0]} lacks param")
    put_tensors(folder, whole | {raw[0]: torch.zeros(3, 5)})
    assert_refused(second, folder, f"has {raw[0]} of shape (3, 5)")
    put_tensors(folder, whole | {raw[0]: whole[raw[0]].half()})
    assert_refused(second, folder, "torch.float16")
    put_tensors(folder, whole | {"unet.\x1b|param": torch.zeros(3)})
    assert_refused(second, folder, "has a parameter 'unet.\\x1b', which this run does not train")
    put_tensors(folder, whole | {raw[0]: torch.full_like(whole[raw[0]], float("nan"))})
    assert_refused(second, folder, "are not finite")
    put_tensors(folder, {key: tensor for key, tensor in whole.items() if key not in raw})
    if name == "schedule-free":
        assert_refused(second, folder, "lacks param")
    else:
        second.restore(folder)
