"""Functions on tensors that a GPU records once, as a CUDA graph, and then replays.

A step of a diffusion model is thousands of short kernels. The host needs longer to launch them than the GPU
to run them; a replay launches all of them at once. The results are the same bits.

A recorded function reads and writes the same memory at every replay, and its Python code does not run again:
whatever changes from call to call must be a tensor of its inputs, or a tensor that is changed in place. So
before a function is replayed, both ways are taken with the same inputs and compared bit for bit.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from dreambooth.io.errors import type_and_reason
from dreambooth.runtime import memory

Tensors: TypeAlias = dict[str, torch.Tensor]
_MOST_GRAPHS = 16  # of one run; each holds descriptions of thousands of kernels


class Recorder(Protocol):
    """Records functions without arguments. Tests put another one in the place of `CudaRecorder`."""

    def rehearse(self, function: Callable[[], Tensors]) -> None:
        """Call `function` where it will be recorded. Raises RuntimeError if it cannot be recorded."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """(outputs, replay). Nothing is computed yet; each call of `replay` fills the outputs anew."""


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool."""

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def rehearse(self, function: Callable[[], Tensors]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a graph cannot hold what makes the host wait for the GPU
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that load photos or watch other processes may use the GPU meanwhile
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            outputs = function()
        return outputs, graph.replay


def can_record(device: torch.device) -> bool:
    """Whether functions on this device can be recorded at all."""
    return device.type == "cuda"


class Graphs:
    """The recorded functions of one run. `reason` says why functions are launched; None while they are
    recorded."""

    def __init__(
        self,
        device: torch.device,
        *,
        reason: str | None = None,
        note: Callable[[str], None],
        make_recorder: Callable[[torch.device], Recorder] = CudaRecorder,
    ):
        """`reason` is given if the run shall not be recorded. `note` is called with one line if recording
        fails."""
        self.device, self.note, self.reason = device, note, reason
        if reason is None and not can_record(device):
            self.reason = "only CUDA GPUs have graphs"
        self.recorder = make_recorder(device) if self.reason is None else None
        self.functions: list[Replayed] = []

    def replayed(
        self, function: Callable[[Tensors], Tensors], state: Callable[[], Sequence[torch.Tensor]] = tuple
    ) -> "Replayed":
        """`function`, replayed where that is possible. `state` returns the tensors that it changes in place,
        random generators aside."""
        self.functions.append(Replayed(self, function, state))
        return self.functions[-1]

    def forget(self) -> None:
        """Drop all recordings and their memory. The next call of each function records it anew."""
        for function in self.functions:
            function.recordings.clear()
        if self.reason is None:
            memory.release()

    def launch_from_now_on(self, reason: str) -> None:
        """Record and replay no more, because of `reason`."""
        self.reason = reason
        self.forget()
        memory.release()
        self.note(f"steps are launched kernel by kernel, not replayed from a CUDA graph: {reason}")

    @property
    def is_full(self) -> bool:
        return sum(len(function.recordings) for function in self.functions) >= _MOST_GRAPHS


class Replayed:
    """A function from tensors by name to tensors by name. It may be called with inputs of several shapes,
    which are recorded one by one. The outputs of a call are overwritten by the next call."""

    def __init__(
        self,
        graphs: Graphs,
        function: Callable[[Tensors], Tensors],
        state: Callable[[], Sequence[torch.Tensor]],
    ):
        self.graphs, self.function, self.state = graphs, function, state
        self.recordings: dict[tuple[object, ...], tuple[Tensors, Tensors, Callable[[], None]]] = {}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """The outputs for `inputs`, which may be on the CPU or on the device."""
        device = self.graphs.device
        if self.graphs.reason is not None:
            return self.function({name: memory.to_device(value, device) for name, value in inputs.items()})
        signature = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        if signature in self.recordings:
            buffers, outputs, replay = self.recordings[signature]
            _fill(buffers, inputs)
            replay()
            return outputs
        buffers = {name: torch.empty_like(value, device=device) for name, value in inputs.items()}
        _fill(buffers, inputs)
        return self._launch_and_record(signature, buffers)

    def _launch_and_record(self, signature: tuple[object, ...], buffers: Tensors) -> Tensors:
        """The outputs for `buffers`. The function is launched, then recorded and replayed; if the two differ
        in a bit, or if anything fails, the launched results stay."""
        before, random_before = _saved(self.state()), _random_state(self.graphs.device)
        launched = self.function(buffers)
        if self.graphs.is_full:
            return launched
        after, random_after = _saved(self.state()), _random_state(self.graphs.device)
        reference = dict(zip(launched, _saved(launched.values()), strict=True))
        del launched

        def rewind() -> None:
            _restore(self.state(), before)
            _set_random_state(self.graphs.device, random_before)

        try:
            recording = self._record(buffers, rewind)
            outputs = recording[1]
            unequal = [name for name in reference if not _same_bits(outputs[name], reference[name])]
            if not all(map(_same_bits, self.state(), after)):
                unequal.append("state")
            failure = f"replayed and launched kernels differ in {', '.join(unequal)}" if unequal else None
        except Exception as error:  # whatever a driver or library raises: a slow run is better than none
            failure = type_and_reason(error)
        if failure is None:
            self.recordings[signature] = recording
            return outputs
        self.graphs.launch_from_now_on(failure)
        _restore(self.state(), after)
        _set_random_state(self.graphs.device, random_after)
        return {name: value.to(self.graphs.device) for name, value in reference.items()}

    def _record(
        self, buffers: Tensors, rewind: Callable[[], None]
    ) -> tuple[Tensors, Tensors, Callable[[], None]]:
        """(buffers, outputs, replay), after the first replay. `rewind` restores what the function changes."""
        recorder = self.graphs.recorder
        assert recorder is not None
        rewind()
        recorder.rehearse(lambda: self.function(buffers))
        rewind()
        memory.release()  # the launched passes' memory, which the graph takes anew
        with _without_collector():
            outputs, replay = recorder.record(lambda: self.function(buffers))
        rewind()
        replay()
        return buffers, outputs, replay


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


def _fill(buffers: Tensors, inputs: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        value = inputs[name]
        is_copied_ahead = buffer.is_cuda and not value.is_cuda
        buffer.copy_(value.pin_memory() if is_copied_ahead else value, non_blocking=True)


def _saved(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> list[torch.Tensor]:
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
