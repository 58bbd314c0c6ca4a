"""A folder of pictures -> checked, upright RGB images of one size.

`check_folder` decodes every picture that is new before any model is loaded and reports all problems at once.
Pictures are taken in the order of their names, so that a run does not depend on the file system.
"""

import dataclasses
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from dreambooth.data import captions
from dreambooth.data.decode_cache import DecodeCache, Decoded
from dreambooth.errors import UserError, few, shown

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_NOT_READ = (
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".gif",
    ".jp2",
    ".raw",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".psd",
    ".svg",
)
MAX_PIXELS = 64_000_000  # a small file can unpack to gigabytes
MIN_SIDE = 16
ODD_SIDE, ODD_ASPECT = 64, 3

# EXIF's orientations: how the stored pixels must be turned. 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

# Remarks on one picture; "{}" stands for its name, or for several.
_BAD_EXIF = "the EXIF orientation of {} cannot be read: taken as stored"
_BAD_PROFILE = "the colour profile of {} cannot be used: taken as sRGB"
_CMYK = "converted from CMYK, whose colours are not quite those on screens: {}"
_TRANSPARENT = "transparent parts are shown over white: {}"
_PAGES = "only the first page is taken: {}"
_GREY = "without colour: {}"
_REMARKS = {_BAD_EXIF, _BAD_PROFILE, _CMYK, _TRANSPARENT, _PAGES, _GREY}  # of decoding
_LONG = f"more than {ODD_ASPECT} times as long as wide, so that a square crop shows little of it: {{}}"


@dataclasses.dataclass(frozen=True)
class Photo:
    """A picture that was decoded once and found good. Size is (width, height) in pixels, upright; the hashes
    are of file and of pixels."""

    path: Path
    size: tuple[int, int]
    sha256: str
    pixels_sha256: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """The pictures of a folder in order of name, and remarks for the user."""

    photos: list[Photo]
    notes: list[str]


def check_folder(
    folder: str | Path,
    flag: str,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_odd_photos: bool = False,
    follow_symlinks: bool = False,
    known: DecodeCache | None = None,
) -> Folder:
    """Decode every picture in `folder`, named by `flag` on the command line, that is not `known`; what is
    found becomes so.

    Raises UserError if the folder is missing or has no picture, or with one line for every picture that
    cannot be used: it is damaged, over `max_pixels`, smaller than `allow_odd_photos` lifts, or lies elsewhere
    and `follow_symlinks` does not say that it may.
    """
    folder = Path(folder)
    names = _names(folder, flag)
    visible = [
        name for name in names if not name.startswith(".") and name not in ("Thumbs.db", "desktop.ini")
    ]
    candidates = [name for name in visible if Path(name).suffix.lower() in FORMATS]
    others = [name for name in visible if name not in candidates]
    if not candidates:
        seen = f"it holds {', '.join(map(shown, others[:5]))}" if others else "it is empty"
        raise UserError(
            f"{flag}: no picture in {shown(folder)} ({', '.join(sorted(FORMATS))}); {seen}{_advice(others)}"
        )
    photos, problems = [], []
    remarks: dict[str, list[str]] = {}
    for name in candidates:
        try:
            photo, said = _check(folder, name, max_pixels, allow_odd_photos, follow_symlinks, known)
        except UserError as error:
            problems.append(f"{flag}: {shown(name)}: {error}")
            continue
        photos.append(photo)
        for remark in said:
            remarks.setdefault(remark, []).append(name)
    if problems:
        raise UserError("\n".join(problems))
    notes = _duplicates(photos) + [remark.format(few(about)) for remark, about in remarks.items()]
    if len(names) > len(visible):
        notes.append(f"skipped {len(names) - len(visible)} hidden or system files in {shown(folder)}")
    stems = {Path(name).stem for name in candidates}
    caption_files = [
        name
        for name in others
        if name in captions.METADATA or (name.endswith(".txt") and name.removesuffix(".txt") in stems)
    ]
    if others := [name for name in others if name not in caption_files]:
        notes.append(f"skipped what is no picture in {shown(folder)}: {few(others)}{_advice(others)}")
    return Folder(photos, notes)


