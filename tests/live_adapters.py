"""Small models of a base, and adapters put on them."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from dreambooth.adapter_files import native
from dreambooth.adapters import inject as adapters
from dreambooth.adapters.inject import Component
from tests import tiny

TARGETS = {"unet": adapters.UNET_TARGETS, "text_encoder": adapters.TEXT_ENCODER_TARGETS}


INFO = {"steps": 3, "seed": 5, "instance_prompt": "a photo of sks dog"}


Models = dict[str, torch.nn.Module]


def load_models(base: Path, dtype: torch.dtype = torch.float32) -> Models:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype)
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=dtype)
    return {"unet": unet.eval(), "text_encoder": text_encoder.eval()}


def inject(models: Models, rank: int = 4, seed: int = 7, dropout: float = 0.0) -> list[Component]:
    return [
        tiny.inject_lora(name, model, rank=rank, dropout=dropout, targets=TARGETS[name], seed=seed)
        for name, model in models.items()
    ]


def trained(components: list[Component]) -> list[Component]:
    """The same after some training: B is no longer zero."""
    draw = torch.Generator().manual_seed(1)
    for component in components:
        for name, parameter in component.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    return components


def packed(components: list[Component]) -> bytes:
    state = {component.name: component.state_dict() for component in components}
    return native.pack(
        state, {component.name: adapters.metadata(component) for component in components}, INFO
    )
