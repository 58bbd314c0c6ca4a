"""Recorded functions: they have the bits of launched ones, and are launched where that cannot be had."""

import weakref
from collections.abc import Callable

import pytest
import torch

from dreambooth.runtime import graphs
from dreambooth.runtime.graphs import Graphs, Replay, Tensors
from tests.tape import TapeRecorder

CPU = torch.device("cpu")


class CountingTape(TapeRecorder):
    """Counts its recordings."""

    made = 0

    def record(self, function: Callable[[], object]) -> Replay:
        CountingTape.made += 1
        return super().record(function)


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> Graphs:
    """Graphs that record on this CPU."""
    monkeypatch.setattr(graphs, "can_record", lambda device: True)
    monkeypatch.setattr(CountingTape, "made", 0)
    return Graphs(CPU, None, notes.append, CountingTape)


def test_nothing_is_recorded_on_a_cpu(notes: list[str]) -> None:
    launched = Graphs(CPU, None, notes.append)
    function = launched.replayed(lambda inputs: {"sum": inputs["x"].sum()})
    assert launched.reason == "only CUDA GPUs have graphs"
    assert function({"x": torch.ones(3)})["sum"] == 3
    assert notes == []


def test_each_shape_is_recorded_once_and_replayed(taped: Graphs, notes: list[str]) -> None:
    calls = []

    def function(inputs: Tensors) -> Tensors:
        calls.append(inputs["x"].shape)
        return {"double": inputs["x"] * 2, "sum": inputs["x"].sum() + inputs["y"]}

    replayed = taped.replayed(function)
    for number in range(3):
        for size in (2, 5):
            x, y = torch.arange(float(size)) + number, torch.tensor(float(number))
            outputs = replayed({"x": x, "y": y})
            assert torch.equal(outputs["double"], x * 2)
            assert torch.equal(outputs["sum"], x.sum() + y)
    assert CountingTape.made == 2
    assert len(calls) == 8  # of each shape: launched twice, rehearsed and recorded
    assert taped.reason is None
    assert notes == []
    taped.forget()
    for _ in range(2):
        assert torch.equal(replayed({"x": torch.ones(2), "y": torch.ones(())})["sum"], torch.tensor(3.0))
    assert CountingTape.made == 3


def test_recording_leaves_no_trace_in_state_and_random_numbers(taped: Graphs) -> None:
    total = torch.zeros(3)

    def add(inputs: Tensors) -> Tensors:
        total.add_(inputs["x"]).mul_(1.5)
        return {"noise": torch.rand(3)}

    def run(function: Callable[[Tensors], Tensors]) -> list[torch.Tensor]:
        total.zero_()
        torch.manual_seed(0)
        noises = [function({"x": torch.full((3,), float(n))})["noise"].clone() for n in range(4)]
        return [*noises, total.clone(), torch.get_rng_state()]

    assert all(map(torch.equal, run(taped.replayed(add, lambda: [total])), run(add)))
    assert taped.reason is None


def reads_a_number(inputs: Tensors) -> Tensors:
    return {"share": inputs["x"] / inputs["x"].sum().item()}


class ForgetsAnInput:
    """The number of the call comes from Python, and not from the inputs. It changes after the first call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: Tensors) -> Tensors:
        self.calls += 1
        return {"number": inputs["x"] * (1 + self.calls // 4)}


class ReplacesItsState:
    """A tensor is replaced and not changed in place."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def __call__(self, inputs: Tensors) -> Tensors:
        self.total = self.total + inputs["x"].sum()
        return {"total": self.total.clone()}


