"""Flags: those of the reference script with its defaults; one message and status 2 for every mistake."""

import importlib.util

import pytest

from dreambooth.options import command_line
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from tests.options.reference import (
    BARE,
    CLASS_IMAGES,
    EVALUATE,
    INFER,
    PRIOR,
    REFERENCE,
    REQUIRED,
    TRAIN,
    flat,
    pretend_everything_is_installed,
    refusal,
    resolved,
)

REFUSED = ("validation_images", "class_labels_conditioning")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


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


def test_prompt_weights_need_their_package(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(InferOptions, [*INFER, "--prompt", "a dog", "--prompt_weights"], capsys)
    assert (
        "--prompt_weights needs the compel package, which is not installed: pip install '.[weights]'"
        in message
    )


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
    EvaluateOptions: {
        0: ["num_class_images", "seed"],
        1: ["num_images", "num_inference_steps", "batch_size"],
    },
}


NEEDED: dict[type, list[str]] = {
    TrainOptions: TRAIN,
    ClassImageOptions: CLASS_IMAGES,
    InferOptions: [*INFER, "--prompt", "a dog"],
    EvaluateOptions: EVALUATE,
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
    rule = "at most 1000000000" if value == "inf" else "at least 0"
    message = refusal(TrainOptions, [*TRAIN, f"--{name}", value], capsys)
    assert f"--{name} must be {rule}, got {value}" in message


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
        (TrainOptions, [*TRAIN, "--lora_dropout", "1"], "--lora_dropout must be under 1, got 1.0"),
        (TrainOptions, [*TRAIN, "--lora_dropout", "-0.1"], "--lora_dropout must be at least 0, got -0.1"),
        (TrainOptions, [*TRAIN, "--lora_dropout", "nan"], "--lora_dropout must be at least 0, got nan"),
        (TrainOptions, [*TRAIN, "--adam_beta1", "1"], "--adam_beta1 must be under 1, got 1.0"),
        (TrainOptions, [*TRAIN, "--adam_beta2", "-1"], "--adam_beta2 must be at least 0, got -1.0"),
        (TrainOptions, [*TRAIN, "--adam_beta2", "nan"], "--adam_beta2 must be at least 0, got nan"),
        (ClassImageOptions, [*CLASS_IMAGES, "--class_prompt", " "], "--class_prompt must not be empty"),
        (
            ClassImageOptions,
            [*CLASS_IMAGES, "--resolution", "20"],
            "--resolution must be a positive multiple of 8, got 20",
        ),
        (
            EvaluateOptions,
            [*INFER, "--judge_dino", "d"],
            "--adapter, --photos, --class_noun, --rare_word: missing; give them, or --subjects_file",
        ),
        (
            EvaluateOptions,
            [*INFER, "--judge_dino", "d", "--adapter", "a"],
            "--photos, --class_noun, --rare_word",
        ),
        (EvaluateOptions, [*EVALUATE, "--class_prompt", "a dog"], "--class_prompt must have {1}, where"),
        (EvaluateOptions, EVALUATE[:-2], "give a judge: --judge_dino, --judge_clip, --judge_reader"),
        (
            EvaluateOptions,
            [*EVALUATE, "--subjects_file", "s.yaml"],
            "--subjects_file has a column for each of --adapter, --photos, --class_noun, --rare_word",
        ),
        (EvaluateOptions, [*EVALUATE, "--subjects", "dog"], "--subjects selects rows of --subjects_file"),
        (InferOptions, INFER, "give either --prompt or --prompts_file"),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "--prompts_file", "prompts.txt"],
            "give either --prompt or --prompts_file",
        ),
        (InferOptions, [*INFER, "--prompt", "a dog", " "], "--prompt must not be empty"),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "--seeds"],
            "--seeds must be numbers from 0 on, got none",
        ),
        (
            InferOptions,
            [*INFER, "--prompt", "a dog", "--seeds", "1", "-1"],
            "--seeds must be at least 0, got -1",
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
        "You need not use --class_data_dir without --with_prior_preservation.",
        "You need not use --class_prompt without --with_prior_preservation, --meter_steps or a judge.",
    ]


def test_a_class_prompt_that_names_the_subject_is_remarked_on():
    (note,) = command_line.parse(
        TrainOptions, "train", [*TRAIN, *PRIOR, "--class_prompt", "a photo of sks dog "]
    ).notes()
    assert note.startswith("--class_prompt equals --instance_prompt")
    measured = ["--class_prompt", "a photo of sks dog", "--meter_steps", "2", "--holdout", "1"]
    (note,) = command_line.parse(TrainOptions, "train", [*TRAIN, *measured]).notes()
    assert note.startswith("--class_prompt equals --instance_prompt: binding")


def test_a_folder_that_is_named_as_in_kohya_s_scripts_gives_prompt_and_repeats():
    words = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "img/10_sks dog/"]
    options = command_line.parse(TrainOptions, "", words)
    assert (options.instance.instance_prompt, options.instance.repeats) == ("sks dog", 10)
    assert "by the folder's name --instance_prompt is sks dog and --repeats 10" in options.notes()
    options = command_line.parse(
        TrainOptions, "", [*words, "--repeats", "3", "--instance_prompt", "a sks dog"]
    )
    assert (options.instance.instance_prompt, options.instance.repeats) == ("a sks dog", 3)
    assert not any("folder's name" in note for note in options.notes())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--caption_column text --in_json m.json", "--caption_column and --in_json both name captions"),
        ("--caption_column a --trigger_word a,b", "--trigger_word must have no comma"),
        ("--trigger_word sks", "--trigger_word is put before captions: give --caption_column"),
        ("--keep_tokens 1", "--keep_tokens is for shuffled or dropped tags"),
        ("--caption_variants 8", "--caption_variants is for shuffled or dropped tags"),
        ("--caption_extension .md", ".txt"),
    ],
)
def test_flags_of_captions_that_cannot_work_are_refused(flags, message, capsys):
    assert message in refusal(TrainOptions, [*TRAIN, *flags.split()], capsys)
