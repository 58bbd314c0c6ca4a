"""Time and memory at the end of each phase of a run, the return of freed memory, and offloading of
activations."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreambooth.io import reader
from dreambooth.io.errors import UserError

Reading = Mapping[str, float]
_GIB = 2**30
_IMPORTED = time.monotonic()


def check_offload(*, offload: bool, device: torch.device) -> None:
    """Raise UserError if --offload is given and the device is the CPU, which has no second memory."""
    if offload and device.type == "cpu":
        raise UserError(
            "--offload needs a GPU: on a CPU, activations are in main memory already; leave it out, or give "
            "--gradient_checkpointing"
        )


def reading(device: torch.device) -> dict[str, float]:
    """The age of this process in seconds, and its memory in GiB. Values that the system does not provide are
    left out.

    `seconds` is the time since the process began, or since `clock_restarted`. `resident_gib` is main memory
    now and `peak_resident_gib` its maximum since the process began. On a GPU `device_gib` is what tensors
    take now; `peak_device_gib` of tensors and `peak_reserved_device_gib` of torch's allocator are maxima
    since the last reading.
    """
    sizes = _resident()
    backend = _backend(device)
    if backend is not None:
        sizes["device_gib"] = backend.memory_allocated(device)
        sizes["peak_device_gib"] = backend.max_memory_allocated(device)
        sizes["peak_reserved_device_gib"] = backend.max_memory_reserved(device)
        backend.reset_peak_memory_stats(device)
    return {
        "seconds": round(_age() - _earlier, 3),
        **{name: round(size / _GIB, 3) for name, size in sizes.items()},
    }


_earlier = 0.0  # seconds of this process before the block of `clock_restarted`


@contextlib.contextmanager
def clock_restarted() -> Iterator[None]:
    """Within the block the seconds of `reading` count from its begin: it trains another run."""
    global _earlier
    before, _earlier = _earlier, _age()
    try:
        yield
    finally:
        _earlier = before


def _age() -> float:
    """Seconds since the system started this process; without /proc, since this module was imported."""
    status = Path("/proc/self/stat")
    if not status.exists():
        return time.monotonic() - _IMPORTED
    fields = reader.read_text(status, str(status)).rpartition(")")[2].split()  # after the program's name
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # in clock ticks since the machine was started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _resident() -> dict[str, float]:
    """Bytes of this process in main memory."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = reader.lines(reader.read_text(status, str(status)))
        fields = dict(line.split(":", 1) for line in lines)
        if {"VmRSS", "VmHWM"} <= fields.keys():
            now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # "  1234 kB"
            return {"resident_gib": now, "peak_resident_gib": peak}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _backend(device: torch.device) -> Any:
    """The module of torch that counts the device's memory; None for a CPU, for Apple's GPUs, for which torch
    counts no peaks, and before the first use of a CUDA device."""
    if device.type == "cuda":
        return torch.cuda if torch.cuda.is_initialized() else None
    return None if device.type in ("cpu", "mps") else torch.accelerator


def release() -> None:
    """Return the memory of freed models to the system. Otherwise the process holds it, in pieces that are too
    small for the next model."""
    gc.collect()
    trim()


def trim() -> None:
    """`release` without the garbage collection, in milliseconds instead of tenths of seconds. Objects in
    reference cycles are not freed."""
    # malloc_trim is a function of the GNU C library
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. It is copied to a GPU asynchronously, from pinned memory."""
    is_copied_ahead = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if is_copied_ahead else tensor.to(device)


def summary(phases: Mapping[str, Reading]) -> str:
    """One line: the maximum on the device, in all phases and in each, and the maximum in main memory."""
    parts = []
    on_device = {
        phase: values["peak_device_gib"] for phase, values in phases.items() if "peak_device_gib" in values
    }
    if on_device:
        by_phase = ", ".join(f"{phase} {size:.1f}" for phase, size in on_device.items())
        parts.append(f"{max(on_device.values()):.1f} GiB at most on the device ({by_phase})")
    resident = [values["peak_resident_gib"] for values in phases.values() if "peak_resident_gib" in values]
    if resident:
        parts.append(f"{max(resident):.1f} GiB at most in main memory")
    return f"memory: {', '.join(parts) or 'not measured on this system'}"


class _Offloaded(NamedTuple):
    """The values of a tensor in main memory, and the layout to rebuild it on its device."""

    values: Tensor  # [span]: all elements between the first and the last, in the order of memory
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]


def offloaded(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within the block autograd stores activations in main memory and copies them back in the backward pass.
    The results are the same bits.

    The weights of `model` are not copied, since they stay on the device. Strides are kept, unlike in torch's
    save_on_cpu: other strides would change the last bits of matrix products.
    """
    weights = {
        parameter.untyped_storage().data_ptr()
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter
    }

    def pack(tensor: Tensor) -> Tensor | _Offloaded:
        if tensor.untyped_storage().data_ptr() in weights or tensor.numel() == 0:
            return tensor
        offsets = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.detach().as_strided((1 + sum(offsets),), (1,))
        values = torch.empty_like(flat, device="cpu", pin_memory=flat.device.type == "cuda")
        values.copy_(flat, non_blocking=values.is_pinned())
        return _Offloaded(values, flat.device, tensor.shape, tensor.stride())

    def unpack(packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed.values.to(packed.device, non_blocking=True).as_strided(packed.shape, packed.stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
