"""A folder of photos: checked, and loaded as upright sRGB images.

`check_folder` decodes every new photo before any model is loaded, and reports all problems at once. Photos
are in the order of their names, so that a run does not depend on the file system.
"""

import dataclasses
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from dreambooth.data import picture_files
from dreambooth.data.decode_cache import DecodeCache, Decoded
from dreambooth.io import reader
from dreambooth.io.errors import UserError, few, raise_all, reason_of, shown
from dreambooth.options.photos import MOST_PIXELS

MAX_PIXELS = 64_000_000  # a small file can unpack to gigabytes
MIN_SIDE = 16
ODD_SIDE, ODD_ASPECT = 64, 3
MOST_ASPECT = 200  # every part of a photo is encoded, and its shorter side may be enlarged before

# EXIF orientation -> the transposition that makes the stored pixels upright. 1 is upright.
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
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")  # modes of Pillow

# Remarks on a photo. "{}" stands for its name, or for the names of several.
_BAD_EXIF = "the EXIF orientation of {} cannot be read: taken as stored"
_BAD_PROFILE = "the colour profile of {} cannot be used: taken as sRGB"
_CMYK = "converted from CMYK, whose colours are not quite those on screens: {}"
_TRANSPARENT = "transparent parts are shown over white: {}"
_PAGES = "only the first page is taken: {}"
_GREY = "without colour: {}"
_REMARKS = {_BAD_EXIF, _BAD_PROFILE, _CMYK, _TRANSPARENT, _PAGES, _GREY}  # those of `decode`
_LONG = f"more than {ODD_ASPECT} times as long as wide, so that a square crop shows little of it: {{}}"


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo that has been checked."""

    path: Path
    size: tuple[int, int]
    """(width, height) of the upright photo, in pixels."""
    sha256: str
    """Of the file."""
    pixels_sha256: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """The photos of a folder in order of name, and notes for the user."""

    photos: list[Photo]
    notes: list[str]


def check_folder(
    folder: str | Path,
    flag: str,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_odd_photos: bool = False,
    follow_symlinks: bool = False,
    cache: DecodeCache | None = None,
    made: Collection[str] = (),
) -> Folder:
    """Check every photo in `folder`, which `flag` named. Photos that `cache` lacks are decoded and added to
    it.

    Raises UserError if the folder is missing or has no photo, or with one line for every photo that cannot be
    used: it is damaged, has over `max_pixels`, is smaller than ODD_SIDE without `allow_odd_photos`, or is a
    link to another folder without `follow_symlinks`. Pictures that this program drew are passed over with a
    note, but for those whose names are in `made`.
    """
    folder = Path(folder)
    listing = picture_files.list_folder(folder, flag, made)
    skipped = listing.described()
    if not listing.pictures:
        content = f"it holds {skipped}" if skipped else "it is empty"
        raise UserError(
            f"{flag}: no picture in {shown(folder)} ({', '.join(sorted(picture_files.READ))}); {content}"
        )

    # Check each photo.
    photos, problems = [], []
    names_by_remark: dict[str, list[str]] = {}
    for name in listing.pictures:
        try:
            photo, remarks = _check(folder, name, max_pixels, allow_odd_photos, follow_symlinks, cache)
            photos.append(photo)
            for remark in remarks:
                names_by_remark.setdefault(remark, []).append(name)
        except UserError as error:
            problems.append(f"{flag}: {shown(name)}: {error}")
    raise_all(problems)

    # Notes for the user.
    notes = _duplicates(photos)
    notes += [remark.format(few(names)) for remark, names in names_by_remark.items()]
    if skipped:
        notes.append(f"skipped in {shown(folder)}: {skipped}")
    return Folder(photos, notes)


def split(folder: Folder, count: int, flag: str) -> tuple[list[Photo], list[Photo]]:
    """(the photos to train on, the last `count` photos by name, which are held out). `flag` named the folder.
    Raises UserError if no photo is left to train on."""
    total = len(folder.photos)
    if count >= total:
        raise UserError(
            f"--holdout {count} leaves no photo to train on: {flag} has {total}; hold out fewer, or give "
            "other photos of the subject by --holdout_data_dir"
        )
    return folder.photos[: total - count], folder.photos[total - count :]


def check_apart(held_out: list[Photo], trained: list[Photo], flag: str) -> None:
    """Raise UserError if photos of `held_out`, which `flag` chose, are trained on too."""
    if same := _same_pictures(trained, held_out):
        raise UserError(
            f"{flag}: photos that are trained on cannot be held out, and {len(same)} are the same picture: "
            f"{'; '.join(same[:3])}. Remove one of the two"
        )


def check_disjoint(subject: list[Photo], classes: list[Photo]) -> None:
    """Raise UserError if photos of the subject are among the class images, which must not show the
    subject."""
    if same := _same_pictures(subject, classes):
        examples = "; ".join(same[:3]) + (f"; and {len(same) - 3} more" if len(same) > 3 else "")
        raise UserError(
            f"--class_data_dir: {len(same)} of the class images are photos of the subject: {examples}. "
            "Remove them there"
        )


def _same_pictures(photos: list[Photo], others: list[Photo]) -> list[str]:
    """A phrase for each of `others` that has the same pixels as one of `photos`."""
    known = {photo.pixels_sha256: photo.path for photo in photos}
    return [
        f"{shown(other.path)} is {shown(known[other.pixels_sha256].name)}"
        for other in others
        if other.pixels_sha256 in known
    ]


def _duplicates(photos: list[Photo]) -> list[str]:
    """Notes on photos with the same pixels."""
    first: dict[str, Photo] = {}
    notes = []
    for photo in photos:
        earlier = first.setdefault(photo.pixels_sha256, photo)
        if earlier is not photo:
            names = f"{shown(photo.path.name)} and {shown(earlier.path.name)}"
            notes.append(f"{names} have the same pixels: that picture counts twice")
    return notes


def _check(
    folder: Path,
    name: str,
    max_pixels: int,
    allow_odd_photos: bool,
    follow_symlinks: bool,
    cache: DecodeCache | None,
) -> tuple[Photo, list[str]]:
    """(the photo, remarks). Raises UserError, without the file's name, if it cannot be used."""
    data = picture_files.read_within(
        folder, name, "cannot be read", picture_files.LARGEST, follow_symlinks=follow_symlinks
    )
    kind = picture_files.identify(data)
    if kind.format is None:
        advice = kind.advice or "save it again or remove it"
        raise UserError(f"by its content {kind.name}, which is not read; {advice}")
    digest = hashlib.sha256(data).hexdigest()
    decoded = _decoded(data, digest, max_pixels, cache)
    (width, height), remarks = decoded.size, list(decoded.remarks)
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{width} x {height} pixels is too small; each side must have at least {MIN_SIDE}")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise UserError(f"{width} x {height} pixels is over {MOST_ASPECT} times as long as wide; cut it")
    if min(width, height) < ODD_SIDE and not allow_odd_photos:
        raise UserError(
            f"{width} x {height} pixels is small; each side must have at least {ODD_SIDE}; "
            "use another photo, or give --allow_odd_photos"
        )
    if max(width, height) > ODD_ASPECT * min(width, height):
        remarks.append(_LONG)
    return Photo(folder / name, decoded.size, digest, decoded.pixels_sha256), remarks


