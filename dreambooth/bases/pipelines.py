"""A pipeline and its pictures: one generator a picture, sets of class images, contact sheets, settings inside PNG files."""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

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


def save_png(image: Image.Image, target: Path | BinaryIO, settings: dict[str, Any]) -> None:
    """Save with `settings` as JSON in one text chunk: a prompt cannot forge another field there."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("dreambooth", json.dumps(settings, ensure_ascii=False, sort_keys=True))
    image.save(
        target, format="PNG", pnginfo=info, compress_level=1
    )  # of photos a quarter of the time of level 6, and no larger a file


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]], columns: Sequence[str] = (), side: int = 160
) -> Image.Image:
    """Labelled rows of pictures, each shown at `side` pixels; `columns` are headings. Where a picture is None its place stays empty."""
    font = ImageFont.load_default(13)
    per_row = max(len(images) for _, images in rows)
    label_height, margin, heading = 20, 6, 22 if columns else 0
    width = margin + per_row * (side + margin)
    height = margin + heading + len(rows) * (label_height + side + margin)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        pen.text(
            (margin + number * (side + margin), margin), _fitted(column, side, font), fill="black", font=font
        )
    for number, (label, images) in enumerate(rows):
        top = margin + heading + number * (label_height + side + margin)
        pen.text((margin, top + 2), _fitted(label, width - 2 * margin, font), fill="black", font=font)
        for place, image in enumerate(images):
            if image is None:
                continue
            scale = side / max(image.size)
            resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            shown = image.resize(
                (max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample
            )
            sheet.paste(shown, (margin + place * (side + margin), top + label_height))
    return sheet


def _fitted(text: str, width: int, font: Any) -> str:
    """The text, cut with an ellipsis to fit `width` pixels; characters that the font lacks cannot break the sheet."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    share = width / font.getlength(text)
    return text[: max(1, math.floor(len(text) * share) - 3)] + "..."
