"""Masks of photos: where the subject is, from a file for each photo or from the photo's transparency.

A mask is resized, mirrored and cropped as its photo is, and then averaged over the pixels of each latent.
Masks are read at each start: encoded photos do not depend on them.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreambooth.data import photos, picture_files
from dreambooth.data.batches import PhotoRows
from dreambooth.data.crops import Crops
from dreambooth.data.photos import Photo
from dreambooth.io import reader
from dreambooth.io.errors import UserError, few, raise_all, shown
from dreambooth.options.masks import MaskOptions

_SMALL = 0.05  # share of a photo under which a note names it
# of 255: programs that segment write masks of 0 and 1, or of the number or colour of a class
_LEAST_BRIGHTEST = 128


@dataclasses.dataclass(frozen=True)
class Mask:
    """A checked mask."""

    path: Path
    """Of the mask; of the photo itself if its transparency is the mask."""
    is_alpha: bool
    sha256: str
    """Of the file."""
    share: float
    """The part of the photo's area that the mask covers, over 0."""


def check(options: MaskOptions, pictures: Sequence[Photo], *, follow_symlinks: bool) -> dict[str, Mask]:
    """The masks of all `pictures` by file name; {} without masks.

    Raises UserError, with a line for each problem, if a photo has no mask or several, or if a mask cannot be
    read, has another size than its photo, has transparent parts or has nothing white.
    """
    if not options.is_given:
        return {}
    flag = "--alpha_mask" if options.mask_dir is None else "--mask_dir"
    folder = Path(options.mask_dir) if options.mask_dir is not None else None
    files = _by_stem(folder) if folder else {}
    masks, problems = {}, []
    for photo in pictures:
        name = photo.path.name
        try:
            path = folder / _file_of(name, files) if folder else photo.path
            is_alpha = folder is None
            masks[name] = _checked(path, photo, is_alpha=is_alpha, follow_symlinks=follow_symlinks)
        except UserError as error:
            problems.append(f"{flag}: {shown(name)}: {error}")
    raise_all(problems)
    return masks


def _by_stem(folder: Path) -> dict[str, list[str]]:
    """The names of the files in a folder of masks, by name without ending."""
    files: dict[str, list[str]] = {}
    for name in picture_files.names(folder, "--mask_dir"):
        if Path(name).suffix.lower() in picture_files.ENDINGS:
            files.setdefault(Path(name).stem, []).append(name)
    return files


def _file_of(photo: str, files: Mapping[str, Sequence[str]]) -> str:
    """The name of the mask's file of the photo with this name."""
    stem = Path(photo).stem
    candidates = files.get(stem, [])
    if not candidates:
        raise UserError(f"there is no mask; its name must be that of the photo, as {shown(stem)}.png")
    if len(candidates) > 1:
        raise UserError(f"there are several masks, {few(candidates)}; keep one of them")
    return candidates[0]


def _checked(path: Path, photo: Photo, *, is_alpha: bool, follow_symlinks: bool) -> Mask:
    """The mask at `path`. Raises UserError, without the file's name, if it cannot be used."""
    data = picture_files.read_within(
        path.parent,
        path.name,
        "the mask cannot be read",
        picture_files.LARGEST,
        follow_symlinks=follow_symlinks,
    )
    image = _decoded(data, is_alpha=is_alpha)
    if image.size != photo.size:
        (width, height), (photo_width, photo_height) = image.size, photo.size
        raise UserError(
            f"the mask has {width} x {height} pixels and the photo, held upright, {photo_width} x"
            f" {photo_height}; save the mask in the size of the photo"
        )
    brightest = int(np.asarray(image).max())
    if brightest < _LEAST_BRIGHTEST:
        raise UserError(_fault_of_dark(brightest, is_alpha=is_alpha))
    share = float(np.asarray(image, dtype=np.float64).mean() / 255)
    return Mask(path, is_alpha, hashlib.sha256(data).hexdigest(), share)


def _fault_of_dark(brightest: int, *, is_alpha: bool) -> str:
    """What is wrong with a mask whose brightest pixel has this value."""
    if is_alpha:
        much = (
            "all of it is transparent" if brightest == 0 else f"its most opaque pixel has {brightest} of 255"
        )
        return f"{much}; the subject must be opaque"
    much = "is black everywhere" if brightest == 0 else f"is dark: its brightest pixel has {brightest} of 255"
    return f"the mask {much}; the subject must be white"


