"""Validation pictures of several prompts, from before the first step to the finished adapter."""

from pathlib import Path
from typing import Any

import pytest

from dreambooth.files import checkpoint_folders, pictures
from dreambooth.files.ownership import WrittenFiles
from tests.running import digest, run_train, same_tensors

PROMPTS = ["a photo of sks dog", "a dog in the snow"]
# the text encoder is trained in the first half only, and then freed
WORDS = "--max_train_steps 4 --checkpointing_steps 2 --train_text_encoder --train_text_encoder_frac 0.5"
PICTURES = "--num_validation_images 2 --validation_steps 3"


def pictures_of(run: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in (run / "validation").iterdir()}


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# of the subject\n" + "\n\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tiny_base, photos_dir, prompts_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    words = [*WORDS.split(), *PICTURES.split(), "--validation_prompts_file", str(prompts_file)]
    run_train(tiny_base, photos_dir, out, *words)
    return out


@pytest.mark.trains
def test_every_prompt_is_drawn_before_the_first_step_between_steps_and_at_the_end(run):
    numbers = [f"{prompt:02d}-{number:02d}" for prompt in (0, 1) for number in (0, 1)]
    expected = {f"step-{step:06d}-{number}.png" for step in (0, 3) for number in numbers}
    expected |= {f"image_{number.replace('-0', '_')}.png" for number in numbers}
    swept = {"weight-0.50.png", "weight-0.75.png", "weight-1.25.png"}
    assert pictures_of(run).keys() == expected | swept
    for name in expected | swept:
        _, settings = pictures.read((run / "validation" / name).read_bytes())
        is_second = name.startswith(("step-000000-01", "step-000003-01", "image_01"))
        assert settings["prompt"] == PROMPTS[is_second]
        assert settings["step"] == (int(name[5:11]) if name.startswith("step") else 4)


@pytest.mark.trains
def test_every_picture_of_a_step_has_noise_of_its_own(run):
    first = {digest for name, digest in pictures_of(run).items() if name.startswith("step-000000")}
    assert len(first) == 4


@pytest.mark.trains
def test_pictures_change_no_bit_of_the_adapter(run, tiny_base, photos_dir, tmp_path):
    adapter = run_train(tiny_base, photos_dir, tmp_path, *WORDS.split())
    assert same_tensors(adapter, run / adapter.name)
    assert checkpoint_folders.list_checkpoints(run)[0][0] == 2


@pytest.mark.trains
def test_a_resumed_run_draws_the_same_pictures(run, tiny_base, photos_dir, prompts_file, tmp_path):
    words = [*WORDS.split(), *PICTURES.split(), "--validation_prompts_file", str(prompts_file)]
    run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        *words,
        "--resume_from_checkpoint",
        str(run / "checkpoint-2"),
    )
    drawn = pictures_of(tmp_path)
    before = {name for name in pictures_of(run) if name.startswith("step-000000")}
    assert drawn == {name: sha for name, sha in pictures_of(run).items() if name not in before}


@pytest.mark.trains
def test_a_run_that_died_while_it_drew_draws_those_pictures_when_it_is_resumed(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    words = "--max_train_steps 3 --checkpointing_steps 2 --validation_steps 2 --num_validation_images 2"
    words += " --resolution 32 --skip_final_inference"
    resumed = [*words.split(), "--validation_prompt", "a dog", "--resume_from_checkpoint", "latest"]
    write = WrittenFiles.write

    def dies(self: WrittenFiles, name: str, *args: Any, **more: Any) -> None:
        if name == "validation/step-000002-01.png":
            raise RuntimeError("died")
        write(self, name, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(WrittenFiles, "write", dies)
        with pytest.raises(RuntimeError, match="died"):
            run_train(tiny_base, photos_dir, tmp_path, *resumed[:-2])
    assert "step-000002-01.png" not in pictures_of(tmp_path)
    first = pictures_of(tmp_path)
    run_train(tiny_base, photos_dir, tmp_path, *resumed)
    assert pictures_of(tmp_path).keys() == first.keys() | {"step-000002-01.png"}
    assert first.items() <= pictures_of(tmp_path).items()


@pytest.mark.trains
def test_a_prompt_has_the_same_noise_alone_and_beside_others(run, tiny_base, photos_dir, tmp_path):
    """So the prompts of a run that is resumed may be edited."""
    (tmp_path / "prompts.txt").write_text(PROMPTS[1])
    words = [*WORDS.split(), "--num_validation_images", "1"]
    run_train(
        tiny_base,
        photos_dir,
        tmp_path / "alone",
        *words,
        "--validation_prompts_file",
        str(tmp_path / "prompts.txt"),
    )
    alone, beside = pictures_of(tmp_path / "alone"), pictures_of(run)
    assert alone["step-000000-00.png"] == beside["step-000000-01-00.png"]


@pytest.mark.trains
def test_the_prompt_of_the_flag_comes_before_those_of_the_file(tiny_base, photos_dir, prompts_file, tmp_path):
    words = ["--max_train_steps", "1", "--num_validation_images", "1", "--skip_final_inference"]
    pair = ["--validation_prompt", PROMPTS[1], "--validation_prompts_file", str(prompts_file)]
    run_train(tiny_base, photos_dir, tmp_path, *words, *pair)
    drawn = [
        pictures.read(path.read_bytes())[1]["prompt"] for path in sorted((tmp_path / "validation").iterdir())
    ]
    assert drawn == [PROMPTS[1], PROMPTS[0]]


@pytest.mark.trains
def test_an_adapter_with_two_weights_only_is_not_drawn_at_others(tiny_base, photos_dir, tmp_path):
    words = ["--max_train_steps", "1", "--adapter", "oft", "--validation_prompt", "a dog"]
    run_train(tiny_base, photos_dir, tmp_path, *words, "--num_validation_images", "1")
    assert pictures_of(tmp_path).keys() == {"step-000000-00.png", "image_0.png"}
