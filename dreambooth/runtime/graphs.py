"""Functions on tensors that a GPU records once, as a CUDA graph, and then replays.

A step of a diffusion model is thousands of short kernels. The host needs longer to launch them than the GPU
to run them; a replay launches all of them at once. The results are the same bits.

A recorded function reads and writes the same memory at every replay, and its Python code does not run again:
whatever changes from call to call must be a tensor of its inputs, or a tensor that is changed in place.
Therefore the first two calls are made both ways, launched and replayed, and compared bit for bit. The second
call has other inputs, and shows values that should have been inputs.
"""

import contextlib
import dataclasses
import gc
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from dreambooth.io.errors import type_and_reason
from dreambooth.runtime import memory

Tensors: TypeAlias = dict[str, torch.Tensor]
Replay: TypeAlias = Callable[[], None]
_MOST_GRAPHS = 16  # of one run; each holds descriptions of thousands of kernels
_CALLS_COMPARED = 2


class Recorder(Protocol):
    """Records functions. Tests put another one in the place of `CudaRecorder`."""

    def rehearse(self, function: Callable[[], object]) -> None:
        """Call `function` as it will be recorded. Raises RuntimeError if it cannot be recorded."""

    def record(self, function: Callable[[], object]) -> Replay:
        """Record `function` without computing anything. Each call of the result computes it once."""


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool. What a graph computes must be copied to memory outside the
    pool: the replay of another graph may overwrite it."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, function: Callable[[], object]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a graph cannot hold what makes the host wait for the GPU
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Callable[[], object]) -> Replay:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: threads that load photos or watch other processes may use the GPU meanwhile
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                function()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # their tensors lie in the pool
            self._abandon(graph, stream)
            raise
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        """Undo what torch leaves behind after a recording that failed: the stream of the recording stays the
        current one, and, up to torch 2.11, the allocator and the random generator go on recording."""
        torch.cuda.set_stream(stream)
        graph.reset()
        with contextlib.suppress(RuntimeError):  # torch had done it
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)
            torch._C._cuda_releasePool(self.device.index or 0, self.pool)
        fresh = torch.Generator(self.device)
        torch.cuda.default_generators[self.device.index or 0].graphsafe_set_state(fresh.graphsafe_get_state())
        torch.cuda.synchronize(self.device)


def can_record(device: torch.device) -> bool:
    """Whether functions on this device can be recorded at all."""
    return device.type == "cuda"


class Graphs:
    """The recorded functions of one run. `reason` says why functions are launched; None while they are
    recorded."""

    def __init__(
        self,
        device: torch.device,
        reason: str | None,
        note: Callable[[str], None],
        make_recorder: Callable[[torch.device], Recorder] | None = None,
    ):
        """`reason` is given if nothing shall be recorded; `note` is called with a line if recording fails.
        `make_recorder` makes the recorder, by default a `CudaRecorder`."""
        self.device, self.note, self.reason = device, note, reason
        if reason is None and not can_record(device):
            self.reason = "only CUDA GPUs have graphs"
        self.make_recorder = make_recorder or CudaRecorder
        self.recorder: Recorder | None = None
        self.functions: list[Replayed] = []

    def replayed(
        self,
        function: Callable[[Tensors], Tensors],
        state: Callable[[], Sequence[torch.Tensor]] = tuple,
        *,
        is_recorded: bool = True,
    ) -> "Replayed":
        """`function`, replayed where that is possible and `is_recorded`. `state` returns the tensors that it
        changes in place, random generators aside."""
        self.functions.append(Replayed(self, function, state, is_recorded))
        return self.functions[-1]

    def forget(self) -> None:
        """Drop all recordings and their memory. The next call of each function records it anew."""
        for function in self.functions:
            function.recordings.clear()
        self.recorder = None  # a memory pool cannot be used again after all of its graphs are gone
        if can_record(self.device):
            memory.release()

    def launch_from_now_on(self, reason: str) -> None:
        """Record and replay no more, because of `reason`."""
        self.reason = reason
        self.forget()
        self.note(f"steps are launched kernel by kernel, not replayed from a CUDA graph: {reason}")

    @property
    def outcome(self) -> str:
        """ "replayed", or "launched" and why, for the record of the run."""
        return "replayed" if self.reason is None else f"launched: {self.reason}"

    @property
    def is_full(self) -> bool:
        return sum(len(function.recordings) for function in self.functions) >= _MOST_GRAPHS