def _decoded(data: bytes, *, is_alpha: bool) -> Image.Image:
    """The mask in a file, in grey levels. Raises UserError, without the file's name, if there is none."""
    if is_alpha:
        alpha = photos.opacity(data)
        if alpha is None:
            raise UserError("the photo has no transparent part; cut the subject out, or give --mask_dir")
        return alpha
    try:
        image, _ = photos.decode(data)
    except UserError as error:
        raise UserError(f"the mask is {error}") from None
    if photos.opacity(data) is not None:
        raise UserError("the mask has transparent parts; save it in black and white, without transparency")
    return image.convert("L")


def load(mask: Mask) -> Image.Image:
    """The mask in grey levels, of the size of its photo. Raises UserError if its file has changed since it
    was checked, or cannot be read."""
    data = reader.read_bytes(mask.path, f"{shown(mask.path)} cannot be read", picture_files.LARGEST)
    if hashlib.sha256(data).hexdigest() != mask.sha256:
        raise UserError(f"{shown(mask.path)} has changed since the run was started; restore it")
    return _decoded(data, is_alpha=mask.is_alpha)


def notes(masks: Mapping[str, Mask], options: MaskOptions) -> list[str]:
    """Notes for the user: how much of the photos the masks cover, and what is learned outside."""
    if not masks:
        return []
    shares = {name: mask.share for name, mask in masks.items()}
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    mean = sum(shares.values()) / len(shares)
    weight, target = options.outside_weight, "the base's own prediction"
    outside = f"the loss outside has the weight {weight:g}" if weight else "the rest is not trained on"
    if options.has_base_targets:
        outside += f", and its target is {target}"
    remarks = [
        f"masks of {len(masks)} photos cover {mean:.0%} of their area, from {shares[least]:.0%}"
        f" ({shown(least)}) to {shares[most]:.0%} ({shown(most)}); {outside}"
    ]
    if small := [name for name, share in shares.items() if share < _SMALL]:
        remarks.append(f"the masks of {few(small)} cover less than {_SMALL:.0%} of the photo: cut it nearer")
    if full := [name for name, share in shares.items() if share == 1]:
        remarks.append(f"the masks of {few(full)} cover the full photo")
    return remarks


def shown_on(image: Image.Image, mask: Mask) -> Image.Image:
    """The photo, pale where its mask is black. Raises UserError as `load`."""
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.75)
    return Image.composite(image, pale, load(mask))


class LatentMasks:
    """The masks of the rows of a data set, on the grid of the latents."""

    def __init__(self, dataset: PhotoRows, masks: Mapping[str, Mask], options: MaskOptions):
        """`masks` are by the names of the photos of the first source (`Source.names`); a photo without one is
        weighted alike everywhere. Raises UserError as `load`."""
        self.dataset, self.options = dataset, options
        source = dataset.sources[0]
        names = dict(zip(source.photos, source.names, strict=True))
        self.resized: dict[tuple[Photo, Crops], Image.Image] = {}
        for photo, crops in dataset.all_crops(source):
            size, mask = crops.resized_size(photo.size), masks.get(names[photo])
            self.resized[photo, crops] = (
                load(mask).resize(size, Image.Resampling.BILINEAR) if mask else Image.new("L", size, 255)
            )

    def of_rows(self, rows: range, shape: tuple[int, int]) -> torch.Tensor:
        """For each row how much of each latent the subject covers, 0 to 1, float32 [rows, 1, height, width].
        `shape` is (height, width) of the latents."""
        return torch.cat([self._of_row(row, shape) for row in rows])

    def _of_row(self, row: int, shape: tuple[int, int]) -> torch.Tensor:
        dataset = self.dataset
        source, crops = dataset.sources[0], dataset.crops_of(row)
        resized = self.resized[source.photos[dataset.photo(source, row)], crops]
        box, is_mirrored = crops.box(dataset.corner(source, row)), dataset.is_mirrored(source, row)
        mask = torch.from_numpy(np.array(crops.cut(resized, box, is_mirrored=is_mirrored)))
        return F.interpolate(mask[None, None].float() / 255, shape, mode="area")
