"""Recorded functions on a GPU: what only real CUDA graphs can show."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dreambooth.runtime.environment import deterministic
from dreambooth.runtime.graphs import CudaRecorder, Graphs, Tensors


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def graphs(device: torch.device, notes: list[str]) -> Graphs:
    return Graphs(device, None, notes.append)


def network(device: torch.device) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.GroupNorm(4, 32), torch.nn.SiLU()
    return torch.nn.Sequential(*layers, torch.nn.Dropout(0.3), torch.nn.Conv2d(32, 4, 3)).to(device)


def loss_and_gradients(model: torch.nn.Module, dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    def function(inputs: Tensors) -> Tensors:
        with deterministic(inputs["images"].device):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                features = model(inputs["images"]).flatten(2)
                attended = F.scaled_dot_product_attention(features, features, features, dropout_p=0.1)
            loss = attended.float().square().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        return {"loss": loss.detach(), "gradients": torch.cat([g.flatten() for g in gradients])}

    return function


def equal(outputs: Tensors, expected: Tensors) -> bool:
    return all(torch.equal(outputs[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [40, 64])
def test_gradients_of_attention_at_full_size_are_the_same_at_every_call(
    device: torch.device, dtype: torch.dtype, width: int
) -> None:
    """By default their sums over 4,096 tokens have another order at every call."""
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(3, 1, 8, 4096, width, generator=generator).to(device, dtype).unbind()
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    gradients = []
    for _ in range(3):
        with deterministic(device):
            loss = F.scaled_dot_product_attention(query, key, value).float().square().sum()
            gradients.append(torch.autograd.grad(loss, (query, key, value)))
    assert all(torch.equal(a, b) for later in gradients[1:] for a, b in zip(gradients[0], later, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_replays_have_the_bits_of_launches_with_dropout_in_every_shape(
    graphs: Graphs, notes: list[str], dtype: torch.dtype
) -> None:
    function = loss_and_gradients(network(graphs.device), dtype)
    replayed = graphs.replayed(function)
    for seed in range(6):
        images = torch.randn(
            1 + seed % 2, 4, 16 + seed % 2, 16, generator=torch.Generator().manual_seed(seed)
        )
        torch.manual_seed(seed)
        launched = function({"images": images.to(graphs.device)})
        random_state = torch.cuda.get_rng_state(graphs.device)
        torch.manual_seed(seed)
        assert equal(replayed({"images": images}), launched)
        assert torch.equal(torch.cuda.get_rng_state(graphs.device), random_state)
    assert graphs.reason is None
    assert notes == []
    assert len(replayed.recordings) == 2


def test_outputs_survive_replays_of_other_functions(graphs: Graphs) -> None:
    """Graphs share memory: the temporary tensors of one may lie where another one keeps its outputs."""

    def first(inputs: Tensors) -> Tensors:
        values = inputs["x"]
        for _ in range(8):
            values = values + torch.ones(1024, 1024, device=graphs.device)
        return {"sum": values.sum()}

    functions = [first, *[lambda inputs, k=k: {"x": inputs["x"] * k} for k in range(2, 8)]]
    replayed = [graphs.replayed(function) for function in functions]
    x = torch.arange(1024.0, device=graphs.device).expand(1024, 1024).contiguous()
    for function in replayed:
        for _ in range(2):  # the second call is recorded
            function({"x": x})
    outputs = [function({"x": x})["x"] for function in replayed[1:]]
    for _ in range(3):
        replayed[0]({"x": x})
    assert all(torch.equal(output, x * k) for k, output in enumerate(outputs, start=2))
    assert graphs.reason is None


def test_forgotten_recordings_are_made_anew_and_their_memory_is_given_back(graphs: Graphs) -> None:
    replayed = graphs.replayed(lambda inputs: {"x": (inputs["x"] @ inputs["x"]).relu() + 1})
    x = torch.ones(2048, 2048)
    for _ in range(2):  # recorded before memory is read: libraries keep a workspace for its stream
        expected = replayed({"x": x})["x"].cpu()
    graphs.forget()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        for _ in range(3):
            outputs = replayed({"x": x})["x"]
            assert torch.equal(outputs.cpu(), expected)
        assert replayed.recordings
        graphs.forget()  # while the outputs are alive
    del outputs
    graphs.forget()
    assert torch.cuda.memory_reserved() <= before + 2**21
    assert graphs.reason is None


def reads_a_number(inputs: Tensors) -> Tensors:
    return {"x": inputs["x"] / inputs["x"].sum().item()}


def waits_for_the_device(inputs: Tensors) -> Tensors:
    """The rehearsal does not notice it, and the recording fails."""
    doubled = inputs["x"] * 2
    torch.cuda.synchronize()
    return {"x": doubled + torch.rand_like(doubled)}


def raises_while_recorded(inputs: Tensors) -> Tensors:
    doubled = F.dropout(inputs["x"] * 2)
    if torch.cuda.is_current_stream_capturing():
        raise KeyError("of this test")
    return {"x": doubled}


@pytest.mark.parametrize("function", [reads_a_number, waits_for_the_device, raises_while_recorded])
def test_after_a_recording_that_failed_the_process_goes_on_launched(
    graphs: Graphs, notes: list[str], function: Callable[[Tensors], Tensors]
) -> None:
    other = graphs.replayed(lambda inputs: {"x": F.dropout(inputs["x"])})
    stream, x = torch.cuda.current_stream(graphs.device), torch.ones(64, device=graphs.device)
    for _ in range(3):
        other({"x": x})  # a recording that was made before
    torch.manual_seed(3)
    expected = [function({"x": x})["x"] for _ in range(2)]
    torch.manual_seed(3)
    failing = graphs.replayed(function)
    assert all(torch.equal(failing({"x": x})["x"], value) for value in expected)
    # what a failed recording may leave behind: its stream, the allocator's, and the generator's state
    assert graphs.reason is not None
    assert len(notes) == 1
    assert torch.cuda.current_stream(graphs.device) == stream
    torch.cuda.empty_cache()
    torch.manual_seed(4)
    drawn = F.dropout(x), torch.rand(8, device=graphs.device)
    torch.manual_seed(4)
    assert torch.equal(other({"x": x})["x"], drawn[0])
    assert torch.equal(torch.rand(8, device=graphs.device), drawn[1])
    torch.cuda.synchronize()
    # the next run of this process records again
    again = Graphs(graphs.device, None, notes.append)
    anew = again.replayed(lambda inputs: {"x": F.dropout(inputs["x"])})
    for _ in range(3):
        torch.manual_seed(4)
        assert torch.equal(anew({"x": x})["x"], drawn[0])
    assert again.reason is None


def test_recorder_leaves_the_stream_and_the_debug_mode_as_they_were(device: torch.device) -> None:
    recorder, x = CudaRecorder(device), torch.ones(8, device=device)
    stream, mode = torch.cuda.current_stream(device), torch.cuda.get_sync_debug_mode()
    with pytest.raises(RuntimeError, match="synchronizing"):
        recorder.rehearse(lambda: {"x": x.cpu()})
    assert torch.cuda.current_stream(device) == stream
    assert torch.cuda.get_sync_debug_mode() == mode
