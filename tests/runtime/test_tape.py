"""The recorder that stands in for CUDA graphs on CPUs: it notices what a graph would get wrong."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dreambooth.runtime.graphs import Tensors
from tests.tape import TapeRecorder


def both(function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], Tensors]]:
    """(outputs of the call, a function that replays and returns the outputs)."""
    launched = {name: value.clone() for name, value in function().items()}
    outputs, replay = TapeRecorder().record(function)

    def replayed() -> Tensors:
        replay()
        return outputs

    return launched, replayed


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

    _, replayed = both(step)
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
    counter = torch.zeros(3)

    def count() -> Tensors:
        counter.add_(1)
        counter[1:].mul_(2)
        return {"sum": counter.sum() + torch.rand(())}

    torch.manual_seed(0)
    state = torch.get_rng_state()
    outputs, replay = TapeRecorder().record(count)
    assert counter.tolist() == [0, 0, 0]
    assert outputs["sum"].isnan()
    assert torch.equal(torch.get_rng_state(), state)
    replay()
    assert counter.tolist() == [1, 2, 2]
    assert 5 <= outputs["sum"] < 6
    replay()
    assert counter.tolist() == [2, 6, 6]


def test_optimizer_step_is_replayed() -> None:
    def trained(replays: bool) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(torch.arange(4.0))
        rate = torch.tensor(0.1)
        optimizer = torch.optim.AdamW([parameter], lr=rate, fused=True)
        parameter.grad = torch.zeros(4)

        def step() -> Tensors:
            optimizer.step()
            return {}

        take: Callable[[], object] = step
        for number in range(4):
            if number == 1 and replays:
                take = TapeRecorder().record(step)[1]
            parameter.grad.fill_(number - 1.5)
            rate.fill_(0.1 / (1 + number))
            take()
        return [parameter.detach(), *optimizer.state[parameter].values()]

    assert all(map(torch.equal, trained(True), trained(False)))


def test_what_python_computed_stays_as_it_was_recorded() -> None:
    values, scale, tables = torch.ones(2), [1.0], {"rate": torch.ones(())}
    launched, replayed = both(lambda: {"scaled": values * scale[0] * tables["rate"]})
    assert torch.equal(replayed()["scaled"], launched["scaled"])
    scale[0] = 3.0
    previous, tables["rate"] = tables["rate"], torch.full((), 5.0)
    assert replayed()["scaled"].tolist() == [1, 1]
    previous.fill_(2)  # a change in place is seen
    assert replayed()["scaled"].tolist() == [2, 2]


def test_tensor_that_was_freed_is_noticed() -> None:
    tables = {"rate": torch.ones(())}
    values = torch.ones(2)
    _, replayed = both(lambda: {"scaled": values * tables["rate"]})
    replayed()
    del tables["rate"]
    with pytest.raises(AssertionError, match="freed"):
        replayed()


def test_recording_may_overwrite_the_outputs_of_later_ones() -> None:
    values, recorder = torch.ones(2), TapeRecorder()
    _, replay_first = recorder.record(lambda: {"value": values + 1})
    outputs, replay_second = recorder.record(lambda: {"value": values + 2})
    replay_second()
    assert outputs["value"].tolist() == [3, 3]
    replay_first()
    assert outputs["value"].isnan().all()


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
        lambda values: values.cpu(),
        lambda values: values.tolist(),
        lambda values: values.numpy(),
        lambda values: torch.tensor(1.0, device=values.device),
    ],
)
@pytest.mark.parametrize("method", ["record", "rehearse"])
def test_host_reads_are_refused(read: Callable[[torch.Tensor], object], method: str) -> None:
    values = torch.ones(3)

    def function() -> Tensors:
        read(values)
        return {}

    with pytest.raises(RuntimeError, match="capturing"):
        getattr(TapeRecorder(), method)(function)


def test_seeding_is_refused() -> None:
    def function() -> Tensors:
        torch.manual_seed(0)
        return {}

    with pytest.raises(RuntimeError, match="capturing: manual_seed"):
        TapeRecorder().record(function)
