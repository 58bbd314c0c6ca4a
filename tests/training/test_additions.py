"""Small additions to the training: Huber loss, timestep range and bias, debiased weights, input perturbation
and LoRA+."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from dreambooth.data import sampling_order
from dreambooth.data.batches import PhotoRows, Source
from dreambooth.data.crops import Crops
from dreambooth.options.command_line import as_table, parse
from dreambooth.options.objective import NoiseLevelOptions
from dreambooth.options.training import TrainOptions
from dreambooth.training import objectives, run_identity
from tests.running import digest, metrics, run_train, train_words

ROWS = range(2000)


def timesteps(**levels: float) -> list[int]:
    dataset = PhotoRows([Source("instance", [], [])], 3, Crops(8, "lanczos", True))
    return dataset.timesteps(ROWS, 1000, NoiseLevelOptions(**levels)).tolist()  # type: ignore[arg-type]


def test_without_the_flags_timesteps_are_those_of_earlier_versions():
    assert timesteps() == sampling_order.timesteps_of_rows(3, "instance-timestep", ROWS, 1000).tolist()


def test_timesteps_lie_in_their_range():
    drawn = timesteps(min_timestep=200, max_timestep=300)
    assert (min(drawn), max(drawn)) == (200, 299)
    assert timesteps(min_timestep=999) == [999] * len(ROWS)


@pytest.mark.parametrize(("bias", "shares"), [(1, (1, 3)), (-1, (3, 1)), (3, (1, 15))])
def test_a_bias_trains_one_end_more_often(bias, shares):
    """The share of the lower half is 1/4 where the density rises from 0 in proportion, 1/16 for its cube."""
    halves = Counter(timestep // 500 for timestep in timesteps(timestep_bias=bias))
    lower, upper = shares
    assert halves[0] / len(ROWS) == pytest.approx(lower / (lower + upper), abs=0.03)


def test_small_errors_are_squared_and_large_ones_grow_in_proportion():
    pred, target = torch.tensor([[0.01, 10.0, -10.0]]), torch.zeros(1, 3)
    assert objectives.errors(pred, target, None).tolist() == [[pytest.approx(1e-4), 100.0, 100.0]]
    small, large, other = objectives.errors(pred, target, 0.1)[0].tolist()
    assert small == pytest.approx(1e-4, rel=0.01)
    assert large == other == pytest.approx(2 * 0.1 * 10, rel=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_debiased_weights_are_those_of_the_noise_s_error(prediction_type):
    """An error of the velocity is one of the noise times the root of SNR + 1: both have the same weight."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    steps = torch.tensor([0, 300, 600, 999])
    weights = objectives.debiased_weights(scheduler, steps)
    alphas = scheduler.alphas_cumprod[steps]
    snr = (alphas / (1 - alphas)).clamp(max=1000)
    of_noise = snr.rsqrt().clamp(max=1000**0.5)
    of_velocity = snr.rsqrt() * snr / (snr + 1)
    assert torch.allclose(weights, of_noise if prediction_type == "epsilon" else of_velocity)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EulerDiscreteScheduler()])
def test_a_perturbation_is_in_the_input_alone(scheduler):
    generator = torch.Generator().manual_seed(0)
    latents, noise, further = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    steps = torch.tensor([100, 700])
    plain = objectives.make_task(scheduler, latents, noise, steps)
    perturbed = objectives.make_task(scheduler, latents, noise, steps, perturbation=0.1 * further)
    other = objectives.make_task(scheduler, latents, noise + 0.1 * further, steps)
    assert torch.equal(perturbed.target, plain.target)
    assert torch.equal(perturbed.noisy_latents, other.noisy_latents)
    assert not torch.equal(perturbed.noisy_latents, plain.noisy_latents)


@pytest.mark.trains
def test_a_run_with_all_additions_is_resumed_exactly(tiny_base, photos_dir, tmp_path):
    flags = (
        "--max_train_steps 4 --checkpointing_steps 2 --huber_c 0.1 --debiased_estimation --timestep_bias 1",
        "--min_timestep 100 --input_perturbation 0.1 --lora_plus_ratio 4 --train_text_encoder",
        "--lr_pattern mid_block=1e-3 --learning_rate 1e-4",
    )
    words = " ".join(flags).split()
    adapter = run_train(tiny_base, photos_dir, tmp_path / "one", *words)
    rates = {name: rate for name, rate in metrics(adapter.parent)[-1].items() if name.startswith("lr")}
    assert rates == {
        "lr": 1e-4,
        "lr_unet:lora_B": pytest.approx(4e-4),
        "lr_unet:0.001": 1e-3,
        "lr_unet:0.001:lora_B": 4e-3,
        "lr_text_encoder": 1e-4,
        "lr_text_encoder:lora_B": pytest.approx(4e-4),
    }
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run_train(
        tiny_base, photos_dir, tmp_path / "resumed", *words, "--resume_from_checkpoint", "latest"
    )
    assert digest(resumed) == digest(adapter)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--min_timestep 300 --max_timestep 300",
            "must be under --max_timestep, got 300 and 300",
        ),
        ("--debiased_estimation --snr_gamma 5", "both weight noise levels: give one of them"),
        (
            "--debiased_estimation --do_edm_style_training",
            "--debiased_estimation: debiased weighting is not supported",
        ),
        ("--lora_plus_ratio 4 --adapter lokr", "--lora_plus_ratio is for the two factors of --adapter lora"),
        ("--huber_c 0", "--huber_c must be over 0, got 0.0"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainOptions, "", train_words(Path("b"), Path("p"), Path("o"), *words.split()))
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_without_the_flags_is_the_run_of_an_older_version():
    flags = as_table(parse(TrainOptions, "", train_words(Path("b"), Path("p"), Path("o"))))
    record = run_identity.identity(
        flags, slots=1, base="", pictures={}, captions={}, max_steps=1, text_steps=1, start=None
    )
    new = {"huber_c", "min_timestep", "max_timestep", "timestep_bias", "debiased_estimation"}
    assert not record["flags"].keys() & {*new, "input_perturbation", "lora_plus_ratio", "subjects"}
