"""Tiny random pipelines with the parts and shapes of each family, built locally in a second, and small photo
folders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dreambooth.adapters import inject
from dreambooth.adapters.inject import Component
from dreambooth.options.adapter import AdapterOptions
from picturebook.tokenizer import build_tokenizer


def text_config(tokenizer: Any, width: int, max_tokens: int, **others: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **others,
    )


def build_vae() -> AutoencoderKL:
    """8 x smaller, 4 channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def build_pipeline(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    text_width: int = 32,
    max_tokens: int = 77,
    tokenizer: Any = None,
    use_linear_projection: bool = False,
) -> Path:
    """Save a Stable Diffusion 1.5 in miniature (2.x with `v_prediction`, and in its layers with
    `use_linear_projection`): 8x VAE, cross attention at two levels, 77 tokens."""
    torch.manual_seed(0)
    tokenizer = tokenizer or build_tokenizer()
    tokenizer.model_max_length = max_tokens
    text_encoder = CLIPTextModel(text_config(tokenizer, text_width, max_tokens))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=8,
        norm_num_groups=8,
        use_linear_projection=use_linear_projection,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def build_xl(folder: Path, *, edm: bool = False, tokenizers: Any = None) -> Path:
    """Save a Stable Diffusion XL in miniature: two tokenizers and text encoders, a vector for the whole
    prompt, sizes and crops as numbers; with `edm` as Playground 2.5, whose scheduler is EDM's and whose
    latents have a mean and deviation."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tokenizers or (build_tokenizer(), build_tokenizer())
    tokenizer_2.pad_token = "!"  # as the second of Stable Diffusion XL
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=24 + 6 * 8,
        cross_attention_dim=32 + 40,
        norm_num_groups=8,
    )
    vae = build_vae()
    if edm:
        vae.register_to_config(
            latents_mean=[-1.6, 0.1, 1.5, -0.2], latents_std=[8.4, 5.9, 5.3, 6.1], scaling_factor=0.5
        )
        scheduler = EDMEulerScheduler()
    else:
        vae.register_to_config(scaling_factor=0.13025)
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 32, 77)),
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(tokenizer_2, 40, 77, projection_dim=24, hidden_act="gelu")
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def build_if(folder: Path) -> Path:
    """Save a DeepFloyd IF, first stage, in miniature: pixels for latents, T5, added key and value
    projections, learned variance."""
    torch.manual_seed(0)
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *(chr(code) for code in range(97, 123)),
        "\u2581",
        "\u2581a",
        "\u2581dog",
        "\u2581photo",
        "\u2581of",
        "\u2581sks",
    ]
    unigram = Tokenizer(
        models.Unigram([(word, -float(len(words) - place)) for place, word in enumerate(words)], unk_id=2)
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=40, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        encoder_hid_dim=40,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        sample_max_value=1.5,
    )
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_photos(folder: Path, count: int = 3, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """Save `count` PNG files of noise, photo-0.png and on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / f"photo-{number}.png"
        )
    return folder


def make_odd_photos(folder: Path) -> Path:
    """Save five PNG files of noise: two wide ones, a tall, a square and a very wide one."""
    make_photos(folder, 2, (96, 64))
    rng = np.random.default_rng(1)
    for number, (width, height) in enumerate([(64, 96), (80, 80), (300, 80)], 2):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo-{number}.png")
    return folder


def inject_lora(
    name: str,
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float,
    targets: tuple[str, ...],
    seed: int,
) -> Component:
    """`inject.inject` of plain LoRA."""
    options = AdapterOptions(rank=rank, lora_alpha=alpha, lora_dropout=dropout)
    return inject.inject(name, model, options, targets, seed=seed)
