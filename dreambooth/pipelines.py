"""A pipeline and its pictures: one generator a picture, sets of class images, contact sheets, settings inside PNG files."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    side: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One picture for each (prompt, seed), drawn together. Its noise depends on its own seed alone. `check` is called after every step."""
    return pipeline(
        prompt=list(prompts),
        negative_prompt=[negative_prompt] * len(prompts),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=side,
        width=side,
        callback_on_step_end=_after_each_step(check),
    ).images


def draw_embeds(pipeline: Any, embeds: torch.Tensor, seeds: Sequence[int], *, side: int, check: Callable[[], None]) -> list[Image.Image]:
    """One picture for each seed, drawn alone, from the embeddings [2, tokens, width] of a prompt and of the empty one."""
    images: list[Image.Image] = []
    for seed in seeds:
        images += pipeline(
            prompt_embeds=embeds[:1],
            negative_prompt_embeds=embeds[1:],
            generator=torch.Generator("cpu").manual_seed(seed),
            num_inference_steps=25,
            height=side,
            width=side,
            callback_on_step_end=_after_each_step(check),
        ).images
    return images


def _after_each_step(check: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        check()
        return values

    return callback


def save_png(image: Image.Image, target: Path | BinaryIO, settings: dict[str, Any]) -> None:
    """Save with `settings` as JSON in one text chunk: a prompt cannot forge another field there."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("dreambooth", json.dumps(settings, ensure_ascii=False, sort_keys=True))
    image.save(target, format="PNG", pnginfo=info)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str] = (), side: int = 160) -> Image.Image:
    """Labelled rows of pictures, each shown at `side` pixels; `columns` are headings."""
    font = ImageFont.load_default(13)
    per_row = max(len(images) for _, images in rows)
    label_height, margin, heading = 20, 6, 22 if columns else 0
    width = margin + per_row * (side + margin)
    height = margin + heading + len(rows) * (label_height + side + margin)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        pen.text((margin + number * (side + margin), margin), column, fill="black", font=font)
    for number, (label, images) in enumerate(rows):
        top = margin + heading + number * (label_height + side + margin)
        pen.text((margin, top + 2), _fitted(label, width - 2 * margin, font), fill="black", font=font)
        for place, image in enumerate(images):
            scale = side / max(image.size)
            resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
            sheet.paste(shown, (margin + place * (side + margin), top + label_height))
    return sheet


def _fitted(text: str, width: int, font: Any) -> str:
    """The text, cut with an ellipsis to fit `width` pixels; characters that the font lacks cannot break the sheet."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    share = width / font.getlength(text)
    return text[: max(1, math.floor(len(text) * share) - 3)] + "..."
