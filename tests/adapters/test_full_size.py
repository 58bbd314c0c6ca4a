"""How much is trained on bases of full size, counted on models without weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.kept import XL_UNET
from dreambooth.adapters import inject
from dreambooth.options.adapter import AdapterOptions
from tests import tiny


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "whole", "trained"),
    [
        ({"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964, 797_184),
        (
            {
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            865_910_724,
            829_952,
        ),
        (XL_UNET, 2_567_463_684, 5_806_080),
    ],
    ids=["SD 1.5", "SD 2.1", "SDXL"],
)
def test_rank_4_trains_so_many_parameters_of_the_full_size_unets(config, whole, trained):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        assert sum(p.numel() for p in unet.parameters()) == whole
        component = tiny.inject_lora("unet", unet, rank=4, dropout=0.0, targets=inject.UNET_TARGETS, seed=0)
    assert sum(p.numel() for _, p in component.named_parameters()) == trained
    assert all(p.is_meta for p in unet.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layers", "width", "trained"),
    [
        (CLIPTextModel, 12, 768, 294_912),
        (
            CLIPTextModel,
            23,
            1024,
            753_664,
        ),  # OpenCLIP-H as Stable Diffusion 2 has it: its 24th layer is not in the base
        (CLIPTextModelWithProjection, 32, 1280, 1_310_720),
    ],
    ids=["CLIP-L", "OpenCLIP-H", "OpenCLIP-bigG"],
)
def test_rank_4_trains_so_many_parameters_of_the_full_size_text_encoders(kind, layers, width, trained):
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    counts = []
    for unused in (0, 1):
        with torch.device("meta"):
            model = kind(config)
            targets = inject.used_text_targets(AdapterOptions(), layers - unused, inject.shapes_of(model))
            component = tiny.inject_lora("text_encoder", model, rank=4, dropout=0.0, targets=targets, seed=0)
        counts.append(sum(p.numel() for _, p in component.named_parameters()))
    assert counts == [
        trained,
        trained // layers * (layers - 1),
    ]  # Stable Diffusion XL leaves out the last layer of its first one
