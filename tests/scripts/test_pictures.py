"""infer.py, end to end, with adapters that were trained here; and real photos."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from dreambooth.adapter_files import native, run_info
from dreambooth.bases import families
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions
from tests import tiny
from tests.running import ROOT, metrics, prior_words, run_train
from tests.scripts.drawing import fill_copy

REAL_PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth"


# --- infer


@pytest.mark.slow
def test_pictures_carry_their_settings_and_do_not_depend_on_their_neighbours(tiny_base, tmp_path):
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --num_inference_steps 2 --batch_size 1 --prompt".split()
    )
    infer.main(
        parse(
            InferOptions,
            "",
            [*words, "a dog", "a cat", "--seeds", "3", "4", "--output_dir", str(tmp_path / "many")],
        )
    )
    infer.main(
        parse(InferOptions, "", [*words, "a cat", "--seeds", "4", "--output_dir", str(tmp_path / "one")])
    )
    records = json.loads((tmp_path / "many" / "images.json").read_text())
    assert [(record["prompt"], record["seed"]) for record in records] == [
        ("a dog", 3),
        ("a dog", 4),
        ("a cat", 3),
        ("a cat", 4),
    ]
    picture = Image.open(tmp_path / "many" / records[3]["file"])
    assert json.loads(picture.info["dreambooth"])["prompt"] == "a cat"
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(tmp_path / "one" / "00000_4.png")))
    assert Image.open(tmp_path / "many" / "contact_sheet.png").width > 2 * 160


@pytest.mark.trains
def test_compare_draws_base_and_adapter_from_the_same_noise(trained, tiny_base, tmp_path):
    path = fill_copy(trained, tmp_path)
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --adapter {path} --num_inference_steps 2 "
        f"--output_dir {tmp_path / 'both'} --compare"
    )
    infer.main(parse(InferOptions, "", [*words.split(), "--prompt", "a dog"]))
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --num_inference_steps 2 --output_dir "
        f"{tmp_path / 'base'}"
    )
    infer.main(parse(InferOptions, "", [*words.split(), "--prompt", "a dog"]))
    records = json.loads((tmp_path / "both" / "images.json").read_text())
    base, adapted = (np.asarray(Image.open(tmp_path / "both" / record["file"])) for record in records)
    assert [record["adapter"] for record in records] == [None, "filled.safetensors"]
    assert np.array_equal(base, np.asarray(Image.open(tmp_path / "base" / "00000_0.png")))
    assert not np.array_equal(base, adapted)


def test_prompts_come_from_a_file(tiny_base, tmp_path):
    (tmp_path / "prompts.txt").write_text("# two\na dog\n\na cat in the snow\n")
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --num_inference_steps 1 --output_dir "
        f"{tmp_path / 'out'} --prompts_file {tmp_path}/prompts.txt"
    )
    infer.main(parse(InferOptions, "", words.split()))
    assert [record["prompt"] for record in json.loads((tmp_path / "out" / "images.json").read_text())] == [
        "a dog",
        "a cat in the snow",
    ]


@pytest.mark.trains
def test_adapter_of_another_base_is_refused(trained, tmp_path):
    other = tiny.build_pipeline(tmp_path / "other", text_width=48)
    words = f"--pretrained_model_name_or_path {other} --adapter {trained} --output_dir {tmp_path / 'out'}"
    with pytest.raises(UserError, match="another base"):
        infer.main(parse(InferOptions, "", [*words.split(), "--prompt", "a dog"]))


@pytest.mark.slow
def test_odd_prompts_cannot_leave_the_folder_or_break_the_sheet(tiny_base, tmp_path):
    prompts = ["../../etc/passwd", 'a "dog"\nSteps: 1', "\x1b[31mred"]
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --num_inference_steps 1 --output_dir {tmp_path / 'out'}"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        infer.main(parse(InferOptions, "", [*words.split(), "--prompt", *prompts]))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *(".lock", ".written.jsonl", "images.json", "contact_sheet.png"),
        *("00000_0.png", "00001_0.png", "00002_0.png"),
    }


# --- real photos


@pytest.mark.trains
@pytest.mark.skipif(not (REAL_PHOTOS / "dog3").is_dir(), reason=f"the real photos are not at {REAL_PHOTOS}")
@pytest.mark.parametrize("base", ["tiny", "picturebook"])
def test_real_photos_train_end_to_end(base, tiny_base, tmp_path):
    """Class images, dual LoRA, pictures: on a Stable-Diffusion-shaped random base, and on the embedded one at
    its own resolution."""
    folder = tiny_base if base == "tiny" else ROOT / "picturebook" / "model"
    words = prior_words(
        tmp_path / "class", "--train_text_encoder", "--max_train_steps", "3", "--num_class_images", "2"
    )
    adapter = run_train(folder, REAL_PHOTOS / "dog3", tmp_path / "run", *words)
    infer_words = (
        f"--pretrained_model_name_or_path {folder} --adapter {adapter} --output_dir "
        f"{tmp_path / 'out'} --num_inference_steps 2 --compare"
    )
    infer.main(parse(InferOptions, "", [*infer_words.split(), "--prompt", "a photo of sks dog"]))
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())) == 2
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert all(np.isfinite(losses))


@pytest.mark.trains
def test_an_adapter_file_says_what_it_was_made_on_and_with_and_no_path(trained, tiny_base):
    from safetensors import safe_open

    with safe_open(trained / native.ADAPTER_NAME, framework="pt") as file:
        metadata = file.metadata()
    said = run_info.of(metadata)
    base = families.find(BaseOptions(str(tiny_base)))
    assert (said["base_model"], said["base_fingerprint"], said["steps"], said["seed"]) == (
        tiny_base.name,
        base.fingerprint(),
        6,
        1,
    )
    assert set(said["versions"]) == {"torch", "diffusers", "transformers", "peft"}
    assert not any(
        str(folder) in json.dumps(metadata)
        for folder in (tiny_base.parent, trained, Path.home())
        if str(folder) != "/"
    )
