"""Mistakes on a command line: refused in one message before a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from dreambooth.io.errors import UserError
from tests import tiny
from tests.running import as_main, run_train

# --- bad input, before any model is loaded


def spoil(folder: Path, kind: str) -> Path:
    if kind == "missing":
        return folder / "nowhere"
    if kind == "empty":
        folder.mkdir()
        return folder
    tiny.make_photos(folder, 1)
    if kind == "truncated":
        whole = (folder / "photo-0.png").read_bytes()
        (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    if kind == "text":
        (folder / "note.jpg").write_text("not a picture")
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [("missing", "no folder"), ("empty", "it is empty"), ("truncated", "cut.png"), ("text", "note.jpg")],
)
def test_bad_photo_folders_are_refused_at_the_door(tiny_base, tmp_path, no_models, kind, said):
    with pytest.raises(UserError, match=said):
        run_train(tiny_base, spoil(tmp_path / "photos", kind), tmp_path / "out")


@pytest.mark.trains
def test_hidden_files_are_skipped_with_a_note(tiny_base, photos_dir, tmp_path, capsys):
    photos = tiny.make_photos(tmp_path / "photos", 1)
    (photos / ".DS_Store").write_text("junk")
    run_train(tiny_base, photos, tmp_path / "out", "--max_train_steps", "1")
    assert "a hidden or system file" in capsys.readouterr().out


def test_long_prompts_are_refused_with_the_words_cut_off(tiny_base, photos_dir, tmp_path, no_models):
    prompt = "a photo of sks dog " + "in the snow " * 25 + "wearing a yellow scarf"
    with pytest.raises(
        UserError, match=r"--instance_prompt is longer than 77 tokens.*wearing a yellow scarf"
    ):
        run_train(tiny_base, photos_dir, tmp_path, "--instance_prompt", prompt)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "there is no folder"),
        (lambda path: (path.mkdir(), path)[1], "no model_index.json"),
        (
            lambda path: (
                path.mkdir(),
                (path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
                path,
            )[2],
            "is a FluxPipeline",
        ),
        (lambda path: (path.write_text("x"), path)[1], "not a complete safetensors file"),
        (
            lambda path: (
                path.mkdir(),
                (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}'),
                path,
            )[2],
            "lacks the folders",
        ),
    ],
)
def test_bad_base_folders_are_refused_at_the_door(photos_dir, tmp_path, no_models, make, said):
    with pytest.raises(UserError, match=said):
        run_train(make(tmp_path / "base"), photos_dir, tmp_path / "out")


def test_parts_of_two_bases_are_refused(tiny_base, photos_dir, tmp_path, no_models):
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_base, mixed)
    config = json.loads((mixed / "text_encoder" / "config.json").read_text())
    (mixed / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(UserError, match="two different bases"):
        run_train(mixed, photos_dir, tmp_path / "out")


def test_fp16_on_a_cpu_is_refused(tiny_base, photos_dir, tmp_path, no_models):
    with pytest.raises(UserError, match="fp16 does not work on a CPU"):
        run_train(tiny_base, photos_dir, tmp_path, "--mixed_precision", "fp16")


@pytest.mark.parametrize("script", ["train_dreambooth_lora.py", "generate_class_images.py", "infer.py"])
def test_mistakes_end_with_status_2_and_one_message(script, tmp_path):
    """As a process has it: no traceback, nothing written."""
    words = {
        "train_dreambooth_lora.py": [
            "--instance_data_dir",
            str(tmp_path / "none"),
            "--instance_prompt",
            "x",
            "--output_dir",
            str(tmp_path / "o"),
        ],
        "generate_class_images.py": ["--class_data_dir", str(tmp_path / "c"), "--class_prompt", "a dog"],
        "infer.py": [
            "--prompt",
            "a dog",
            "--adapter",
            str(tmp_path / "none.safetensors"),
            "--output_dir",
            str(tmp_path / "o"),
        ],
    }[script]
    status, errors = as_main(script, "--pretrained_model_name_or_path", str(tmp_path / "nobase"), *words)
    assert status == 2
    assert "Traceback" not in errors
    assert errors.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
