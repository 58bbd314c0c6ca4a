"""Pictures of plain diffusers, for the drawing benchmark: what its documentation shows, and nothing else.

    python -m benchmarks.plain_drawing BASE BATCH COUNT STEPS DEVICE FOLDER

Draws COUNT pictures of one prompt in batches with the base's own sampler, in bfloat16 (on a CPU in
float32), and saves them as PNG files in FOLDER. The times of the files are what is measured.
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def main(base: str, batch: int, count: int, steps: int, device: str, folder: Path) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True)
    for first in range(0, count, batch):
        seeds = range(first, first + batch)
        images = pipeline(
            ["a photo of a dog"] * batch,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
        for seed, image in zip(seeds, images, strict=True):
            image.save(folder / f"{seed:05d}.png")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], Path(sys.argv[6]))
