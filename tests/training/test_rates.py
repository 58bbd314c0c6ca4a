"""A run whose learning rates leave its adapter next to untrained says so before it trains."""

from typing import Any

import pytest

from dreambooth.options.command_line import parse
from dreambooth.options.resolved import ResolvedTrainOptions, resolve
from dreambooth.options.training import TrainOptions
from dreambooth.training import rates
from tests.running import run_train

WARM = ["--lr_scheduler", "constant_with_warmup"]


def options_of(*words: str) -> ResolvedTrainOptions:
    needed = ["--pretrained_model_name_or_path", "b", "--instance_data_dir", "p", "--instance_prompt", "x"]
    return resolve(parse(TrainOptions, "", [*needed, *words]), "sd", seed=0, mixed_precision="no")


def notes_of(*words: str, steps: int = 100, scale: int = 1) -> list[str]:
    options = options_of(*words)
    text = ("text_encoder",) if options.text.train_text_encoder else ()
    return rates.notes(options, ("unet", *text), steps, scale)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (WARM, ["--lr_warmup_steps 500", "100 steps", "9.9e-05", "19.80%", "0.0005"]),
        (["--lr_scheduler", "linear"], ["--lr_warmup_steps 500", "19.80%"]),
        (["--lr_scheduler", "cosine", "--lr_warmup_steps", "100"], []),
        ([*WARM, "--lr_warmup_steps", "10000", "--learning_rate", "1"], ["0.0099", "0.99%"]),
        (["--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", "200"], ["49.50%"]),
        (["--lr_scheduler", "polynomial", "--lr_warmup_steps", "0", "--lr_power", "200"], ["on average"]),
        (["--learning_rate", "1e-12"], ["1e-12 adds up to 1e-10 over 100 steps"]),
    ],
    ids=str,
)
def test_a_schedule_that_leaves_little_is_noted_with_numbers(words: list[str], numbers: list[str]):
    lines = notes_of(*words)
    assert len(lines) == bool(numbers)
    assert all(number in lines[0] for number in numbers)


@pytest.mark.parametrize(
    "words",
    [
        [],
        [*WARM, "--lr_warmup_steps", "0"],
        [*WARM, "--lr_warmup_steps", "50"],
        ["--lr_scheduler", "linear", "--lr_warmup_steps", "10"],
        ["--learning_rate", "1e-6"],
        ["--lr_warmup_steps", "5000"],
    ],
    ids=str,
)
def test_a_usual_schedule_is_not_noted(words: list[str]):
    assert notes_of(*words) == []


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--learning_rate", "0"], ["--learning_rate is 0: the adapter of unet"]),
        (
            ["--learning_rate", "0", "--train_text_encoder"],
            [
                "--learning_rate is 0: the adapter of unet",
                "--text_encoder_lr is 0: the adapter of text_encoder",
            ],
        ),
        (
            ["--text_encoder_lr", "0", "--train_text_encoder"],
            ["--text_encoder_lr is 0: the adapter of text_encoder"],
        ),
        (["--lr_pattern", "mid_block=0"], ["--lr_pattern: the learning rate of mid_block is 0"]),
        (["--learning_rate", "0", "--lr_pattern", "mid_block=1e-3"], ["but for the parts of --lr_pattern"]),
        (["--learning_rate", "0", *WARM], ["--learning_rate is 0"]),
    ],
    ids=str,
)
def test_a_rate_of_zero_is_noted(words: list[str], flags: list[str]):
    lines = notes_of(*words)
    assert len(lines) == len(flags)
    assert all(flag in line for flag, line in zip(flags, lines, strict=True))


def test_a_warm_up_of_one_step_is_a_run_of_one_step_without_training():
    (note,) = notes_of(*WARM, "--lr_warmup_steps", "1", steps=1)
    assert "0.00%" in note


@pytest.mark.trains
def test_the_note_comes_before_training(tiny_base: Any, photos_dir: Any, tmp_path: Any, capsys):
    words = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "500", "--max_train_steps", "1"]
    run_train(tiny_base, photos_dir, tmp_path / "out", *words)
    printed = capsys.readouterr().out
    assert printed.index("note: --lr_warmup_steps 500 is not over") < printed.index("training on")
