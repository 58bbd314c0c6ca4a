"""Tiny random judges in the formats of facebook/dino-vits16 and openai/clip-vit-base-patch32."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

from picturebook.tokenizer import build_tokenizer
from tests.tiny import text_config

SIDE = 28  # pixels; pictures are resized to 32 before they are cropped


def build_dino(folder: Path, *, seed: int = 0, width: int = 24, std: float = 0.3) -> Path:
    """Save a ViTModel as facebook/dino-vits16 is saved: with a pooling layer that is not used. `std` is the
    deviation of its weights."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=SIDE,
        patch_size=7,
    )
    model = ViTModel(config)
    for weight in (weight for weight in model.parameters() if weight.dim() > 1):
        torch.nn.init.normal_(weight, std=std)  # else all pictures have next to the same embedding
    model.save_pretrained(folder)
    return folder


def build_clip(folder: Path, *, seed: int = 0, width: int = 32) -> Path:
    """Save a CLIPModel with its image processor and tokenizer, as openai/clip-vit-base-patch32 is saved."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=7,
    )
    text = text_config(tokenizer, width, 77)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    return folder
