"""Memory: how much a run takes, phase by phase, and the backward pass's share of it moved off the device."""

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreambooth.errors import UserError

Reading = Mapping[str, float]
_GIB = 2**30


def check(offload: bool, device: torch.device) -> None:
    """Raise UserError if there is no other memory than the computer's."""
    if offload and device.type == "cpu":
        raise UserError(
            "--offload needs a GPU: this run's memory is the computer's already; leave it out, or give --gradient_checkpointing"
        )


def reading(device: torch.device) -> dict[str, float]:
    """What this process takes, in GiB: `resident_gib` now and `peak_resident_gib` since it began; on a GPU `device_gib` now, and since the
    last reading `peak_device_gib` in tensors and `peak_reserved_device_gib` from the driver. What the system does not tell is left out."""
    found = _resident()
    backend = _backend(device)
    if backend is not None:
        found["device_gib"] = backend.memory_allocated(device)
        found["peak_device_gib"] = backend.max_memory_allocated(device)
        found["peak_reserved_device_gib"] = backend.max_memory_reserved(device)
        backend.reset_peak_memory_stats(device)
    return {name: round(size / _GIB, 3) for name, size in found.items()}


def _resident() -> dict[str, float]:
    """Bytes of this process in the computer's memory."""
    status = Path("/proc/self/status")
    if status.exists():
        told = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if {"VmRSS", "VmHWM"} <= told.keys():
            now, peak = (int(told[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # "  1234 kB"
            return {"resident_gib": now, "peak_resident_gib": peak}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _backend(device: torch.device) -> Any:
    """The module of torch that counts this device's memory; None where none does."""
    if device.type == "cuda":
        return torch.cuda
    # that of Apple's GPUs keeps no peaks
    return None if device.type in ("cpu", "mps") else torch.accelerator


def give_back() -> None:
    """Return freed memory to the system: what models that are gone leave free would else stay with the process, and be no use to larger ones."""
    gc.collect()
    trim()


def trim() -> None:
    """`give_back` without a search for objects that refer to each other: milliseconds, not tenths of seconds."""
    malloc_trim = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )  # of the GNU C library
    if malloc_trim is not None:
        malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. The copy to a GPU is asynchronous, which needs memory that cannot be swapped out."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def summary(phases: Mapping[str, Reading]) -> str:
    """One line on all readings, by phase: the most on the device, with each phase's, and the most in the computer."""
    said = []
    on_device = {
        phase: values["peak_device_gib"] for phase, values in phases.items() if "peak_device_gib" in values
    }
    if on_device:
        each = ", ".join(f"{phase} {size:.1f}" for phase, size in on_device.items())
        said.append(f"{max(on_device.values()):.1f} GiB at most on the device ({each})")
    resident = [values["peak_resident_gib"] for values in phases.values() if "peak_resident_gib" in values]
    if resident:
        said.append(f"{max(resident):.1f} GiB at most in the computer")
    return f"memory: {', '.join(said) or 'not told by this system'}"


def offloaded(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within the block what autograd keeps for the backward pass goes to the computer's memory, and comes back when it is needed: the same bits.

    The weights of `model` stay where they are: they are there anyway. Strides stay as well, which torch's own save_on_cpu changes: a product
    that reads its factors in another order has other last bits.
    """
    weights = {
        parameter.untyped_storage().data_ptr()
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter
    }

    def pack(tensor: Tensor) -> Tensor | _Away:
        if tensor.untyped_storage().data_ptr() in weights or tensor.numel() == 0:
            return tensor
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        flat = tensor.detach().as_strided((span,), (1,))
        kept = torch.empty_like(flat, device="cpu", pin_memory=flat.device.type == "cuda")
        return _Away(
            kept.copy_(flat, non_blocking=kept.is_pinned()), flat.device, tensor.shape, tensor.stride()
        )

    def unpack(packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed.kept.to(packed.device, non_blocking=True).as_strided(packed.shape, packed.stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Away(NamedTuple):
    kept: Tensor  # all elements from the first to the last, in the order of memory
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
