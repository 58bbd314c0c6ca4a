"""Optimizers: each takes the steps that it promises, and after a resume the very steps that it would have taken."""

import copy
import importlib.util
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dreambooth.errors import UserError
from dreambooth.files import checkpoint_folders
from dreambooth.options.training import OPTIMIZERS, OptimizerOptions
from dreambooth.training import checkpoints, optimizers
from dreambooth.training.optimizers import Group
from tests import tiny
from tests.adapters.test_adapters import TARGETS, Models, load_models, packed
from tests.training.test_checkpoints import rewrite

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule-free": "schedulefree"}


def needs(*names: str) -> Any:
    """A parameter of a test, which is skipped where a package for it is not installed."""
    lacking = [
        PACKAGES[name]
        for name in names
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None
    ]
    return pytest.param(
        *names, marks=pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")
    )


EACH = [needs(name) for name in OPTIMIZERS]
COUNTING = [needs("adamw8bit"), needs("prodigy"), needs("adafactor")]
PRODIGY, SCHEDULE_FREE = needs("prodigy"), needs("schedule-free")
# Of a group: what is set before each step, and what Prodigy writes for whoever wants to look at it.
NOT_READ = ("params", "lr", "d_hat", "d_denom")
RATES = {
    "prodigy": (400.0, 400.0)
}  # it takes one rate for all; with this one its estimate grows in the third step
DECAYS = (1e-2, 1e-1)


def flags(optimizer: str, **more: Any) -> OptimizerOptions:
    return OptimizerOptions(**{"optimizer": optimizer, **more})


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    return load_models(tiny_base)


class Run:
    """Adapters on fresh models, a group for each, and steps with made-up gradients, of one sign more often than not: Prodigy's estimate grows."""

    def __init__(
        self, loaded: Models, optimizer: str, *, rank: int = 4, seed: int = 7, alpha: float = 1.0, **more: Any
    ):
        models = copy.deepcopy(loaded)
        self.components = [
            tiny.inject_lora(n, models[n], rank=rank, dropout=0.0, targets=TARGETS[n], seed=seed)
            for n in models
        ]
        self.alpha = alpha  # what the adapter file has its lora_B multiplied by
        self.named = [pair for component in self.components for pair in component.named_parameters()]
        self.names = {id(parameter): name for name, parameter in self.named}
        self.options = flags(optimizer, **more)
        rates = RATES.get(optimizer, (1e-2, 1e-3))
        settings = zip(self.components, rates, DECAYS, strict=True)
        groups = [
            Group(c.name, [p for _, p in c.named_parameters()], rate, decay) for c, rate, decay in settings
        ]
        self.optimizer = optimizers.make(self.options, groups)

    def step(self, number: int, factor: float = 1.0) -> None:
        optimizers.set_learning_rate(self.optimizer, factor)
        draw = torch.Generator().manual_seed(number)
        for _, parameter in self.named:
            parameter.grad = torch.randn(parameter.shape, generator=draw) + 1
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            self.step(number, factor=number / 8)

    def save(self, folder: Path, step: int) -> Path:
        moments = optimizers.state_tensors(self.optimizer, self.names)
        if optimizers.needs_raw_parameters(self.optimizer) or self.alpha != 1:
            moments |= checkpoints.raw_parameters(self.named)
        with optimizers.evaluated(self.optimizer):
            kept = [parameter.detach().clone() for _, parameter in self.named]
            for name, parameter in self.named:
                parameter.data *= self.alpha if "lora_B" in name else 1
            adapter = packed(self.components)
            for (_, parameter), value in zip(self.named, kept, strict=True):
                parameter.data.copy_(value)
        state = {"optimizer": optimizers.state_numbers(self.optimizer, self.names)}
        return checkpoints.save(folder, step, adapter, moments, state, limit=None)

    def restore(self, folder: Path) -> None:
        checkpoints.restore(checkpoint_folders.read(folder), self.components, self.optimizer)

    def everything(self) -> dict[str, Any]:
        """All that the next step depends on, copied."""
        found: dict[str, Any] = {name: parameter.detach().clone() for name, parameter in self.named}
        for group in self.optimizer.param_groups:
            found |= {f"{group['name']} {key}": value for key, value in group.items() if key not in NOT_READ}
        for parameter, state in self.optimizer.state.items():
            found |= {
                f"{self.names[id(parameter)]} {key}": copy.deepcopy(value) for key, value in state.items()
            }
        return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
            assert value.dtype == other[key].dtype, key
        else:
            assert value == other[key], key
            assert type(value) is type(other[key]), key


