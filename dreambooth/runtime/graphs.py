"""Functions on tensors that a GPU records once, as a CUDA graph, and then replays.

A step of a diffusion model is thousands of short kernels. The host needs longer to launch them than the GPU
to run them; a replay launches all of them at once. The results are the same bits.

A recorded function reads and writes the same memory at every replay, and its Python code does not run again:
whatever changes from call to call must be a tensor of its inputs or of its state, which is changed in place.
Therefore the first two calls are launched, and must then be repeated by replays bit for bit. One call would
not show a value that should have been an input.
"""

import contextlib
import dataclasses
import gc
import hashlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from dreambooth.io.errors import is_memory_error, type_and_reason
from dreambooth.runtime import memory

Tensors: TypeAlias = dict[str, torch.Tensor]
Replay: TypeAlias = Callable[[], None]
_MOST_GRAPHS = 16  # of one `Graphs`; each holds descriptions of thousands of kernels
# Graphs whose recording failed. They are kept: up to torch 2.11 the allocator of pinned memory uses them.
_abandoned: list[torch.cuda.CUDAGraph] = []


class Recorder(Protocol):
    """Records functions. Tests put another one in the place of `CudaRecorder`."""

    def rehearse(self, function: Callable[[], object]) -> None:
        """Call `function` as it will be recorded. Raises RuntimeError if it cannot be recorded."""

    def record(self, function: Callable[[], object]) -> Replay:
        """Record `function` without computing anything. Each call of the result computes it once."""

    def forget(self) -> None:
        """Wait for running replays. This is called before all recordings are dropped; later ones share no
        memory with them."""


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool. What a graph computes must be copied to memory outside the
    pool: the replay of another graph may overwrite it."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, function: Callable[[], object]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")  # a graph holds nothing that the host waits for
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            # also after an error: the state that its kernels write is then restored on this stream
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
        index = self.device.index or 0
        torch.cuda.set_stream(stream)
        try:
            graph.pool()
        except RuntimeError:  # the recording has no end, so that `reset` does not give back the memory
            for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(RuntimeError):  # torch has done it
                    give_back(index, self.pool)
        graph.reset()
        _abandoned.append(graph)
        fresh = torch.Generator(self.device)
        torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
        torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        torch.cuda.synchronize(self.device)
        self.pool = torch.cuda.graph_pool_handle()  # a pool cannot be used again after all of its graphs


def can_record(device: torch.device) -> bool:
    """Whether functions on this device can be recorded at all."""
    return device.type == "cuda"


def launched_note(reason: str) -> str:
    """The line that tells the user that nothing is replayed."""
    return f"steps are launched kernel by kernel, not replayed from a CUDA graph: {reason}"


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
        """`reason` says why nothing shall be recorded; None records. `note` gets a line if recording fails.
        `make_recorder` makes the recorder, by default a `CudaRecorder`."""
        self.device, self.note, self.reason = device, note, reason
        if reason is None and not can_record(device):
            self.reason = "only CUDA GPUs have graphs"
        self.make_recorder = make_recorder or CudaRecorder
        self.recorder: Recorder | None = None
        self.functions: list[Replayed] = []
        self.has_recorded = False

    def replayed(
        self,
        function: Callable[[Tensors], Tensors],
        state: Callable[[], Sequence[torch.Tensor]] = tuple,
        *,
        is_recorded: bool = True,
    ) -> "Replayed":
        """`function`, replayed where that is possible and `is_recorded`. `state` returns the tensors, beside
        its inputs, that it changes or that change between its calls."""
        self.functions.append(Replayed(self, function, state, is_recorded))
        return self.functions[-1]

    def forget(self) -> None:
        """Drop all recordings and their memory. The second call of each function from now on is recorded."""
        if self.recorder is not None:
            self.recorder.forget()
        for function in self.functions:
            for recording in function.recordings.values():
                recording.replay = None  # the call in which a recording failed still has the rest of it
            function.recordings.clear()
        if can_record(self.device):
            memory.release()

    def launch_from_now_on(self, reason: str) -> None:
        """Record and replay no more, because of `reason`."""
        self.reason = reason
        self.forget()
        self.note(launched_note(reason))

    @property
    def outcome(self) -> str:
        """ "replayed", or "launched" and why, for the record of the run."""
        if self.reason is not None:
            return f"launched: {self.reason}"
        return "replayed" if self.has_recorded else "launched: there was no second step of a shape"

    @property
    def has_replays(self) -> bool:
        """Whether a recording holds memory."""
        return any(r.replay is not None for function in self.functions for r in function.recordings.values())

    @property
    def is_full(self) -> bool:
        return sum(len(function.recordings) for function in self.functions) >= _MOST_GRAPHS


