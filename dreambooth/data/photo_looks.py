"""What a photo looks like in small: how sharp it is, and whether it shows the same as another one.

The limits were chosen on the 158 photos of the DreamBooth data set (30 subjects); docs/photos.md has the
figures.
"""

import dataclasses
import functools
import itertools
from typing import Literal

import numpy as np
from PIL import Image

from dreambooth.data import photos
from dreambooth.data.photos import Photo

SHARP_SIDE = 512  # pixels of the shorter side at which blur is measured
MOST_BLUR = 0.52
MOST_DIFFERENCE = 0.3
_SIDE = 128  # of the stored picture
_SMALL = 32  # of the compared pictures
_TILES = 8  # on each side of a compared picture
_MARGINS = (0, 0.03, 0.06)  # that may be cut off each side
# Pairs that differ more than this in 16 x 16 pixels, without margins, are not compared further.
_MOST_AT_FIRST = 0.6
_BLUR_WIDTH = 9  # of the mean that a picture is compared with


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """A photo in small."""

    grey: Image.Image
    """128 x 128 pixels, whatever the photo's shape."""
    blur: float
    """From 0, sharp, to 1: see `blur_of`."""

    @functools.cached_property
    def coarse(self) -> np.ndarray:
        """16 x 16 pixels, normalized."""
        return _normalized(np.asarray(self.grey.resize((16, 16), Image.Resampling.BOX), dtype=np.float32))

    @functools.cached_property
    def cut(self) -> np.ndarray:
        """The picture with each combination of margins cut off, float32 [81, 32, 32], normalized. The first
        is the full picture."""
        side = self.grey.width
        boxes = [
            (left * side, top * side, side - right * side, side - bottom * side)
            for left, top, right, bottom in itertools.product(_MARGINS, repeat=4)
        ]
        size, box_filter = (_SMALL, _SMALL), Image.Resampling.BOX
        small = [np.asarray(self.grey.resize(size, box_filter, box=box)) for box in boxes]
        return _normalized(np.stack(small).astype(np.float32))

    @functools.cached_property
    def mirrored(self) -> "Look":
        return Look(self.grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), self.blur)


def look_at(photo: Photo) -> Look:
    """The photo in small, read from its file. Raises UserError as `photos.load` does."""
    return look_of(photos.load(photo, reduced_to=SHARP_SIDE))


def look_of(image: Image.Image) -> Look:
    """The picture in small."""
    grey = image.convert("L")
    scale = SHARP_SIDE / min(grey.size)
    if scale < 1:
        sides = (round(grey.width * scale), round(grey.height * scale))
        grey = grey.resize(sides, Image.Resampling.BOX)
    return Look(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), blur_of(np.asarray(grey, np.float32)))


def blur_of(pixels: np.ndarray) -> float:
    """How blurred a picture is, from its grey values [height, width]: the share of the differences between
    neighbours that is left after a mean over 9 pixels, along the more blurred axis (Crete et al. 2007, "The
    blur effect"). A picture of one colour is 0."""
    return max(_blur_along(pixels), _blur_along(pixels.T))


def _blur_along(pixels: np.ndarray) -> float:
    """`blur_of` along the first axis."""
    padded = np.pad(pixels, [(_BLUR_WIDTH // 2 + 1, _BLUR_WIDTH // 2), (0, 0)], mode="edge")
    sums = np.cumsum(padded, axis=0, dtype=np.float64)
    mean = (sums[_BLUR_WIDTH:] - sums[:-_BLUR_WIDTH]) / _BLUR_WIDTH
    before, after = np.abs(np.diff(pixels, axis=0)), np.abs(np.diff(mean, axis=0))
    total = float(before.sum())
    return 1 - float(np.maximum(0, before - after).sum()) / total if total else 0.0


def same_picture(one: Look, other: Look) -> Literal["same", "mirrored"] | None:
    """Whether two photos show the same, up to size, compression, brightness and margins of 6 %, or are mirror
    images of each other."""
    if difference(one, other) < MOST_DIFFERENCE:
        return "same"
    return "mirrored" if difference(one, other.mirrored) < MOST_DIFFERENCE else None


def difference(one: Look, other: Look) -> float:
    """The largest squared difference of a tile, in units of the mean square of the pictures: 0 for the same
    picture, over 1 for different ones. Of the margins that may be cut off one of both, the best are taken."""
    if float(((one.coarse - other.coarse) ** 2).mean()) / 2 > _MOST_AT_FIRST:
        return np.inf
    pairs = ((one.cut, other.cut[:1]), (other.cut, one.cut[:1]))
    return min(float(_largest_tile(cut - full).min()) for cut, full in pairs)


def _largest_tile(differences: np.ndarray) -> np.ndarray:
    """The largest mean square of a tile of each picture, halved as a difference of two pictures."""
    side = _SMALL // _TILES
    tiles = (differences**2).reshape(len(differences), _TILES, side, _TILES, side).mean(axis=(2, 4))
    return tiles.max(axis=(1, 2)) / 2


def _normalized(pixels: np.ndarray) -> np.ndarray:
    """Pictures [..., height, width] with mean 0 and mean square 1; 0 for a picture of one colour."""
    centred = pixels - pixels.mean(axis=(-2, -1), keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=(-2, -1), keepdims=True))
    return centred / np.maximum(spread, 1e-3)
