"""--help prints the flags that people use, in groups with headings in words; --help_all prints every flag."""

import itertools
import re

import pytest

from dreambooth.options import command_line, conversion, help_page
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions

SCRIPTS = [TrainOptions, ClassImageOptions, InferOptions, EvaluateOptions]
KINDS = [*SCRIPTS, *(kind for kind, _, _ in conversion.COMMANDS.values())]
# Flags that exist so that old command lines work.
FOR_OLD_COMMAND_LINES = [
    "local_rank",
    "pre_compute_text_embeddings",
    "use_8bit_adam",
    "validation_images",
    "class_labels_conditioning",
    "scale_lr",
]


def printed(kind: type, word: str, monkeypatch, capsys, columns: int = 100) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as left:
        command_line.parse(kind, "A script.\n\nIt has two\nparagraphs.", [word])
    assert left.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> dict[str, str]:
    """Help text of each flag, on one line."""
    entries = re.findall(r"^  --(\w+)[^\n]*\n((?: {6,}[^\n]*\n)*)", text, re.MULTILINE)
    return {name: " ".join(lines.split()) for name, lines in entries}


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_has_a_help_text_that_fits_the_terminal(kind, columns, monkeypatch, capsys):
    text = printed(kind, "--help_all", monkeypatch, capsys, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "None" not in text
    assert "It has two paragraphs." in text
    texts = flags_in(text)
    assert texts.keys() == command_line.fields_of(kind).keys()
    for name, words in texts.items():
        words = re.sub(r" \((default|required)\b[^)]*\)$", "", words)
        assert len(words.split()) >= 2, name
        assert words.endswith((".", "?")), name


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_line_breaks_of_the_source_are_not_in_the_help_texts(columns, monkeypatch, capsys):
    """A line ends where the next word does not fit."""
    width = min(columns, 100)
    lines = printed(TrainOptions, "--help_all", monkeypatch, capsys, columns).splitlines()
    for line, following in itertools.pairwise(lines):
        if re.match(r" {6}\S", line) and re.match(r" {6}\S", following):
            assert len(line) + 1 + len(following.split()[0]) > width, line


@pytest.mark.parametrize("kind", SCRIPTS)
def test_help_shows_the_flags_that_people_use_and_counts_the_others(kind, monkeypatch, capsys):
    text = printed(kind, "--help", monkeypatch, capsys)
    shown, every = flags_in(text), command_line.fields_of(kind)
    assert shown.keys() == set(kind.COMMON_FLAGS) <= every.keys()
    assert f"{len(every) - len(shown)} more flags are listed by --help_all." in text
    assert len(text.splitlines()) <= 130
    assert len(shown) < 35
    required = [
        name
        for name, words in flags_in(printed(kind, "--help_all", monkeypatch, capsys)).items()
        if words.endswith("(required)")
    ]
    assert shown.keys() >= set(required)


def test_flags_for_old_command_lines_are_in_the_full_help_only(monkeypatch, capsys):
    assert not set(FOR_OLD_COMMAND_LINES) & set(TrainOptions.COMMON_FLAGS)
    assert (
        set(FOR_OLD_COMMAND_LINES)
        <= flags_in(printed(TrainOptions, "--help_all", monkeypatch, capsys)).keys()
    )


@pytest.mark.parametrize("word", ["-h", "--help", "--help_all", "--help-all"])
def test_help_is_asked_for_anywhere_on_the_command_line(word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["folder/train.py", "--rank", "x", word])
    with pytest.raises(SystemExit) as left:
        command_line.parse(TrainOptions, "A script.")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: train.py ")
    assert ("--lora_dropout" in text) == ("all" in word)


def test_groups_are_titled_in_words(monkeypatch, capsys):
    text = printed(TrainOptions, "--help", monkeypatch, capsys)
    titles = re.findall(r"^([A-Z][a-z ]+)[^\n]*\n  --", text, re.MULTILINE)
    assert titles[:4] == ["Base model", "Instance photos", "Masks", "Prior preservation"]
    assert "options" not in " ".join(titles)


def test_values_choices_and_defaults_are_shown(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_page.page(AdapterOptions, "x", "Text.", is_full=True)
    assert "\n  --rank INT\n" in text
    assert "\n  --text_encoder_rank INT\n" in text
    assert "\n  --target_preset {attn, attn_ff, full}\n" in text
    assert "\n  --use_dora\n" in text
    assert flags_in(text)["rank"].endswith("(default: 4)")
    assert flags_in(text)["lora_dropout"].endswith("(default: 0.0)")
