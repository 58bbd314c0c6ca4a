"""Drawing with a pipeline: one generator for each picture."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from dreambooth.bases import autoencoder
from dreambooth.bases.prompts import PromptEmbeds


def draw(
    pipeline: Any,
    prompts: PromptEmbeds,
    negative: PromptEmbeds,
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    side: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One picture for each row of `prompts` and seed, drawn together; `negative` is one row, or one for each. A picture's noise depends on its
    own seed alone. `check` is called after every step."""
    count = len(seeds)
    unet = pipeline.unet
    prompts, negative = prompts.to(unet.device, unet.dtype), negative.to(unet.device, unet.dtype)
    negative = negative if len(negative.embeds) == count else negative.rows([0] * count)
    words: dict[str, Any] = {"prompt_embeds": prompts.embeds, "negative_prompt_embeds": negative.embeds}
    if prompts.pooled is not None:
        words |= {"pooled_prompt_embeds": prompts.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    vae = getattr(pipeline, "vae", None)
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        words["callback_on_step_end"] = _after_each_step(check)
    else:  # DeepFloyd IF's pipeline has the older kind
        words["callback"] = lambda step, timestep, latents: check()
    images = pipeline(
        **words,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=side,
        width=side,
        output_type="latent" if vae is not None else "pil",
    ).images
    return decode(pipeline, images) if vae is not None else images


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents [B, channels, h, w], one at a time (so much less memory), in the VAE's own precision whatever autocast is on."""
    vae = pipeline.vae
    with torch.autocast(vae.device.type, enabled=False):
        latents = autoencoder.denormalized(vae, latents.to(vae.device, vae.dtype))
        pixels = torch.cat([vae.decode(one[None]).sample.float() for one in latents])
    return pipeline.image_processor.postprocess(pixels.cpu(), output_type="pil")


def _after_each_step(check: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        check()
        return values

    return callback
