"""Flags: those of the reference script with its defaults, one clear message and status 2 for every mistake, files of flags."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from dreambooth.options import command_line, training
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.resolved import ResolvedTrainOptions, resolve
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import processes

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("train_dreambooth_lora.py", "generate_class_images.py", "infer.py")

TRAIN = [
    "--pretrained_model_name_or_path",
    "base",
    "--instance_data_dir",
    "photos",
    "--instance_prompt",
    "a photo of sks dog",
]
CLASS_IMAGES = [
    "--pretrained_model_name_or_path",
    "base",
    "--class_data_dir",
    "pictures",
    "--class_prompt",
    "dog",
]
INFER = ["--pretrained_model_name_or_path", "base"]
PRIOR = ["--with_prior_preservation", "--class_data_dir", "pictures", "--class_prompt", "dog"]

REQUIRED = object()
BARE = None  # a flag without a value

# Every flag of diffusers' train_dreambooth_lora.py: its default, a word that may follow it, and the value that the word stands for.
REFERENCE: dict[str, tuple[Any, str | None, Any]] = {
    "pretrained_model_name_or_path": (REQUIRED, "other", "other"),
    "revision": (None, "main", "main"),
    "variant": (None, "fp16", "fp16"),
    "tokenizer_name": (None, "words", "words"),
    "instance_data_dir": (REQUIRED, "other", "other"),
    "class_data_dir": (None, "pictures", "pictures"),
    "instance_prompt": (REQUIRED, "a zwx cat", "a zwx cat"),
    "class_prompt": (None, "a photo of dog", "a photo of dog"),
    "validation_prompt": (None, "a sks dog in the snow", "a sks dog in the snow"),
    "num_validation_images": (4, "2", 2),
    "validation_epochs": (50, "10", 10),
    "with_prior_preservation": (False, BARE, True),
    "prior_loss_weight": (1.0, "0.5", 0.5),
    "num_class_images": (100, "200", 200),
    "output_dir": ("lora-dreambooth-model", "out", "out"),
    "seed": (None, "7", 7),
    "resolution": (512, "64", 64),
    "center_crop": (False, BARE, True),
    "train_text_encoder": (False, BARE, True),
    "train_batch_size": (4, "1", 1),
    "sample_batch_size": (4, "8", 8),
    "num_train_epochs": (1, "3", 3),
    "max_train_steps": (None, "800", 800),
    "checkpointing_steps": (500, "100", 100),
    "checkpoints_total_limit": (None, "2", 2),
    "resume_from_checkpoint": (None, "latest", "latest"),
    "gradient_accumulation_steps": (1, "2", 2),
    "gradient_checkpointing": (False, BARE, True),
    "learning_rate": (5e-4, "1e-4", 1e-4),
    "scale_lr": (False, BARE, True),
    "lr_scheduler": ("constant", "cosine", "cosine"),
    "lr_warmup_steps": (500, "0", 0),
    "lr_num_cycles": (1, "2", 2),
    "lr_power": (1.0, "2", 2.0),
    "dataloader_num_workers": (0, "2", 2),
    "use_8bit_adam": (False, BARE, True),
    "adam_beta1": (0.9, "0.8", 0.8),
    "adam_beta2": (0.999, "0.99", 0.99),
    "adam_weight_decay": (1e-2, "0", 0.0),
    "adam_epsilon": (1e-8, "1e-6", 1e-6),
    "max_grad_norm": (1.0, "0.5", 0.5),
    "push_to_hub": (False, BARE, True),
    "hub_token": (None, "secret", "secret"),
    "hub_model_id": (None, "me/dog", "me/dog"),
    "logging_dir": ("logs", "records", "records"),
    "allow_tf32": (False, BARE, True),
    "report_to": ("tensorboard", "wandb", "wandb"),
    "mixed_precision": (None, "bf16", "bf16"),
    "prior_generation_precision": (None, "fp32", "fp32"),
    "local_rank": (-1, "1", 1),
    "enable_xformers_memory_efficient_attention": (False, BARE, True),
    "pre_compute_text_embeddings": (False, BARE, True),
    "tokenizer_max_length": (None, "77", 77),
    "text_encoder_use_attention_mask": (False, BARE, True),
    "validation_images": (None, "first.png", ("first.png",)),
    "class_labels_conditioning": (None, "timesteps", "timesteps"),
    "rank": (4, "16", 16),
    "lora_dropout": (0.0, "0.1", 0.1),
    "image_interpolation_mode": ("lanczos", "bicubic", "bicubic"),
}
REFUSED = ("validation_images", "class_labels_conditioning")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def resolved(options: TrainOptions, family: str) -> ResolvedTrainOptions:
    return resolve(options, family, seed=0, mixed_precision="no")


def flat(group: Any) -> dict[str, Any]:
    """Every flag and its value, None included."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        table |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return table


