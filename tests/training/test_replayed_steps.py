"""Steps that are recorded and replayed learn what launched steps learn, bit for bit.

A tape stands in for CUDA graphs. All else is as on a GPU: learning rates are tensors, losses are read late,
and the device decides whether a step is taken.
"""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import train_dreambooth_lora as train
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import environment, graphs
from dreambooth.training import loss_log, step_inputs
from dreambooth.training.trainables import Trainables
from tests import tiny
from tests.running import (
    adapter_after,
    digest,
    how_steps_were_taken,
    main_on_two_processes,
    meter_records,
    metrics,
    prior_words,
    run_train,
    same_tensors,
    train_words,
)
from tests.tape import TapeRecorder

LAUNCHED = ("--cuda_graph", "off")


@pytest.fixture(scope="module")
def taped():
    """Runs record their steps on this CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "can_record", lambda device: True)
        patch.setattr(graphs, "CudaRecorder", TapeRecorder)
        patch.setattr(loss_log, "steps_between_readings", lambda device: 3)
        yield


@pytest.fixture(scope="module")
def launched(taped, tiny_base, photos_dir, tmp_path_factory) -> Path:
    """The folder of a run of six launched steps with checkpoints after 2 and 4."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--max_train_steps", "6", "--checkpointing_steps", "2", *LAUNCHED]
    return run_train(tiny_base, photos_dir, tmp_path_factory.mktemp("launched"), *words).parent


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """Photos of which two have the same caption."""
    photos = tiny.make_photos(tmp_path_factory.mktemp("captioned"))
    for photo, caption in zip(sorted(photos.iterdir()), ("a dog", "a red dog", "a dog"), strict=True):
        photo.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return photos


CASES = {
    "text encoder, prior preservation, accumulation, schedule": (
        "tiny_base",
        "--max_train_steps 6 --train_text_encoder --train_text_encoder_frac 0.5 --lora_dropout 0.2 "
        "--gradient_accumulation_steps 2 --lr_scheduler cosine --max_grad_norm 0.01 --checkpointing_steps 3 "
        "--lr_pattern unet.up_blocks=1e-3 --validation_steps 4 --validation_prompt dog "
        "--num_validation_images 1 --meter_steps 4 --holdout 1",
    ),
    "v prediction, captions, checkpointing, weights": (
        "tiny_v_base",
        "--max_train_steps 4 --train_text_encoder --gradient_checkpointing --snr_gamma 5 --noise_offset 0.1 "
        "--train_batch_size 2 --caption_dropout 0.3",
    ),
    "SDXL, targets of the base": (
        "tiny_xl",
        "--max_train_steps 3 --train_text_encoder --gradient_checkpointing --random_flip "
        "--with_prior_preservation --prior_source base --class_prompt dog",
    ),
    "EDM, DoRA": ("tiny_edm", "--max_train_steps 3 --use_dora --lora_dropout 0.1"),
    "IF, LoKr": ("tiny_if", "--max_train_steps 3 --adapter lokr --resolution 16"),
    "buckets": ("tiny_xl", "--max_train_steps 5 --buckets --resolution 64,80 --checkpointing_steps 3"),
    "masks": (
        "tiny_base",
        "--max_train_steps 4 --unmasked_target base --snr_gamma 5 --lora_dropout 0.2 --train_text_encoder",
    ),
    "scaled LoHa": ("tiny_base", "--max_train_steps 4 --adapter loha --mixed_precision bf16"),
}


