"""The five commands with a base in a single file: the pictures, adapters and bases of its folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import infer
from dreambooth.bases import single_files
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.pictures import InferOptions
from tests import single_files as made
from tests.running import prior_words, run_train, same_tensors
from tests.scripts.converting import run

V_MARK = {"modelspec.prediction_type": "v"}


@pytest.fixture(autouse=True)
def tiny_configs(file_configs, monkeypatch) -> None:
    monkeypatch.setattr(single_files, "CONFIGS", file_configs)


@pytest.fixture(scope="module")
def files(file_bases, tmp_path_factory) -> dict[str, Path]:
    """By kind, the base in one file: of Stable Diffusion 1 as diffusers writes it, of the others as kohya."""
    folder = tmp_path_factory.mktemp("files")
    return {
        kind: made.write(
            base,
            kind,
            folder / f"{kind}.safetensors",
            kohya=kind != "sd1",
            metadata=V_MARK if kind == "sd2_v" else None,
        )
        for kind, base in file_bases.items()
    }


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in sorted(folder.glob("*.png"))}


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["sd1", "sd2_v", "sdxl"])
def test_adapters_and_pictures_are_those_of_the_folder(kind, file_bases, files, photos_dir, tmp_path, capfd):
    """Training with class images, a cache and the text encoder; then pictures with the adapter."""
    adapters = {}
    for name, base in (("folder", file_bases[kind]), ("file", files[kind])):
        words = ["--encoded_dir", str(tmp_path / f"cache_{name}"), "--max_train_steps", "1"]
        words += ["--train_text_encoder", "--rank", "2"]
        if kind == "sd1":
            words += [*prior_words(tmp_path / f"class_{name}"), "--checkpointing_steps", "1"]
        adapters[name] = run_train(base, photos_dir, tmp_path / name, *words)
        words = ["--pretrained_model_name_or_path", str(base), "--adapter", str(adapters[name])]
        words += ["--prompt", "a photo of sks dog", "--num_inference_steps", "2"]
        infer.main(parse(InferOptions, "", [*words, "--output_dir", str(tmp_path / f"pictures_{name}")]))
    assert same_tensors(adapters["folder"], adapters["file"])
    assert pixels(tmp_path / "pictures_folder") == pixels(tmp_path / "pictures_file")
    said = "".join(capfd.readouterr())
    assert said.count(f"{files[kind]}: a single file of Stable Diffusion") == 2  # by each of the two programs
    if kind != "sd1":
        return
    assert pixels(tmp_path / "class_folder") == pixels(tmp_path / "class_file") != {}
    # the file may move: the cache is of its weights, and the run goes on
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(files[kind].read_bytes())
    stored = set((tmp_path / "cache_file").rglob("*.safetensors"))
    words = [*prior_words(tmp_path / "class_file"), "--encoded_dir", str(tmp_path / "cache_file")]
    words += ["--max_train_steps", "2", "--checkpointing_steps", "1", "--train_text_encoder", "--rank", "2"]
    run_train(moved, photos_dir, tmp_path / "file", *words, "--resume_from_checkpoint", "latest")
    assert set((tmp_path / "cache_file").rglob("*.safetensors")) == stored


@pytest.mark.slow
def test_an_evaluation_is_that_of_the_folder(file_bases, files, photos_dir, tiny_dino, tiny_clip, tmp_path):
    results = {}
    adapter = tmp_path / "adapter.safetensors"
    run("extract", tuned(files["sd1"], tmp_path), *base_words(files["sd1"]), "--rank", 2, "--output", adapter)
    (tmp_path / "prompts.txt").write_text("a {0} {1} in the snow\n")
    for name, base in (("folder", file_bases["sd1"]), ("file", files["sd1"])):
        words = f"--pretrained_model_name_or_path {base} --prompts_file {tmp_path}/prompts.txt"
        words += f" --output_dir {tmp_path / name} --judge_dino {tiny_dino} --judge_clip {tiny_clip}"
        words += f" --adapter {adapter} --photos {photos_dir} --class_noun dog --rare_word sks"
        words += " --num_images 1 --num_class_images 2 --num_inference_steps 2 --num_threads 1"
        evaluate.main(parse(EvaluateOptions, "", words.split()))
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert results["folder"]["subjects"] == results["file"]["subjects"]


def base_words(base: Path) -> tuple[str, str]:
    return ("--pretrained_model_name_or_path", str(base))


def tuned(file: Path, folder: Path) -> Path:
    """The file with a change of rank 1 in one layer of its UNet."""
    state = load_file(file)
    key = next(key for key in state if key.endswith("attn1.to_q.weight"))
    state[key] = state[key] + torch.outer(torch.ones(len(state[key])), torch.ones(len(state[key]))) / 8
    save_file(state, folder / "tuned.safetensors")
    return folder / "tuned.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl"])
def test_what_is_extracted_is_baked_into_a_folder_of_diffusers(kind, files, tmp_path):
    """The baked folder has every part, and its pictures are those of the tuned file."""
    changed, adapter, baked = tuned(files[kind], tmp_path), tmp_path / "e.safetensors", tmp_path / "baked"
    run("extract", changed, *base_words(files[kind]), "--rank", 1, "--output", adapter)
    run("bake", adapter, *base_words(files[kind]), "--merge_to", baked)
    pipeline = DiffusionPipeline.from_pretrained(baked)
    assert pipeline.tokenizer("a sks dog").input_ids == [49406, 320, 48136, 1929, 49407]
    pictures = {}
    for name, base in (("baked", baked), ("tuned", changed)):
        words = [*base_words(base), "--prompt", "a sks dog", "--num_inference_steps", "2"]
        infer.main(parse(InferOptions, "", [*words, "--output_dir", str(tmp_path / f"of_{name}")]))
        (picture,) = (tmp_path / f"of_{name}").glob("0*.png")
        pictures[name] = np.asarray(Image.open(picture)).astype(int)
    assert np.abs(pictures["baked"] - pictures["tuned"]).max() <= 2


def test_what_cannot_be_baked_is_refused(files, file_bases, tmp_path):
    without = made.write(file_bases["sd1"], "sd1", tmp_path / "x.safetensors", without=("vae",))
    adapter = tmp_path / "a.safetensors"
    run("extract", tuned(without, tmp_path), *base_words(without), "--rank", 1, "--output", adapter)
    with pytest.raises(UserError, match="has no VAE, and a base that is written needs one"):
        run("bake", adapter, *base_words(without), "--merge_to", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