def _decoded(data: bytes, digest: str, max_pixels: int, cache: DecodeCache | None) -> Decoded:
    """The result of decoding a file, from the cache if it has the file. A cached photo must be within the
    present limits."""
    cached = cache.decoded.get(digest) if cache else None
    if cached is not None and math.prod(cached.size) <= max_pixels and set(cached.remarks) <= _REMARKS:
        return cached
    image, remarks = decode(data, max_pixels)
    width, height = image.size
    pixels_sha256 = hashlib.sha256(f"{width} {height} ".encode() + image.tobytes()).hexdigest()
    decoded = Decoded(image.size, pixels_sha256, tuple(remarks))
    if cache:
        cache.add(digest, decoded)
    return decoded


def load(photo: Photo, reduced_to: int | None = None) -> Image.Image:
    """The photo as `decode` returns it, from its file. Raises UserError if the file has changed since it was
    checked, or cannot be read."""
    path = shown(photo.path)
    data = reader.read_bytes(photo.path, f"{path} cannot be read", picture_files.LARGEST)
    if hashlib.sha256(data).hexdigest() != photo.sha256:
        raise UserError(f"{path} has changed since the run was started; restore it, or start a new run")
    try:
        return decode(data, reduced_to=reduced_to)[0]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses pictures of twice this number


