"""Bases of a given shape with random weights, for measuring.

    python -m benchmarks.speed_bases NAME FOLDER [DEVICE] [DTYPE]

NAME is one of SHAPES. The weights are made on the device, cpu or cuda, and saved as float32 or bfloat16. On a
GPU that takes seconds where a CPU takes minutes.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.kept import XL_UNET
from picturebook.tokenizer import build_tokenizer


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a base. With two text encoders it is a Stable Diffusion XL, else a 1.5."""

    unet: dict[str, Any]
    vae_widths: tuple[int, ...]
    texts: tuple[tuple[int, int, int, int], ...]
    """Width, layers, heads and least vocabulary of each text encoder."""
    resolution: int = 512
    """Pixels."""


_TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_TINY_XL_UNET = _TINY_UNET | {
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 1),
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
_VAE, _CLIP = (128, 256, 512, 512), (768, 12, 12, 49408)
SHAPES = {
    "m35": Shape(
        {"sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256},
        (64, 64, 128, 128),
        ((256, 6, 8, 1000),),
    ),
    "sd15": Shape({"sample_size": 64, "cross_attention_dim": 768}, _VAE, (_CLIP,)),
    "sdxl": Shape({"sample_size": 128, **XL_UNET}, _VAE, (_CLIP, (1280, 32, 20, 49408)), 1024),
    "sd15-tiny": Shape(_TINY_UNET | {"cross_attention_dim": 32}, (32,) * 4, ((32, 2, 4, 0),), 64),
    "sdxl-tiny": Shape(_TINY_XL_UNET, (32,) * 4, ((32, 2, 4, 0), (32, 2, 4, 0)), 64),
}


def build(name: str, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Save the base in `folder`. The folder appears only once it is complete."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipeline = _pipeline(shape)
    finally:
        torch.set_default_dtype(default)
    partial = folder.with_name(f"{folder.name}.partial")
    pipeline.save_pretrained(partial)
    os.rename(partial, folder)


def _pipeline(shape: Shape) -> Any:
    is_xl = len(shape.texts) > 1
    tokenizers = [build_tokenizer() for _ in shape.texts]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 77
    configs = [
        CLIPTextConfig(
            vocab_size=max(words, len(tokenizer)),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=width if is_xl else 512,
        )
        for tokenizer, (width, layers, heads, words) in zip(tokenizers, shape.texts, strict=True)
    ]
    vae = AutoencoderKL(
        block_out_channels=shape.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=shape.resolution,
        scaling_factor=0.13025 if is_xl else 0.18215,
    )
    text_encoder = CLIPTextModel(configs[0])
    text_encoder_2 = CLIPTextModelWithProjection(configs[1]) if is_xl else None
    unet = UNet2DConditionModel(**{"attention_head_dim": 8, **shape.unet})
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with torch.device("cpu"):  # the schedulers' tables
        if is_xl:
            tokenizers[1].pad_token = "!"  # as the second of Stable Diffusion XL
            return StableDiffusionXLPipeline(
                vae=vae,
                text_encoder=text_encoder,
                text_encoder_2=text_encoder_2,
                tokenizer=tokenizers[0],
                tokenizer_2=tokenizers[1],
                unet=unet,
                scheduler=EulerDiscreteScheduler(**noise, timestep_spacing="leading"),
                add_watermarker=False,
            )
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizers[0],
            unet=unet,
            scheduler=DDIMScheduler(**noise, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


if __name__ == "__main__":
    name, folder, *others = sys.argv[1:]
    device = others[0] if others else "cpu"
    dtype = others[1] if len(others) > 1 else "float32"
    build(name, Path(folder), device, getattr(torch, dtype))
