"""Crop geometry: the shorter side of a photo is resized to the training resolution, and a square is cut from
the result.

Sizes are (width, height), corners (left, top) and boxes (left, top, right, bottom), in pixels of the resized
photo.
"""

import dataclasses

import numpy as np
import torch
from PIL import Image

Size = tuple[int, int]
Corner = tuple[int, int]
Box = tuple[int, int, int, int]

# Longest side of an encoded box, in crops: a VAE's memory grows with its input, and a panorama is not encoded
# in one.
_LONGEST_BOX = 3


@dataclasses.dataclass(frozen=True)
class Crops:
    """How the photos of a run are resized and cropped."""

    resolution: int
    """Side of the square crop, in pixels."""
    interpolation: str
    """A value of --image_interpolation_mode: the name of a filter of Pillow, or "nearest_exact"."""
    center_crop: bool
    stride: int = 1
    """Random crops start at multiples of it: the VAE's stride where crops are cut from stored latents, else
    1."""

    @property
    def latent_side(self) -> int:
        """Side of a crop in latents, where `stride` is the VAE's."""
        return self.resolution // self.stride

    def resized_size(self, size: Size) -> Size:
        """The size of a photo once its shorter side is `resolution`."""
        width, height = size
        if width <= height:
            return self.resolution, max(self.resolution, int(self.resolution * height / width))
        return max(self.resolution, int(self.resolution * width / height)), self.resolution

    def room(self, size: Size) -> Size:
        """How many pixels a crop can move to the right and down in the resized photo."""
        width, height = self.resized_size(size)
        return width - self.resolution, height - self.resolution

    def middle_corner(self, size: Size) -> Corner:
        """The corner of the crop from the middle."""
        left, top = self.room(size)
        return round(left / 2), round(top / 2)

    def middle(self, size: Size) -> Corner:
        """The corner of a crop near the middle that can be cut from an encoded photo: `middle_corner`, in
        steps of `stride` where crops vary."""
        left, top = self.middle_corner(size)
        if self.is_fixed(size):
            return left, top
        return left // self.stride * self.stride, top // self.stride * self.stride

    def time_ids(self, size: Size, corner: Corner) -> tuple[int, ...]:
        """Stable Diffusion XL's sizes of the crop at `corner` of a photo: original height and width, crop top
        and left, target height and width."""
        (width, height), (left, top) = size, corner
        return height, width, top, left, self.resolution, self.resolution

    def is_fixed(self, size: Size) -> bool:
        """Whether every crop of a photo of this size is the same."""
        return self.center_crop or self.room(size) == (0, 0)

    def square(self, corner: Corner) -> Box:
        """The box of the crop at `corner`."""
        left, top = corner
        return left, top, left + self.resolution, top + self.resolution

    def encoded_box(self, size: Size, corner: Corner) -> Box:
        """The box that is encoded for the crop at `corner`: a crop that is fixed, else the full photo up to
        its last complete latent, or a part of a very long photo."""
        if self.is_fixed(size):
            return self.square(self.middle_corner(size))
        sides = zip(self.resized_size(size), corner, strict=True)
        (left, right), (top, bottom) = (self._range(length, start) for length, start in sides)
        return left, top, right, bottom

    def _range(self, length: int, start: int) -> tuple[int, int]:
        """(begin, end) of the encoded range of one side for a crop that begins at `start`.

        Ranges overlap by the length of a crop, so that every crop lies within one range.
        """
        crop = self.latent_side * self.stride
        step = (_LONGEST_BOX - 1) * crop
        begin = start // step * step
        return begin, min(begin + _LONGEST_BOX * crop, length // self.stride * self.stride)

    def encoded_boxes(self, size: Size) -> list[Box]:
        """Every box that `encoded_box` can return for a photo of this size."""
        step = (_LONGEST_BOX - 1) * self.latent_side * self.stride
        lefts, tops = (range(0, room // self.stride * self.stride + 1, step) for room in self.room(size))
        return list(dict.fromkeys(self.encoded_box(size, (left, top)) for left in lefts for top in tops))

    def pixel_values(self, image: Image.Image, box: Box, *, is_mirrored: bool = False) -> torch.Tensor:
        """Float32 [3, height, width] in [-1, 1]: the image resized, mirrored if `is_mirrored`, cut to
        `box`."""
        # Pillow's nearest samples at pixel centres, as torch's "nearest-exact" does
        resampling = Image.Resampling[self.interpolation.removesuffix("_exact").upper()]
        image = image.resize(self.resized_size(image.size), resampling)
        if is_mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.crop(box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
