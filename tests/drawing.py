"""Pipelines that draw batches of a few steps, as the programs do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreambooth.bases import families, pipelines
from dreambooth.options.training import BaseOptions


def load(
    folder: Path, *, steps: int, dtype: torch.dtype, device: torch.device, sampler: Any = None
) -> tuple[Any, Callable[..., list[bytes]]]:
    """(pipeline of the base in `folder`, function that draws a batch and returns the pixels). `sampler` is a
    class of diffusers in place of the base's own."""
    base = families.find(BaseOptions(str(folder)))
    pipeline = pipelines.load_pipeline(base, dtype, device)
    if sampler is not None:
        pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    with torch.no_grad():
        cache = pipelines.text_of(pipeline, base).encode_all(["a dog", ""])

    def draw(
        seeds: list[int], guidance_scale: float = 7.5, check: Callable[[], None] = lambda: None
    ) -> list[bytes]:
        images = pipelines.draw(
            pipeline,
            cache.of(["a dog"] * len(seeds)),
            cache.of([""]),
            seeds,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            check=check,
        )
        return [image.tobytes() for image in images]

    return pipeline, draw
