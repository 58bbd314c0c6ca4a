"""generate_class_images.py, end to end, on a tiny pipeline."""

from pathlib import Path

import pytest

import generate_class_images
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions
from tests.running import digest, main_on_two_processes
from tests.scripts.conftest import classes_of

# --- class images


def class_words(base: Path, folder: Path, *more: str) -> list[str]:
    words = (
        f"--pretrained_model_name_or_path {base} --class_data_dir {folder} --num_class_images 5 "
        "--class_inference_steps 2 --sample_batch_size 2"
    )
    return [*words.split(), "--class_prompt", "a photo of dog", *more]


def make_class_images(base: Path, folder: Path, *more: str) -> dict[str, str]:
    """Hash of every picture, by name."""
    generate_class_images.main(parse(ClassImageOptions, "", class_words(base, folder, *more)))
    return {path.name: digest(path) for path in sorted(folder.glob("*.png"))}


@pytest.mark.slow
def test_class_images_are_the_same_after_an_interruption(tiny_base, tmp_path, monkeypatch):
    from dreambooth.bases import pipelines

    whole = make_class_images(tiny_base, tmp_path / "whole")
    assert len(set(whole.values())) == 5
    real, calls = pipelines.draw, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pipelines, "draw", dies)
    with pytest.raises(KeyboardInterrupt):
        make_class_images(tiny_base, tmp_path / "cut")
    monkeypatch.undo()
    assert len(list((tmp_path / "cut").glob("*.png"))) == 2
    assert make_class_images(tiny_base, tmp_path / "cut") == whole


@pytest.mark.slow
def test_class_images_are_the_same_from_two_processes(tiny_base, tmp_path):
    alone = make_class_images(tiny_base, tmp_path / "alone", "--num_threads", "1")
    words = class_words(tiny_base, tmp_path / "both", "--num_threads", "1")
    main_on_two_processes(generate_class_images.main, parse(ClassImageOptions, "", words))
    assert {path.name: digest(path) for path in sorted((tmp_path / "both").glob("*.png"))} == alone
    assert not list((tmp_path / "both").glob(".class-*"))


@pytest.mark.trains
def test_training_makes_the_class_images_that_the_script_makes(trained, tiny_base, tmp_path):
    by_script = make_class_images(tiny_base, tmp_path / "class", "--num_class_images", "3", "--seed", "1")
    assert by_script == {path.name: digest(path) for path in sorted((classes_of(trained)).glob("*.png"))}


def test_class_folder_of_other_settings_is_refused(tiny_base, tiny_v_base, tmp_path):
    make_class_images(tiny_base, tmp_path / "class")
    for base, more, said in (
        (tiny_base, ["--class_prompt", "a cat"], "prompt"),
        (tiny_base, ["--seed", "3"], "seed"),
        (tiny_v_base, [], "base"),
    ):
        with pytest.raises(UserError, match=said):
            make_class_images(base, tmp_path / "class", *more)


def test_more_steps_than_the_base_has_timesteps_are_refused_at_once(tiny_base, tmp_path, no_models):
    with pytest.raises(UserError, match="--class_inference_steps must be at most 1000, the timesteps of"):
        make_class_images(tiny_base, tmp_path / "class", "--class_inference_steps", "1001")
    assert not (tmp_path / "class").exists()
