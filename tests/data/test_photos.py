"""A folder of pictures: every bad one is named before anything slow happens, and the good ones come out upright, RGB and cropped."""

import io
import os
import signal
import struct
import typing
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from dreambooth.data import crops, photos
from dreambooth.data.crops import Crops
from dreambooth.errors import UserError
from dreambooth.options import training
from tests import tiny

FLAG = "--instance_data_dir"


@pytest.fixture(autouse=True)
def _no_waiting():
    """A test that would wait for ever, on a pipe, fails instead."""

    def stop(*_: object) -> None:
        pytest.fail("waited for 30 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def animation(kind: str) -> bytes:
    first, *others = (Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue"))
    return encoded(first, kind, save_all=True, append_images=others)


def png_by_header(side: int) -> bytes:
    """A whole 1-bit PNG of side x side pixels: a few kilobytes that unpack to megabytes, and to gigabytes as RGB floats."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def damaged_png() -> bytes:
    data = bytearray(encoded(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def text_bomb() -> bytes:
    """Fifty megabytes of text in a chunk of as many kilobytes: Pillow raises ValueError for it, not OSError."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 50_000_000, zip=True)
    return encoded(noise(), "PNG", pnginfo=info)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        photos.check_folder(folder, FLAG)
    return str(refused.value)


# --- the folder


def test_good_photos_are_found_with_size_and_hash_and_no_remark(photos_dir):
    found = photos.check_folder(photos_dir, FLAG)
    assert [photo.path.name for photo in found.photos] == ["photo-0.png", "photo-1.png", "photo-2.png"]
    assert {photo.size for photo in found.photos} == {(64, 64)}
    assert len({photo.sha256 for photo in found.photos}) == 3
    assert found.notes == []


def test_every_format_is_read(tmp_path):
    for suffix, kind in photos.FORMATS.items():
        noise().save(tmp_path / f"photo{suffix}", kind)
        noise().save(tmp_path / f"LOUD{suffix.upper()}", kind)
    assert len(photos.check_folder(tmp_path, FLAG).photos) == 2 * len(photos.FORMATS)


def test_a_missing_folder_is_named_with_its_flag(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"{FLAG}: there is no folder {tmp_path / 'nowhere'}"


def test_a_file_in_place_of_a_folder_is_named_with_its_flag(photos_dir):
    message = refusal(photos_dir / "photo-0.png")
    assert message.startswith(f"{FLAG}: {photos_dir / 'photo-0.png'} is not a folder")


def test_an_empty_folder_says_so(tmp_path):
    message = refusal(tmp_path)
    assert f"{FLAG}: no picture in {tmp_path}" in message
    assert "it is empty" in message
    assert ".png" in message


def test_a_folder_of_other_files_shows_what_it_holds(tmp_path):
    for name in ("captions.txt", "photo.heic", "video.mp4", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"something")
    message = refusal(tmp_path)
    assert f"{FLAG}: no picture in {tmp_path}" in message
    assert "it holds captions.txt, photo.heic, video.mp4" in message
    assert "hidden" not in message


def test_files_that_are_no_pictures_are_skipped_with_a_note(tmp_path):
    tiny.make_photos(tmp_path)
    for name in (".DS_Store", "._photo-0.png", "Thumbs.db", "desktop.ini", "photo-0.md", "photo-0.txt"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "more").mkdir()
    found = photos.check_folder(tmp_path, FLAG)
    assert len(found.photos) == 3
    hidden, others = found.notes
    assert "skipped 4 hidden or system files" in hidden
    assert others.endswith(": more, photo-0.md")  # a caption is spoken of elsewhere


def test_duplicates_are_named_in_pairs(tmp_path):
    tiny.make_photos(tmp_path)
    (tmp_path / "copy.png").write_bytes((tmp_path / "photo-1.png").read_bytes())
    found = photos.check_folder(tmp_path, FLAG)
    assert len(found.photos) == 4
    assert found.notes == ["photo-1.png and copy.png have the same pixels: that picture counts twice"]


def test_a_duplicate_under_another_format_is_found_by_its_pixels(tmp_path):
    noise().save(tmp_path / "a.png")
    noise().save(tmp_path / "b.bmp")
    first, second = photos.check_folder(tmp_path, FLAG).photos
    assert first.sha256 != second.sha256
    assert photos.check_folder(tmp_path, FLAG).notes == [
        "b.bmp and a.png have the same pixels: that picture counts twice"
    ]


def test_photos_of_the_subject_among_the_class_images_are_refused(tmp_path):
    """They would teach that the subject is any dog."""
    instance, classes = tmp_path / "instance", tmp_path / "class"
    tiny.make_photos(instance, 3)
    tiny.make_photos(classes, 2, seed=5)
    check = (photos.check_folder(instance, FLAG), photos.check_folder(classes, "--class_data_dir"))
    photos.check_disjoint(*check)
    Image.open(instance / "photo-2.png").save(classes / "stray.bmp")
    with pytest.raises(UserError) as refused:
        photos.check_disjoint(check[0], photos.check_folder(classes, "--class_data_dir"))
    assert str(refused.value).startswith(
        "--class_data_dir: 1 of the class images are photos of the subject: "
    )
    assert f"{classes / 'stray.bmp'} is photo-2.png" in str(refused.value)


def test_photos_are_in_order_of_name_whatever_the_file_system_says(tmp_path, monkeypatch):
    """A run does not depend on the order in which files were copied."""
    names = ["10.png", "9.png", "Z.png", "a.png", "b.png", "é.png"]
    for seed, name in enumerate(names):
        noise(seed=seed).save(tmp_path / name)
    listed = os.listdir
    for order in (sorted, lambda found: sorted(found, reverse=True)):
        monkeypatch.setattr(os, "listdir", lambda folder, order=order: order(listed(folder)))
        assert [photo.path.name for photo in photos.check_folder(tmp_path, FLAG).photos] == names


def test_a_link_to_a_picture_within_the_folder_is_a_picture(tmp_path):
    tiny.make_photos(tmp_path / "real", 1)
    (tmp_path / "link.png").symlink_to("real/photo-0.png")
    assert len(photos.check_folder(tmp_path, FLAG).photos) == 1


def test_a_linked_folder_is_a_folder(tmp_path, photos_dir):
    (tmp_path / "link").symlink_to(photos_dir)
    assert len(photos.check_folder(tmp_path / "link", FLAG).photos) == 3


def test_a_link_out_of_the_folder_needs_a_flag(tmp_path, photos_dir):
    """A folder that somebody sent could otherwise show what lies elsewhere on the disk."""
    (tmp_path / "link.png").symlink_to(photos_dir / "photo-0.png")
    assert f"link.png: a link to {photos_dir / 'photo-0.png'}, outside the folder" in refusal(tmp_path)
    assert "--follow_symlinks" in refusal(tmp_path)
    assert len(photos.check_folder(tmp_path, FLAG, follow_symlinks=True).photos) == 1


@pytest.mark.parametrize(("width", "height"), [(63, 64), (64, 63), (16, 30)])
def test_small_photos_need_a_flag(width, height, tmp_path):
    noise(width, height).save(tmp_path / "odd.png")
    message = refusal(tmp_path)
    assert message.startswith(f"{FLAG}: odd.png: {width} x {height} pixels is ")
    assert "--allow_odd_photos" in message
    assert photos.check_folder(tmp_path, FLAG, allow_odd_photos=True).photos[0].size == (width, height)


def test_a_photo_more_than_three_times_as_long_as_wide_is_remarked_on(tmp_path):
    noise(192, 64).save(tmp_path / "long.png")
    assert photos.check_folder(tmp_path, FLAG).notes == []
    noise(64, 193).save(tmp_path / "longer.png")
    assert photos.check_folder(tmp_path, FLAG).notes == [
        "more than 3 times as long as wide, so that a square crop shows little of it: longer.png"
    ]


def test_the_limit_on_pixels_can_be_moved(tmp_path):
    (tmp_path / "large.png").write_bytes(png_by_header(8_001))
    with pytest.raises(
        UserError, match="8001 x 8001 is over 64,000,000 pixels; make it smaller, or raise --max_image_pixels"
    ):
        photos.check_folder(tmp_path, FLAG)
    assert len(photos.check_folder(tmp_path, FLAG, max_pixels=65_000_000).photos) == 1
    with pytest.raises(UserError, match="over 5,000 pixels"):
        photos.check_folder(tiny.make_photos(tmp_path / "tiny", 1, (80, 64)), FLAG, max_pixels=5_000)


def test_what_was_converted_is_remarked_on_by_name(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    Image.new("RGBA", (64, 64), (255, 0, 0, 9)).save(tmp_path / "clear.png")
    Image.new("RGBA", (64, 64), (0, 255, 0, 255)).save(tmp_path / "opaque.png")
    Image.new("L", (64, 64), 7).save(tmp_path / "grey.png")
    Image.new("L", (64, 64), 8).save(tmp_path / "grey2.png")
    (tmp_path / "exif.jpg").write_bytes(
        encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 30)
    )
    (tmp_path / "profile.png").write_bytes(encoded(noise(seed=3), "PNG", icc_profile=b"no profile"))
    (tmp_path / "pages.tif").write_bytes(
        encoded(noise(seed=4), "TIFF", save_all=True, append_images=[noise(seed=5)])
    )
    assert sorted(photos.check_folder(tmp_path, FLAG).notes) == [
        "converted from CMYK, whose colours are not quite those on screens: ink.tif",
        "only the first page is taken: pages.tif",
        "the EXIF orientation of exif.jpg cannot be read: taken as stored",
        "the colour profile of profile.png cannot be used: taken as sRGB",
        "transparent parts are shown over white: clear.png",
        "without colour: grey.png, grey2.png",
    ]


def test_formats_that_phones_write_and_nobody_reads_are_named_with_advice(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"something")
    assert ".heic files are not read: save them as PNG or JPEG" in refusal(tmp_path)
    tiny.make_photos(tmp_path, 1)
    (note,) = photos.check_folder(tmp_path, FLAG).notes
    assert ".heic files are not read" in note


# --- pictures that cannot be used


def written(data: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data())


def image_file(kind: str, dtype: type) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(np.ones((64, 64), dtype)).save(path, kind)


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated JPEG": ("cut.jpg", written(lambda: encoded(noise(), "JPEG")[:-500]), "truncated"),
    "truncated PNG": ("cut.png", written(lambda: encoded(noise(), "PNG")[:-500]), "truncated"),
    "truncated WEBP": (
        "cut.webp",
        written(lambda: encoded(noise(), "WEBP", lossless=True)[:-500]),
        "not a whole picture",
    ),
    "header alone": ("head.png", written(lambda: encoded(noise(), "PNG")[:20]), "not a whole picture"),
    "flipped bits": ("flip.png", written(damaged_png), "not a whole picture"),
    "text": ("text.png", written(b"a photo of sks dog\n"), "not a whole picture"),
    "SVG": ("drawing.png", written(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a whole picture"),
    "no bytes": ("empty.jpg", written(b""), "the file is empty"),
    "animated GIF as WEBP": ("moving.webp", written(lambda: animation("GIF")), "not a whole picture"),
    "animated WEBP": ("moving.webp", written(lambda: animation("WEBP")), "animated, 3 frames"),
    "animated PNG": ("moving.png", written(lambda: animation("PNG")), "animated, 3 frames"),
    "bomb of 169 million pixels": (
        "bomb.png",
        written(lambda: png_by_header(13_000)),
        "13000 x 13000 is over 64,000,000 pixels; make it smaller",
    ),
    "bomb of 400 million pixels": (
        "bomb.png",
        written(lambda: png_by_header(20_000)),
        "is over 64,000,000 pixels; make it smaller",
    ),
    "one row too many": (
        "large.png",
        written(lambda: png_by_header(8_001)),
        "8001 x 8001 is over 64,000,000 pixels",
    ),
    "bomb of text": ("text.png", written(text_bomb), "not a whole picture"),
    "32-bit float": ("depth.tif", image_file("TIFF", np.float32), "pixels of mode F"),
    "32-bit integer": ("depth.tiff", image_file("TIFF", np.int32), "pixels of mode I"),
    "one pixel": ("dot.png", lambda path: noise(1, 1).save(path), "1 x 1 pixels is too small"),
    "thin": (
        "thin.png",
        lambda path: noise(200, 15).save(path),
        "200 x 15 pixels is too small; each side must have at least 16",
    ),
    "pipe": ("pipe.png", os.mkfifo, "not a regular file"),
    "folder": ("folder.png", os.mkdir, "not a regular file"),
    "device": ("zero.png", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "link to nothing": (
        "link.png",
        lambda path: path.symlink_to("nowhere.png"),
        "cannot be read: No such file or directory",
    ),
    "link to itself": (
        "loop.png",
        lambda path: path.symlink_to(path),
        "cannot be read: Too many levels of symbolic links",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_picture_that_cannot_be_used_is_named_with_the_reason(what, tmp_path):
    name, make, reason = BAD[what]
    make(tmp_path / name)
    message = refusal(tmp_path)
    assert message.startswith(f"{FLAG}: {name}: ")
    assert reason in message
    assert "\n" not in message


def test_all_bad_pictures_of_a_folder_are_in_one_message(tmp_path):
    """Nobody repairs a folder one run at a time."""
    tiny.make_photos(tmp_path)
    (tmp_path / "notes.txt").write_text("skipped")
    expected = {
        f"{number:02d}-{name}": (make, reason) for number, (name, make, reason) in enumerate(BAD.values())
    }
    for name, (make, _) in expected.items():
        make(tmp_path / name)
    lines = refusal(tmp_path).split("\n")
    assert len(lines) == len(BAD)
    for line, (name, (_, reason)) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{FLAG}: {name}: ")
        assert reason in line


@pytest.mark.parametrize("side", [8_001, 13_000, 20_000])
def test_a_bomb_is_refused_by_its_header_in_one_message_without_a_warning(side, tmp_path, monkeypatch):
    """Nothing is unpacked, and Pillow's own warning, which names no file, does not show."""
    (tmp_path / "bomb.png").write_bytes(png_by_header(side))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("unpacked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "over 64,000,000 pixels" in refusal(tmp_path)


def test_a_large_photo_within_the_limit_is_taken(tmp_path):
    (tmp_path / "large.png").write_bytes(png_by_header(8_000))
    assert photos.check_folder(tmp_path, FLAG).photos[0].size == (8_000, 8_000)


def test_a_photo_with_a_preview_beside_it_is_no_animation(tmp_path):
    """Many phones write JPEGs with a second picture inside (MPO): a preview, or the depth of a portrait."""
    (tmp_path / "phone.jpg").write_bytes(
        encoded(noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    )
    assert [photo.size for photo in photos.check_folder(tmp_path, FLAG).photos] == [(64, 64)]


EVIL = [
    "\x1b[2J\x1b[31mred",
    "new\nerror: line",
    "\u202egnp.txet",
    "back\rspace",
    "bell\x07",
    b"\xff\xfe".decode("utf-8", "surrogateescape"),
]


@pytest.mark.parametrize("stem", EVIL)
def test_names_cannot_write_to_the_terminal(stem, tmp_path):
    """Escapes, line breaks and reversed letters are spelled out wherever a name is printed."""
    bad, others, twice = tmp_path / "bad", tmp_path / "others", tmp_path / "twice"
    for folder in (bad, others, twice):
        folder.mkdir()
    (bad / f"{stem}.png").write_text("no picture")
    (others / f"{stem}.md").write_text("no picture")
    for name in (f"{stem}.png", f"{stem}2.png"):
        noise().save(twice / name)
    (twice / f"{stem}.md").write_text("no picture")
    found = photos.check_folder(twice, FLAG)
    assert len(found.photos) == len(found.notes) == 2
    for text in (refusal(bad), refusal(others), *found.notes, refusal(tmp_path / stem)):
        assert text.isprintable(), ascii(text)
        text.encode("utf-8")


# --- what comes out


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_come_upright(orientation, tmp_path):
    """Phones store the sensor's pixels and say in EXIF how to hold them."""
    upright = Image.new("RGB", (96, 64), "blue")
    upright.paste("red", (0, 0, 48, 32))  # the upper left quarter
    turned = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = upright.transpose(Image.Transpose[turned[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert photos.check_folder(tmp_path, FLAG).photos[0].size == (96, 64)
    assert photos.load(tmp_path / "photo.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 30],
    ids=["garbage", "none", "endless"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_orientation_is_ignored(exif, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(noise(80, 64), "JPEG", exif=exif))
    assert photos.check_folder(tmp_path, FLAG).photos[0].size == (80, 64)


def big_endian_tiff(pixels: np.ndarray) -> bytes:
    """16-bit grey with the high byte first, which Pillow reads as another mode."""
    height, width = pixels.shape
    data = pixels.astype(">u2").tobytes()
    short, long = 3, 4
    entries = [
        (256, long, width),
        (257, long, height),
        (258, short, 16 << 16),
        (259, short, 1 << 16),
        (262, short, 1 << 16),
        (273, long, 8),
    ]
    entries += [(277, short, 1 << 16), (278, long, height), (279, long, len(data))]
    directory = struct.pack(">H", len(entries)) + b"".join(
        struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in entries
    )
    return b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + directory + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind, tmp_path):
    """Pillow's own conversion turns everything above 255 of 65,535 white."""
    grey = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    path = tmp_path / f"grey{'.png' if kind == 'PNG' else '.tif'}"
    path.write_bytes(
        big_endian_tiff(grey) if kind.startswith("big") else encoded(Image.fromarray(grey), kind)
    )
    found = np.asarray(photos.load(path)).astype(int)
    assert found.shape == (64, 64, 3)
    assert np.abs(found - (grey[..., None] / 257)).max() <= 1
    assert (found[0, 0] == 0).all()


def palette() -> Image.Image:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 0] + [0, 0, 255] * 255)
    return image


@pytest.mark.parametrize(
    ("image", "settings", "expected"),
    [
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 255)), {}, (255, 0, 0)),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 51)), {}, (255, 204, 204)),
        (Image.new("LA", (64, 64), (0, 0)), {}, (255, 255, 255)),
        (palette(), {}, (255, 0, 0)),
        (palette(), {"transparency": 0}, (255, 255, 255)),
        (Image.new("L", (64, 64), 7), {}, (7, 7, 7)),
        (Image.new("L", (64, 64), 7), {"transparency": 7}, (255, 255, 255)),
        (Image.new("RGB", (64, 64), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (Image.new("1", (64, 64), 1), {}, (255, 255, 255)),
    ],
    ids=[
        "clear",
        "opaque",
        "one fifth",
        "grey clear",
        "palette",
        "palette clear",
        "grey",
        "grey key",
        "colour key",
        "one bit",
    ],
)
def test_pictures_become_rgb_over_white(image, settings, expected, tmp_path):
    """A hidden colour under transparent parts does not leak into training."""
    image.save(tmp_path / "photo.png", **settings)
    found = photos.load(tmp_path / "photo.png")
    assert (found.mode, found.size) == ("RGB", (64, 64))
    assert set(found.get_flattened_data()) == {expected}


def display_p3() -> bytes:
    """The profile that many phones write: sRGB's curve and white, stronger primaries. Matrix and curve of a v2 ICC file."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(map(fixed, values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    name = b"Display P3\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78 + 3),
        b"wtpt": xyz(0.9505, 1.0, 1.0891),
        b"rXYZ": xyz(0.51512, 0.24120, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.15710, 0.06657, 0.78407),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, data = struct.pack(">I", len(tags)), b""
    for tag, body in tags.items():
        body += bytes(-len(body) % 4)
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(body))
        data += body
    size = 128 + len(table) + len(data)
    header = (
        struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
        + xyz(0.9642, 1.0, 0.8249)[8:]
    )
    return header.ljust(128, b"\0") + table + data


def test_colours_of_a_profile_become_srgb(tmp_path):
    """A phone's green of 200 is stronger than sRGB's: read as plain numbers it would be trained on too pale."""
    for name, profile in (
        ("plain", None),
        ("srgb", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("p3", display_p3()),
    ):
        Image.new("RGB", (64, 64), (60, 200, 60)).save(tmp_path / f"{name}.png", icc_profile=profile)
    assert photos.load(tmp_path / "plain.png").getpixel((5, 5)) == (60, 200, 60)
    assert photos.load(tmp_path / "srgb.png").getpixel((5, 5)) == (60, 200, 60)
    red, green, _ = typing.cast(tuple[int, int, int], photos.load(tmp_path / "p3.png").getpixel((5, 5)))
    assert green > 202
    assert red < 50
    assert not any("profile" in note for note in photos.check_folder(tmp_path, FLAG).notes)


def test_ink_colours_become_rgb(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "photo.tif")
    assert photos.load(tmp_path / "photo.tif").getpixel((5, 5)) == (255, 0, 0)


# --- resize and crop


@pytest.mark.parametrize(
    ("size", "resolution", "resized"),
    [
        ((64, 64), 64, (64, 64)),
        ((100, 50), 32, (64, 32)),
        ((50, 100), 32, (32, 64)),
        ((333, 500), 64, (64, 96)),
        ((500, 333), 64, (96, 64)),
        ((20, 21), 512, (512, 537)),
        ((65, 64), 8, (8, 8)),
    ],
)
def test_the_shorter_side_becomes_the_resolution(size, resolution, resized):
    crops = Crops(resolution, "lanczos", center_crop=False)
    assert crops.resized_size(size) == resized
    assert crops.room(size) == (resized[0] - resolution, resized[1] - resolution)


def cropped(
    path: Path, resolution: int, interpolation: str = "lanczos", corner: tuple[int, int] | None = None
) -> torch.Tensor:
    """Pixels of the crop at `corner`, or of the one from the middle."""
    crops, image = Crops(resolution, interpolation, center_crop=corner is None), photos.load(path)
    return crops.pixel_values(image, crops.square(corner or crops.middle_corner(image.size)))


@pytest.fixture
def wide(tmp_path) -> Path:
    """96x64 pixels; a pixel's red is its column, its green its row."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(96), np.arange(64)[:, None]
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def columns_and_rows(pixels: torch.Tensor) -> tuple[list[int], list[int]]:
    """Which columns and rows of `wide` a crop shows."""
    values = ((pixels + 1) * 127.5).round().int()
    return values[0, 0].tolist(), values[1, :, 0].tolist()


@pytest.mark.parametrize("left", [0, 10, 32])
def test_a_crop_is_taken_at_its_corner(left, wide):
    assert Crops(64, "lanczos", center_crop=False).room((96, 64)) == (32, 0)
    columns, rows = columns_and_rows(cropped(wide, 64, corner=(left, 0)))
    assert columns == list(range(left, left + 64))
    assert rows == list(range(64))


def test_without_a_corner_the_crop_is_the_middle(wide, tmp_path):
    assert columns_and_rows(cropped(wide, 64)) == (
        list(range(16, 80)),
        list(range(64)),
    )
    tall = Image.open(wide).crop((0, 0, 40, 64))
    tall.save(tmp_path / "tall.png")
    assert columns_and_rows(cropped(tmp_path / "tall.png", 40)) == (
        list(range(40)),
        list(range(12, 52)),
    )


def test_every_corner_within_the_room_shows_picture_only(tmp_path):
    """A crop past the edge would train on black bars."""
    Image.new("RGB", (101, 47), "white").save(tmp_path / "white.png")
    room = Crops(32, "bicubic", center_crop=False).room((101, 47))
    for corner in ((0, 0), room):
        pixels = cropped(tmp_path / "white.png", 32, "bicubic", corner)
        assert pixels.shape == (3, 32, 32)
        assert (pixels == 1).all()


def test_pixel_values_are_float32_from_minus_one_to_one(tmp_path):
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 64, 32))
    image.save(tmp_path / "halves.png")
    pixels = cropped(tmp_path / "halves.png", 64)
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 64, 64))
    assert (pixels[:, :32] == 1).all()
    assert (pixels[:, 32:] == -1).all()


def test_channels_stay_red_green_blue(tmp_path):
    Image.new("RGB", (32, 32), (255, 0, 51)).save(tmp_path / "photo.png")
    pixels = cropped(tmp_path / "photo.png", 32, "box")
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_every_interpolation_on_offer_works_and_they_differ(tmp_path):
    choices = typing.get_args(typing.get_type_hints(training.InstanceOptions)["image_interpolation_mode"])
    assert set(choices) == set(crops.INTERPOLATIONS)
    noise(90, 70).save(tmp_path / "photo.png")
    results = {name: cropped(tmp_path / "photo.png", 32, name, (1, 0)) for name in choices}
    assert all(pixels.shape == (3, 32, 32) and pixels.abs().max() <= 1 for pixels in results.values())
    assert (
        len({pixels.numpy().tobytes() for pixels in results.values()}) == len(choices) - 1
    )  # the two nearest are one
