"""A disk that takes nothing more ends a script with one message, and leaves no half file."""

import itertools
import os
from pathlib import Path

import pytest

import convert_adapter
import generate_class_images
import infer
import train_dreambooth_lora as train
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from tests.running import train_words

ERRORS = {"full": 28, "quota": 122, "read-only": 30, "damaged": 5}


def fills_up(monkeypatch: pytest.MonkeyPatch, number: int, after: int) -> None:
    """From the flush with that number on, counted from 0, the disk reports the error."""
    real, calls = os.fsync, itertools.count()

    def fsync(descriptor: int) -> None:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def check(said: str, folder: Path, number: int) -> None:
    """One message, with a file of the folder and the reason; no temporary in the folder."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert f"{folder}/" in errors[0]
    assert f"cannot be written: {os.strerror(number)}" in errors[0]
    assert "Traceback" not in said
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "after"), [("full", 0), ("quota", 1), ("read-only", 3), ("damaged", 4)])
def test_class_images(kind, after, tiny_base, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "class"
    words = ["--pretrained_model_name_or_path", str(tiny_base), "--class_data_dir", str(folder)]
    words += ["--class_prompt", "a dog", "--num_class_images", "2", "--class_inference_steps", "1"]
    fills_up(monkeypatch, ERRORS[kind], after)
    with pytest.raises(SystemExit) as end:
        generate_class_images.main(parse(ClassImageOptions, "", [*words, "--sample_batch_size", "1"]))
    assert end.value.code == 1
    check(capsys.readouterr().err, folder, ERRORS[kind])
    monkeypatch.undo()
    if kind == "full":
        generate_class_images.main(parse(ClassImageOptions, "", words))
        assert len(list(folder.glob("*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "after"), [("full", 0), ("quota", 2), ("read-only", 4)])
def test_pictures(kind, after, tiny_base, tmp_path, monkeypatch, capsys):
    words = f"--pretrained_model_name_or_path {tiny_base} --output_dir {tmp_path / 'out'}"
    words += " --num_inference_steps 1 --prompt dog"
    fills_up(monkeypatch, ERRORS[kind], after)
    with pytest.raises(SystemExit) as end:
        infer.main(parse(InferOptions, "", words.split()))
    assert end.value.code == 1
    check(capsys.readouterr().err, tmp_path / "out", ERRORS[kind])


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["full", "read-only"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_run_before_its_first_step(kind, after, tiny_base, photos_dir, tmp_path, monkeypatch, capsys):
    words = train_words(tiny_base, photos_dir, tmp_path / "out", "--max_train_steps", "1")
    fills_up(monkeypatch, ERRORS[kind], after)
    with pytest.raises(SystemExit) as end:
        train.main(parse(TrainOptions, "", words))
    assert end.value.code == 1
    check(capsys.readouterr().err, tmp_path / "out", ERRORS[kind])


@pytest.mark.trains
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("command", ["native", "peft", "bake"])
def test_conversions(command, kind, plain_run, tiny_base, tmp_path, monkeypatch, capsys):
    adapter = str(plain_run / "pytorch_lora_weights.safetensors")
    target = tmp_path / "new" / ("file.safetensors" if command == "native" else "folder")
    words = ["convert", adapter, "--to", command, "--output", str(target)]
    if command == "bake":
        words = ["bake", adapter, "--pretrained_model_name_or_path", str(tiny_base)]
        words += ["--merge_to", str(target)]
    fills_up(monkeypatch, ERRORS[kind], 1 if command == "bake" else 0)
    with pytest.raises(SystemExit) as end:
        convert_adapter.main(convert_adapter.parse_command(words))
    assert end.value.code == 1
    check(capsys.readouterr().err, tmp_path / "new", ERRORS[kind])
    assert not list((tmp_path / "new").iterdir())
