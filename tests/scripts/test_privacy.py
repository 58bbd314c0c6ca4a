"""What others may see of a run holds no path of the user's machine."""

import shutil

import pytest

import infer
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from tests import tiny
from tests.running import prior_words, run_train

SECRET = "home-of-alice"
RECORDS = {"run.yaml", "run.json", "status.json", ".lock"}  # of the user's: they hold the paths of flags


@pytest.mark.trains
def test_pictures_adapters_and_checkpoints_hold_no_path(tiny_base, tmp_path):
    home = tmp_path / SECRET
    base = shutil.copytree(tiny_base, home / "base")
    photos = tiny.make_photos(home / "photos", 2)
    more = "--max_train_steps 1 --checkpointing_steps 1"
    more += " --num_validation_images 1 --output_kohya_format --validation_prompt dog --tokenizer_name "
    more += f"{base}/tokenizer --pretrained_vae_model_name_or_path {base}/vae"
    adapter = run_train(base, photos, home / "run", *more.split(), *prior_words(home / "class"))
    words = f"--pretrained_model_name_or_path {base} --output_dir {home}/drawn --num_inference_steps 1"
    words += f" --prompt dog --adapter {adapter} --compare"
    infer.main(parse(InferOptions, "", words.split()))

    written = [path for name in ("run", "drawn", "class") for path in (home / name).rglob("*")]
    public = [path for path in written if path.is_file() and path.name not in RECORDS]
    endings = {path.suffix for path in public}
    assert {".png", ".safetensors", ".json"} <= endings
    assert [path.name for path in public if SECRET.encode() in path.read_bytes()] == []
    # the control: what the base is called, and where the user may look it up
    assert b'"base": "base"' in (home / "drawn" / "00000_0_base.png").read_bytes()
    assert SECRET in (home / "run" / "run.yaml").read_text()
