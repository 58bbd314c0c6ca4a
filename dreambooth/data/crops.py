"""Crop geometry: a photo is resized until it just covers the shape of a crop, which is cut from the result.
The shape is a square, or with --buckets one near the photo's own (see buckets.py).

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
    """How photos are resized and cropped."""

    resolution: int
    """Side of the square crop, in pixels."""
    interpolation: str
    """A value of --image_interpolation_mode: the name of a filter of Pillow, or "nearest_exact"."""
    center_crop: bool
    stride: int = 1
    """Random crops start at multiples of it: the VAE's stride where crops are cut from stored latents, else
    1."""
    bucket: Size | None = None
    """Width and height of a crop that is no square; None for the square."""

    @property
    def shape(self) -> Size:
        """Width and height of the crop, in pixels."""
        return self.bucket or (self.resolution, self.resolution)

    @property
    def latent_shape(self) -> Size:
        """Width and height of the crop in latents, where `stride` is the VAE's."""
        width, height = self.shape
        return width // self.stride, height // self.stride

    def of(self, shape: Size) -> "Crops":
        """Crops of this shape, resized and cropped as these."""
        width, height = shape
        if width == height:
            return dataclasses.replace(self, resolution=width, bucket=None)
        return dataclasses.replace(self, bucket=shape)

    def resized_size(self, size: Size) -> Size:
        """The size of a photo once it just covers the crop."""
        (width, height), (crop_width, crop_height) = size, self.shape
        if width * crop_height <= height * crop_width:
            return crop_width, max(crop_height, int(crop_width * height / width))
        return max(crop_width, int(crop_height * width / height)), crop_height

    def room(self, size: Size) -> Size:
        """How many pixels a crop can move to the right and down in the resized photo."""
        (width, height), (crop_width, crop_height) = self.resized_size(size), self.shape
        return width - crop_width, height - crop_height

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
        (width, height), (left, top), (crop_width, crop_height) = size, corner, self.shape
        return height, width, top, left, crop_height, crop_width

    def is_fixed(self, size: Size) -> bool:
        """Whether every crop of a photo of this size is the same."""
        return self.center_crop or self.room(size) == (0, 0)

    def box(self, corner: Corner) -> Box:
        """The box of the crop at `corner`."""
        (left, top), (width, height) = corner, self.shape
        return left, top, left + width, top + height

    def encoded_box(self, size: Size, corner: Corner) -> Box:
        """The box that is encoded for the crop at `corner`: a crop that is fixed, else the full photo up to
        its last complete latent, or a part of a very long photo."""
        if self.is_fixed(size):
            return self.box(self.middle_corner(size))
        sides = zip(self.resized_size(size), corner, self.latent_shape, strict=True)
        (left, right), (top, bottom) = (self._range(*side) for side in sides)
        return left, top, right, bottom

    def _range(self, length: int, start: int, latents: int) -> tuple[int, int]:
        """(begin, end) of the encoded range of one side, `length` pixels long, for a crop of `latents` that
        begins at `start`.

        Ranges overlap by the length of a crop, so that every crop lies within one range.
        """
        crop = latents * self.stride
        step = (_LONGEST_BOX - 1) * crop
        begin = start // step * step
        return begin, min(begin + _LONGEST_BOX * crop, length // self.stride * self.stride)

    def encoded_boxes(self, size: Size) -> list[Box]:
        """Every box that `encoded_box` can return for a photo of this size."""
        lefts, tops = (
            range(0, room // self.stride * self.stride + 1, (_LONGEST_BOX - 1) * latents * self.stride)
            for room, latents in zip(self.room(size), self.latent_shape, strict=True)
        )
        return list(dict.fromkeys(self.encoded_box(size, (left, top)) for left in lefts for top in tops))

    def cut(self, resized: Image.Image, box: Box, *, is_mirrored: bool) -> Image.Image:
        """The part `box` of a resized picture, which is mirrored before if `is_mirrored`."""
        if is_mirrored:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return resized.crop(box)

    def pixel_values(self, image: Image.Image, box: Box, *, is_mirrored: bool = False) -> torch.Tensor:
        """Float32 [3, height, width] in [-1, 1]: the image resized, mirrored if `is_mirrored`, cut to
        `box`."""
        # Pillow's nearest samples at pixel centres, as torch's "nearest-exact" does
        resampling = Image.Resampling[self.interpolation.removesuffix("_exact").upper()]
        image = self.cut(
            image.resize(self.resized_size(image.size), resampling), box, is_mirrored=is_mirrored
        )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
