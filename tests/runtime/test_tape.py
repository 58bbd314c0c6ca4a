"""The recorder that stands in for CUDA graphs on CPUs: it notices what a graph would get wrong."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dreambooth.runtime.graphs import Tensors
from tests.tape import TapeRecorder


def recorded(function: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """A function that replays `function` and returns its outputs, copied to memory from outside."""
    outputs = {name: value.clone() for name, value in function().items()}

    def compute() -> None:
        for name, value in function().items():
            outputs[name].copy_(value)

    replay = TapeRecorder().record(compute)

    def replayed() -> Tensors:
        replay()
        return outputs

    return replayed


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_replay_computes_forward_and_backward_pass_anew(is_checkpointed: bool) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 8, 3)
    model = torch.nn.Sequential(convolution, torch.nn.GroupNorm(2, 8), torch.nn.Dropout(0.5))
    images = torch.randn(2, 3, 8, 8)

    def step() -> Tensors:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            if is_checkpointed:
                hidden = checkpoint(model[:2], images, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = model[:2](images)
            features = model[2](hidden).flatten(2)
            attended = F.scaled_dot_product_attention(features, features, features)
        loss = attended.float().square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return {"loss": loss.detach(), "gradients": torch.cat([g.flatten() for g in gradients])}

    replayed = recorded(step)
    for seed in range(3):
        with torch.no_grad():
            images.copy_(torch.randn(2, 3, 8, 8))
            convolution.weight.mul_(1.5)
        torch.manual_seed(seed)
        launched, state = step(), torch.get_rng_state()
        torch.manual_seed(seed)
        outputs = replayed()
        assert all(torch.equal(outputs[name], launched[name]) for name in launched)
        assert torch.equal(torch.get_rng_state(), state)


def test_recording_computes_nothing() -> None:
    counter, total = torch.zeros(3), torch.zeros(())

    def count() -> None:
        counter.add_(1)
        counter[1:].mul_(2)
        total.copy_(counter.sum() + torch.rand(()))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    replay = TapeRecorder().record(count)
    assert counter.tolist() == [0, 0, 0]
    assert total == 0
    assert torch.equal(torch.get_rng_state(), state)
    replay()
    assert counter.tolist() == [1, 2, 2]
    assert 5 <= total < 6
    replay()
    assert counter.tolist() == [2, 6, 6]


def test_optimizer_step_is_replayed() -> None:
    def trained(replays: bool) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(torch.arange(4.0))
        rate = torch.tensor(0.1)
        optimizer = torch.optim.AdamW([parameter], lr=rate, fused=True)
        parameter.grad = torch.zeros(4)
        take: Callable[[], object] = optimizer.step
        for number in range(4):
            if number == 1 and replays:
                take = TapeRecorder().record(optimizer.step)
            parameter.grad.fill_(number - 1.5)
            rate.fill_(0.1 / (1 + number))
            take()
        return [parameter.detach(), *optimizer.state[parameter].values()]

    assert all(map(torch.equal, trained(True), trained(False)))


def test_what_python_computed_stays_as_it_was_recorded() -> None:
    values, scale, tables = torch.ones(2), [1.0], {"rate": torch.ones(())}
    replayed = recorded(lambda: {"scaled": values * scale[0] * tables["rate"]})
    assert replayed()["scaled"].tolist() == [1, 1]
    scale[0] = 3.0
    previous, tables["rate"] = tables["rate"], torch.full((), 5.0)
    assert replayed()["scaled"].tolist() == [1, 1]
    previous.fill_(2)  # a change in place is seen
    assert replayed()["scaled"].tolist() == [2, 2]


def test_tensor_that_was_freed_is_noticed() -> None:
    tables = {"rate": torch.ones(())}
    values = torch.ones(2)
    replayed = recorded(lambda: {"scaled": values * tables["rate"]})
    replayed()
    del tables["rate"]
    with pytest.raises(AssertionError, match="freed"):
        replayed()


def test_what_was_not_copied_to_memory_from_outside_is_lost() -> None:
    values, kept = torch.ones(2), []
    replay = TapeRecorder().record(lambda: kept.append(values + 1))
    assert kept[0].isnan().all()
    replay()
    assert kept[0].isnan().all()


def test_numbers_of_the_host_may_be_used() -> None:
    values = torch.ones(2)
    assert recorded(lambda: {"double": values * torch.tensor(2.0)})()["double"].tolist() == [2, 2]


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.sum().item(),
        lambda values: bool(values.sum() > 0),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: torch.equal(values, values),
        lambda values: values.masked_select(values > 0),
        lambda values: torch.unique(values),
        lambda values: torch.linalg.solve(torch.diag(values), values),
        lambda values: values.cpu(),
        lambda values: values.tolist(),
        lambda values: values.numpy(),
        lambda values: torch.tensor(1.0, device=values.device),
    ],
)
@pytest.mark.parametrize("method", ["record", "rehearse"])
def test_host_reads_are_refused(read: Callable[[torch.Tensor], object], method: str) -> None:
    values = torch.ones(3)
    with pytest.raises(RuntimeError, match="capturing"):
        getattr(TapeRecorder(), method)(lambda: read(values))


def test_seeding_is_refused() -> None:
    with pytest.raises(RuntimeError, match="capturing: manual_seed"):
        TapeRecorder().record(lambda: torch.manual_seed(0))
