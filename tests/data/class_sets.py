"""Sets of class images, drawn without a model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreambooth.data import class_images, sampling_order
from dreambooth.data.class_images import ClassImageSettings

SETTINGS = ClassImageSettings(
    base="0123456789abcdef",
    prompt="a photo of dog",
    seed=5,
    steps=20,
    guidance_scale=7.5,
    batch_size=4,
    side=64,
    precision="fp32",
    scheduler="dpm",
)


class Interrupted(Exception):
    """Stands for a kill."""


class Painter:
    """Draws noise instead of a prompt. As with a real base, a picture depends on its seed and, in its last
    bits, on the whole batch."""

    def __init__(self, *, fail_after: int | None = None):
        self.fail_after = fail_after
        self.chunks: list[list[int]] = []
        self.loaded = 0

    def make_draw(self) -> Callable[[Sequence[int]], list[Any]]:
        self.loaded += 1
        return self.draw

    def draw(self, seeds: Sequence[int]) -> list[Image.Image]:
        if self.fail_after is not None and len(self.chunks) >= self.fail_after:
            raise Interrupted
        self.chunks.append(list(seeds))
        batch = sampling_order.key(0, *seeds)
        return [
            Image.fromarray(np.random.default_rng([seed, batch]).integers(0, 256, (8, 8, 3), dtype=np.uint8))
            for seed in seeds
        ]

    @property
    def numbers(self) -> list[int]:
        """The chunks drawn, by their number."""
        first = {
            sampling_order.key(SETTINGS.seed, "class-image", SETTINGS.batch_size * chunk): chunk
            for chunk in range(100)
        }
        return [first[seeds[0]] for seeds in self.chunks]


def fill(
    folder: Path,
    total: int,
    painter: Painter | None = None,
    settings: ClassImageSettings = SETTINGS,
    **place: Any,
) -> int:
    return class_images.fill(folder, settings, total, (painter or Painter()).make_draw, **place)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())