@dataclasses.dataclass(frozen=True)
class _Moment:
    """Everything that a call of a function depends on, in main memory: the device may have no room for it."""

    inputs: Sequence[torch.Tensor]
    state: Sequence[torch.Tensor]
    random_states: Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _LaunchedCall:
    """A call of a function as Python code. A replay from `before` must lead to the same `digests`."""

    before: _Moment
    digests: dict[str, str]


@dataclasses.dataclass
class _Recording:
    """A function for inputs of one signature: `replay` reads `inputs` and fills `outputs`. Before the second
    call there is no replay yet."""

    inputs: Tensors
    first: _LaunchedCall | None = None  # between the first and the second call
    outputs: Tensors = dataclasses.field(default_factory=dict)
    replay: Replay | None = None


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
        if recording.replay is not None:
            recording.replay()
            return recording.outputs
        if recording.first is None:
            outputs, recording.first = self._launch(recording)
            return outputs
        return self._record_and_compare(recording, recording.first)

    def _record_and_compare(self, recording: _Recording, first: _LaunchedCall) -> Tensors:
        """The outputs of the second call. It is launched; then the function is recorded, and replays must
        repeat both calls. If a bit differs, or if anything fails, nothing is replayed from now on."""
        launched, second = self._launch(recording)
        if self.graphs.reason is not None:
            return launched
        try:
            recording.outputs = {name: value.detach() for name, value in launched.items()}
            recording.replay = self._record(recording, second.before)
            differing: set[str] = set()
            for call in (first, second):
                self._rewind(recording, call.before)
                recording.replay()
                digests = self._digests(recording.outputs)
                differing |= {name for name in digests if digests[name] != call.digests[name]}
            names = ", ".join(sorted(differing))
            failure = f"replayed and launched kernels do not agree on {names}" if differing else None
        except Exception as error:  # whatever a driver or library raises: a slow run is better than none
            failure = type_and_reason(error)
        recording.first = None
        if failure is None:
            self.graphs.has_recorded = True
            return recording.outputs
        self.graphs.launch_from_now_on(failure)
        self._rewind(recording, second.before)
        return self.function(recording.inputs)

    def _record(self, recording: _Recording, before: _Moment) -> Replay:
        """The replay of the function, which reads the recording's inputs and fills its outputs."""
        if self.graphs.recorder is None:
            self.graphs.recorder = self.graphs.make_recorder(self.graphs.device)

        def compute() -> None:
            for name, value in self.function(recording.inputs).items():
                recording.outputs[name].copy_(value)

        # memory that one of these passes has freed is not used by the next, on another stream
        memory.release()
        self._rewind(recording, before)
        self.graphs.recorder.rehearse(compute)
        memory.release()
        self._rewind(recording, before)
        with _without_collector():
            return self.graphs.recorder.record(compute)

    def _launch(self, recording: _Recording) -> tuple[Tensors, _LaunchedCall]:
        """The outputs of the function as Python code, and the record of this call.

        Recordings of other shapes hold the memory of a whole pass. If the call lacks it, nothing is replayed
        from now on, and the call is made again.
        """
        before = _Moment(
            _saved(recording.inputs.values()), _saved(self.state()), _random_states(self.graphs.device)
        )
        try:
            outputs = self.function(recording.inputs)
        except RuntimeError as error:
            if not is_memory_error(error) or not self.graphs.has_replays:
                raise
            reason = type_and_reason(error)
        else:
            return outputs, _LaunchedCall(before, self._digests(outputs))
        self.graphs.launch_from_now_on(reason)  # out of the block above, whose error holds tensors
        self._rewind(recording, before)
        outputs = self.function(recording.inputs)
        return outputs, _LaunchedCall(before, self._digests(outputs))

    def _digests(self, outputs: Tensors) -> dict[str, str]:
        """Digests of outputs and state. They tell all bits, also those of NaN."""
        digests = {name: _digest([value]) for name, value in outputs.items()}
        return {**digests, "state": _digest(self.state())}

    @torch.no_grad()
    def _rewind(self, recording: _Recording, moment: _Moment) -> None:
        """Set inputs, state and random generators to those of `moment`."""
        for tensor, value in zip(recording.inputs.values(), moment.inputs, strict=True):
            tensor.copy_(value)
        for tensor, value in zip(self.state(), moment.state, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(moment.random_states[0])
        if self.graphs.device.type == "cuda":
            torch.cuda.set_rng_state(moment.random_states[1], self.graphs.device)


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
    """Copies in main memory."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of all bytes of the values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _random_states(device: torch.device) -> list[torch.Tensor]:
    """States of the default generators of the CPU and of `device`."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