def refusal(kind: type, words: list[str], capsys) -> str:
    """The one message with which the command line is refused, its frame taken off."""
    with pytest.raises(SystemExit) as refused:
        command_line.parse(kind, "a script", words)
    out, err = capsys.readouterr()
    assert refused.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.translate({ord(c): " " for c in "╭╮╰╯│─"}).split())


def saved(folder: Path, text: str) -> list[str]:
    """The words that read flags from a file with this text."""
    path = folder / "flags.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def pretend_everything_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


# --- the reference's flags


def test_reference_has_59_flags_and_three_are_required():
    assert len(REFERENCE) == 59
    assert [name for name, (default, _, _) in REFERENCE.items() if default is REQUIRED] == [
        "pretrained_model_name_or_path",
        "instance_data_dir",
        "instance_prompt",
    ]


def test_every_flag_of_the_reference_has_its_default():
    """Seed and precision are those of the machine in the end."""
    ours = flat(resolved(command_line.parse(TrainOptions, "train", TRAIN), "sd"))
    ours |= flat(command_line.parse(TrainOptions, "train", TRAIN).run)
    for name, (default, _, _) in REFERENCE.items():
        if default is not REQUIRED:
            assert (ours[name], type(ours[name])) == (default, type(default)), name


@pytest.mark.parametrize("name", [name for name in REFERENCE if name not in REFUSED])
def test_every_flag_of_the_reference_is_taken_as_it_takes_it(name, monkeypatch):
    """Old command lines work unchanged."""
    pretend_everything_is_installed(monkeypatch)
    _, word, value = REFERENCE[name]
    needed = PRIOR[1:] if name == "with_prior_preservation" else []
    found = flat(
        command_line.parse(
            TrainOptions, "train", [*TRAIN, *needed, f"--{name}", *([] if word is BARE else [word])]
        )
    )[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", ["output_dir", "rank", "learning_rate", "lr_scheduler"])
def test_values_may_be_joined_with_an_equals_sign(name):
    _, word, value = REFERENCE[name]
    assert flat(command_line.parse(TrainOptions, "train", [*TRAIN, f"--{name}={word}"]))[name] == value


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_version_cannot_do_is_refused_with_a_reason(name, capsys):
    """Nobody finds out after an hour of training that nothing was uploaded."""
    word = REFERENCE[name][1]
    message = refusal(TrainOptions, [*TRAIN, f"--{name}", *([] if word is BARE else [word])], capsys)
    assert f"--{name}" in message
    assert "which this version does not train" in message


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "instance_data_dir", "instance_prompt"])
def test_a_missing_required_flag_is_named(name, capsys):
    place = TRAIN.index(f"--{name}")
    message = refusal(TrainOptions, TRAIN[:place] + TRAIN[place + 2 :], capsys)
    assert f"--{name}" in message
    assert "required" in message.lower() or "Specify either --instance_data_dir or --dataset_name" in message


@pytest.mark.parametrize(
    ("flag", "package", "words"),
    [
        ("--use_8bit_adam", "bitsandbytes", ["--use_8bit_adam"]),
        ("--report_to wandb", "wandb", ["--report_to", "wandb"]),
        ("--report_to comet_ml", "comet_ml", ["--report_to", "comet_ml"]),
        (
            "--enable_xformers_memory_efficient_attention",
            "xformers",
            ["--enable_xformers_memory_efficient_attention"],
        ),
    ],
)
def test_a_missing_package_is_named_with_the_flag_that_needs_it(flag, package, words, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(TrainOptions, TRAIN + words, capsys)
    assert f"{flag} needs the {package} package, which is not installed" in message


def test_missing_tensorboard_is_no_error_since_it_is_the_default(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command_line.parse(TrainOptions, "train", TRAIN).reports.report_to == "tensorboard"


# --- mistakes


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--rnk", "3"], ["--rnk", "Perhaps you meant", "--rank"]),
        (
            ["--max_train", "7"],
            ["--max_train,", "Perhaps you meant", "--max_train_steps"],
        ),  # argparse would take the abbreviation
        (["stray"], ["stray"]),
        (["--rank"], ["--rank"]),
        (["--rank", "x"], ["--rank", "'x'"]),
        (["--rank", "1.5"], ["--rank", "'1.5'"]),
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'"]),
        (["--lr_scheduler", "sine"], ["--lr_scheduler", "'sine'", "cosine"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "fp8", "bf16"]),
        (["--image_interpolation_mode", "cubic"], ["--image_interpolation_mode", "cubic", "bicubic"]),
        (["--report_to", "mlflow"], ["--report_to", "mlflow", "tensorboard"]),
    ],
)
def test_a_wrong_word_is_named_with_what_could_stand_there(words, fragments, capsys):
    message = refusal(TrainOptions, TRAIN + words, capsys)
    for fragment in fragments:
        assert fragment in message


