"""A folder of pictures: every bad one is named before anything slow happens."""

import os
import signal
import warnings
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from dreambooth.data import photos, picture_files
from dreambooth.io.errors import UserError
from tests import tiny
from tests.data.bad_pictures import BAD, FLAG, HEIC, encoded, noise, png_by_header


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
    for kind, endings in picture_files.READ.items():
        for ending in endings:
            noise().save(tmp_path / f"photo{ending}", kind)
            noise().save(tmp_path / f"LOUD{ending.upper()}", kind)
    assert len(photos.check_folder(tmp_path, FLAG).photos) == 2 * len(picture_files.ENDINGS)


def test_a_missing_folder_is_named_with_its_flag(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"{FLAG}: there is no folder {tmp_path / 'nowhere'}"


def test_a_file_in_place_of_a_folder_is_named_with_its_flag(photos_dir):
    message = refusal(photos_dir / "photo-0.png")
    assert message.startswith(f"{FLAG}: {photos_dir / 'photo-0.png'} is not a folder")


def test_an_empty_folder_says_so(tmp_path):
    message = refusal(tmp_path)
    assert f"{FLAG}: no picture in {tmp_path}" in message
    assert "it is empty" in message
    assert "PNG" in message


def test_a_folder_of_other_files_shows_what_it_holds(tmp_path):
    for name in ("captions.txt", "photo.heic", "video.mp4", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"something")
    message = refusal(tmp_path)
    assert f"{FLAG}: no picture in {tmp_path}" in message
    assert "it holds 3 text files (captions.txt, photo.heic, video.mp4); 2 hidden or system files" in message


def test_files_that_are_no_pictures_are_skipped_with_a_note(tmp_path):
    tiny.make_photos(tmp_path)
    for name in (".DS_Store", "._photo-0.png", "Thumbs.db", "desktop.ini", "photo-0.md", "photo-0.txt"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "more").mkdir()
    found = photos.check_folder(tmp_path, FLAG)
    assert len(found.photos) == 3
    assert found.notes == [  # a caption is spoken of elsewhere
        f"skipped in {tmp_path}: a folder (more); a text file (photo-0.md); 4 hidden or system files"
    ]


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
    subject = photos.check_folder(instance, FLAG).photos
    photos.check_disjoint(subject, photos.check_folder(classes, "--class_data_dir").photos)
    Image.open(instance / "photo-2.png").save(classes / "stray.bmp")
    with pytest.raises(UserError) as refused:
        photos.check_disjoint(subject, photos.check_folder(classes, "--class_data_dir").photos)
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
    assert f"link.png: cannot be read: a link to {photos_dir / 'photo-0.png'}, outside the folder" in refusal(
        tmp_path
    )
    assert "--follow_symlinks" in refusal(tmp_path)
    assert len(photos.check_folder(tmp_path, FLAG, follow_symlinks=True).photos) == 1


@pytest.mark.parametrize(("width", "height"), [(63, 64), (64, 63), (16, 30)])
def test_small_photos_need_a_flag(width, height, tmp_path):
    noise(width, height).save(tmp_path / "odd.png")
    message = refusal(tmp_path)
    assert message.startswith(f"{FLAG}: odd.png: {width} x {height} pixels is ")
    assert "--allow_odd_photos" in message
    assert photos.check_folder(tmp_path, FLAG, allow_odd_photos=True).photos[0].size == (width, height)


def test_a_photo_over_two_hundred_times_as_long_as_wide_is_refused(tmp_path):
    noise(64, 64 * 200).save(tmp_path / "long.png")
    assert len(photos.check_folder(tmp_path, FLAG).photos) == 1
    noise(64, 64 * 200 + 1).save(tmp_path / "long.png")
    said = f"{FLAG}: long.png: 64 x 12801 pixels is over 200 times as long as wide; cut it"
    assert refusal(tmp_path) == said


def test_a_photo_more_than_three_times_as_long_as_wide_is_remarked_on(tmp_path):
    noise(192, 64).save(tmp_path / "long.png")
    assert photos.check_folder(tmp_path, FLAG).notes == []
    noise(64, 193).save(tmp_path / "longer.png")
    assert photos.check_folder(tmp_path, FLAG).notes == [
        "more than 3 times as long as wide, so that a square crop shows little of it: longer.png"
    ]


@pytest.mark.slow
def test_the_limit_on_pixels_can_be_moved(tmp_path):
    (tmp_path / "large.png").write_bytes(png_by_header(8_001))
    message = refusal(tmp_path)
    assert "8001 x 8001 is over 64,000,000 pixels; make it smaller, or give --max_image_pixels 6" in message
    advised = int(message.split()[-1])
    with pytest.raises(UserError, match="is over"):
        photos.check_folder(tmp_path, FLAG, max_pixels=advised - 1)
    assert len(photos.check_folder(tmp_path, FLAG, max_pixels=advised).photos) == 1
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
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC)
    install = "pip install '.[photos]', which reads it"
    advice = f"a HEIC picture (IMG_1.HEIC): convert it to JPEG or PNG, or {install}"
    assert advice in refusal(tmp_path)
    tiny.make_photos(tmp_path, 1)
    assert photos.check_folder(tmp_path, FLAG).notes == [f"skipped in {tmp_path}: {advice}"]


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


@pytest.mark.slow
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