# --- there and back


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4, "adam_beta1": 0.8}],
    ids=["", "warm-up"],
)
@pytest.mark.parametrize("name", EACH)
def test_a_resumed_run_takes_the_steps_of_an_unbroken_one_bit_for_bit(name, more, loaded, tmp_path):
    """Rank 64, so that bitsandbytes keeps some moments in 8 bits and others in 32."""
    straight, first = Run(loaded, name, rank=64, **more), Run(loaded, name, rank=64, **more)
    straight.steps(1, 6)
    first.steps(1, 3)
    folder = first.save(tmp_path, 3)
    second = Run(loaded, name, rank=64, seed=8, **more)
    second.restore(folder)
    assert_same(second.everything(), first.everything())
    second.steps(4, 6)
    assert_same(second.everything(), straight.everything())


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_the_optimizer_s_state_counts(name, loaded, tmp_path):
    """The control of the test above: every number has changed, and with the parameters alone the next step is another one."""
    first, second = Run(loaded, name), Run(loaded, name)
    first.steps(1, 3)
    before, after = (optimizers.state_numbers(run.optimizer, run.names)["groups"] for run in (second, first))
    assert all(
        after[group][field] != value for group, values in before.items() for field, value in values.items()
    )
    for (_, parameter), (_, value) in zip(second.named, first.named, strict=True):
        parameter.data.copy_(value.data)
    first.step(4)
    second.step(4)
    assert not all(
        torch.equal(one, other) for (_, one), (_, other) in zip(first.named, second.named, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_what_a_checkpoint_restored_is_what_it_writes_again(name, loaded, tmp_path):
    first, second = Run(loaded, name, rank=64), Run(loaded, name, rank=64, seed=8)
    first.steps(1, 2)
    (tmp_path / "again").mkdir()
    folder = first.save(tmp_path, 2)
    second.restore(folder)
    again = second.save(tmp_path / "again", 2)
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_a_run_whose_adapter_file_is_scaled_goes_on_from_its_own_parameters(name, loaded, tmp_path):
    first, second = Run(loaded, name, alpha=2.0), Run(loaded, name, alpha=2.0, seed=8)
    first.steps(1, 2)
    second.restore(first.save(tmp_path, 2))
    assert_same(second.everything(), first.everything())


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_a_run_that_has_not_stepped_yet_is_restored_where_fp16_may_have_skipped_its_steps(
    name, loaded, tmp_path
):
    first, second = Run(loaded, name), Run(loaded, name, seed=8)
    folder = first.save(tmp_path, 2)
    with pytest.raises(UserError, match="lacks"):
        second.restore(folder)
    rewrite(folder, "state.json", lambda data: json.dumps({**json.loads(data), "grad_scaler": {}}).encode())
    second.restore(folder)
    first.steps(1, 2)
    second.steps(1, 2)
    assert_same(second.everything(), first.everything())


def test_a_checkpoint_of_adamw_from_before_there_were_others_is_taken(loaded, tmp_path):
    first, second, other = (
        Run(loaded, "adamw"),
        Run(loaded, "adamw", seed=8),
        Run(loaded, "adafactor"),
    )
    first.steps(1, 2)
    folder = first.save(tmp_path, 2)
    rewrite(folder, "state.json", lambda data: json.dumps({"step": 2}).encode())
    second.restore(folder)
    assert_same(second.everything(), first.everything())
    with pytest.raises(
        UserError,
        match=r"state\.json has no state of --optimizer adafactor: it was written with another optimizer$",
    ):
        other.restore(folder)


@pytest.mark.parametrize("name", [needs("adamw8bit")])
def test_8_bit_moments_are_stored_in_8_bits(name, loaded, tmp_path):
    run = Run(loaded, name, rank=64)
    run.step(1)
    stored = load((run.save(tmp_path, 1) / "optimizer.safetensors").read_bytes())
    parameters = dict(run.named)
    for key, tensor in stored.items():
        name, _, field = key.rpartition("|")
        if field in ("state1", "state2"):
            assert tensor.dtype == (torch.uint8 if parameters[name].numel() >= 4096 else torch.float32)
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint8, torch.float32}
    assert {key.rpartition("|")[2] for key in stored} == {"state1", "state2", "absmax1", "absmax2"}


# --- steps


@pytest.mark.parametrize("name", EACH)
def test_each_group_has_its_learning_rate_and_weight_decay(name, loaded):
    run = Run(loaded, name)
    for component, group, rate, decay in zip(
        run.components, run.optimizer.param_groups, RATES.get(name, (1e-2, 1e-3)), DECAYS, strict=True
    ):
        assert [id(p) for p in group["params"]] == [id(p) for _, p in component.named_parameters()]
        assert (group["name"], group["lr"], group["initial_lr"], group["weight_decay"]) == (
            component.name,
            rate,
            rate,
            decay,
        )
    rates = optimizers.set_learning_rate(run.optimizer, 0.25)
    assert (
        rates
        == {g["name"]: g["lr"] for g in run.optimizer.param_groups}
        == {g["name"]: g["initial_lr"] / 4 for g in run.optimizer.param_groups}
    )
    optimizers.set_learning_rate(run.optimizer, 1.0)
    assert [g["lr"] for g in run.optimizer.param_groups] == [
        g["initial_lr"] for g in run.optimizer.param_groups
    ]


@pytest.mark.parametrize("name", EACH)
def test_weight_decay_is_decoupled_in_each_group(name):
    """Without a gradient a parameter shrinks by rate x decay in a step, and one without decay stays."""
    decayed, kept = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = optimizers.make(flags(name), [Group("a", [decayed], 0.1, 0.5), Group("b", [kept], 0.1, 0.0)])
    for parameter in (decayed, kept):
        parameter.grad = torch.zeros(4, 4)
    if (
        name == "prodigy"
    ):  # it does nothing where nothing has a gradient, and decays by its estimate, here still 1e-6 x the bias correction
        kept.grad = torch.full((4, 4), 1e-30)
        expected = 1 - 1e-6 * 0.1 * (1 - 0.999) ** 0.5 / (1 - 0.9) * 0.5
    elif name == "schedule-free":
        expected = 1 - 0.1 * 0.5 * (1 - 0.9 * 0)  # the first average is the first point
    else:
        expected = 1 - 0.1 * 0.5
    optimizer.step()
    assert decayed.detach().flatten().tolist() == pytest.approx([expected] * 16, rel=1e-6)
    if name != "prodigy":
        assert torch.equal(kept, torch.ones(4, 4))


@pytest.mark.parametrize("name", EACH)
def test_the_loss_falls_on_a_small_problem(name):
    draw = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(64, 8, generator=draw), torch.randn(8, 8, generator=draw) / 3
    down = torch.nn.Parameter(torch.randn(8, 8, generator=draw) / 8)
    up = torch.nn.Parameter(torch.zeros(8, 8))
    rate = 1.0 if name == "prodigy" else 0.02
    optimizer = optimizers.make(flags(name), [Group("down", [down], rate, 0.0), Group("up", [up], rate, 0.0)])

    def loss() -> torch.Tensor:
        return (inputs @ down.T @ up.T - inputs @ wanted).square().mean()

    before = loss().item()
    for _ in range(200):
        optimizers.set_learning_rate(optimizer, 1.0)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    with optimizers.evaluated(optimizer):
        assert loss().item() < before / 5


@pytest.mark.parametrize("name", EACH)
def test_adam_s_flags_reach_the_optimizer(name):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    chosen = {
        "prodigy_beta3": 0.5,
        "prodigy_decouple": False,
        "prodigy_use_bias_correction": False,
        "prodigy_safeguard_warmup": False,
    }
    optimizer = optimizers.make(
        flags(name, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, **chosen),
        [Group("a", [parameter], 0.1, 0.0)],
    )
    (group,) = optimizer.param_groups
    if name == "adafactor":
        assert not any(group[key] for key in ("scale_parameter", "relative_step", "warmup_init", "beta1"))
    else:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    if name == "prodigy":
        assert [group[key] for key in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")] == [
            0.5,
            False,
            False,
            False,
        ]


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_a_dropped_group_is_trained_no_more_and_the_rest_resumes_bit_for_bit(name, loaded, tmp_path):
    def dropped(run: Run) -> list[torch.Tensor]:
        optimizers.drop(run.optimizer, "text_encoder")
        return [
            parameter.detach().clone()
            for parameter_name, parameter in run.named
            if parameter_name.startswith("text_encoder.")
        ]

    straight, first = Run(loaded, name), Run(loaded, name)
    straight.steps(1, 2)
    frozen = dropped(straight)
    straight.steps(3, 5)
    assert [group["name"] for group in straight.optimizer.param_groups] == ["unet"]
    assert {straight.names[id(p)].partition(".")[0] for p in straight.optimizer.state} == {"unet"}
    first.steps(1, 2)
    dropped(first)
    first.step(3, 3 / 8)
    second = Run(loaded, name, seed=8)
    dropped(second)
    second.restore(first.save(tmp_path, 3))
    assert_same(second.everything(), first.everything())
    second.steps(4, 5)
    assert_same(second.everything(), straight.everything())
    now = [
        parameter for parameter_name, parameter in second.named if parameter_name.startswith("text_encoder.")
    ]
    assert all(torch.equal(one, other) for one, other in zip(now, frozen, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_a_checkpoint_of_more_than_is_trained_now_is_refused(name, loaded, tmp_path):
    first, second = Run(loaded, name), Run(loaded, name)
    first.step(1)
    optimizers.drop(second.optimizer, "text_encoder")
    before = second.everything()
    with pytest.raises(UserError, match="text_encoder"):
        second.restore(first.save(tmp_path, 1))
    assert_same(second.everything(), before)


# --- the average


@pytest.mark.parametrize("name", EACH)
def test_after_a_look_at_the_adapter_training_goes_on_from_the_same_bits(name, loaded):
    run = Run(loaded, name)
    run.steps(1, 3)
    before = run.everything()
    inside: list[torch.Tensor] = []

    def look() -> None:
        with optimizers.evaluated(run.optimizer):
            inside.extend(parameter.detach().clone() for _, parameter in run.named)
            raise RuntimeError("even so")

    with pytest.raises(RuntimeError, match="even so"):
        look()
    assert_same(run.everything(), before)
    same = all(torch.equal(value, before[key]) for value, (key, _) in zip(inside, run.named, strict=True))
    assert same == (name != "schedule-free") == (not optimizers.needs_raw_parameters(run.optimizer))
    run.step(4)  # the schedule-free optimizer refuses steps outside of training mode


@pytest.mark.parametrize("name", [SCHEDULE_FREE])
def test_what_the_schedule_free_adapter_has_is_the_average_of_the_points(name, loaded):
    """With an even rate, of all of them alike; a dropped group keeps it."""
    run = Run(loaded, name)
    points: dict[str, list[torch.Tensor]] = {key: [] for key, _ in run.named}
    for number in range(1, 6):
        run.step(number)
        for key, parameter in run.named:
            points[key].append(run.optimizer.state[parameter]["z"].clone())
    means = {key: torch.stack(values).mean(dim=0) for key, values in points.items()}
    with optimizers.evaluated(run.optimizer):
        for key, parameter in run.named:
            torch.testing.assert_close(parameter.detach(), means[key], rtol=1e-4, atol=1e-6)
    off = [
        key
        for key, parameter in run.named
        if not torch.allclose(parameter.detach(), means[key], rtol=1e-4, atol=1e-6)
    ]
    assert len(off) == len(run.named)
    optimizers.drop(run.optimizer, "text_encoder")
    for key, parameter in run.named:
        is_mean = torch.allclose(parameter.detach(), means[key], rtol=1e-4, atol=1e-6)
        assert is_mean == key.startswith("text_encoder.")


@pytest.mark.parametrize("name", [SCHEDULE_FREE])
@pytest.mark.parametrize(
    ("scheduler", "expected"), [("constant", [1, 1, 1, 1]), ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1])]
)
def test_the_schedule_free_optimizer_warms_up_by_itself(scheduler, expected, name, loaded):
    run = Run(loaded, name, lr_scheduler=scheduler, lr_warmup_steps=3)
    assert optimizers.schedules_itself(run.options)
    for number, share in enumerate(expected):
        rates = optimizers.set_learning_rate(run.optimizer, 1.0)
        assert rates == pytest.approx({"unet": 1e-2 * share, "text_encoder": 1e-3 * share})
        run.step(number)
        assert rates == {group["name"]: group["scheduled_lr"] for group in run.optimizer.param_groups}


def test_the_others_leave_warming_up_to_the_schedule():
    assert not optimizers.schedules_itself(flags("adamw", lr_scheduler="constant_with_warmup"))
    assert not optimizers.schedules_itself(flags("adafactor", lr_scheduler="constant_with_warmup"))


# --- what does not fit


@pytest.mark.slow
@pytest.mark.parametrize(("own", "theirs"), [needs(*pair) for pair in itertools.permutations(OPTIMIZERS, 2)])
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
    """With one line, and nothing is changed."""
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


WRONG: list[Any] = ["\x1b[2J", None, True, [], float("nan"), 10**400]


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
    for field, right in fields.items():
        for value in WRONG:
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
    """Each field of a parameter missing, of another shape and of another dtype; a field, a parameter too many; a parameter missing."""
    first, second = Run(loaded, name, rank=64), Run(loaded, name, rank=64, seed=8)
    first.step(1)
    folder = first.save(tmp_path, 1)
    whole = load((folder / "optimizer.safetensors").read_bytes())
    parameter = next(key for key, value in first.named if value.numel() >= 4096)
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
    refused(f"is damaged: {parameter} lacks everything", {}, fields)
    put_tensors(folder, whole)
    second.restore(folder)
    assert_same(second.everything(), first.everything())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", SCHEDULE_FREE])
def test_parameters_beside_the_adapter_are_all_there_and_fit(name, loaded, tmp_path):
    """Of one component some are not enough; none is right for AdamW, whose adapter has them, and not for the schedule-free optimizer."""
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
