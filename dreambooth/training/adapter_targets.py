"""What would be trained: layers, parameters and sizes, counted on models without weights."""

import torch
from diffusers import UNet2DConditionModel
from transformers import AutoConfig

from dreambooth.adapters import inject
from dreambooth.bases import families
from dreambooth.options.training import TrainOptions


def table(options: TrainOptions, base: families.Base) -> str:
    """The table that a run prints when it starts, and the size of a checkpoint, from the base's configurations alone."""
    # BOFT makes its matrices by hand, on the CPU: what is built there holds memory, but reads no weights either
    with torch.device("cpu" if options.adapter.adapter == "boft" else "meta"):
        config = base.config("unet")
        models: dict[str, torch.nn.Module] = {"unet": UNet2DConditionModel.from_config(config)}
        if options.text.train_text_encoder:
            for name, (_, kind) in base.family.text.items():
                models[name] = kind(AutoConfig.from_pretrained(base.folder / name))
        components = []
        for name, model in models.items():
            targets = inject.unet_targets(options.adapter)
            if name != "unet":
                unused = families.unused_layers(base.family, name, options.text)
                targets = inject.text_targets(
                    families.text_layers(base, name), unused, options.adapter, inject.shapes_of(model)
                )
            components.append(inject.inject(name, model, options.adapter, targets, seed=0))
        adapter = sum(
            parameter.numel() for component in components for _, parameter in component.named_parameters()
        )
        return f"{inject.describe(components)}\nadapter file {4 * adapter / 2**20:.2f} MiB"
