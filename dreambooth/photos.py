"""A folder of pictures -> checked, upright RGB images of one size.

`check_folder` decodes every picture before any model is loaded and reports all problems at once. Pictures are taken in the order of
their names, so that a run does not depend on the file system.
"""

import dataclasses
import hashlib
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dreambooth.errors import UserError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
MAX_PIXELS = 64_000_000  # a small file can unpack to gigabytes
MIN_SIDE = 16

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # Pillow's nearest samples at pixel centres, which is what "exact" means
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True)
class Photo:
    """A picture that was decoded once and found good. Size is (width, height) in pixels, upright."""

    path: Path
    size: tuple[int, int]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """The pictures of a folder in order of name, and remarks for the user."""

    photos: list[Photo]
    notes: list[str]


def _shown(name: str) -> str:
    """A file name safe to print: control characters and escapes are spelled out."""
    return name if name.isprintable() else ascii(name)


def check_folder(folder: str | Path, flag: str) -> Folder:
    """Decode every picture in `folder`, named by `flag` on the command line.

    Raises UserError if the folder is missing or has no picture, or with one line for every picture that cannot be used.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{flag}: there is no folder {_shown(str(folder))}")
    if not folder.is_dir():
        raise UserError(f"{flag}: {_shown(str(folder))} is not a folder; name the folder that holds the pictures")
    names = sorted(os.listdir(folder), key=os.fsencode)
    visible = [name for name in names if not name.startswith(".") and name not in ("Thumbs.db", "desktop.ini")]
    candidates = [name for name in visible if Path(name).suffix.lower() in FORMATS]
    others = [name for name in visible if name not in candidates]
    if not candidates:
        seen = f"it holds {', '.join(map(_shown, others[:5]))}" if others else "it is empty"
        raise UserError(f"{flag}: no picture in {_shown(str(folder))} ({', '.join(sorted(FORMATS))}); {seen}")
    photos, problems, notes = [], [], []
    by_hash: dict[str, str] = {}
    for name in candidates:
        try:
            photo = _check(folder / name)
        except UserError as error:
            problems.append(f"{flag}: {_shown(name)}: {error}")
            continue
        photos.append(photo)
        if photo.sha256 in by_hash:
            notes.append(f"{_shown(name)} and {_shown(by_hash[photo.sha256])} are the same file: that picture counts twice")
        by_hash.setdefault(photo.sha256, name)
    if problems:
        raise UserError("\n".join(problems))
    if len(names) > len(visible):
        notes.append(f"skipped {len(names) - len(visible)} hidden or system files in {_shown(str(folder))}")
    if others:
        notes.append(
            f"skipped what is no picture in {_shown(str(folder))}: {', '.join(map(_shown, others[:5]))}" + (" ..." if len(others) > 5 else "")
        )
    return Folder(photos, notes)


def _check(path: Path) -> Photo:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe or a device would wait for ever
            raise UserError("not a regular file")
        if info.st_size == 0:
            raise UserError("the file is empty")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    image = load(path)
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{image.width} x {image.height} pixels is too small; each side must have at least {MIN_SIDE}")
    return Photo(path, image.size, hashlib.sha256(data).hexdigest())


def load(path: Path) -> Image.Image:
    """The picture, upright and RGB; transparent parts over white, 16-bit grey scaled to 8. Raises UserError if it cannot be used."""
    formats = tuple(sorted(set(FORMATS.values())))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower, and an error
            with Image.open(path, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{image.width} x {image.height} is over {MAX_PIXELS:,} pixels; make it smaller")
                # the second picture of an MPO file, which many phones write as .jpg, is a preview; a TIFF may have pages
                if getattr(image, "n_frames", 1) > 1 and image.format not in ("TIFF", "MPO"):
                    raise UserError(f"animated, {image.n_frames} frames; save the one that you want as a picture")  # type: ignore[attr-defined]
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"the picture is over {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
        reason = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        raise UserError(f"not a whole picture ({reason}); save it again or remove it") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise UserError(f"pixels of mode {image.mode} have no known white; save it with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resized_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) once the shorter side is `resolution`."""
    width, height = size
    if width <= height:
        return resolution, max(resolution, int(resolution * height / width))
    return max(resolution, int(resolution * width / height)), resolution


def crop_room(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """How many pixels a crop of side `resolution` can move to the right and down in the resized picture."""
    width, height = resized_size(size, resolution)
    return width - resolution, height - resolution


def pixel_values(path: Path, resolution: int, interpolation: str, corner: tuple[int, int] | None) -> torch.Tensor:
    """[3, resolution, resolution] in [-1, 1]: shorter side resized, cropped at `corner` (left, top), or in the middle if None."""
    image = load(path)
    width, height = resized_size(image.size, resolution)
    image = image.resize((width, height), INTERPOLATIONS[interpolation])
    left, top = corner if corner is not None else (round((width - resolution) / 2), round((height - resolution) / 2))
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
