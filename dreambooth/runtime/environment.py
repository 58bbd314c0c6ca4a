"""The environment of a run: settings and versions that change only the last bits of a result."""

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils.deterministic

from dreambooth.runtime import startup


def environment(device: torch.device, libraries: Iterable[str], **settings: Any) -> dict[str, Any]:
    """The kind of device, the version of each of `libraries`, and `settings`, as JSON takes them."""
    return {**settings, "device": device.type, **versions(libraries)}


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """The installed version of each library."""
    return {name: importlib.metadata.version(name) for name in libraries}


def processor(device: torch.device) -> dict[str, Any]:
    """Settings for `environment`: threads and instructions of a CPU, name and TF32 switches of a CUDA GPU."""
    if device.type == "cpu":
        # oneDNN uses bf16 and AMX instructions where the CPU has them; get_cpu_capability does not name them
        extensions = sorted(
            name
            for name, is_available in torch.cpu.get_capabilities().items()
            if is_available and ("bf16" in name or "amx" in name)
        )
        instructions = [torch.backends.cpu.get_cpu_capability(), *extensions]
        return {"threads": torch.get_num_threads(), "instructions": instructions}
    if device.type == "cuda":
        tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
        return {"name": torch.cuda.get_device_name(device), "tf32": tf32}
    return {}


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within the block, which holds forward and backward passes, kernels on CUDA give the same bits at every
    call.

    Without it torch's fused kernels of attention add up gradients in an order that changes from call to call,
    and cuDNN may choose such kernels for convolutions. torch raises RuntimeError for operators that have no
    deterministic kernel (`torch.use_deterministic_algorithms` lists them); the models here have none of them.
    """
    if device.type != "cuda":
        yield
        return
    startup.fix_cublas_workspace()  # where no script has begun; torch refuses products of matrices without
    settings: Any = torch.utils.deterministic
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # kernels that would only make errors visible
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        settings.fill_uninitialized_memory = filled
