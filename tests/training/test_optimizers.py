"""Optimizers: each takes the steps of its papers, and after a resume the same steps as without a break."""

import json

import pytest
import torch
from safetensors.torch import load

from dreambooth.io.errors import UserError
from dreambooth.training import optimizers
from dreambooth.training.optimizers import Group
from tests.checkpointing import rewrite
from tests.training.optimizing import DECAYS, EACH, RATES, SCHEDULE_FREE, Run, assert_same, flags, needs

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
    """The control of the test above: all numbers have changed; parameters alone give another next step."""
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
    with pytest.raises(UserError, match=r"lacks|has no state of"):
        second.restore(folder)
    rewrite(folder, "state.json", lambda data: json.dumps({**json.loads(data), "grad_scaler": {}}).encode())
    second.restore(folder)
    first.steps(1, 2)
    second.steps(1, 2)
    assert_same(second.everything(), first.everything())


@pytest.mark.slow
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
    """A parameter without a gradient shrinks by rate x decay in a step; one without decay stays."""
    decayed, kept = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = optimizers.make(flags(name), [Group("a", [decayed], 0.1, 0.5), Group("b", [kept], 0.1, 0.0)])
    for parameter in (decayed, kept):
        parameter.grad = torch.zeros(4, 4)
    if name == "prodigy":
        # It does nothing without any gradient, and decays by its estimate: here 1e-6 x the bias correction.
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


@pytest.mark.slow
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
    """At a constant rate all points weigh alike; a dropped group keeps the average."""
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
