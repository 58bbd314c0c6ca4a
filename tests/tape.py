"""A recorder for CPUs in the place of CUDA graphs.

It shows on a CPU what a CUDA graph would do with a function: the function's Python code runs once, while it
is recorded, and every replay runs the recorded operators on the same memory. So a constant that Python
computed, an input that was forgotten, a tensor that was replaced or freed, and a number that the host reads
are noticed here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth.runtime.graphs import Replay

aten = torch.ops.aten
# The host waits for the GPU to read their results, which a graph cannot hold.
_HOST_READS = {
    aten._linalg_check_errors.default,
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}
_HOST_COPIES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
# They allocate, and compute nothing.
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


@dataclasses.dataclass(frozen=True)
class _Outside:
    """A tensor that lives longer than the recording. A graph has its address, and does not keep it alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise AssertionError(
                f"a replay reads a tensor {list(self.size)} that was freed after the recording"
            )
        empty: Any = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Call:
    """One operator with its arguments."""

    operator: Any
    arguments: Sequence[Any]
    keywords: dict[str, Any]
    results: dict[int, torch.Tensor]
    """Those in memory that the operator allocated, by their places among all results."""

    def repeat(self) -> None:
        keywords = {name: _mapped(value, _inside) for name, value in self.keywords.items()}
        values = _tensors(self.operator(*_mapped(self.arguments, _inside), **keywords))
        for place, result in self.results.items():
            result.copy_(values[place])

    def spoil(self) -> None:
        for tensor in self.results.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


class _NoCopies(TorchFunctionMode):
    """Raises RuntimeError where a GPU's tensor would be copied to the host, or one be made of the host's
    numbers. On a CPU these are no operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        is_copied_to_device = func in (torch.tensor, torch.as_tensor) and keywords.get("device") is not None
        if func in _HOST_COPIES or is_copied_to_device:
            raise RuntimeError(_refusal(func.__name__))
        return func(*args, **keywords)


class _NoReads(TorchDispatchMode):
    """Raises RuntimeError where the host reads a result, as PyTorch does while a CUDA graph is recorded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = _tensors(args[1]) if func.overloadpacket in (aten.index, aten.index_put_) else []
        is_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if func in _HOST_READS or is_mask:
            raise RuntimeError(_refusal(str(func)))
        return func(*args, **(kwargs or {}))


class _Recording(_NoReads):
    """Records every operator, those of backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        # by address: what the function allocated, and outer memory that it wrote to with the old bytes
        self.made: dict[int, torch.UntypedStorage] = {}
        self.untouched: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        written = list(_written(func, args, keywords))
        for tensor in written:
            self._keep(tensor)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.lift_fresh.default:  # a number of the host, in memory that `torch.tensor` allocated
            self.made[_address(result)] = result.untyped_storage()
            return result
        given = {_address(tensor) for tensor in _tensors([*args, *keywords.values()])}
        results = {n: t.detach() for n, t in enumerate(_tensors(result)) if _address(t) not in given}
        for tensor in results.values():
            self.made[_address(tensor)] = tensor.untyped_storage()
        if (results or written) and func.overloadpacket not in _ALLOCATIONS:  # others are views
            arguments = _mapped(args, self._bound)
            keywords = {name: _mapped(value, self._bound) for name, value in keywords.items()}
            self.calls.append(_Call(func, arguments, keywords, results))
        return result

    def _bound(self, tensor: torch.Tensor) -> Any:
        if _address(tensor) in self.made:
            return tensor.detach()
        weak, place = StorageWeakRef(tensor.untyped_storage()), int(tensor.storage_offset())
        return _Outside(weak, tensor.dtype, tensor.size(), tensor.stride(), place)

    def _keep(self, tensor: torch.Tensor) -> None:
        """Copy memory from outside before it is written to for the first time."""
        address = _address(tensor)
        if address not in self.made and address not in self.untouched:
            empty: Any = torch.empty(0, dtype=torch.uint8)
            memory = empty.set_(tensor.untyped_storage())
            self.untouched[address] = memory, memory.clone()


class TapeRecorder:
    """A `dreambooth.runtime.graphs.Recorder` for functions on CPUs."""

    def __init__(self, device: torch.device | None = None):
        """Made for `device` as a `CudaRecorder` is."""

    def rehearse(self, function: Callable[[], object]) -> None:
        with _NoCopies(), _NoReads():
            function()

    def record(self, function: Callable[[], object]) -> Replay:
        recording, random_state = _Recording(), torch.get_rng_state()
        with _NoCopies(), recording, mock.patch.object(torch, "manual_seed", _refuse_to_seed):
            function()
        # a recording computes nothing
        torch.set_rng_state(random_state)
        for memory, content in recording.untouched.values():
            memory.copy_(content)
        recording.untouched.clear()
        _spoil(recording.calls)
        return functools.partial(_replay, recording.calls)

    def forget(self) -> None:
        """Nothing runs later than its call."""


@torch.no_grad()
def _replay(calls: list[_Call]) -> None:
    for call in calls:
        call.repeat()
    _spoil(calls)


def _spoil(calls: list[_Call]) -> None:
    """Overwrite what was computed: the memory is shared by all recordings. What a function returns must be
    copied to memory from outside while it is recorded."""
    for call in calls:
        call.spoil()


def _refusal(name: str) -> str:
    return f"operation not permitted when stream is capturing: {name}"


def _refuse_to_seed(seed: int) -> None:
    raise RuntimeError(_refusal("manual_seed"))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """An argument, or a sequence of arguments, with `function` applied to each tensor in it."""
    if isinstance(value, torch.Tensor | _Outside):
        return function(value)
    return [_mapped(part, function) for part in value] if isinstance(value, list | tuple) else value


def _inside(value: Any) -> torch.Tensor:
    return value.tensor() if isinstance(value, _Outside) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in an argument or result, or in a sequence of them."""
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def _address(tensor: torch.Tensor) -> int:
    """Of the memory that a tensor shares with its views."""
    return tensor.untyped_storage()._cdata


def _written(operator: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that an operator changes in place."""
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else keywords.get(argument.name)
            yield from _tensors(value)
