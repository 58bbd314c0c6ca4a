"""Runs on a GPU: replayed steps and pictures have the bits of launched ones, in as much memory."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import infer
import train_dreambooth_lora as train
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from tests.running import ROOT, digest, how_steps_were_taken, metrics, prior_words, run_train, same_tensors

BASE, PHOTOS = ROOT / "picturebook" / "model", ROOT / "picturebook" / "subjects" / "dog"
LAUNCHED = ("--cuda_graph", "off")
Run = Callable[..., Path]

_DROPOUT = (
    "--max_train_steps 12 --checkpointing_steps 7 --train_text_encoder --lora_dropout 0.1 "
    "--gradient_accumulation_steps 2 --lr_scheduler cosine"
)
_CHECKPOINTING = (
    "--max_train_steps 12 --checkpointing_steps 7 --train_text_encoder --train_text_encoder_frac 0.5 "
    "--gradient_checkpointing --train_batch_size 2 --caption_dropout 0.3 --snr_gamma 5 --noise_offset 0.1"
)
CASES = {
    "float32, dropout, prior": f"{_DROPOUT} --mixed_precision no",
    "bfloat16, dropout": f"{_DROPOUT} --mixed_precision bf16",
    "bfloat16, checkpointing, captions": f"{_CHECKPOINTING} --mixed_precision bf16",
    "float16, dropout": f"{_DROPOUT} --mixed_precision fp16",
    "float32, DoRA": "--max_train_steps 8 --checkpointing_steps 5 --mixed_precision no --use_dora",
}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos, of which some have the same caption: a batch has one prompt or two."""
    folder = tmp_path_factory.mktemp("captioned")
    for number, photo in enumerate(sorted(PHOTOS.glob("*.png"))):
        shutil.copy(photo, folder)
        (folder / photo.name).with_suffix(".txt").write_text(f"a dog, number {number % 2}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def class_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prior_words(tmp_path_factory.mktemp("class"))


def resumed(run: Run, replayed: Path, folder: Path, step: int) -> Path:
    """The adapter of a run that was lost after `step` and goes on from its checkpoint."""
    shutil.copytree(replayed.parent / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return run(folder, "--resume_from_checkpoint", "latest")


@pytest.mark.trains
@pytest.mark.parametrize("case", CASES)
def test_replayed_launched_and_resumed_runs_are_equal(
    case: str, captioned: Path, class_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*CASES[case].split(), *(class_words if "prior" in case else [])]
    if case.startswith("float16"):  # the first steps overflow, and are skipped
        scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**24)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    photos = captioned if "captions" in case else PHOTOS
    run = functools.partial(run_train, BASE, photos)
    adapters, reserved = {}, {}
    for name, more in {"launched": LAUNCHED, "replayed": ()}.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        adapters[name] = run(tmp_path / name, *words, *more)
        reserved[name] = torch.cuda.max_memory_reserved()
    replayed = adapters["replayed"]
    assert how_steps_were_taken(replayed) == "replayed"
    assert digest(replayed) == digest(adapters["launched"])
    losses = [[record["loss"] for record in metrics(a.parent)] for a in adapters.values()]
    assert losses[0] == losses[1]
    step = int(words[words.index("--checkpointing_steps") + 1])
    moments = f"checkpoint-{step}/optimizer.safetensors"
    assert digest(replayed.parent / moments) == digest(adapters["launched"].parent / moments)
    again = resumed(lambda folder, *more: run(folder, *words, *more), replayed, tmp_path / "resumed", step)
    assert how_steps_were_taken(again) == "replayed"
    assert digest(again) == digest(replayed)
    assert reserved["replayed"] <= reserved["launched"] + 0.3 * 2**30


@pytest.mark.trains
def test_run_whose_steps_cannot_be_recorded_ends_well(tmp_path: Path, monkeypatch, capsys) -> None:
    """The recording fails in the middle of a step, at what a rehearsal allows and a CUDA graph does not."""
    words = ["--max_train_steps", "8", "--lora_dropout", "0.1", "--validation_prompt", "a dog"]
    words += ["--validation_steps", "4", "--num_validation_images", "1"]
    losses = train.denoising_losses

    def waiting(*values: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        return losses(*values)

    launched = run_train(BASE, PHOTOS, tmp_path / "launched", *words, *LAUNCHED)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_losses", waiting)
        adapter = run_train(BASE, PHOTOS, tmp_path / "failed", *words)
    said = capsys.readouterr()
    assert how_steps_were_taken(adapter).startswith("launched: ")
    assert (said.out + said.err).count("launched kernel by kernel") == 1
    assert same_tensors(adapter, launched)
    # the next run of this process records again
    replayed = run_train(BASE, PHOTOS, tmp_path / "replayed", *words)
    assert how_steps_were_taken(replayed) == "replayed"
    assert same_tensors(replayed, launched)


@pytest.mark.trains
def test_steps_that_are_not_finite_are_skipped_on_the_device(tmp_path: Path, capsys) -> None:
    """A rate that no training survives: the run ends at the same step, launched or replayed."""
    words = ["--max_train_steps", "30", "--learning_rate", "1e9", "--max_grad_norm", "0"]
    ends = []
    for flags in (LAUNCHED, ()):
        folder = tmp_path / ("launched" if flags else "replayed")
        with pytest.raises(SystemExit):
            run_train(BASE, PHOTOS, folder, *words, *flags)
        assert "not finite" in capsys.readouterr().err
        ends.append(json.loads((folder / "status.json").read_text())["step"])
    assert ends[0] == ends[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_replayed_pictures_are_the_launched_ones(tmp_path: Path, precision: str) -> None:
    words = f"--pretrained_model_name_or_path {BASE} --num_inference_steps 8 --mixed_precision {precision}"
    drawn = {}
    for name, flags in {"launched": LAUNCHED, "replayed": ()}.items():
        folder = tmp_path / name
        # three pictures in batches of two: the last batch has another shape
        more = ["--output_dir", str(folder), "--prompt", "a photo of a dog", "--seeds", "1", "2", "3"]
        infer.main(parse(InferOptions, "", [*words.split(), *more, "--batch_size", "2", *flags]))
        records = json.loads((folder / "images.json").read_text())
        drawn[name] = [np.asarray(Image.open(folder / record["file"])) for record in records]
    assert len(drawn["launched"]) == 3
    assert all(map(np.array_equal, drawn["launched"], drawn["replayed"]))
