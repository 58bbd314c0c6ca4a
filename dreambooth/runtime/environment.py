"""The environment of a run: settings and versions that change only the last bits of a result."""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

import torch


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
