"""Optimizers over a small adapter."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.files import checkpoint_folders
from dreambooth.options.optimizer import OPTIMIZERS, OptimizerOptions
from dreambooth.training import checkpoints, optimizers
from dreambooth.training.optimizers import Group
from tests import tiny
from tests.live_adapters import TARGETS, Models, packed

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule-free": "schedulefree"}


def needs(*names: str) -> Any:
    """A parameter of a test, which is skipped where a package for it is not installed."""
    lacking = [
        PACKAGES[name]
        for name in names
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None
    ]
    return pytest.param(
        *names, marks=pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")
    )


EACH = [needs(name) for name in OPTIMIZERS]


PRODIGY, SCHEDULE_FREE = needs("prodigy"), needs("schedule-free")


# Of a group: what is set before each step, and what Prodigy writes for whoever wants to look at it.
NOT_READ = ("params", "lr", "d_hat", "d_denom")


RATES = {
    "prodigy": (400.0, 400.0)
}  # it takes one rate for all; with this one its estimate grows in the third step


DECAYS = (1e-2, 1e-1)


def flags(optimizer: str, **more: Any) -> OptimizerOptions:
    return OptimizerOptions(**{"optimizer": optimizer, **more})


class Run:
    """Adapters on fresh models, a group for each, and steps with made-up gradients.

    Most gradients are of one sign, so that Prodigy's estimate grows.
    """

    def __init__(
        self, loaded: Models, optimizer: str, *, rank: int = 4, seed: int = 7, alpha: float = 1.0, **more: Any
    ):
        models = copy.deepcopy(loaded)
        self.components = [
            tiny.inject_lora(n, models[n], rank=rank, dropout=0.0, targets=TARGETS[n], seed=seed)
            for n in models
        ]
        self.alpha = alpha  # what the adapter file has its lora_B multiplied by
        self.named = [pair for component in self.components for pair in component.named_parameters()]
        self.names = {id(parameter): name for name, parameter in self.named}
        self.options = flags(optimizer, **more)
        rates = RATES.get(optimizer, (1e-2, 1e-3))
        settings = zip(self.components, rates, DECAYS, strict=True)
        groups = [
            Group(c.name, [p for _, p in c.named_parameters()], rate, decay) for c, rate, decay in settings
        ]
        self.optimizer = optimizers.make(self.options, groups)

    def step(self, number: int, factor: float = 1.0) -> None:
        optimizers.set_learning_rate(self.optimizer, factor)
        draw = torch.Generator().manual_seed(number)
        for _, parameter in self.named:
            parameter.grad = torch.randn(parameter.shape, generator=draw) + 1
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            self.step(number, factor=number / 8)

    def save(self, folder: Path, step: int) -> Path:
        moments = optimizers.state_tensors(self.optimizer, self.names)
        if optimizers.needs_raw_parameters(self.optimizer) or self.alpha != 1:
            moments |= checkpoints.raw_parameters(self.named)
        with optimizers.evaluated(self.optimizer):
            kept = [parameter.detach().clone() for _, parameter in self.named]
            for name, parameter in self.named:
                parameter.data *= self.alpha if "lora_B" in name else 1
            adapter = packed(self.components)
            for (_, parameter), value in zip(self.named, kept, strict=True):
                parameter.data.copy_(value)
        state = {"optimizer": optimizers.state_numbers(self.optimizer, self.names)}
        return checkpoints.save(folder, step, adapter, moments, state, limit=None)

    def restore(self, folder: Path) -> None:
        checkpoints.restore(checkpoint_folders.read(folder), self.components, self.optimizer)

    def everything(self) -> dict[str, Any]:
        """Copies of all that the next step depends on."""
        found: dict[str, Any] = {name: parameter.detach().clone() for name, parameter in self.named}
        for group in self.optimizer.param_groups:
            found |= {f"{group['name']} {key}": value for key, value in group.items() if key not in NOT_READ}
        for parameter, state in self.optimizer.state.items():
            found |= {
                f"{self.names[id(parameter)]} {key}": copy.deepcopy(value) for key, value in state.items()
            }
        return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
            assert value.dtype == other[key].dtype, key
        else:
            assert value == other[key], key
            assert type(value) is type(other[key]), key
