"""train_dreambooth_lora.py, end to end, on tiny pipelines."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import infer
import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import TrainOptions
from dreambooth.training import objectives
from tests import tiny
from tests.running import (
    adapter_after,
    digest,
    main_on_two_processes,
    meter_records,
    metrics,
    prior_words,
    run_train,
    train_words,
)
from tests.scripts.conftest import classes_of
from tests.scripts.drawing import fill_copy

# --- training


@pytest.mark.trains
def test_a_run_leaves_adapter_checkpoints_metrics_options_and_pictures(trained):
    names = {path.name for path in trained.iterdir()}
    assert {
        "pytorch_lora_weights.safetensors",
        "metrics.jsonl",
        "run.yaml",
        "validation",
    } <= names
    assert {name for name in names if "checkpoint" in name} == {
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    }
    assert [record["step"] for record in metrics(trained)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_instance", "loss_prior", "lr", "images_per_second"} <= metrics(trained)[0].keys()
    assert {path.name for path in (trained / "validation").iterdir()} == {
        *("step-000000-00.png", "step-000003-00.png", "image_0.png"),
        *("weight-0.50.png", "weight-0.75.png", "weight-1.25.png"),
    }
    assert len(list((classes_of(trained)).glob("class-*.png"))) == 3


@pytest.mark.trains
def test_loss_is_instance_plus_weighted_prior(trained):
    for record in metrics(trained):
        assert record["loss"] == pytest.approx(record["loss_instance"] + record["loss_prior"], rel=1e-5)


@pytest.mark.trains
def test_training_moves_both_adapters(trained):
    state = load_file(trained / native.ADAPTER_NAME)
    for component in ("unet.", "text_encoder."):
        moved = [
            tensor.abs().max()
            for key, tensor in state.items()
            if key.startswith(component) and "lora_B" in key
        ]
        assert moved
        assert all(value > 0 for value in moved)


@pytest.mark.trains
def test_plain_diffusers_draws_what_infer_draws(trained, tiny_base, tmp_path):
    """The adapter file loads with `load_lora_weights`, and the picture is the same but for rounding: on a CPU
    infer.py computes by oneDNN."""
    from diffusers import StableDiffusionPipeline

    path = fill_copy(trained, tmp_path)
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --adapter {path} --output_dir "
        f"{tmp_path / 'out'} --num_inference_steps 3"
    )
    infer.main(parse(InferOptions, "", [*words.split(), "--prompt", "a photo of sks dog", "--seeds", "5"]))
    ours = np.asarray(Image.open(tmp_path / "out" / "00000_5.png"))

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    draw = {"num_inference_steps": 3, "generator": [torch.Generator().manual_seed(5)]}
    without = np.asarray(pipeline(["a photo of sks dog"], **draw).images[0])
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    draw["generator"] = [torch.Generator().manual_seed(5)]
    plain = np.asarray(pipeline(["a photo of sks dog"], **draw).images[0])
    assert np.abs(ours.astype(int) - plain).max() <= 1
    assert np.abs(ours.astype(int) - without).max() > 10


@pytest.mark.trains
def test_zero_learning_rate_leaves_the_base_as_it_was(tiny_base, photos_dir, tmp_path):
    """Step 0 of every run is the base itself: with no update the adapted picture is the base's, bit for
    bit."""
    adapter = run_train(
        tiny_base,
        photos_dir,
        tmp_path / "run",
        "--max_train_steps",
        "1",
        "--learning_rate",
        "0",
        "--train_text_encoder",
    )
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --adapter {adapter} --compare --output_dir "
        f"{tmp_path / 'out'} --num_inference_steps 2"
    )
    infer.main(parse(InferOptions, "", [*words.split(), "--prompt", "a dog"]))
    records = json.loads((tmp_path / "out" / "images.json").read_text())
    base, adapted = (np.asarray(Image.open(tmp_path / "out" / record["file"])) for record in records)
    assert np.array_equal(base, adapted)


@pytest.mark.trains
@pytest.mark.parametrize("photo_size", [(64, 64), (90, 64)], ids=["fixed crop", "random crop"])
def test_resumed_run_equals_uninterrupted_run(tiny_base, tmp_path, photo_size):
    """6 steps, and 4 (checkpoint at 3) resumed to 6: the same bytes; with dropout, accumulation, prior
    preservation, text encoder."""
    photos = tiny.make_photos(tmp_path / "photos", 5, photo_size)
    words = [
        *prior_words(tmp_path / "class"),
        *["--train_text_encoder", "--lora_dropout", "0.2", "--gradient_accumulation_steps", "2"],
    ]
    words += ["--checkpointing_steps", "3", "--lr_scheduler", "linear"]
    whole = run_train(tiny_base, photos, tmp_path / "whole", *words, "--max_train_steps", "6")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-6", native.ADAPTER_NAME):  # as if the run had died after step 4
        path = tmp_path / "cut" / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    resumed = run_train(
        tiny_base,
        photos,
        tmp_path / "cut",
        *words,
        "--max_train_steps",
        "6",
        "--resume_from_checkpoint",
        "latest",
    )
    assert digest(resumed) == digest(whole)
    other = run_train(
        tiny_base,
        photos,
        tmp_path / "other",
        *words,
        "--max_train_steps",
        "6",
        "--seed",
        "2",
        "--class_seed",
        "1",
    )
    assert digest(other) != digest(whole)
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


@pytest.mark.trains
def test_loader_workers_change_nothing(tiny_base, tmp_path):
    photos = tiny.make_photos(tmp_path / "photos", 3, (90, 64))
    words = ["--max_train_steps", "2", "--cache_latents", "off"]
    digests = {
        digest(run_train(tiny_base, photos, tmp_path / workers, *words, "--dataloader_num_workers", workers))
        for workers in ("0", "2")
    }
    assert len(digests) == 1


@pytest.mark.trains
def test_gradient_checkpointing_changes_nothing(tiny_base, photos_dir, tmp_path):
    words = ["--max_train_steps", "2", "--train_text_encoder"]
    plain = run_train(tiny_base, photos_dir, tmp_path / "a", *words)
    checkpointed = run_train(tiny_base, photos_dir, tmp_path / "b", *words, "--gradient_checkpointing")
    assert digest(plain) == digest(checkpointed)


@pytest.mark.trains
def test_two_processes_give_the_adapter_of_one(tiny_base, photos_dir, tmp_path):
    """Two processes x 1 equals one process x 2 accumulated, bit for bit, class images and measurements
    included."""
    common = ["--train_text_encoder", "--lora_dropout", "0.1", "--max_train_steps", "3"]
    common += ["--num_threads", "1", "--holdout", "1", "--meter_steps", "2"]
    words = [*prior_words(tmp_path / "class-1"), *common]
    one = run_train(tiny_base, photos_dir, tmp_path / "one", *words, "--gradient_accumulation_steps", "2")
    words = [*prior_words(tmp_path / "class-2"), *common]
    options = parse(TrainOptions, "", train_words(tiny_base, photos_dir, tmp_path / "two", *words))
    main_on_two_processes(train.main, options)
    pictures = [
        [digest(tmp_path / folder / f"class-00000{k}.png") for k in range(3)]
        for folder in ("class-1", "class-2")
    ]
    assert pictures[0] == pictures[1]
    assert digest(one) == digest(tmp_path / "two" / native.ADAPTER_NAME)
    assert len(metrics(tmp_path / "two")) == 3  # one process writes
    assert len(meter_records(tmp_path / "two")) == 3
    assert meter_records(tmp_path / "two") == meter_records(tmp_path / "one")


@pytest.mark.trains
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapter_is_float32_whatever_the_base(tiny_v_base, photos_dir, tmp_path, precision):
    """And v-prediction trains."""
    words = ["--max_train_steps", "2", "--train_text_encoder", "--mixed_precision", precision]
    state = load_file(run_train(tiny_v_base, photos_dir, tmp_path, *words))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_target_follows_the_prediction_type():
    from diffusers import DDPMScheduler

    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        task = objectives.make_task(scheduler, latents, noise, timesteps)
        signal, spread = (
            share.sqrt().view(-1, 1, 1, 1)
            for share in (scheduler.alphas_cumprod[timesteps], 1 - scheduler.alphas_cumprod[timesteps])
        )
        assert torch.allclose(task.model_input, signal * latents + spread * noise, atol=1e-6)
        expected = noise if prediction_type == "epsilon" else signal * noise - spread * latents
        assert torch.allclose(task.target, expected, atol=1e-6)


def test_instance_and_class_are_averaged_separately():
    losses = torch.tensor([1.0, 3.0, 10.0, 30.0])
    loss, pieces = train.dreambooth_loss(losses, sources=2, prior_loss_weight=0.5)
    assert loss == 2 + 0.5 * 20
    assert (pieces["loss_instance"], pieces["loss_prior"]) == (2, 20)
    assert train.dreambooth_loss(losses, sources=1, prior_loss_weight=9)[0] == 11


@pytest.mark.trains
def test_prior_weight_zero_equals_no_prior(tiny_base, photos_dir, tmp_path):
    alone = run_train(
        tiny_base, photos_dir, tmp_path / "alone", "--max_train_steps", "2", "--num_threads", "1"
    )
    words = prior_words(tmp_path / "class", "--prior_loss_weight", "0")
    weighted = run_train(
        tiny_base, photos_dir, tmp_path / "zero", "--max_train_steps", "2", "--num_threads", "1", *words
    )
    first, second = load_file(alone), load_file(weighted)
    differences = torch.cat([(first[key] - second[key]).abs().flatten() for key in first])
    # another batch has other last bits, and Adam makes whole steps of those where a gradient is next to
    # nothing
    assert (differences < 1e-6).float().mean() > 0.99


@pytest.mark.trains
def test_frozen_text_encoder_is_freed_and_embeddings_flags_change_nothing(
    tiny_base, photos_dir, plain_run, tmp_path
):
    watched = [
        "--validation_prompt",
        "a dog",
        "--num_validation_images",
        "1",
    ]  # drawn without the text encoder
    steps = ["--max_train_steps", "2"]
    computed = run_train(
        tiny_base, photos_dir, tmp_path / "a", *steps, *watched, "--pre_compute_text_embeddings"
    )
    assert (tmp_path / "a" / "validation" / "image_0.png").is_file()
    plain = adapter_after(plain_run, 2)
    assert digest(plain) == digest(computed)
    masked = run_train(
        tiny_base, photos_dir, tmp_path / "c", "--max_train_steps", "2", "--text_encoder_use_attention_mask"
    )
    assert digest(plain) != digest(masked)


@pytest.mark.trains
def test_validation_does_not_shift_training(tiny_base, photos_dir, tmp_path):
    words = ["--max_train_steps", "3", "--lora_dropout", "0.3", "--train_text_encoder"]
    plain = run_train(tiny_base, photos_dir, tmp_path / "a", *words)
    watched = run_train(
        tiny_base,
        photos_dir,
        tmp_path / "b",
        *words,
        "--validation_prompt",
        "a dog",
        "--num_validation_images",
        "1",
        "--validation_epochs",
        "1",
    )
    assert digest(plain) == digest(watched)


@pytest.mark.trains
def test_run_yaml_repeats_the_run(tiny_base, photos_dir, tmp_path):
    """Without --seed one is drawn and stored; the stored options give the same adapter."""
    words = train_words(tiny_base, photos_dir, tmp_path / "a", "--max_train_steps", "2")
    at = words.index("--seed")
    del words[at : at + 2]
    train.main(parse(TrainOptions, "", words))
    train.main(
        parse(
            TrainOptions,
            "",
            ["--config", str(tmp_path / "a" / "run.yaml"), "--output_dir", str(tmp_path / "b")],
        )
    )
    assert digest(tmp_path / "a" / native.ADAPTER_NAME) == digest(tmp_path / "b" / native.ADAPTER_NAME)


@pytest.mark.trains
def test_scale_lr_and_schedule_set_the_rate_of_each_step(tiny_base, photos_dir, tmp_path):
    words = (
        "--max_train_steps 4 --learning_rate 0.001 --scale_lr --gradient_accumulation_steps 2 "
        "--lr_scheduler linear --lr_warmup_steps 2"
    )
    run_train(tiny_base, photos_dir, tmp_path, *words.split())
    assert [record["lr"] for record in metrics(tmp_path)] == pytest.approx([0, 0.001, 0.002, 0.001])


@pytest.mark.trains
def test_epochs_become_steps(tiny_base, photos_dir, tmp_path):
    run_train(tiny_base, photos_dir, tmp_path, "--num_train_epochs", "2")
    assert len(metrics(tmp_path)) == 6  # three photos, batch 1, two passes


@pytest.mark.trains
def test_total_limit_keeps_the_newest(tiny_base, photos_dir, tmp_path):
    run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        *["--max_train_steps=6", "--checkpointing_steps=2", "--checkpoints_total_limit=2"],
    )
    assert {name for name in os.listdir(tmp_path) if "checkpoint" in name} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.trains
def test_resume_past_the_end_trains_nothing_and_says_so(trained, tiny_base, photos_dir, tmp_path, capsys):
    words = prior_words(classes_of(trained), "--train_text_encoder", "--max_train_steps", "6")
    run_train(
        tiny_base, photos_dir, tmp_path, *words, "--resume_from_checkpoint", str(trained / "checkpoint-6")
    )
    assert "nothing is left to train" in capsys.readouterr().out
    assert digest(tmp_path / native.ADAPTER_NAME) == digest(trained / native.ADAPTER_NAME)


@pytest.mark.trains
def test_resuming_with_another_batch_or_seed_is_refused(trained, tiny_base, photos_dir, tmp_path):
    words = prior_words(
        classes_of(trained),
        "--train_text_encoder",
        "--resume_from_checkpoint",
        str(trained / "checkpoint-2"),
    )
    for more, found in (
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps"),
        (["--train_batch_size", "2"], "train_batch_size"),
    ):
        with pytest.raises(UserError, match=found):
            run_train(tiny_base, photos_dir, tmp_path, *words, *more)
    with pytest.raises(UserError, match="seed"):
        run_train(tiny_base, photos_dir, tmp_path, *words, "--seed", "2", "--class_seed", "1")


@pytest.mark.trains
def test_resuming_in_another_precision_or_past_the_end_is_refused(trained, tiny_base, photos_dir, tmp_path):
    """Either would quietly give another adapter under the same name."""
    words = prior_words(
        classes_of(trained),
        "--train_text_encoder",
        "--resume_from_checkpoint",
        str(trained / "checkpoint-4"),
    )
    with pytest.raises(UserError, match="mixed_precision"):
        run_train(tiny_base, photos_dir, tmp_path, *words, "--mixed_precision", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="past step 2"):
        run_train(tiny_base, photos_dir, tmp_path, *words, "--max_train_steps", "2")


@pytest.mark.trains
def test_class_images_of_another_run_serve_whatever_its_seed(trained, tiny_base, photos_dir, tmp_path):
    """Without --class_seed the pictures that are there are taken as they are."""
    before = {path.name: digest(path) for path in (classes_of(trained)).glob("*.png")}
    run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        *prior_words(classes_of(trained)),
        "--max_train_steps",
        "1",
        "--seed",
        "77",
    )
    assert {path.name: digest(path) for path in (classes_of(trained)).glob("*.png")} == before
    with pytest.raises(UserError, match="seed is 1 there and 5 now"):
        run_train(
            tiny_base,
            photos_dir,
            tmp_path / "other",
            *prior_words(classes_of(trained)),
            "--class_seed",
            "5",
        )


@pytest.mark.trains
def test_gradients_that_are_not_finite_stop_the_run(tiny_base, photos_dir, tmp_path, monkeypatch, capsys):
    real = train.Training.gather_gradients

    def poisoned(self, total, gradients):
        real(self, total, gradients)
        total[0] = float("inf")

    monkeypatch.setattr(train.Training, "gather_gradients", poisoned)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "2")
    assert stop.value.code == 1
    assert "gradients of step 1 are not finite" in capsys.readouterr().err
    assert not (tmp_path / native.ADAPTER_NAME).exists()


@pytest.mark.trains
def test_adapters_in_the_reference_scripts_spelling_are_read(trained, tiny_base, tmp_path):
    from safetensors.torch import save_file

    ours = fill_copy(trained, tmp_path)
    renamed = {}
    for key, tensor in load_file(ours).items():
        down, up = (
            (".lora.down.", ".lora.up.")
            if key.startswith("unet.")
            else (".lora_linear_layer.down.", ".lora_linear_layer.up.")
        )
        renamed[key.replace(".lora_A.", down).replace(".lora_B.", up)] = tensor
    theirs = tmp_path / "theirs.safetensors"
    save_file(renamed, theirs, {"format": "pt"})
    pictures = []
    for path in (ours, theirs):
        words = (
            f"--pretrained_model_name_or_path {tiny_base} --adapter {path} --num_inference_steps 2 "
            f"--output_dir {tmp_path / path.stem}"
        )
        infer.main(parse(InferOptions, "", [*words.split(), "--prompt", "a dog"]))
        pictures.append(np.asarray(Image.open(tmp_path / path.stem / "00000_0.png")))
    assert np.array_equal(pictures[0], pictures[1])


def test_an_output_folder_that_cannot_be_made_is_refused_before_models_load(
    tiny_base, photos_dir, tmp_path, no_models
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        run_train(tiny_base, photos_dir, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="--output_dir"):
        infer.main(
            parse(
                InferOptions,
                "",
                (
                    f"--pretrained_model_name_or_path {tiny_base} --prompt dog --output_dir "
                    f"{tmp_path / 'file'}"
                ).split(),
            )
        )


def test_processes_that_cannot_see_each_other_are_refused(tiny_base, photos_dir, tmp_path, monkeypatch):
    """Each would do the whole work, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes and accelerate joined 1"):
        run_train(tiny_base, photos_dir, tmp_path)