@pytest.mark.trains
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_learn_what_launched_steps_learn(
    taped, case, request, photos_dir, captioned, tmp_path, monkeypatch
):
    base, words = CASES[case]
    more = words.split()
    if "prior preservation" in case:
        more += prior_words(tmp_path / "class")
    if "scaled" in case:  # as with fp16; the first steps overflow, and are skipped
        always = functools.partial(torch.amp.GradScaler, init_scale=2.0**127)
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: always(device))
    photos = captioned if "captions" in case else photos_dir
    if case == "buckets":  # a graph for each shape
        photos = tiny.make_photos(tiny.make_photos(tmp_path / "odd", 2, (96, 64)), 1)
    if case == "masks":  # noise on grey
        more += ["--mask_dir", str(tiny.make_photos(tmp_path / "masks"))]
    run = functools.partial(run_train, request.getfixturevalue(base), photos)
    launched, replayed = run(tmp_path / "launched", *more, *LAUNCHED), run(tmp_path / "replayed", *more)
    assert how_steps_were_taken(launched) == "launched: --cuda_graph off"
    assert how_steps_were_taken(replayed) == "replayed"
    assert digest(replayed) == digest(launched)
    numbers = [[{**r, "images_per_second": 0} for r in metrics(a.parent)] for a in (launched, replayed)]
    assert numbers[0] == numbers[1]
    assert meter_records(launched.parent) == meter_records(replayed.parent)
    if "--checkpointing_steps" in more:  # stopped in the middle, where the text encoder leaves, and resumed
        shutil.copytree(replayed.parent / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
        resumed = run(tmp_path / "stopped", *more, "--resume_from_checkpoint", "latest")
        assert how_steps_were_taken(resumed) == "replayed"
        assert digest(resumed) == digest(launched)


@pytest.mark.trains
def test_two_processes_replay_what_one_launches(taped, launched, tiny_base, photos_dir, tmp_path):
    words = train_words(tiny_base, photos_dir, tmp_path / "two", "--max_train_steps", "4")
    main_on_two_processes(train.main, parse(TrainOptions, "", words))
    alone = run_train(
        tiny_base,
        photos_dir,
        tmp_path / "one",
        "--max_train_steps",
        "4",
        *LAUNCHED,
        "--gradient_accumulation_steps",
        "2",
    )
    assert how_steps_were_taken(tmp_path / "two" / alone.name) == "replayed"
    assert digest(tmp_path / "two" / alone.name) == digest(alone)


@pytest.mark.trains
def test_step_that_is_not_finite_is_held_back(
    taped, launched, tiny_base, photos_dir, tmp_path, monkeypatch, capsys
):
    of_batch = step_inputs.of_batch

    def spoiled(batch, *others):
        inputs = of_batch(batch, *others)
        return {**inputs, "target": inputs["target"] * (float("nan") if batch.step == 4 else 1)}

    monkeypatch.setattr(step_inputs, "of_batch", spoiled)
    with pytest.raises(SystemExit):
        run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "6")
    assert "the loss of step 5 is not finite" in capsys.readouterr().err
    assert same_tensors(adapter_after(tmp_path, 4), adapter_after(launched, 4))
    assert how_steps_were_taken(tmp_path / "any") == "replayed"


# Functions that a graph gets wrong, in the place of `denoising_losses`.


def reads_a_number(losses: torch.Tensor) -> torch.Tensor:
    return losses * (1.0 if losses.sum().item() else 0.0)


class Counts:
    """A number that Python computes, and that changes from the second call to the third."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, losses: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return losses * (1.0 if self.calls > 1 else 1.5)


@pytest.mark.trains
@pytest.mark.parametrize(
    ("make_wrong", "reason"),
    [
        (lambda: reads_a_number, "RuntimeError: operation not permitted when stream is capturing"),
        (Counts, "replayed and launched kernels do not agree on gradients, loss"),
    ],
)
def test_steps_that_cannot_be_replayed_are_launched_with_one_line(
    taped, tiny_base, photos_dir, launched, tmp_path, monkeypatch, capsys, make_wrong, reason
):
    losses, wrong = train.denoising_losses, make_wrong()
    monkeypatch.setattr(train, "denoising_losses", lambda *args: wrong(losses(*args)))
    adapter = run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "6")
    said = capsys.readouterr()
    assert (said.out + said.err).count("launched kernel by kernel") == 1
    assert how_steps_were_taken(adapter).startswith(f"launched: {reason}")
    if make_wrong is not Counts:
        assert same_tensors(adapter, launched / adapter.name)


@pytest.mark.trains
def test_steps_run_with_the_deterministic_kernels_of_a_gpu(
    taped, tiny_base, photos_dir, launched, tmp_path, monkeypatch
):
    """No operator of a step lacks such a kernel on this CPU, and gradients are taken within the block."""
    deterministic, gradients = environment.deterministic, Trainables.gradients

    def checked(self: Trainables, loss: torch.Tensor) -> torch.Tensor:
        assert torch.are_deterministic_algorithms_enabled()
        return gradients(self, loss)

    monkeypatch.setattr(environment, "deterministic", lambda device: deterministic(torch.device("cuda")))
    monkeypatch.setattr(Trainables, "gradients", checked)
    adapter = run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "6")
    assert how_steps_were_taken(adapter) == "replayed"
    assert same_tensors(adapter, launched / adapter.name)


@pytest.mark.trains
def test_a_run_of_one_step_says_that_it_was_launched(taped, tiny_base, photos_dir, tmp_path):
    adapter = run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1")
    assert how_steps_were_taken(adapter) == "launched: there was no second step of a shape"
