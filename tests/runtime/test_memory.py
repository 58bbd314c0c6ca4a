"""Readings of time and memory, and activations that --offload moves off the GPU."""

import json
import re
import time
from pathlib import Path

import psutil
import pytest
import torch

from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import memory
from tests.running import run_train, train_words

LOADING = ["imports", "checks", "prompts encoded", "photos encoded", "UNet loaded", "adapters injected"]


def records(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "memory" in record]


@pytest.mark.trains
def test_every_phase_is_recorded_and_the_most_is_said(tiny_base, photos_dir, tmp_path, capsys):
    run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "3")
    found = records(tmp_path)
    phases = [*((0, phase) for phase in LOADING), (1, "first step"), (3, "training")]
    assert [(record["step"], record["memory"]["phase"]) for record in found] == phases
    for record in found:
        assert 0.1 < record["memory"]["resident_gib"] <= record["memory"]["peak_resident_gib"] < 100
        assert not any(name.startswith(("device", "peak_device")) for name in record["memory"])
    seconds = [record["memory"]["seconds"] for record in found]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    peak = max(record["memory"]["peak_resident_gib"] for record in found)
    assert f"memory: {peak:.1f} GiB at most in main memory" in capsys.readouterr().out


@pytest.mark.trains
def test_a_resumed_run_records_its_own_phases(tiny_base, photos_dir, tmp_path):
    words = ["--checkpointing_steps", "2"]
    run_train(tiny_base, photos_dir, tmp_path, *words, "--max_train_steps", "2")
    run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        *words,
        "--max_train_steps",
        "4",
        "--resume_from_checkpoint",
        "latest",
    )
    assert [(record["step"], record["memory"]["phase"]) for record in records(tmp_path)] == [
        *[*((0, phase) for phase in LOADING), (1, "first step"), (2, "training")],
        *[*((2, phase) for phase in LOADING), (3, "first step"), (4, "training")],
    ]


@pytest.mark.trains
def test_models_that_stay_and_class_images_are_phases_of_their_own(tiny_base, photos_dir, tmp_path):
    words = "--train_text_encoder --cache_latents off --max_train_steps 1 --with_prior_preservation"
    prior = "--class_prompt dog --num_class_images 1 --class_inference_steps 1 --class_data_dir"
    run_train(
        tiny_base, photos_dir, tmp_path / "out", *words.split(), *prior.split(), str(tmp_path / "class")
    )
    assert [record["memory"]["phase"] for record in records(tmp_path / "out")] == [
        *("imports", "checks", "class images", "text encoders loaded", "VAE loaded", "UNet loaded"),
        *("adapters injected", "first step", "training"),
    ]


def test_seconds_count_from_the_start_of_the_process():
    started = psutil.Process().create_time()
    before = time.time() - started
    seconds = memory.reading(torch.device("cpu"))["seconds"]
    assert before - 1 <= seconds <= time.time() - started + 1


def test_a_gpu_is_read_phase_by_phase(monkeypatch):
    """Peaks count from the last reading."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    sizes = {"memory_allocated": 1, "max_memory_allocated": 3, "max_memory_reserved": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size * 2**30)
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    device = torch.device("cuda")
    found = memory.reading(device)
    assert (found["device_gib"], found["peak_device_gib"], found["peak_reserved_device_gib"]) == (1, 3, 4)
    assert reset == [device]
    said = memory.summary(
        {
            "loaded": found | {"peak_resident_gib": 2.0},
            "training": {"peak_device_gib": 5.25, "peak_resident_gib": 2.5},
        }
    )
    assert (
        said
        == "memory: 5.2 GiB at most on the device (loaded 3.0, training 5.2), 2.5 GiB at most in main memory"
    )


def test_a_gpu_that_is_not_in_use_yet_is_not_asked():
    assert not any("device" in name for name in memory.reading(torch.device("cuda")))


def test_the_peak_is_known_where_there_is_no_proc(monkeypatch, tmp_path):
    whole = memory.reading(torch.device("cpu"))
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / "missing")
    found = memory.reading(torch.device("cpu"))
    assert list(found) == ["seconds", "peak_resident_gib"]
    assert found["seconds"] <= whole["seconds"] + 1  # since the import of the module
    assert found["peak_resident_gib"] == pytest.approx(whole["peak_resident_gib"], rel=0.1)


def test_offloaded_tensors_are_copies_with_their_strides_and_weights_stay():
    layer = torch.nn.Conv2d(4, 4, 3).requires_grad_(False)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with memory.offloaded(layer):
        out = layer(x.sin()).sigmoid()
    product = out.grad_fn.next_functions[0][0]
    assert product._saved_weight.data_ptr() == layer.weight.data_ptr()
    assert out.grad_fn._saved_result.data_ptr() != out.data_ptr()
    assert torch.equal(out.grad_fn._saved_result, out)
    assert product._saved_input.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.trains
@pytest.mark.parametrize("words", ["--gradient_checkpointing", "--mixed_precision bf16", "--use_dora"])
def test_an_offloaded_run_gives_the_same_bytes(words, tiny_base, photos_dir, tmp_path, monkeypatch):
    """On a CPU this shows the bytes only: activations are copied within the same memory."""
    monkeypatch.setattr(memory, "check_offload", lambda offload, device: None)
    whole = run_train(tiny_base, photos_dir, tmp_path / "whole", "--max_train_steps", "2", *words.split())
    moved = run_train(
        tiny_base, photos_dir, tmp_path / "moved", "--max_train_steps", "2", "--offload", *words.split()
    )
    assert moved.read_bytes() == whole.read_bytes()


def test_offload_without_a_gpu_is_refused_before_a_model_is_loaded(
    tiny_base, photos_dir, tmp_path, no_models
):
    from dreambooth.io.errors import UserError
    from train_dreambooth_lora import main

    with pytest.raises(UserError, match=re.escape("--offload needs a GPU")):
        main(
            parse(
                TrainOptions,
                "",
                train_words(tiny_base, photos_dir, tmp_path, "--offload", "--max_train_steps", "1"),
            )
        )
    assert not list(tmp_path.iterdir())
