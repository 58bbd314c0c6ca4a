"""Pictures come out upright, RGB, resized and cropped."""

import signal
import struct
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dreambooth.data import photos
from dreambooth.data.crops import Crops
from dreambooth.options import training
from tests.data.bad_pictures import FLAG, encoded, noise


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
    assert loaded(tmp_path / "photo.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 30],
    ids=["garbage", "none", "endless"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_orientation_is_ignored(exif, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(noise(80, 64), "JPEG", exif=exif))
    assert photos.check_folder(tmp_path, FLAG).photos[0].size == (80, 64)


def loaded(path: Path) -> Image.Image:
    return photos.decode(path.read_bytes())[0]


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
    found = np.asarray(loaded(path)).astype(int)
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
    found = loaded(tmp_path / "photo.png")
    assert (found.mode, found.size) == ("RGB", (64, 64))
    assert set(found.get_flattened_data()) == {expected}


def display_p3() -> bytes:
    """The profile that many phones write: sRGB's curve and white, stronger primaries. Matrix and curve of a
    v2 ICC file."""

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
    """A phone's green of 200 is stronger than sRGB's: read as plain numbers it would be trained on too
    pale."""
    for name, profile in (
        ("plain", None),
        ("srgb", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("p3", display_p3()),
    ):
        Image.new("RGB", (64, 64), (60, 200, 60)).save(tmp_path / f"{name}.png", icc_profile=profile)
    assert loaded(tmp_path / "plain.png").getpixel((5, 5)) == (60, 200, 60)
    assert loaded(tmp_path / "srgb.png").getpixel((5, 5)) == (60, 200, 60)
    red, green, _ = typing.cast(tuple[int, int, int], loaded(tmp_path / "p3.png").getpixel((5, 5)))
    assert green > 202
    assert red < 50
    assert not any("profile" in note for note in photos.check_folder(tmp_path, FLAG).notes)


def test_ink_colours_become_rgb(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "photo.tif")
    assert loaded(tmp_path / "photo.tif").getpixel((5, 5)) == (255, 0, 0)


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
    crops, image = Crops(resolution, interpolation, center_crop=corner is None), loaded(path)
    return crops.pixel_values(image, crops.box(corner or crops.middle_corner(image.size)))


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
    noise(90, 70).save(tmp_path / "photo.png")
    results = {name: cropped(tmp_path / "photo.png", 32, name, (1, 0)) for name in choices}
    assert all(pixels.shape == (3, 32, 32) and pixels.abs().max() <= 1 for pixels in results.values())
    assert (
        len({pixels.numpy().tobytes() for pixels in results.values()}) == len(choices) - 1
    )  # the two nearest are one