AT_LEAST = {
    TrainOptions: {
        0: [
            "dataloader_num_workers",
            "prior_loss_weight",
            "class_guidance_scale",
            "learning_rate",
            "lr_warmup_steps",
            "lr_power",
        ]
        + ["adam_weight_decay", "text_encoder_lr", "max_grad_norm", "seed"],
        1: [
            "num_class_images",
            "sample_batch_size",
            "class_inference_steps",
            "rank",
            "lr_num_cycles",
            "train_batch_size",
            "num_train_epochs",
        ]
        + [
            "max_train_steps",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "num_threads",
        ]
        + ["num_validation_images", "validation_epochs"],
        3: ["tokenizer_max_length"],
    },
    ClassImageOptions: {
        0: ["class_guidance_scale", "seed"],
        1: ["num_class_images", "sample_batch_size", "class_inference_steps", "num_threads"],
    },
    InferOptions: {0: ["guidance_scale"], 1: ["num_inference_steps", "batch_size", "num_threads"]},
}
NEEDED: dict[type, list[str]] = {
    TrainOptions: TRAIN,
    ClassImageOptions: CLASS_IMAGES,
    InferOptions: [*INFER, "--prompt", "a dog"],
}


@pytest.mark.parametrize(
    ("kind", "name", "least"),
    [
        (kind, name, least)
        for kind, table in AT_LEAST.items()
        for least, names in table.items()
        for name in names
    ],
)
def test_numbers_below_the_least_are_refused_and_the_least_is_not(kind, name, least, capsys):
    message = refusal(kind, [*NEEDED[kind], f"--{name}", str(least - 1)], capsys)
    assert f"--{name} must be at least {least}, got {least - 1}" in message
    assert flat(command_line.parse(kind, "a script", [*NEEDED[kind], f"--{name}", str(least)]))[name] == least


