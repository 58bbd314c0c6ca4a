"""check_photos.py from a folder to its page: everything is found, nothing of the user's is changed."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageFilter, ImageOps

import check_photos
from dreambooth.data import class_images
from dreambooth.files import pictures
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.photo_check import PhotoCheckOptions
from tests.data.test_photo_findings import scene
from tests.running import digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photos with a copy, a mirror image and a blurred one, captions, masks, and a class image of them."""
    root = tmp_path_factory.mktemp("doctor")
    for name in ("photos", "masks", "class"):
        (root / name).mkdir()
    images = {
        "a": scene(1),
        "a<b>copy": scene(1).resize((560, 560)),
        "m": ImageOps.mirror(scene(2)),
        "n": scene(2),
        "blurred": scene(3).filter(ImageFilter.GaussianBlur(4)),
    }
    for name, image in images.items():
        image.save(root / "photos" / f"{name}.png")
        Image.new("L", image.size, 255).save(root / "masks" / f"{name}.png")
    (root / "photos" / "a.txt").write_text("a dog, " + "very " * 80)
    drawn = root / "class" / "x.png"
    drawn.write_bytes(pictures.png(scene(2).resize((300, 300)), {}))  # as this program draws class images
    manifest = json.dumps({"settings": {}, "sha256": {drawn.name: digest(drawn)}})
    (root / "class" / class_images.MANIFEST).write_text(manifest)
    return root


def run(folder: Path, out: Path, *more: str) -> str:
    words = ["--instance_data_dir", str(folder / "photos"), "--output_dir", str(out), *more]
    check_photos.main(parse(PhotoCheckOptions, "", words))
    return (out / "photos.html").read_text()


def test_the_page_shows_every_finding_and_no_photo_is_touched(folder, tiny_base, tmp_path, capsys):
    before = {path: digest(path) for path in folder.rglob("*.*")}
    words = (
        f"--class_data_dir {folder / 'class'} --mask_dir {folder / 'masks'} --caption_extension .txt "
        f"--pretrained_model_name_or_path {tiny_base}"
    )
    prompts = ["--instance_prompt", "a photo of sks dog", "--class_prompt", "a photo of dog"]
    page = run(folder, tmp_path, *words.split(), *prompts)
    said = capsys.readouterr().out
    for title in (
        "Class images that show the subject",
        "Captions without the subject&#39;s word",
        "Nearly the same picture",
        "Mirror images",
        "Blurred",
        "Captions that are too long",
    ):
        assert title in page
        assert title.replace("&#39;", "'") in said
    assert (
        page.index("Class images that show") < page.index("Mirror images") < page.index("that are too long")
    )
    assert "a&lt;b&gt;copy.png" in page
    assert page.count("a dog, very very") == 2  # below the findings on captions
    assert "<b>copy" not in page
    assert "Content-Security-Policy" in page
    assert page.count("data:image/jpeg;base64,") >= 7
    assert {path: digest(path) for path in folder.rglob("*.*")} == before
    run(folder, tmp_path)  # its own page is written anew


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--output_dir {0}/photos/out", "--output_dir: .* lies in .* which --instance_data_dir names"),
        ("--mask_dir {0}/class", "--mask_dir: a.png: there is no mask; its name must be"),
        ("--caption_extension .caption", "--caption_extension: there are no captions in"),
        ("--instance_data_dir {0}/nowhere", "--instance_data_dir: there is no folder"),
    ],
)
def test_what_cannot_be_checked_is_refused(folder, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, *more.format(folder).split())


def test_a_page_of_another_program_is_not_replaced(folder, tmp_path):
    (tmp_path / "photos.html").write_text("mine")
    with pytest.raises(UserError, match=r"--output_dir: .*photos.html"):
        run(folder, tmp_path)
    assert (tmp_path / "photos.html").read_text() == "mine"
