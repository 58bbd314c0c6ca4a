"""What tests of the scripts share."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dreambooth.adapter_files import native, reading
from dreambooth.files import safetensors_files


def fill(path: Path, scale: float = 0.3) -> Path:
    """Give an adapter file updates large enough to see."""
    state, metadata = load_file(path), reading.read_additive(path).metadata
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(tensor.shape, generator=generator) * scale if "lora_B" in key else tensor
        for key, tensor in state.items()
    }
    path.write_bytes(safetensors_files.stable_bytes(state, metadata))
    return path


def fill_copy(run: Path, folder: Path) -> Path:
    """A copy of a run's adapter with updates large enough to see."""
    path = folder / "filled.safetensors"
    path.write_bytes((run / native.ADAPTER_NAME).read_bytes())
    return fill(path)
