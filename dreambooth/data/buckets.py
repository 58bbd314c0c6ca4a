"""Aspect-ratio buckets: each photo is cut to a shape near its own, so that little of it is lost.

All photos of one shape are a bucket, and a batch takes its photos from one bucket. Shapes have at most the
area of the square of a resolution, so a bucket needs no more memory than the square.
"""

import dataclasses
import functools
from collections.abc import Sequence

from dreambooth.data.crops import Size
from dreambooth.io.errors import UserError, few

MOST_ENLARGED = 1.5  # a photo that would be enlarged more gets a smaller shape
_LONGEST = 4  # longer side of a shape, in shorter sides
_LEAST_AREA = 0.8  # of a shape, in areas of the largest square on the grid
_STEPS = 16  # of the side of the square: finer shapes would make more buckets with fewer photos each


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The photos of one shape."""

    shape: Size
    photos: tuple[int, ...]
    """Indices of its photos, in order."""

    def moved(self, first: int) -> "Bucket":
        """The bucket in a longer list of photos, of which `first` come before."""
        return Bucket(self.shape, tuple(first + photo for photo in self.photos))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """How --buckets chooses the shapes of photos."""

    sides: tuple[int, ...]
    """The values of --resolution, in pixels."""
    grid: int
    """Width and height of a shape are multiples of it, in pixels: `Base.grid`."""

    def check(self) -> None:
        """Raise UserError if a resolution is under the grid."""
        if min(self.sides) < self.grid:
            raise UserError(
                f"--resolution must be at least {self.grid} with --buckets: the base's VAE and UNet halve"
                f" {self.grid} pixels to one; got {min(self.sides)}"
            )

    def shapes_of(self, size: Size) -> tuple[Size, ...]:
        """The shapes of a photo of this size: one for each resolution, without those for which it would be
        enlarged more than MOST_ENLARGED times. A photo that is small for all of them has one smaller
        shape."""
        shapes = [_nearest(size, side, self.grid) for side in self.sides]
        wanted = [shape for shape in shapes if _enlarged(size, shape) <= MOST_ENLARGED]
        if wanted:
            return tuple(dict.fromkeys(wanted))
        smaller = [_nearest(size, side, self.grid) for side in range(min(self.sides), self.grid, -self.grid)]
        fitting = (shape for shape in smaller if _enlarged(size, shape) <= MOST_ENLARGED)
        return (next(fitting, (self.grid, self.grid)),)

    def filled(self, sizes: Sequence[Size]) -> tuple[Bucket, ...]:
        """The buckets of photos of these sizes, the fullest first."""
        photos_of: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            for shape in self.shapes_of(size):
                photos_of.setdefault(shape, []).append(index)
        by_count = sorted(photos_of.items(), key=lambda item: (-len(item[1]), item[0]))
        return tuple(Bucket(shape, tuple(photos)) for shape, photos in by_count)


@functools.cache
def _shapes(side: int, grid: int) -> list[Size]:
    """All shapes for the resolution `side`: at most the area of its square, and not much less. The largest
    square on the grid is one of them."""
    step = -(-side // (_STEPS * grid)) * grid
    lengths = range(step, _LONGEST * side + 1, step)
    least = _LEAST_AREA * (side // step * step) ** 2
    return [
        (width, height)
        for width in lengths
        for height in lengths
        if least <= width * height <= side * side and max(width, height) <= _LONGEST * min(width, height)
    ]


def _nearest(size: Size, side: int, grid: int) -> Size:
    """The shape that shows most of a photo of this size; of equal ones the largest, then the widest."""
    return max(_shapes(side, grid), key=lambda shape: (kept(size, shape), shape[0] * shape[1], shape))


def kept(size: Size, shape: Size) -> float:
    """The share of a photo's area that a crop of this shape shows."""
    (width, height), (crop_width, crop_height) = size, shape
    of_photo, of_crop = width * crop_height, height * crop_width
    return min(of_photo, of_crop) / max(of_photo, of_crop)


def _enlarged(size: Size, shape: Size) -> float:
    return max(crop / side for crop, side in zip(shape, size, strict=True))


def table(buckets: Sequence[Bucket], sizes: Sequence[Size]) -> str:
    """The buckets of photos of these sizes, for the user: a line each."""
    lines = [
        " ".join(f"{cell:>{width}}" for cell, width in zip(row, (13, 6, 14, 16), strict=True))
        for row in (HEADINGS, *rows(buckets, sizes))
    ]
    return "\n".join(["buckets:", *lines])


HEADINGS = ("shape", "photos", "shown at least", "enlarged at most")


def rows(buckets: Sequence[Bucket], sizes: Sequence[Size]) -> list[tuple[str, str, str, str]]:
    """The cells under HEADINGS, for each bucket: how much of each photo its crop shows, and by how much a
    photo is enlarged."""
    table = []
    for bucket in buckets:
        shown = min(kept(sizes[photo], bucket.shape) for photo in bucket.photos)
        enlarged = max(_enlarged(sizes[photo], bucket.shape) for photo in bucket.photos)
        width, height = bucket.shape
        # rounded down: 100 % is all of the photo
        cells = f"{int(100 * shown)} %", f"{enlarged:.2f} x"
        table.append((f"{width} x {height}", str(len(bucket.photos)), *cells))
    return table


def notes(buckets: Buckets, photos: Sequence[tuple[str, Size]], batch_size: int) -> list[str]:
    """Notes on photos, given by name and size: on those that have a smaller shape, and on buckets with fewer
    photos than a batch."""
    remarks = []
    names = [
        name
        for name, size in photos
        if any(_enlarged(size, _nearest(size, side, buckets.grid)) > MOST_ENLARGED for side in buckets.sides)
    ]
    if names:
        sides = ",".join(map(str, buckets.sides))
        remarks.append(
            f"{len(names)} of {len(photos)} photos would be enlarged more than {MOST_ENLARGED} times for"
            f" --resolution {sides}, and have smaller shapes: {few(names)}"
        )
    filled = buckets.filled([size for _, size in photos])
    small = sum(len(bucket.photos) < batch_size for bucket in filled)
    if small and len(filled) > 1:
        remarks.append(
            f"{small} of {len(filled)} buckets have fewer photos than --train_batch_size {batch_size}: their"
            " batches hold a photo several times, with other noise; --train_batch_size 1 with"
            " --gradient_accumulation_steps mixes shapes within a step"
        )
    return remarks