@pytest.mark.trains
def test_loss_that_is_not_finite_stops_the_run(
    tiny_base, photos_dir, plain_run, tmp_path, monkeypatch, capsys
):
    """No step is taken with it, the step before it is saved, the picture is named, and the exit status is
    1."""
    real = train.denoising_losses
    calls = []

    def poisoned(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "denoising_losses", poisoned)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "5", "--checkpointing_steps", "5")
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "the loss of step 3 is not finite (nan)" in said
    assert "photo-" in said
    assert {name for name in os.listdir(tmp_path) if "checkpoint" in name} == {"checkpoint-2"}
    monkeypatch.undo()
    resumed = run_train(
        tiny_base, photos_dir, tmp_path, "--max_train_steps", "5", "--resume_from_checkpoint", "latest"
    )
    assert digest(resumed) == digest(adapter_after(plain_run, 5))


@pytest.mark.trains
def test_what_is_trained_is_printed(tiny_base, photos_dir, tmp_path, capsys):
    run_train(
        tiny_base, photos_dir, tmp_path, "--max_train_steps", "1", "--train_text_encoder", "--rank", "2"
    )
    printed = capsys.readouterr().out
    state = load_file(tmp_path / native.ADAPTER_NAME)
    for component in ("unet", "text_encoder"):
        tensors = [tensor for key, tensor in state.items() if key.startswith(component + ".")]
        row = next(line for line in printed.splitlines() if line.startswith(component + " "))
        assert f"{len(tensors) // 2:,}" in row
        assert f"{sum(tensor.numel() for tensor in tensors):,}" in row


@pytest.mark.trains
def test_tensorboard_gets_scalars(tiny_base, photos_dir, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an optional extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "2", "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / "dreambooth-lora"))
    events.Reload()
    assert {"loss", "lr"} <= set(events.Tags()["scalars"])
