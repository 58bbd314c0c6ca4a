"""Findings about photos: what is wrong is found, and photos that are fine give none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dreambooth.data import photo_findings, photo_looks, photos
from dreambooth.data.crops import Crops
from dreambooth.data.photo_findings import Finding
from dreambooth.data.photos import Photo

CROPS = Crops(512, "lanczos", center_crop=True)
REAL = Path(__file__).parents[3] / "shared" / "data" / "dreambooth"


def scene(seed: int, side: int = 640) -> Image.Image:
    """A sharp picture: blocks of random colours at several sizes."""
    draw = np.random.default_rng(seed)
    layers = [
        Image.fromarray(draw.integers(0, 256, (count, count, 3), dtype=np.uint8)).resize((side, side), 0)
        for count in (4, 8, 80)
    ]
    return Image.blend(Image.blend(layers[0], layers[1], 0.5), layers[2], 0.3)


def relation(one: Image.Image, other: Image.Image) -> str | None:
    return photo_looks.same_picture(photo_looks.look_of(one), photo_looks.look_of(other))


def titles(findings: list[Finding]) -> list[str]:
    return [finding.title for finding in findings]


def photo(name: str, size: tuple[int, int]) -> Photo:
    return Photo(Path(name), size, "", name)


def test_a_copy_that_was_made_smaller_brighter_or_cut_is_the_same_picture():
    image = scene(1)
    side = image.width
    for copy in (
        image.resize((200, 200)),
        ImageEnhance.Brightness(image).enhance(1.2),
        image.crop((round(0.06 * side), round(0.03 * side), side, round(0.95 * side))),
    ):
        assert relation(image, copy) == "same"
        assert relation(image, ImageOps.mirror(copy)) == "mirrored"
    assert relation(image, scene(2)) is None


def test_one_thing_at_another_place_before_the_same_background_is_another_picture():
    background = Image.new("RGB", (512, 512), "white")
    one, other = background.copy(), background.copy()
    one.paste(scene(1, 160), (80, 200))
    other.paste(scene(1, 160), (200, 200))
    assert relation(one, other) is None


def test_blur_is_found_and_names_the_photos():
    looks = {name: photo_looks.look_of(scene(seed)) for seed, name in enumerate(("a.png", "b.png"))}
    assert photo_findings.of_looks(looks) == []
    looks["c.png"] = photo_looks.look_of(scene(5).filter(ImageFilter.GaussianBlur(4)))
    (finding,) = photo_findings.of_looks(looks)
    assert (finding.title, finding.photos) == ("Blurred", ("c.png",))
    assert finding.note.startswith("1 of 3 photos are blurred")


def test_three_copies_are_one_finding():
    looks = {f"{n}.png": photo_looks.look_of(scene(1, 400 + 60 * n)) for n in range(3)}
    (finding,) = photo_findings.of_looks(looks)
    assert finding.photos == ("0.png", "1.png", "2.png")
    assert "counts 3 times" in finding.text


def test_class_images_of_the_subject_are_named_with_the_photo():
    look, other = photo_looks.look_of(scene(1)), photo_looks.look_of(scene(2))
    (finding,) = photo_findings.of_class_images({"a.png": look}, {"x.png": other, "y.png": look})
    assert "y.png is a.png" in finding.text
    assert photo_findings.of_class_images({"a.png": look}, {"x.png": other}) == []


def test_small_and_long_photos_are_found_and_long_ones_only_where_crops_are_squares():
    pictures = [photo("a", (640, 640)), photo("small", (300, 400)), photo("long", (1300, 600))]
    findings = photo_findings.of_sizes(pictures, CROPS, is_square=True)
    assert {finding.title: finding.photos for finding in findings} == {
        "Smaller than the resolution": ("small",),
        "Long photos": ("long",),
    }
    assert "by up to 1.7" in findings[0].text
    assert titles(photo_findings.of_sizes(pictures, CROPS, is_square=False)) == [
        "Smaller than the resolution"
    ]


def test_masks_tell_whether_the_subject_is_cut_off_or_small():
    """The mask of a wide photo has its subject at the left edge."""
    wide, square = photo("wide", (1200, 600)), photo("square", (600, 600))
    mask = Image.new("L", (1200, 600))
    mask.paste(255, (0, 0, 400, 600))
    full = Image.new("L", (60, 60), 255)
    findings = photo_findings.of_masks([(wide, mask), (square, full)], CROPS, is_square=True)
    assert [(finding.title, finding.photos) for finding in findings] == [
        ("The crop cuts the subject off", ("wide",))
    ]
    assert photo_findings.of_masks([(wide, mask), (square, full)], CROPS, is_square=False) == []
    dot = Image.new("L", (600, 600))
    dot.paste(255, (280, 280, 320, 320))
    assert titles(photo_findings.of_masks([(square, dot)], CROPS, is_square=True)) == ["The subject is small"]
    assert photo_findings.of_masks([], CROPS, is_square=True) == []


def test_captions_without_the_word_and_too_long_ones_are_found():
    captions = {"a": "a Sks dog", "b": "a dog", "c": "asks a dog"}
    word, long = photo_findings.of_captions(captions, ["sks"], ["a"])
    assert (word.photos, long.photos) == (("b", "c"), ("a",))
    assert photo_findings.of_captions(captions, [], []) == []


def test_findings_that_spoil_most_come_first():
    findings = [
        Finding(rank, str(rank), "", "", ("a",) * count) for rank, count in ((3, 9), (1, 1), (2, 1), (2, 4))
    ]
    assert [(f.rank, len(f.photos)) for f in photo_findings.ranked(findings)] == [
        (1, 1),
        (2, 4),
        (2, 1),
        (3, 9),
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real photos are not there")
def test_real_photos_give_no_false_alarm():
    """15 photos of three subjects, each sharp and different."""
    for folder in sorted(path for path in REAL.iterdir() if path.is_dir()):
        pictures = photos.check_folder(folder, "--instance_data_dir").photos
        looks = {each.path.name: photo_looks.look_at(each) for each in pictures}
        assert photo_findings.of_looks(looks) == []
        assert photo_findings.of_sizes(pictures, CROPS, is_square=True) == []