def decode(
    data: bytes, max_pixels: int = MOST_PIXELS, reduced_to: int | None = None
) -> tuple[Image.Image, list[str]]:
    """(the photo, remarks) from the content of its file. The photo is upright and sRGB; transparent parts are
    over white, and 16-bit grey is scaled to 8 bits. A JPEG may be read at a fraction of its size, which is
    faster, if its sides stay over `reduced_to`.

    Raises UserError, without the file's name, if it cannot be used or has over `max_pixels`.
    """
    kind = picture_files.identify(data)
    if kind.format in picture_files.PLUGINS:
        picture_files.load_plugin(kind.format)
    try:
        with warnings.catch_warnings(record=True) as warned:
            # Record all warnings, print none: those on size are errors below, and the others name no file.
            warnings.simplefilter("always")
            with Image.open(io.BytesIO(data), formats=picture_files.FORMATS) as image:
                if (pixels := image.width * image.height) > max_pixels:
                    advice = f", or give --max_image_pixels {pixels}" if pixels <= MOST_PIXELS else ""
                    rule = f"is over {max_pixels:,} pixels; make it smaller{advice}"
                    raise UserError(f"{image.width} x {image.height} {rule}")
                # Phones write MPO files as .jpg: their second picture is a preview. A TIFF may have pages.
                # `n_frames` would read all of them, of which there may be millions.
                has_frames = getattr(image, "is_animated", False)
                if has_frames and image.format not in ("TIFF", "MPO"):
                    raise UserError("animated; save the frame that you want as a picture")
                remarks = [_PAGES] if has_frames and image.format == "TIFF" else []
                if reduced_to is not None:
                    image.draft(None, (reduced_to, reduced_to))
                image.load()
                orientation = _orientation(image)
                if orientation is None or any("EXIF" in str(warning.message) for warning in warned):
                    remarks.append(_BAD_EXIF)
                upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
                return _to_rgb(upright, image.info.get("icc_profile"), remarks.append), remarks
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"the picture is over {MOST_PIXELS:,} pixels; make it smaller") from None
    except MemoryError:
        raise UserError("there is not enough memory to unpack it; make it smaller") from None
    # for broken files Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
    except Exception as error:
        is_unknown = isinstance(error, UnidentifiedImageError)  # whose message holds nothing but a name
        reason = "Pillow does not recognize it" if is_unknown else reason_of(error)
        raise UserError(f"not a whole picture ({reason}); save it again or remove it") from None


def opacity(data: bytes) -> Image.Image | None:
    """The opacity of each pixel of a photo that `decode` takes, in grey levels (255 is opaque), upright; None
    if all of it is opaque."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `decode` has noted them
        with Image.open(io.BytesIO(data), formats=picture_files.FORMATS) as image:
            image.load()
            orientation = _orientation(image)
            upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
            if upright.mode not in _WITH_ALPHA and "transparency" not in upright.info:
                return None
            alpha = upright.convert("RGBA").getchannel("A")
            return None if alpha.getextrema() == (255, 255) else alpha


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 to 8; None if it is damaged or something else."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF raises anything, and the photo is usable without it
        return None
    return orientation if orientation in (1, *_TURNS) else None


def _to_rgb(image: Image.Image, profile: bytes | None, remark: Callable[[str], None]) -> Image.Image:
    """The image in sRGB. `remark` is called with each remark. Raises UserError for modes without a known
    white."""
    if image.mode.startswith("I;16"):
        remark(_GREY)
        return Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise UserError(
            f"a picture of mode {image.mode}, which has no known white; save it with 8 or 16 bits a channel"
        )
    if image.mode in ("1", "L", "LA", "La"):
        remark(_GREY)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
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
        except Exception:  # a broken profile raises anything, and the photo is usable without it
            remark(_BAD_PROFILE)
    return image.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """The image converted from its colour profile to sRGB. Many phones write Display P3, which has a wider
    gamut."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in ("RGB", "CMYK", "GRAY"):
        raise ValueError("a profile of no picture")
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    if space == "GRAY" and image.mode == "RGB":  # its channels are equal: it was composed over white
        image = image.convert("L")
    if "sRGB" in (source.profile.profile_description or "") and image.mode == "RGB":
        return image  # without a conversion, which would round
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    return converted