class HidesState:
    """Its state is not among the tensors that are restored after a recording."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def __call__(self, inputs: Tensors) -> Tensors:
        self.total += 1
        return {"total": self.total + inputs["x"]}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            reads_a_number,
            "RuntimeError: operation not permitted when stream is capturing: aten._local_scalar",
        ),
        (ForgetsAnInput(), "replayed and launched kernels do not agree on number"),
        (HidesState(), "replayed and launched kernels do not agree on total"),
        (ReplacesItsState(), "AssertionError: a replay reads a tensor [] that was freed"),
    ],
)
def test_what_cannot_be_replayed_is_launched_from_then_on(
    function: Callable[[Tensors], Tensors], reason: str, taped: Graphs, notes: list[str]
) -> None:
    other = taped.replayed(lambda inputs: {"x": inputs["x"] + 1})
    for _ in range(2):
        other({"x": torch.zeros(2)})
    assert CountingTape.made == 1
    replayed = taped.replayed(function)
    for _ in range(2):
        outputs = replayed({"x": torch.ones(2)})
    assert taped.reason is not None
    assert taped.reason.startswith(reason)
    assert notes == [f"steps are launched kernel by kernel, not replayed from a CUDA graph: {taped.reason}"]
    if function is reads_a_number:
        assert outputs["share"].tolist() == [0.5, 0.5]
    assert other({"x": torch.zeros(2)})["x"].tolist() == [1, 1]
    assert CountingTape.made <= 2  # no second attempt


def test_state_is_as_launched_once_where_recording_fails(taped: Graphs) -> None:
    total = torch.zeros(2)

    def function(inputs: Tensors) -> Tensors:
        total.add_(inputs["x"])
        return {"number": total.sum() * total.sum().item(), "noise": torch.rand(1)}

    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    replayed = taped.replayed(function, lambda: [total])
    noises = [replayed({"x": torch.ones(2)})["noise"].clone() for _ in range(2)]
    assert torch.equal(torch.cat(noises), expected)
    assert total.tolist() == [2, 2]


def test_failed_recording_holds_no_memory_when_the_call_is_launched_again(
    taped: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays, function = [], ForgetsAnInput()
    record = CountingTape.record

    def watched(self: CountingTape, recorded: Callable[[], object]) -> Replay:
        replay = record(self, recorded)
        replays.append(weakref.ref(replay))
        return replay

    def noted(inputs: Tensors) -> Tensors:
        alive.append(any(reference() is not None for reference in replays))
        return function(inputs)

    monkeypatch.setattr(CountingTape, "record", watched)
    alive: list[bool] = []
    replayed = taped.replayed(noted)
    for _ in range(2):
        replayed({"x": torch.ones(2)})
    assert taped.reason == "replayed and launched kernels do not agree on number"
    assert len(replays) == 1
    assert alive == [False] * 5


@pytest.mark.parametrize("calls_before", [0, 1])
def test_launched_call_gets_the_memory_of_recordings_that_it_lacks(
    calls_before: int, taped: Graphs, notes: list[str]
) -> None:
    total, failing = torch.zeros(2), [torch.OutOfMemoryError("out of memory")]

    def function(inputs: Tensors) -> Tensors:
        total.add_(inputs["x"].sum())
        outputs = {"total": total.clone(), "noise": torch.rand(1)}
        if len(inputs["x"]) == 3 and total[0] >= 2 + 3 * (calls_before + 1) and failing:
            raise failing.pop()
        return outputs

    torch.manual_seed(0)
    expected = torch.rand(calls_before + 4)
    torch.manual_seed(0)
    replayed = taped.replayed(function, lambda: [total])
    sizes = [1, 1, *[3] * (calls_before + 2)]
    outputs = [{n: v.clone() for n, v in replayed({"x": torch.ones(size)}).items()} for size in sizes]
    assert torch.equal(torch.cat([values["noise"] for values in outputs]), expected)
    assert [values["total"][0].item() for values in outputs] == [
        sum(sizes[: n + 1]) for n in range(len(sizes))
    ]
    assert taped.outcome == "launched: OutOfMemoryError: out of memory"
    assert len(notes) == 1
    assert not taped.has_replays


def test_call_that_lacks_memory_without_recordings_fails(taped: Graphs, notes: list[str]) -> None:
    def function(inputs: Tensors) -> Tensors:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        taped.replayed(function)({"x": torch.ones(1)})
    assert notes == []


def test_number_of_recordings_is_bounded(taped: Graphs, notes: list[str]) -> None:
    replayed = taped.replayed(lambda inputs: {"sum": inputs["x"].sum()})
    for size in range(1, 20):
        for _ in range(2):
            assert replayed({"x": torch.ones(size)})["sum"] == size
    assert CountingTape.made == 16
    assert replayed({"x": torch.ones(19)})["sum"] == 19
    assert taped.reason is None
    assert notes == []
