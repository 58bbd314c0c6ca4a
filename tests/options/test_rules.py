"""Rules in the types of flags: every number has a range, every path and text fits into a file."""

import dataclasses
import os
from typing import Any, get_args, get_origin

import pytest

from dreambooth.options import rules
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.command_line import config_words, fields_of, parse
from dreambooth.options.conversion import COMMANDS
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from tests.options.reference import CLASS_IMAGES, EVALUATE, INFER, TRAIN, refusal

WORDS: dict[type, list[str]] = {
    TrainOptions: TRAIN,
    ClassImageOptions: CLASS_IMAGES,
    InferOptions: [*INFER, "--prompt", "a dog"],
    EvaluateOptions: EVALUATE,
}
KINDS = [*WORDS, *(kind for kind, _, _ in COMMANDS.values())]


def kinds_in(kind: Any) -> set[Any]:
    """The plain types in a field's type."""
    if get_origin(kind) is not None:
        return set().union(*map(kinds_in, get_args(kind)))
    return {kind}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_range(kind):
    for name, field in fields_of(kind).items():
        if kinds_in(field.type) & {int, float}:
            (rule,) = rules.rules_of(field.type)
            if isinstance(rule, rules.SidesRule):
                for sides in (10**400, -(10**400), 8200, 0, "512,8200", "512,nan", "512,inf"):
                    assert rule.broken_by(sides) is not None, (name, sides)
                continue
            assert isinstance(rule, rules.Range), name
            for value in (10**400, -(10**400), float("inf"), float("nan"), rule.most + 1, rule.least - 1):
                assert rule.broken_by(value) is not None, (name, value)
            default = field.default if isinstance(field.default, tuple) else (field.default,)
            for value in default:
                if isinstance(value, int | float):
                    assert rule.broken_by(value) is None, name


@pytest.mark.parametrize("value", ["9" * 400, "-" + "9" * 400, "1e15", "1e400", "nan", "-inf"])
@pytest.mark.parametrize("name", ["rank", "lora_alpha", "peer_timeout", "num_threads", "local_rank", "seed"])
def test_numbers_past_all_use_are_refused(name, value, capsys):
    assert f"--{name}" in refusal(TrainOptions, [*TRAIN, f"--{name}={value}"], capsys)


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        ("", "must be the name of a file or folder, got ''"),
        (" ", "must be the name of a file or folder, got ' '"),
        ("x" * 256, "names of at most 255 bytes"),
        ("\u00e9" * 128, "names of at most 255 bytes"),
        ("x/" * 2500, "must be a path of at most 3500 bytes"),
        ("a\udcffb", "character 2 is NUL or not UTF-8"),
        ("a\0b", "character 2 is NUL or not UTF-8"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((TrainOptions, name) for name in ("output_dir", "class_data_dir", "encoded_dir", "logging_dir")),
        *((TrainOptions, name) for name in ("cache_dir", "tokenizer_name", "resume_from_checkpoint")),
        *((InferOptions, name) for name in ("output_dir", "prompts_file", "adapter")),
        (ClassImageOptions, "class_data_dir"),
        *((EvaluateOptions, name) for name in ("output_dir", "subjects_file", "photos")),
    ],
)
def test_paths_that_no_run_can_record_are_refused(kind, name, value, phrase, capsys):
    assert phrase in refusal(kind, [*WORDS[kind], f"--{name}={value}"], capsys)


def test_a_working_folder_that_is_not_utf_8_is_refused_with_the_path(tmp_path, monkeypatch, capsys):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    assert "--output_dir must be a path in UTF-8" in refusal(TrainOptions, [*TRAIN, "--output_dir=o"], capsys)


@pytest.mark.parametrize("text", ["\udcff", "\0", "x" * 70_000])
@pytest.mark.parametrize("name", ["instance_prompt", "hub_model_id", "lora_layers", "hub_token", "optimizer"])
def test_texts_that_no_file_can_hold_are_refused(name, text, capsys):
    message = refusal(TrainOptions, [*TRAIN, f"--{name}", text], capsys)
    assert f"--{name}: " in message
    assert "character 1 is NUL" in message or "a text of 70,000 characters" in message


@pytest.mark.parametrize("value", [r'"a\0b"', r'"a\ud800"', "x" * 70_000])
def test_a_configuration_file_holds_the_same_texts(value, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text(f"validation_prompt: {value}\n")
    message = refusal(TrainOptions, [*TRAIN, "--config", str(tmp_path / "flags.yaml")], capsys)
    assert "--validation_prompt: " in message or "not a YAML file" in message


def test_the_group_names_every_broken_rule(capsys):
    message = refusal(TrainOptions, [*TRAIN, "--rank=0", "--seed=-1", "--output_dir="], capsys)
    for phrase in ("--rank must be at least 1, got 0", "--seed must be at least 0", "--output_dir must be"):
        assert phrase in message


def test_values_of_replaced_options_are_checked_too():
    with pytest.raises(ValueError, match="--rank must be at most 1024"):
        dataclasses.replace(AdapterOptions(), rank=2000)


def test_usual_values_are_accepted(tmp_path):
    (tmp_path / "flags.yaml").write_text("seed: 18446744073709551615\nlora_alpha: 0.5\nnum_threads: 256\n")
    words = config_words(TrainOptions, tmp_path / "flags.yaml")
    options = parse(TrainOptions, "", [*TRAIN, *words, "--instance_prompt", "d\u00e9j\u00e0 vu \U0001f415"])
    assert (options.run.seed, options.run.num_threads) == (2**64 - 1, 256)