def check_disjoint(instance: Folder, classes: Folder) -> None:
    """Raise UserError, naming them, if photos of the subject are among the class images: those are to show
    what the subject is not."""
    subjects = {photo.pixels_sha256: photo.path for photo in instance.photos}
    twice = [
        (subjects[photo.pixels_sha256], photo.path)
        for photo in classes.photos
        if photo.pixels_sha256 in subjects
    ]
    if twice:
        pairs = "; ".join(f"{shown(theirs)} is {shown(mine.name)}" for mine, theirs in twice[:3])
        more = f"; and {len(twice) - 3} more" if len(twice) > 3 else ""
        raise UserError(
            f"--class_data_dir: {len(twice)} of the class images are photos of the subject: {pairs}{more}. "
            "Remove them there"
        )


def _names(folder: Path, flag: str) -> list[str]:
    """The names in a folder, in an order that no file system changes."""
    try:
        if not folder.exists():
            raise UserError(f"{flag}: there is no folder {shown(folder)}")
        if not folder.is_dir():
            raise UserError(
                f"{flag}: {shown(folder)} is not a folder; name the folder that holds the pictures"
            )
        return sorted(os.listdir(folder), key=os.fsencode)
    except OSError as error:  # no permission, or a name that is too long
        raise UserError(f"{flag}: {shown(folder)} cannot be read: {error.strerror or error}") from None


def _advice(others: list[str]) -> str:
    unread = sorted({Path(name).suffix.lower() for name in others} & set(_NOT_READ))
    return f"; {', '.join(unread)} files are not read: save them as PNG or JPEG" if unread else ""


def _duplicates(photos: list[Photo]) -> list[str]:
    first: dict[str, Photo] = {}
    notes = []
    for photo in photos:
        other = first.setdefault(photo.pixels_sha256, photo)
        if other is not photo:
            notes.append(
                f"{shown(photo.path.name)} and {shown(other.path.name)} have the same pixels: that picture "
                "counts twice"
            )
    return notes


def _check(
    folder: Path,
    name: str,
    max_pixels: int,
    allow_odd_photos: bool,
    follow_symlinks: bool,
    known: DecodeCache | None,
) -> tuple[Photo, list[str]]:
    path = folder / name
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe or a device would wait for ever
            raise UserError("not a regular file")
        if not follow_symlinks and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"a link to {shown(path.resolve())}, outside the folder; copy the file, or give "
                "--follow_symlinks"
            )
        if info.st_size == 0:
            raise UserError("the file is empty")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    seen = _seen(path, digest, max_pixels, known)
    (width, height), remarks = seen.size, list(seen.remarks)
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{width} x {height} pixels is too small; each side must have at least {MIN_SIDE}")
    if min(width, height) < ODD_SIDE and not allow_odd_photos:
        lift = "use another photo, or give --allow_odd_photos"
        raise UserError(
            f"{width} x {height} pixels is small; each side must have at least {ODD_SIDE}; {lift}"
        )
    if max(width, height) > ODD_ASPECT * min(width, height):
        remarks.append(_LONG)
    return Photo(path, seen.size, digest, seen.pixels_sha256), remarks


def _seen(path: Path, digest: str, max_pixels: int, known: DecodeCache | None) -> Decoded:
    """What decoding finds, or has found of the same bytes; the limits of now hold for either."""
    found = known.of(digest) if known else None
    if found is not None and found.size[0] * found.size[1] <= max_pixels and set(found.remarks) <= _REMARKS:
        return found
    image, remarks = _decode(path, max_pixels)
    width, height = image.size
    pixels = hashlib.sha256(f"{width} {height} ".encode() + image.tobytes()).hexdigest()
    found = Decoded(image.size, pixels, tuple(remarks))
    if known:
        known.add(digest, found)
    return found


