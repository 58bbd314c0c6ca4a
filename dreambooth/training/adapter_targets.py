"""Which layers of a base get an adapter, in training and in --dry_run."""

import dataclasses
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from transformers import AutoConfig

from dreambooth.adapter_files import layer_names
from dreambooth.adapters import inject
from dreambooth.bases import families
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.training import TextOptions

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of weights by layer name."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """The layers of one component: shapes of all its layers, and the names of those that get an adapter."""

    shapes: Shapes
    layers: list[str]


def target_modules(
    base: families.Base, component: str, adapter: AdapterOptions, text: TextOptions, shapes: Shapes
) -> tuple[str, ...]:
    """Which layers of the component get an adapter: the ends of their names, as peft's `target_modules`.

    `shapes` are those of the component's layers, by plain name. The last layers of a text encoder are left
    out if their output is not used (Stable Diffusion XL's first encoder, --clip_skip).
    """
    if component == "unet":
        return inject.unet_targets(adapter)
    unused = families.unused_layers(base.family, component, text)
    return inject.text_targets(families.text_layers(base, component), unused, adapter, shapes)


def trained_layers(base: families.Base, adapter: AdapterOptions, text: TextOptions) -> dict[str, Targets]:
    """The layers that get an adapter, by component, read from the headers of the base's weight files.

    Text encoders are included with --train_text_encoder, if they can be trained in the base's family.
    """
    targets = {}
    for component, shapes in layer_names.plain_layers(base.layers()).items():
        if component == "unet" or (text.train_text_encoder and base.family.trains_text):
            modules = target_modules(base, component, adapter, text, shapes)
            targets[component] = Targets(shapes, inject.layers_at(modules, shapes))
    return targets


def table(base: families.Base, adapter: AdapterOptions, text: TextOptions) -> str:
    """The table of adapters that a run prints at its start, and the size of the adapter file.

    No weights are read.
    """
    # peft builds BOFT's matrices on the CPU: a model on the meta device cannot take them.
    with torch.device("cpu" if adapter.adapter == "boft" else "meta"):
        config = base.config("unet")
        models: dict[str, torch.nn.Module] = {"unet": UNet2DConditionModel.from_config(config)}
        if text.train_text_encoder:
            for name, (_, model_class) in base.family.text.items():
                models[name] = model_class(AutoConfig.from_pretrained(base.folder / name))
        components = []
        for name, model in models.items():
            modules = target_modules(base, name, adapter, text, inject.shapes_of(model))
            components.append(inject.inject(name, model, adapter, modules, seed=0))
    size = sum(p.numel() for component in components for _, p in component.named_parameters())
    return f"{inject.describe(components)}\nadapter file {4 * size / 2**20:.2f} MiB"
