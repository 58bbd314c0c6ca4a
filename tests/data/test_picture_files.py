"""A file is what its first bytes say, whatever its name says: in a folder of photos and of class images."""

import gzip
import io
import math
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from dreambooth.data import class_images, photo_sets, photos, picture_files
from dreambooth.io.errors import UserError
from dreambooth.options.photos import MOST_PIXELS
from tests import tiny
from tests.data.bad_pictures import FLAG, HEIC, encoded, noise
from tests.data.captioned import wanted

SHARED = Path(__file__).parents[3] / "shared" / "inputs"


def tiff(tags: dict[int, int], order: str = "<") -> bytes:
    """The beginning of a TIFF file with these tags in its first directory."""
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


def container(*brands: bytes) -> bytes:
    return (
        struct.pack(">I", 8 + 4 * (len(brands) + 1)) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    )


OTHERS = {
    "HEIC of a phone": (HEIC, "a HEIC picture", "convert it to JPEG or PNG"),
    "HEIC, by its second brand": (container(b"mif1", b"miaf", b"heic"), "a HEIC picture", "convert it"),
    "JPEG XL": (b"\xff\x0a" + bytes(20), "a JPEG XL picture", "save it as PNG or JPEG"),
    "JPEG XL in a container": (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture", "save it"),
    "Canon, new": (container(b"crx ", b"isom"), "a camera raw picture", "save it as PNG or JPEG"),
    "Canon, old": (b"II*\0\x10\0\0\0CR\2\0", "a camera raw picture", "save it"),
    "DNG": (tiff({50706: 1}), "a camera raw picture", "save it"),
    "Nikon": (tiff({254: 1, 330: 99}, ">"), "a camera raw picture", "save it"),
    "Photoshop": (b"8BPS\0\1" + bytes(30), "a Photoshop file", "save it as PNG or JPEG"),
    "web page": (b"\n<!-- x --><!DOCTYPE html><html>", "an HTML page", "download the picture itself"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
    "SVG": (b'<?xml version="1.0"?>\n<svg width="4">', "an SVG drawing", "save it as PNG or JPEG"),
    "zip": (zipped(), "an archive", "save it again"),
    "gzip": (gzip.compress(b"x"), "an archive", "save it again"),
    "PDF": (b"%PDF-1.7\n", "a PDF file", "save its pictures"),
    "film": (container(b"isom", b"mp42"), "a video", "save it again or remove it"),
    "film of a phone": (container(b"qt  "), "a video", "save it again"),
    "WebM": (b"\x1a\x45\xdf\xa3" + bytes(9), "a video", "save it again"),
    "AVI": (b"RIFF\0\0\0\0AVI LIST", "a video", "save it again"),
    "text": ("über\n".encode() * 2000, "a text file", "save it again"),
    "UTF-16": ("text".encode("utf-16"), "a text file", "save it again"),
    "zeros": (bytes(9000), "a file of zeros only", "copy it again"),
    "random bytes": (bytes(range(200, 256)), "a file of an unknown kind", "save it again"),
    "weights": (struct.pack("<Q", 2) + b'{"a":1}', "a safetensors file", "save it again"),
    "BM of a text": (b"BMW at the lake", "a text file", "save it again"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_has_a_pictures_ending_and_is_none_is_named_by_what_it_is(what, tmp_path):
    data, kind, advice = OTHERS[what]
    (tmp_path / "IMG_1.JPG").write_bytes(data)
    with pytest.raises(UserError) as refused:
        photos.check_folder(tmp_path, FLAG)
    message = str(refused.value)
    assert message.startswith(f"{FLAG}: IMG_1.JPG: by its content {kind}, which is not read; {advice}")
    assert "''" not in message


@pytest.mark.parametrize("format", picture_files.READ)
@pytest.mark.parametrize("name", ["photo", "photo.jfif", "PHOTO.PJPEG", "photo.png", "photo.jpg.download"])
def test_a_picture_is_read_under_any_ending_and_none(format, name, tmp_path):
    data = encoded(noise(), format)
    (tmp_path / name).write_bytes(data)
    checked = photos.check_folder(tmp_path, FLAG)
    assert [(photo.path.name, photo.size) for photo in checked.photos] == [(name, (64, 64))]
    expected = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    assert photos.load(checked.photos[0]).tobytes() == expected


@pytest.mark.parametrize("format", picture_files.READ)
@pytest.mark.parametrize("share", [0.02, 0.6])
def test_a_picture_that_breaks_off_is_named_and_no_name_is_empty(format, share, tmp_path):
    data = encoded(noise(), format)
    (tmp_path / "photo").write_bytes(data[: max(24, int(len(data) * share))])
    with pytest.raises(UserError) as refused:
        photos.check_folder(tmp_path, FLAG)
    message = str(refused.value)
    assert message.startswith(f"{FLAG}: photo: ")
    assert not [text for text in ("''", str(tmp_path), "BytesIO", "MPO") if text in message]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animation_is_refused_under_any_ending(format, tmp_path):
    first, *others = (noise(seed=seed) for seed in range(3))
    (tmp_path / "photo.jpg").write_bytes(encoded(first, format, save_all=True, append_images=others))
    with pytest.raises(UserError, match=r"photo.jpg: animated; save the frame that you want"):
        photos.check_folder(tmp_path, FLAG)


def test_a_camera_raw_file_is_not_taken_for_its_thumbnail(tmp_path):
    tiny.make_photos(tmp_path, 1)
    (tmp_path / "IMG.NEF").write_bytes(encoded(noise(), "TIFF"))
    checked = photos.check_folder(tmp_path, FLAG)
    assert len(checked.photos) == 1
    assert checked.notes == [f"skipped in {tmp_path}: a camera raw picture (IMG.NEF): save it as PNG or JPEG"]


def test_a_caption_is_no_picture_whatever_it_says(tmp_path):
    tiny.make_photos(tmp_path, 1)
    (tmp_path / "photo-0.txt").write_bytes(b"P5 10 sks dogs")
    checked = photos.check_folder(tmp_path, FLAG)
    assert [photo.path.name for photo in checked.photos] == ["photo-0.png"]
    assert checked.notes == []


def fill_with_others(folder: Path) -> str:
    """Write files that are no pictures. Returns what the note says of them."""
    np.savez(folder / "latents.npz", np.zeros(3))
    for name in ("film.mov", "film2.mov"):
        (folder / name).write_bytes(container(b"qt  "))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"x")
    (folder / "IMG_2.HEIC").write_bytes(HEIC)
    return (
        f"skipped in {folder}: a HEIC picture (IMG_2.HEIC): convert it to JPEG or PNG, or pip install "
        "'.[photos]', which reads it; 2 videos (film.mov, film2.mov); an archive (latents.npz); "
        "3 hidden or system files"
    )


def test_one_note_counts_what_is_no_picture_by_what_it_is(tmp_path):
    tiny.make_photos(tmp_path, 1)
    note = fill_with_others(tmp_path)
    assert photos.check_folder(tmp_path, FLAG).notes == [note]
    assert class_images.notes(tmp_path) == [note]


def test_class_images_of_the_user_are_counted_by_content(tmp_path):
    (tmp_path / "dog.jfif").write_bytes(encoded(noise(), "JPEG"))
    (tmp_path / "dog").write_bytes(encoded(noise(seed=1), "PNG"))
    fill_with_others(tmp_path)
    settings = class_images.ClassImageSettings("0", "a dog", 0, 1, 1.0, 1, 64, "fp32", "dpm")
    assert class_images.missing_numbers(tmp_path, settings, 5) == [0, 1, 2]


def test_a_data_set_folder_holds_photos_whatever_their_endings(tmp_path):
    """The folder `train` in it is taken only where the folder itself holds no photos."""
    (tmp_path / "train").mkdir()
    (tmp_path / "IMG_1").write_bytes(b"no picture")
    assert photo_sets.find(wanted(dataset_name=str(tmp_path))).folder == tmp_path / "train"
    (tmp_path / "IMG_1").write_bytes(encoded(noise(), "JPEG"))
    assert photo_sets.find(wanted(dataset_name=str(tmp_path))).folder == tmp_path


@pytest.mark.parametrize(
    "sides",
    [
        (20_000, 20_000),
        (12_240, 16_320),
        (8_001, 8_001),
        (31_622, 31_622),
        (31_623, 31_623),
        (40_000, 40_000),
    ],
)
def test_the_advised_limit_on_pixels_is_one_that_is_accepted(sides, tmp_path, monkeypatch):
    """Also for photos of 200 million pixels, which phones take. Nothing is unpacked here."""
    (tmp_path / "large.ppm").write_bytes(b"P6 %d %d 255\n" % sides)
    with pytest.raises(UserError) as refused:
        photos.check_folder(tmp_path, FLAG)
    message = str(refused.value)
    if math.prod(sides) > MOST_PIXELS:
        assert "--max_image_pixels" not in message
        assert message.endswith("pixels; make it smaller")
        return
    advised = int(message.split("or give --max_image_pixels ")[1])
    instance = wanted(instance_data_dir=str(tmp_path), max_image_pixels=advised)
    monkeypatch.setattr(Image.Image, "tobytes", lambda image: b"")
    monkeypatch.setattr(photos, "_to_rgb", lambda image, *_: image)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: None)
    checked = photos.check_folder(tmp_path, FLAG, max_pixels=instance.max_image_pixels)
    assert checked.photos[0].size == sides


@pytest.mark.skipif(not SHARED.is_dir(), reason="the inputs lie beside a checkout only")
def test_inputs_from_the_field_are_read_or_named(tmp_path):
    (tmp_path / "a.jfif").write_bytes((SHARED / "a.jfif").read_bytes())
    assert len(photos.check_folder(tmp_path, FLAG).photos) == 1
    (tmp_path / "heic_named.JPG").write_bytes((SHARED / "heic_named.JPG").read_bytes())
    with pytest.raises(UserError, match=r"heic_named.JPG: by its content a HEIC picture, which is not read"):
        photos.check_folder(tmp_path, FLAG)


def test_the_plugin_of_a_format_is_registered_once_when_a_picture_needs_it(monkeypatch):
    plugin, calls = types.ModuleType("pillow_heif"), []
    plugin.register_heif_opener = lambda: calls.append("HEIF")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    picture_files.load_plugin.cache_clear()
    picture_files.load_plugin("HEIF")
    picture_files.load_plugin("HEIF")
    assert calls == ["HEIF"]
