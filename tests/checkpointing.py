"""A small training state that is saved and restored."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from dreambooth.files import checkpoint_folders
from dreambooth.training import checkpoints, optimizers
from tests.live_adapters import Models, inject, packed, trained

STATE = {"seed": 5, "train_batch_size": 2, "slots": 1}


FILES = {"pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


ROOT = Path(__file__).parent.parent


FLAG = "--resume_from_checkpoint"


class Run:
    """Adapters on fresh models and an optimizer that takes steps with made-up gradients."""

    def __init__(
        self,
        loaded: Models,
        *,
        rank: int = 4,
        seed: int = 7,
        names: tuple[str, ...] = ("unet", "text_encoder"),
    ):
        self.components = trained(inject(copy.deepcopy({name: loaded[name] for name in names}), rank, seed))
        pairs = [pair for component in self.components for pair in component.named_parameters()]
        self.names = {id(parameter): name for name, parameter in pairs}
        self.optimizer = torch.optim.AdamW([parameter for _, parameter in pairs], lr=1e-2)

    def step(self, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def moments(self) -> dict[str, torch.Tensor]:
        return optimizers.state_tensors(self.optimizer, self.names)

    def save(self, folder: Path, step: int, limit: int | None = None) -> Path:
        return checkpoints.save(folder, step, packed(self.components), self.moments(), STATE, limit=limit)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint must bring back, copied."""
        adapter = {
            f"{component.name}.{key}": tensor
            for component in self.components
            for key, tensor in component.state_dict().items()
        }
        return {key: tensor.detach().clone() for key, tensor in (adapter | self.moments()).items()}


def small(output_dir: Path, step: int, *, limit: int | None = None, mark: int = 0) -> Path:
    """A checkpoint without models: its files can be told apart by step and mark."""
    moments = {"unet.a|exp_avg": torch.tensor([step, mark])}
    return checkpoints.save(
        output_dir, step, f"adapter {step} {mark}".encode(), moments, {**STATE, "mark": mark}, limit=limit
    )


def content(folder: Path) -> tuple[int, int]:
    """(step, mark) of a whole checkpoint that `small` wrote; fails if it is not whole."""
    assert {path.name for path in folder.iterdir()} == FILES
    state = read_state(folder)
    found = (state["step"], state["mark"])
    assert (folder / "pytorch_lora_weights.safetensors").read_text() == f"adapter {found[0]} {found[1]}"
    assert load((folder / "optimizer.safetensors").read_bytes())["unet.a|exp_avg"].tolist() == list(found)
    return found


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def change(path: Path) -> None:
    """Damage that leaves name and size."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def read_state(folder: Path) -> dict[str, Any]:
    return checkpoints.read_state(checkpoint_folders.read(folder))


def latest(output_dir: Path) -> Path | None:
    return checkpoint_folders.choose("latest", output_dir).folder


def rewrite(folder: Path, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """The same checkpoint with another file, or without it, and hashes that hold: as a mistake of the program
    would write it."""
    content = checkpoint_folders.read(folder)
    files = dict(content.files)
    changed = change(files.pop(name))
    shutil.rmtree(folder)
    checkpoint_folders.publish(
        folder.parent, content.step, files if changed is None else {**files, name: changed}, {}, limit=None
    )
