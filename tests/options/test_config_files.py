"""Files of flags are read like the command line, and are written so that they give the same options."""

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from dreambooth.options import command_line, training
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from tests.options.reference import (
    CLASS_IMAGES,
    EVALUATE,
    INFER,
    PRIOR,
    TRAIN,
    flat,
    pretend_everything_is_installed,
    refusal,
    resolved,
)

ROOT = Path(__file__).parent.parent.parent


SCRIPTS = (
    "train_dreambooth_lora.py",
    "generate_class_images.py",
    "infer.py",
    "evaluate.py",
    "check_photos.py",
)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def saved(folder: Path, text: str) -> list[str]:
    """The words that read flags from a file with this text."""
    path = folder / "flags.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


# --- files of flags


def test_config_file_stands_for_the_words_in_it(tmp_path):
    text = (
        "pretrained_model_name_or_path: base\ninstance_data_dir: photos\n"
        "instance_prompt: a photo of sks dog\nrank: 8\nmax_grad_norm: 0.5\n"
    )
    found = command_line.parse(TrainOptions, "train", saved(tmp_path, text))
    assert found == command_line.parse(
        TrainOptions, "train", [*TRAIN, "--rank", "8", "--max_grad_norm", "0.5"]
    )


def test_config_can_be_written_with_an_equals_sign(tmp_path):
    _, path = saved(tmp_path, "rank: 8\n")
    assert command_line.parse(TrainOptions, "train", [*TRAIN, f"--config={path}"]).adapter.rank == 8


@pytest.mark.parametrize("config_first", [True, False])
def test_typed_words_win_over_the_file_wherever_it_stands(config_first, tmp_path):
    typed, config = (
        [*TRAIN, "--rank", "2"],
        saved(tmp_path, "rank: 8\nseed: 3\ninstance_prompt: from the file\n"),
    )
    found = command_line.parse(TrainOptions, "train", config + typed if config_first else typed + config)
    assert (found.adapter.rank, found.run.seed, found.instance.instance_prompt) == (
        2,
        3,
        "a photo of sks dog",
    )


def test_of_two_files_the_later_one_wins(tmp_path):
    (tmp_path / "common").mkdir()
    common, own = saved(tmp_path / "common", "rank: 8\nseed: 3\n"), saved(tmp_path, "rank: 2\n")
    found = command_line.parse(TrainOptions, "train", [*TRAIN, *common, *own])
    assert (found.adapter.rank, found.run.seed) == (2, 3)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("center_crop: true\n", [], True),
        ("center_crop: false\n", [], False),
        ("center_crop: yes\n", [], True),
        ("center_crop: true\n", ["--no_center_crop"], False),
        ("center_crop: false\n", ["--center_crop"], True),
    ],
)
def test_booleans_go_both_ways(text, words, expected, tmp_path):
    assert (
        command_line.parse(
            TrainOptions, "train", [*TRAIN, *saved(tmp_path, text), *words]
        ).instance.center_crop
        is expected
    )


def test_lists_become_several_values_and_typed_ones_replace_them(tmp_path):
    config = saved(tmp_path, "prompt: [a red dog, a dog in the snow]\nseeds: [4, 5, 6]\n")
    found = command_line.parse(InferOptions, "infer", [*INFER, *config])
    assert (found.prompt, found.seeds) == (("a red dog", "a dog in the snow"), (4, 5, 6))
    found = command_line.parse(InferOptions, "infer", [*INFER, *config, "--seeds", "9"])
    assert (found.prompt, found.seeds) == (("a red dog", "a dog in the snow"), (9,))


def test_null_leaves_the_default(tmp_path):
    found = command_line.parse(
        TrainOptions, "train", [*TRAIN, *saved(tmp_path, "rank: null\nseed: ~\noutput_dir:\n")]
    )
    assert found == command_line.parse(TrainOptions, "train", TRAIN)


@pytest.mark.parametrize(
    ("text", "expected"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("0.0001", 1e-4), ("2", 2.0), ("1.0e-04", 1e-4)]
)
def test_numbers_in_yaml_are_numbers(text, expected, tmp_path):
    """PyYAML reads 1e-4 as a string."""
    assert (
        command_line.parse(
            TrainOptions, "train", [*TRAIN, *saved(tmp_path, f"learning_rate: {text}\n")]
        ).optimization.learning_rate
        == expected
    )


@pytest.mark.parametrize("name", ["mixed_precision", "prior_generation_precision"])
@pytest.mark.parametrize("text", ["no", "'no'"])
def test_the_choice_no_can_be_written_in_a_file(name, text, tmp_path):
    """PyYAML reads a plain `no` as false."""
    assert (
        flat(command_line.parse(TrainOptions, "train", [*TRAIN, *saved(tmp_path, f"{name}: {text}\n")]))[name]
        == "no"
    )