@pytest.mark.parametrize(
    "name",
    [
        "prior_loss_weight",
        "learning_rate",
        "lr_power",
        "adam_weight_decay",
        "text_encoder_lr",
        "max_grad_norm",
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(name, value, capsys):
    """float("nan") parses, and every comparison with it is false: a plain check would let it through."""
    assert f"--{name} must be at least 0, got {value}" in refusal(
        TrainOptions, [*TRAIN, f"--{name}", value], capsys
    )


@pytest.mark.parametrize(
    ("kind", "words", "fragment"),
    [
        (
            TrainOptions,
            [*TRAIN, "--resolution", "30"],
            "--resolution must be a positive multiple of 8, got 30",
        ),
        (TrainOptions, [*TRAIN, "--resolution", "0"], "--resolution must be a positive multiple of 8, got 0"),
        (
            TrainOptions,
            [*TRAIN, "--resolution", "-64"],
            "--resolution must be a positive multiple of 8, got -64",
        ),
        (TrainOptions, [*TRAIN, "--instance_prompt", ""], "--instance_prompt must not be empty"),
        (TrainOptions, [*TRAIN, "--instance_prompt", " \t"], "--instance_prompt must not be empty"),
        (
            TrainOptions,
            [*TRAIN, PRIOR[0], *PRIOR[3:]],
            "You must specify a data directory for class images: --class_data_dir",
        ),
        (TrainOptions, [*TRAIN, *PRIOR[:3]], "You must specify prompt for class images: --class_prompt"),
        (
            TrainOptions,
            [*TRAIN, *PRIOR[:3], "--class_prompt", " "],
            "You must specify prompt for class images: --class_prompt",
        ),
        (
            TrainOptions,
            [*TRAIN, "--train_text_encoder", "--pre_compute_text_embeddings"],
            "--train_text_encoder cannot be used with --pre_compute_text_embeddings",
        ),
        (TrainOptions, [*TRAIN, "--lora_dropout", "1"], "--lora_dropout must be in [0, 1), got 1.0"),
        (TrainOptions, [*TRAIN, "--lora_dropout", "-0.1"], "--lora_dropout must be in [0, 1), got -0.1"),
        (TrainOptions, [*TRAIN, "--lora_dropout", "nan"], "--lora_dropout must be in [0, 1), got nan"),
        (TrainOptions, [*TRAIN, "--adam_beta1", "1"], "--adam_beta1 must be in [0, 1), got 1.0"),
        (TrainOptions, [*TRAIN, "--adam_beta2", "-1"], "--adam_beta2 must be in [0, 1), got -1.0"),
        (TrainOptions, [*TRAIN, "--adam_beta2", "nan"], "--adam_beta2 must be in [0, 1), got nan"),
        (ClassImageOptions, [*CLASS_IMAGES, "--class_prompt", " "], "--class_prompt must not be empty"),
        (
            ClassImageOptions,
            [*CLASS_IMAGES, "--resolution", "20"],
            "--resolution must be a positive multiple of 8, got 20",
        ),
        (InferOptions, INFER, "give either --prompt or --prompts_file"),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "--prompts_file", "prompts.txt"],
            "give either --prompt or --prompts_file",
        ),
        (InferOptions, [*INFER, "--prompt", "a dog", " "], "--prompt must not be empty"),
        (InferOptions, [*INFER, "--prompt", "a dog", "--seeds"], "--seeds must be numbers from 0 on, got ()"),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "--seeds", "1", "-1"],
            "--seeds must be numbers from 0 on, got (1, -1)",
        ),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "--compare"],
            "--compare needs an --adapter to compare with the base",
        ),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "--resolution", "-8"],
            "--resolution must be a positive multiple of 8, got -8",
        ),
    ],
)
def test_every_rule_names_flag_rule_and_value(kind, words, fragment, capsys):
    assert fragment in refusal(kind, words, capsys)


def test_flags_that_have_no_effect_are_remarked_on():
    """As in the reference, --class_* without prior preservation is odd, but no error."""
    assert command_line.parse(TrainOptions, "train", TRAIN).notes() == []
    assert command_line.parse(TrainOptions, "train", TRAIN + PRIOR).notes() == []
    unused = command_line.parse(TrainOptions, "train", TRAIN + PRIOR[1:]).notes()
    assert unused == [
        f"You need not use --{name} without --with_prior_preservation."
        for name in ("class_data_dir", "class_prompt")
    ]


def test_a_class_prompt_that_names_the_subject_is_remarked_on():
    (note,) = command_line.parse(
        TrainOptions, "train", [*TRAIN, *PRIOR, "--class_prompt", "a photo of sks dog "]
    ).notes()
    assert note.startswith("--class_prompt equals --instance_prompt")


def test_local_rank_of_old_launchers_is_handed_on_but_never_wins(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "")
    monkeypatch.delenv("LOCAL_RANK")
    processes.adopt_local_rank(-1)
    assert "LOCAL_RANK" not in os.environ
    processes.adopt_local_rank(3)
    assert os.environ["LOCAL_RANK"] == "3"
    processes.adopt_local_rank(1)
    assert os.environ["LOCAL_RANK"] == "3"


# --- files of flags


def test_config_file_stands_for_the_words_in_it(tmp_path):
    text = "pretrained_model_name_or_path: base\ninstance_data_dir: photos\ninstance_prompt: a photo of sks dog\nrank: 8\nmax_grad_norm: 0.5\n"
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
    [("nowhere.yaml", "No such file"), (".", "Is a directory"), ("binary", "not a YAML file")],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(name, fragment, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"rank: \xff\xfe\x00")
    path = tmp_path / name
    message = refusal(TrainOptions, [*TRAIN, "--config", str(path)], capsys)
    assert f"--config {path}: " in message
    assert fragment in message


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
    ],
    ids=["defaults", "many", "odd words", "letters", "class images", "lists", "empty list", "leading minus"],
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


@pytest.mark.parametrize("module", ["dreambooth.options.training", "dreambooth.errors"])
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
    assert (found.prompt, found.adapter, found.batch_size) == (("a", "b", "c"), ("x", "y:0.5"), 2)
