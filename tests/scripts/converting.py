"""Adapter files and bases that convert_adapter.py is given, and what diffusers computes from them."""

import torch

import convert_adapter
from dreambooth.adapter_files import deltas
from dreambooth.adapter_files.adapter import Adapter

Modules = dict[str, dict[str, deltas.Module]]


INFO = {"resolution": 64, "seed": 3, "steps": 7, "clip_skip": 1}


def run(*words: object) -> None:
    convert_adapter.main(convert_adapter.parse_command([str(word) for word in words]))


def all_deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        f"{c}.{path}": deltas.delta(module)
        for c, modules in adapter.components.items()
        for path, module in modules.items()
    }


def expect_close(found: Adapter, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    own = all_deltas(found)
    assert own.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert (own[name] - expected).norm() <= tolerance * expected.norm(), name