def test_a_prompt_of_any_letters_can_be_written_in_a_file(tmp_path):
    text = "a 狗 \"named\" 'Sks': #1, 50 % --rank"
    config = saved(tmp_path, f"instance_prompt: {json.dumps(text)}\n")
    assert command_line.parse(TrainOptions, "train", [*TRAIN[:4], *config]).instance.instance_prompt == text


@pytest.mark.parametrize(
    ("key", "near"),
    [("lerning_rate", "learning_rate"), ("train-batch-size", "train_batch_size"), ("Rank", "rank")],
)
def test_an_unknown_key_names_the_nearest_flag_and_the_file(key, near, tmp_path, capsys):
    config = saved(tmp_path, f"rank: 4\n{key}: 1\n")
    message = refusal(TrainOptions, TRAIN + config, capsys)
    assert message == f"error: --config {config[1]}: no flag '{key}'; did you mean '{near}'?"


def test_a_flag_of_another_script_is_unknown(tmp_path, capsys):
    config = saved(tmp_path, "num_inference_steps: 10\n")
    assert f"{config[1]}: no flag 'num_inference_steps'" in refusal(TrainOptions, TRAIN + config, capsys)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("rank: [1\n", "not a YAML file"),
        ("rank: 1\n\tseed: 2\n", "not a YAML file"),
        ("- rank\n- 4\n", "must be a table of `flag: value` lines, got list"),
        ("just words\n", "must be a table of `flag: value` lines, got str"),
        ("", "must be a table of `flag: value` lines"),
        ("rank: {of: 4}\n", "'rank' must be a value or a list, got a table"),
        ("seed: !!python/object/apply:os.getpid []\n", "not a YAML file"),
    ],
)
def test_a_file_that_is_no_table_of_flags_is_refused_by_name(text, fragment, tmp_path, capsys):
    config = saved(tmp_path, text)
    message = refusal(TrainOptions, TRAIN + config, capsys)
    assert message.startswith(f"error: --config {config[1]}: ")
    assert fragment in message


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("nowhere.yaml", "No such file"),
        (".", "Is a directory"),
        ("binary", "not UTF-8 text (byte 6, in line 1: ff fe 00)"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(name, fragment, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"rank: \xff\xfe\x00")
    path = tmp_path / name
    message = refusal(TrainOptions, [*TRAIN, "--config", str(path)], capsys)
    assert f"--config {path}: " in message
    assert fragment in message


@pytest.mark.parametrize(
    ("former", "name"), [("sd15_6gb.yaml", "sd15_4gb.yaml"), ("sdxl_12gb.yaml", "sdxl_8gb.yaml")]
)
def test_the_former_name_of_a_recipe_meets_one_message_with_the_new_one(
    former, name, tmp_path, monkeypatch, capsys
):
    message = refusal(TrainOptions, [*TRAIN, "--config", f"configs/{former}"], capsys)
    assert message == (
        f"error: --config configs/{former}: this recipe has a new name; give --config configs/{name}"
    )
    assert (ROOT / "configs" / name).is_file()
    # a file of the user with that name is read as any other
    monkeypatch.chdir(tmp_path)
    Path(former).write_text("rank: 9")
    assert command_line.parse(TrainOptions, "", [*TRAIN, "--config", former]).adapter.rank == 9


def test_config_without_a_name_is_refused(capsys):
    assert (
        refusal(TrainOptions, [*TRAIN, "--config"], capsys) == "error: --config needs the name of a YAML file"
    )


def test_a_wrong_value_in_a_file_meets_the_same_checks(tmp_path, capsys):
    assert "--rank must be at least 1, got 0" in refusal(
        TrainOptions, TRAIN + saved(tmp_path, "rank: 0\n"), capsys
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (TrainOptions, TRAIN),
        (
            TrainOptions,
            [
                *TRAIN,
                *PRIOR,
                "--rank",
                "8",
                "--center_crop",
                "--adam_epsilon",
                "1e-12",
                "--seed",
                "0",
                "--mixed_precision",
                "no",
            ],
        ),
        (
            TrainOptions,
            [
                *TRAIN,
                "--instance_prompt",
                "no",
                "--class_prompt",
                "1e-4",
                "--output_dir",
                "2026-01-01",
                "--validation_prompt",
                "null",
            ],
        ),
        (
            TrainOptions,
            [
                *TRAIN,
                "--instance_prompt",
                "a 狗 'sks': #1\nof \"two\" lines",
                "--learning_rate",
                "0.00012345678901234567",
            ],
        ),
        (
            ClassImageOptions,
            [
                *CLASS_IMAGES,
                "--seed",
                "12345678901234567890",
                "--resolution",
                "64",
                "--prior_generation_precision",
                "no",
            ],
        ),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "[a, list]", "--seeds", "3", "4", "--adapter", "out", "--compare"],
        ),
        (InferOptions, [*INFER, "--prompts_file", "prompts.txt", "--guidance_scale", "1"]),
        (InferOptions, [*INFER, "--prompt", "a dog", "--negative_prompt=-blurry"]),
        (EvaluateOptions, [*EVALUATE, "--live", "no", "--failed_pictures", "skip", "--tables_only"]),
    ],
    ids=[
        "defaults",
        "many",
        "odd words",
        "letters",
        "class images",
        "lists",
        "empty list",
        "leading minus",
        "evaluation",
    ],
)
def test_saved_options_are_read_back_equal(kind, words, tmp_path):
    """run.yaml of a run is the run."""
    wanted = command_line.parse(kind, "a script", words)
    path = tmp_path / "run.yaml"
    path.write_text(command_line.yaml_text(command_line.as_table(wanted)), encoding="utf-8")
    assert command_line.parse(kind, "a script", ["--config", str(path)]) == wanted