def load(path: Path) -> Image.Image:
    """The picture, upright and sRGB; transparent parts over white, 16-bit grey scaled to 8. Raises UserError
    if it cannot be used."""
    return _decode(path, max_pixels=None)[0]


def load_checked(photo: Photo) -> Image.Image:
    """The same picture as when it was checked. Raises UserError, naming the file, if it is another one by
    now, or cannot be unpacked."""
    try:
        data = photo.path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown(photo.path)} cannot be read: {error.strerror or error}") from None
    if hashlib.sha256(data).hexdigest() != photo.sha256:
        raise UserError(f"{shown(photo.path)} has changed since the run was started; start again")
    try:
        return _decode(photo.path, None, io.BytesIO(data))[0]
    except UserError as error:
        raise UserError(f"{shown(photo.path)}: {error}") from None


def _decode(
    path: Path, max_pixels: int | None, data: BinaryIO | None = None
) -> tuple[Image.Image, list[str]]:
    """(the picture as `load` gives it, remarks), of the file or of its bytes. Without `max_pixels` Pillow's
    own limit holds, which is higher."""
    formats = tuple(sorted(set(FORMATS.values())))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter(
                "always"
            )  # seen here alone: those on sizes are errors below, and others name no file
            with Image.open(path if data is None else data, formats=formats) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise UserError(f"{image.width} x {image.height} is over {max_pixels:,} pixels{_SMALLER}")
                # the second picture of an MPO file, which many phones write as .jpg, is a preview; a TIFF may
                # have pages
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format not in ("TIFF", "MPO"):
                    raise UserError(f"animated, {frames} frames; save the one that you want as a picture")
                remarks = [_PAGES] if frames > 1 and image.format == "TIFF" else []
                image.load()
                orientation = _orientation(image)
                if orientation is None or any("EXIF" in str(warning.message) for warning in warned):
                    remarks.append(_BAD_EXIF)
                upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
                return _to_rgb(upright, image.info.get("icc_profile"), remarks.append), remarks
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"the picture is over {max_pixels or MAX_PIXELS:,} pixels{_SMALLER}") from None
    except MemoryError:
        raise UserError(f"there is not enough memory to unpack it{_SMALLER}") from None
    except (
        Exception
    ) as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
        reason = (
            " ".join(str(error).replace(str(path) if data is None else repr(data), "").split())
            or type(error).__name__
        )
        raise UserError(f"not a whole picture ({shown(reason)}); save it again or remove it") from None


_SMALLER = "; make it smaller, or raise --max_image_pixels"


def _orientation(image: Image.Image) -> int | None:
    """From 1 to 8; None if EXIF says something else, or is broken."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as many kinds as there are ways to break EXIF, which is no reason to lose the picture
        return None
    return orientation if orientation in (1, *_TURNS) else None


def _to_rgb(image: Image.Image, profile: bytes | None, remark: Callable[[str], None]) -> Image.Image:
    if image.mode.startswith("I;16"):
        remark(_GREY)
        return Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise UserError(
            f"pixels of mode {image.mode} have no known white; save it with 8 or 16 bits a channel"
        )
    if image.mode in ("1", "L", "LA", "La"):
        remark(_GREY)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            remark(_TRANSPARENT)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "CMYK":
        remark(_CMYK)
    if profile:
        try:
            return _by_profile(image, profile)
        except Exception:  # a profile is a file of its own, and as easily broken
            remark(_BAD_PROFILE)
    return image.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours that the profile means, in sRGB. Many phones write Display P3, whose numbers mean stronger
    colours."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if own.profile.xcolor_space.strip() not in ("RGB", "CMYK", "GRAY"):
        raise ValueError("a profile of no picture")
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    if (
        own.profile.xcolor_space.strip() == "GRAY" and image.mode == "RGB"
    ):  # composed over white above: its channels are equal
        image = image.convert("L")
    if "sRGB" in (own.profile.profile_description or "") and image.mode == "RGB":
        return image  # what it means already: no rounding
    converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    return converted
