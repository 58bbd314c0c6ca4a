"""Measure what the embedded base knows, by the reader, and write it into its model card.

    python -m picturebook.base_report

512 prompts with fixed seeds, 25 sampling steps; fresh renders for the autoencoder. Ends with status 1 if a figure misses its target.
"""

import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers import StableDiffusionPipeline
from PIL import Image

from picturebook import score
from picturebook.draw import draw
from picturebook.read import read
from picturebook.train_base import MODEL_DIR, to_tensor
from picturebook.world import describe, random_scene, with_article

SPREAD_TARGET = 0.25
PSNR_TARGET = 28.0


@dataclass
class Options:
    """Figures of the embedded base."""

    model: Path = MODEL_DIR
    """Folder of the base."""
    prompts: int = 512
    """How many prompts."""
    guidance_scale: float = 3.0
    """Classifier-free guidance."""
    batch_size: int = 32
    """Pictures drawn at once."""
    num_threads: int = 2
    """CPU threads."""
    output: Path | None = None
    """JSON file for the figures; None is figures.json beside the model's card."""
    sheet: Path | None = None
    """PNG file for a contact sheet of the first pictures."""


def report_prompt(number: int) -> str:
    """Prompt `number` of the report: class, colour and place always, an accessory with its colour on half of them."""
    scene = random_scene(random.Random(f"report {number}"))
    return f"a photo of {with_article(describe(scene.kind, scene.colour, scene.place, scene.accessory, scene.accessory_colour))}"


@torch.no_grad()
def reconstruction_psnr(vae: Any, pictures: int = 256) -> float:
    """Peak signal-to-noise ratio, in dB over all pixels together, of fresh renders after encoding (mean) and decoding."""
    errors = []
    for start in range(0, pictures, 32):
        pixels = to_tensor([random_scene(random.Random(f"psnr {n}")) for n in range(start, start + 32)])
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - pixels).square().mean().item() / 4)
    return -10 * math.log10(float(np.mean(errors)))


def draw_prompts(pipeline: Any, prompts: list[str], options: Options) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(batch))]
        images += pipeline(batch, generator=generators, num_inference_steps=25, guidance_scale=options.guidance_scale).images
    return images


def reader_accuracy(pictures: int = 200) -> float:
    """Share of fresh renders of which the reader gets every attribute right."""
    scenes = [random_scene(random.Random(f"reader {n}")) for n in range(pictures)]
    return sum(same_but_pose(read(draw(scene)).scene, scene) for scene in scenes) / pictures


def same_but_pose(a: Any, b: Any) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ("kind", "colour", "place", "accessory", "accessory_colour", "identity"))


def main(options: Options) -> bool:
    """Print and write the figures; True if all targets are met."""
    torch.set_num_threads(options.num_threads)
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    prompts = [report_prompt(n) for n in range(options.prompts)]
    started = time.monotonic()
    images = draw_prompts(pipeline, prompts, options)
    drawing_seconds = time.monotonic() - started
    readings = [read(image) for image in images]
    if options.sheet:
        from PIL import ImageDraw

        sheet = Image.new("RGB", (8 * 136, 6 * 150), "white")
        for n, image in enumerate(images[:48]):
            sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), (8 + n % 8 * 136, n // 8 * 150))
            ImageDraw.Draw(sheet).text((8 + n % 8 * 136, n // 8 * 150 + 130), prompts[n].removeprefix("a photo of ")[:24], fill="black")
        sheet.save(options.sheet)
    figures: dict[str, Any] = {
        "prompts": options.prompts,
        "guidance_scale": options.guidance_scale,
        "steps": 25,
        **{name: round(value, 4) for name, value in score.prompt_scores(readings, prompts).items()},
        "spread": {name: round(value, 4) for name, value in score.spread(readings).items()},
        "psnr_db": round(reconstruction_psnr(pipeline.vae), 2),
        "reader_right_on_renders": round(reader_accuracy(), 4),
        "seconds_a_picture": round(drawing_seconds / len(images), 3),
    }
    misses = [f"{name} {figures[name]:.3f} < {target}" for name, target in score.BASE_TARGETS.items() if figures[name] < target]
    misses += [f"spread of {name} {value:.3f} > {SPREAD_TARGET}" for name, value in figures["spread"].items() if value > SPREAD_TARGET]
    misses += [f"PSNR {figures['psnr_db']} dB < {PSNR_TARGET} dB"] if figures["psnr_db"] < PSNR_TARGET else []
    figures["misses"] = misses
    print(json.dumps(figures, indent=1))
    (options.output or options.model / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return not misses


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options, use_underscores=True)) else 1)