@dataclasses.dataclass
class _Recording:
    """A recorded function: `replay` reads `inputs` and fills `outputs`."""

    inputs: Tensors
    outputs: Tensors = dataclasses.field(default_factory=dict)
    replay: Replay | None = None
    compared: int = 0
    """The number of calls that were made both ways."""


class Replayed:
    """A function from tensors by name to tensors by name. It may be called with inputs of several shapes,
    which are recorded one by one. The outputs of a call are overwritten by the next call."""

    def __init__(
        self,
        graphs: Graphs,
        function: Callable[[Tensors], Tensors],
        state: Callable[[], Sequence[torch.Tensor]],
        is_recorded: bool,
    ):
        self.graphs, self.function, self.state, self.is_recorded = graphs, function, state, is_recorded
        self.recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """The outputs for `inputs`, which may be on the CPU or on the device."""
        device = self.graphs.device
        signature = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        recording = self.recordings.get(signature)
        is_launched = self.graphs.reason is not None or not self.is_recorded
        if is_launched or (recording is None and self.graphs.is_full):
            return self.function({name: memory.to_device(value, device) for name, value in inputs.items()})
        if recording is None:
            buffers = {name: torch.empty_like(value, device=device) for name, value in inputs.items()}
            recording = self.recordings[signature] = _Recording(buffers)
        for name, buffer in recording.inputs.items():
            is_copied_ahead = buffer.is_cuda and not inputs[name].is_cuda
            buffer.copy_(inputs[name].pin_memory() if is_copied_ahead else inputs[name], non_blocking=True)
        if recording.compared < _CALLS_COMPARED:
            return self._both_ways(recording)
        assert recording.replay is not None
        recording.replay()
        return recording.outputs

    def _both_ways(self, recording: _Recording) -> Tensors:
        """The outputs for the recording's inputs. The function is launched, then replayed, the first time
        after it has been recorded. If the two differ in a bit, or if anything fails, the launched results
        stay."""
        before, random_before = _saved(self.state()), _random_state(self.graphs.device)
        launched = self.function(recording.inputs)
        after, random_after = _saved(self.state()), _random_state(self.graphs.device)
        reference = dict(zip(launched, _saved(launched.values()), strict=True))

        def rewind() -> None:
            _restore(self.state(), before)
            _set_random_state(self.graphs.device, random_before)

        try:
            if recording.replay is None:
                recording.outputs = {name: value.detach() for name, value in launched.items()}
                self._record(recording, rewind)
            rewind()
            assert recording.replay is not None
            recording.replay()
            outputs = recording.outputs
            differing = [name for name in reference if not _same_bits(outputs[name], reference[name])]
            if not all(map(_same_bits, self.state(), after)):
                differing.append("what it changes in place")
            names = ", ".join(differing)
            failure = f"a replay differs from launched kernels in {names}" if differing else None
        except Exception as error:  # whatever a driver or library raises: a slow run is better than none
            failure = type_and_reason(error)
        if failure is None:
            recording.compared += 1
            return outputs
        self.graphs.launch_from_now_on(failure)
        _restore(self.state(), after)
        _set_random_state(self.graphs.device, random_after)
        return {name: value.to(self.graphs.device) for name, value in reference.items()}

    def _record(self, recording: _Recording, rewind: Callable[[], None]) -> None:
        """Set `recording.replay`. `rewind` restores what the function changes."""
        if self.graphs.recorder is None:
            self.graphs.recorder = self.graphs.make_recorder(self.graphs.device)

        def compute() -> None:
            for name, value in self.function(recording.inputs).items():
                recording.outputs[name].copy_(value)

        rewind()
        self.graphs.recorder.rehearse(compute)
        rewind()
        memory.release()  # the launched passes' memory, which the graph takes anew
        with _without_collector():
            recording.replay = self.graphs.recorder.record(compute)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Within the block no garbage is collected: an old graph must not be destroyed during a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _saved(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in main memory, since the device may have no room for two of each."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


@torch.no_grad()
def _restore(tensors: Sequence[torch.Tensor], saved: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, saved, strict=True):
        tensor.copy_(value)


def _same_bits(tensor: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether all bits are equal, also those of NaN."""
    value = tensor.detach().cpu().contiguous().reshape(-1)
    return torch.equal(value.view(torch.uint8), saved.contiguous().reshape(-1).view(torch.uint8))


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """States of the default generators of the CPU and of `device`."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