# --- answered at once


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def imported(importtime: str) -> set[str]:
    """Top-level modules in what `python -X importtime` wrote."""
    names = [
        line.rpartition("|")[2].strip() for line in importtime.splitlines() if line.startswith("import time:")
    ]
    return {name.partition(".")[0] for name in names}


SLOW = {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate"}


@pytest.mark.parametrize("module", ["dreambooth.options.training", "dreambooth.io.errors"])
def test_options_pull_in_no_slow_package(module):
    done = python("-c", f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))")
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "dreambooth" in loaded
    assert not loaded & SLOW


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_answered_before_any_slow_import(script):
    done = python("-X", "importtime", script, "--help")
    assert done.returncode == 0
    assert "--pretrained_model_name_or_path" in done.stdout
    assert "--config FILE" in done.stdout
    assert "dreambooth" in imported(done.stderr)
    assert not imported(done.stderr) & SLOW


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_answered_before_any_slow_import(script):
    done = python("-X", "importtime", script, "--rsolution", "64")
    assert done.returncode == 2
    assert "--rsolution" in done.stderr
    assert not imported(done.stderr) & SLOW


def test_a_mistake_in_a_file_is_answered_before_any_slow_import(tmp_path):
    done = python("-X", "importtime", SCRIPTS[0], *TRAIN, *saved(tmp_path, "rank: 0\n"))
    assert done.returncode == 2
    assert "--rank must be at least 1, got 0" in done.stderr
    assert not imported(done.stderr) & SLOW


def test_interpolations_offered_are_the_reference_s():
    choices = typing.get_args(typing.get_type_hints(training.InstanceOptions)["image_interpolation_mode"])
    assert set(choices) == {"nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"}


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["--text_encoder_lr", "1e-5"], "You need not use --text_encoder_lr without --train_text_encoder."),
        (
            ["--train_text_encoder_frac", "0.5"],
            "You need not use --train_text_encoder_frac without --train_text_encoder.",
        ),
        (["--validation_steps", "5"], "You need not use --validation_steps without --validation_prompt."),
        (["--class_seed", "5"], "You need not use --class_seed without --with_prior_preservation."),
        (["--prodigy_beta3", "0.9"], "You need not use --prodigy_beta3 without --optimizer prodigy."),
        (["--cache_dir", "x"], "You need not use --cache_dir without --dataset_name."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_that_says_nothing_without_another_is_remarked_on(words, note):
    assert command_line.parse(TrainOptions, "", [*TRAIN, *words]).notes() == [note]


def test_resolved_options_read_back_give_no_remarks():
    """run.yaml is read again at every resume."""
    for family in ("sd", "sdxl", "if"):
        options = resolved(command_line.parse(TrainOptions, "", TRAIN), family)
        assert resolved(options, family) == options
        assert options.notes() == []


def test_prodigy_has_one_learning_rate(monkeypatch, capsys):
    pretend_everything_is_installed(monkeypatch)
    words = [*TRAIN, "--optimizer", "prodigy", "--train_text_encoder", "--text_encoder_lr", "5e-6"]
    options = command_line.parse(TrainOptions, "", words)
    assert any("not --text_encoder_lr" in note for note in options.notes())
    optimizer = resolved(options, "sdxl").optimization
    assert (optimizer.learning_rate, optimizer.text_encoder_lr) == (1.0, 1.0)
    assert optimizer.rate_and_decay("unet") == (1.0, 1e-4)
    assert optimizer.rate_and_decay("text_encoder_2") == (1.0, 1e-3)
    assert "one step size for all parts" in refusal(
        TrainOptions, [*TRAIN, "--optimizer", "prodigy", "--lr_pattern", "mid_block=0.5"], capsys
    )


def test_a_flag_with_several_values_may_be_repeated():
    found = command_line.parse(
        InferOptions,
        "",
        [
            *INFER,
            "--prompt",
            "a",
            "b",
            "--adapter",
            "x",
            "--prompt=c",
            "--adapter",
            "y:0.5",
            "--batch_size",
            "2",
        ],
    )
    assert (found.prompt, found.adapter, found.drawing.batch_size) == (("a", "b", "c"), ("x", "y:0.5"), 2)
