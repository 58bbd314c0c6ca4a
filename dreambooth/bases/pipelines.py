"""Pipelines from parts in memory or from disk, and the pictures that they draw."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, TCDScheduler
from PIL import Image

from dreambooth.bases import autoencoder, loading, schedulers
from dreambooth.bases.families import Base
from dreambooth.bases.folders import BASE_FLAG, UNUSED_PARTS
from dreambooth.bases.loading import FrozenParts
from dreambooth.bases.prompts import PromptCache, PromptEmbeds, TextParts
from dreambooth.io.errors import UserError
from dreambooth.options.pictures import Sampling, SchedulerName
from dreambooth.options.training import TextOptions

_TCD_ETA = 0.3  # the noise of a step, as in TCD's own examples (arXiv 2402.19159)


def pipeline_of(parts: FrozenParts, scheduler: Any, vae: AutoencoderKL | None) -> Any:
    """A pipeline of the models in memory with this VAE, without a safety checker, which would blacken
    pictures."""
    family, text = parts.family, parts.text
    models: dict[str, Any] = {}
    for number, (encoder, (tokenizer, _)) in enumerate(family.text.items()):
        models[encoder] = text.encoders.get(encoder) if text else None
        models[tokenizer] = text.tokenizers[number] if text else None
    models |= {"unet": parts.unet, "scheduler": scheduler} | ({"vae": vae} if vae is not None else {})
    if family.pipeline is StableDiffusionXLPipeline:
        models["add_watermarker"] = False
    else:
        models |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if not family.has_vae:
        models["watermarker"] = None
    pipeline = family.pipeline(**models)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(
    base: Base, dtype: torch.dtype, device: torch.device, scheduler: SchedulerName | None = None
) -> Any:
    """A pipeline from disk with no safety checker, and with this scheduler, or else the base's own. Raises
    UserError if loading fails.

    With float16, a VAE whose config says that it overflows is loaded in float32.
    """
    family, options = base.family, base.options
    parts: dict[str, Any] = {part: None for part in UNUSED_PARTS if part in base.index}
    tokenizers = [name for name, _ in family.text.values()]
    if base.single_file:
        parts |= dict(zip(tokenizers, loading.load_tokenizers(base), strict=True))
    elif options.tokenizer_name:
        parts["tokenizer"] = loading.load_tokenizers(base)[0]
    if family.has_vae:
        overflows = dtype == torch.float16 and base.config("vae")["force_upcast"]
        parts["vae"] = loading.load_part(base, "vae", torch.float32 if overflows else dtype, device)
    parts |= {part: loading.load_part(base, part, dtype, device) for part in ("unet", *family.text)}
    parts["scheduler"] = schedulers.own(base) if scheduler is None else schedulers.named(base, scheduler)
    if family.pipeline is StableDiffusionXLPipeline:
        parts["add_watermarker"] = False
    pipeline = loading.from_pretrained(
        family.pipeline, str(base.folder), BASE_FLAG, use_safetensors=True, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def text_of(pipeline: Any, base: Base, *, clip_skip: int = 0) -> TextParts:
    """The tokenizers and text encoders of a pipeline, set to encode prompts as training does."""
    tokenizers = tuple(getattr(pipeline, tokenizer) for tokenizer, _ in base.family.text.values())
    text = loading.text_without_encoders(base, tokenizers, TextOptions(clip_skip=clip_skip))
    text.encoders = {encoder: getattr(pipeline, encoder) for encoder in base.family.text}
    return text


def draw(
    pipeline: Any,
    prompts: PromptEmbeds,
    negative: PromptEmbeds,
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    side: int | None = None,
    size: tuple[int, int] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One picture for each row of `prompts` and its seed, drawn as one batch, `side` pixels square, or of
    this `size`, (width, height).

    `negative` has one row for all pictures, or one for each. A picture's noise depends on its own seed only.
    `check` is called after every step; what it raises ends the drawing.
    """
    count = len(seeds)
    unet = pipeline.unet
    prompts, negative = prompts.to(unet.device, unet.dtype), negative.to(unet.device, unet.dtype)
    if len(negative.embeds) != count:
        negative = negative.rows(torch.zeros(count, dtype=torch.int64))
    arguments: dict[str, Any] = {"prompt_embeds": prompts.embeds, "negative_prompt_embeds": negative.embeds}
    if prompts.pooled is not None:
        arguments["pooled_prompt_embeds"] = prompts.pooled
        arguments["negative_pooled_prompt_embeds"] = negative.pooled
    vae = getattr(pipeline, "vae", None)
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        arguments["callback_on_step_end"] = _after_each_step(check)
    else:  # DeepFloyd IF's pipeline has the older callback only
        arguments["callback"] = lambda step, timestep, latents: check()
    if isinstance(pipeline.scheduler, TCDScheduler):  # which the pipelines would give 0 otherwise
        arguments["eta"] = _TCD_ETA
    width, height = size or (side, side)
    images = pipeline(
        **arguments,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        output_type="latent" if vae is not None else "pil",
    ).images
    return decode(pipeline, images) if vae is not None else images


def draw_as(
    sampling: Sampling,
    negative_prompt: str,
    pipeline: Any,
    cache: PromptCache,
    prompts: Sequence[str],
    seeds: Sequence[int],
    check: Callable[[], None],
) -> list[Image.Image]:
    """`draw` with the steps, guidance and size that the flags say. `cache` has all the prompts."""
    return draw(
        pipeline,
        cache.of(prompts),
        cache.of([negative_prompt]),
        seeds,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        size=sampling.size,
        check=check,
    )


def dtype_of(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the models of a pipeline by --mixed_precision. Raises UserError for fp16 on a CPU."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents [B, channels, h, w], in the VAE's dtype, even under autocast. One at a time, to
    save memory."""
    vae = pipeline.vae
    with torch.autocast(vae.device.type, enabled=False):
        latents = autoencoder.denormalized(vae, latents.to(vae.device, vae.dtype))
        pixels = torch.cat([vae.decode(picture[None]).sample.float() for picture in latents])
    return pipeline.image_processor.postprocess(pixels.cpu(), output_type="pil")


def _after_each_step(check: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        check()
        return values

    return callback
