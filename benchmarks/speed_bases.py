"""Bases of a given shape with random weights, for measuring.

python -m benchmarks.speed_bases m35|sd15 FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from picturebook.tokenizer import build_tokenizer

# name: UNet, the VAE's widths, the text encoder's width, layers, heads and least vocabulary
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, int, int, int]]] = {
    "m35": (
        {"sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256},
        (64, 64, 128, 128),
        (256, 6, 8, 1000),
    ),
    "sd15": ({"sample_size": 64, "cross_attention_dim": 768}, (128, 256, 512, 512), (768, 12, 12, 49408)),
}


def build(name: str, folder: Path) -> None:
    """Save the base as a Stable Diffusion 1.5 pipeline in `folder`. The folder appears only once it is
    complete."""
    unet, vae_widths, (width, layers, heads, words) = SHAPES[name]
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=max(words, len(tokenizer)),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=512,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(attention_head_dim=8, **unet),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(f"{folder.name}.partial")
    pipeline.save_pretrained(partial)
    os.rename(partial, folder)


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
