"""Every script refuses to write into folders of photos, class images and bases, before it writes anything."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import convert_adapter
from dreambooth.data import class_images, output_pictures
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import writer
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import TrainOptions
from dreambooth.training import output_folder, run_folder
from tests.faults.ownership_faults import snapshot
from tests.running import train_words
from tests.tiny import make_photos

MANIFEST = '{"settings": {"seed": 0}, "sha256": {}}'


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Photos, a base, class images and links to them, in the working folder."""
    make_photos(tmp_path / "photos")
    (tmp_path / "base" / "unet").mkdir(parents=True)
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / class_images.MANIFEST).write_text(MANIFEST)
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "logs").symlink_to("../photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words: str) -> None:
    options = parse(TrainOptions, "", train_words(Path("base"), Path("photos"), Path("run"), *words))
    output_folder.check_apart_from_input(options, ["tensorboard"])


def draw(folder: str) -> None:
    words = ["--pretrained_model_name_or_path", "base", "--prompt", "a dog", "--output_dir", folder]
    options = parse(InferOptions, "", words)
    output_pictures.checked_folder(options.output_dir, options.base)


def convert(*words: str) -> None:
    base = ["--pretrained_model_name_or_path", "base"]
    convert_adapter.main(convert_adapter.parse_command([*words, *base]))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: train("--encoded_dir", "photos/kept"), "--encoded_dir: photos/kept lies in photos"),
        (lambda: train("--encoded_dir", "base/unet"), "--encoded_dir: base/unet lies in base"),
        (lambda: train("--logging_dir", "../link"), "--logging_dir: run/../link is photos"),
        (lambda: train("--logging_dir", "../base/x"), "--logging_dir: run/../base/x lies in base"),
        (lambda: train("--output_dir", "out"), "--logging_dir: out/logs is photos"),
        (lambda: train("--output_dir", "class", "--overwrite"), "class is a folder of class images"),
        (lambda: train("--output_dir", "class/a/b"), "class/a/b lies in a folder of class images"),
        (lambda: draw("class/a"), "class/a lies in a folder of class images"),
        (lambda: draw("photos"), "photos holds pictures that this program did not draw, photo-0.png"),
        (lambda: draw("link"), "link holds pictures that this program did not draw, photo-0.png"),
        (lambda: convert("convert", "a", "--to", "lora", "--output", "base/a.safetensors"), "lies in base"),
        (lambda: convert("convert", "a", "--to", "peft", "--output", "base/a"), "lies in base"),
        (lambda: convert("merge", "a:1", "b:1", "--output", "base/unet/a.safetensors"), "lies in base"),
        (
            lambda: convert("extract", "--tuned", "link", "--rank", "1", "--output", "photos/a.safetensors"),
            "lies in link, which --tuned names",
        ),
    ],
)
def test_folders_that_are_read_are_not_written_to(place: Path, run: Callable[[], None], message: str):
    before = snapshot(place)
    with pytest.raises(UserError) as refusal:
        run()
    assert message in str(refusal.value)
    assert snapshot(place) == before
    assert not os.path.lexists("run")


@pytest.mark.parametrize("folder", ["pictures", "photos/pictures", "base-pictures"])
def test_other_folders_are_written_to(place: Path, folder: str):
    draw(folder)
    train("--encoded_dir", "kept", "--logging_dir", "records")


def test_overwrite_keeps_the_status_that_this_start_has_written(tmp_path):
    files = WrittenFiles(tmp_path)
    for name in (run_folder.IDENTITY, run_folder.STATUS, "validation/image_0.png", "00000_0.png"):
        files.write(name, b"{}")
    assert run_folder.removable(tmp_path) == [run_folder.IDENTITY, "validation/image_0.png"]
    run_folder.begin(tmp_path, {}, "", is_resumed=False, overwrite=True)
    assert (tmp_path / run_folder.STATUS).exists()


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "file/x"])
def test_a_name_that_no_folder_can_have_is_one_message(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=r"--output_dir: .* cannot be made"):
        writer.make_output_folder(Path(name), "--output_dir")


def test_a_pipe_in_place_of_a_manifest_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / class_images.MANIFEST)
    class_images.check_outside(tmp_path / "out", "--output_dir")
    with pytest.raises(UserError, match=r"manifest\.json is damaged, or another program's"):
        class_images.names_made(tmp_path)
