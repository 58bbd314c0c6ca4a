"""Which layers of a base get an adapter, in training and in --dry_run."""

import dataclasses
from collections.abc import Mapping

import torch

from dreambooth.adapter_files import layer_names, writing
from dreambooth.adapters import inject
from dreambooth.bases import configs, families
from dreambooth.data import sampling_order
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
    if not unused:
        return inject.text_targets(adapter)
    layers = base.config(component)["num_hidden_layers"]
    return inject.used_text_targets(adapter, layers - unused, shapes)


def inject_adapters(
    models: Mapping[str, torch.nn.Module],
    base: families.Base,
    adapter: AdapterOptions,
    text: TextOptions,
    seed: int,
) -> list[inject.Component]:
    """The UNet and text encoders in `models`, by component, with their adapters. Initial values depend on
    `seed` and the component's name alone."""
    components = []
    for name, model in models.items():
        modules = target_modules(base, name, adapter, text, inject.shapes_of(model))
        init_seed = sampling_order.key(seed, "lora-init", name)
        components.append(inject.inject(name, model, adapter, modules, seed=init_seed))
    return components


def trained_layers(base: families.Base, adapter: AdapterOptions, text: TextOptions) -> dict[str, Targets]:
    """The layers that get an adapter, by component, read from the headers of the base's weight files. Text
    encoders are included with --train_text_encoder, if they can be trained in the base's family."""
    targets = {}
    for component, shapes in layer_names.plain_layers(base.layers()).items():
        if component == "unet" or (text.train_text_encoder and base.family.trains_text):
            modules = target_modules(base, component, adapter, text, shapes)
            targets[component] = Targets(shapes, inject.layers_at(modules, shapes))
    return targets


def reader_notes(base: families.Base, adapter: AdapterOptions, text: TextOptions) -> list[str]:
    """Notes on programs that misread this kind of adapter, or some of its layers, in kohya's layout."""
    notes = []
    if adapter.use_dora and adapter.output_kohya_format:
        notes.append(
            "--output_kohya_format with --use_dora: only LyCORIS reads that file as it is trained."
            " `convert_adapter.py convert` with --to kohya and --rank writes a LoRA near it for ComfyUI,"
            " A1111, Forge, InvokeAI and kohya's own scripts."
        )
    factor = adapter.decompose_factor
    if adapter.adapter == "lokr" and factor > 0 and base.kohya_family is not None:
        widths = {
            f"{component}.{layer}": targets.shapes[layer][:2]
            for component, targets in trained_layers(base, adapter, text).items()
            for layer in targets.layers
        }
        swapped = [
            name
            for name, sides in widths.items()
            if any(writing.divided(width, factor) ** 2 > width for width in sides)
        ]
        if swapped:
            notes.append(
                f"--decompose_factor {factor} is over the root of the width of {len(swapped)} of"
                f" {len(widths)} layers, e.g. {swapped[0]}: LyCORIS cannot read these layers from a kohya"
                " file. The other programs can."
            )
    return notes


def table(base: families.Base, adapter: AdapterOptions, text: TextOptions) -> str:
    """The table of adapters that a run prints at its start, and the size of the adapter file. No weights are
    read."""
    # peft builds BOFT's matrices on the CPU: a model on the meta device cannot take them.
    with torch.device("cpu" if adapter.adapter == "boft" else "meta"):
        names = ["unet", *(base.family.text if text.train_text_encoder else ())]
        models = {name: configs.build(base.family.kinds[name], base.config(name)) for name in names}
        components = inject_adapters(models, base, adapter, text, seed=0)
    size = sum(p.numel() for component in components for _, p in component.named_parameters())
    return f"{inject.describe(components)}\nadapter file {4 * size / 2**20:.2f} MiB"
