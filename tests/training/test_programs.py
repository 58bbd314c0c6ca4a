"""Which file is for which program: what a run says at its start and in its last line."""

import pytest
from safetensors import safe_open

from dreambooth.bases import families
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.training import BaseOptions, TextOptions
from dreambooth.training import adapter_targets, programs
from tests.running import run_train

OTHERS = "for ComfyUI, A1111, Forge, InvokeAI and kohya's scripts"


@pytest.mark.parametrize(
    ("flags", "has_kohya_names", "expected"),
    [
        ({"output_kohya_format": True}, True, ["for diffusers and infer.py: o/p", f"{OTHERS}: o/p_kohya"]),
        ({}, True, ["for diffusers and infer.py: o/p", f"{OTHERS}: the file of `convert_adapter.py convert"]),
        ({}, False, ["for diffusers and infer.py: o/p"]),
        (
            {"use_dora": True, "output_kohya_format": True},
            True,
            [
                "for diffusers and infer.py: o/p",
                "for LyCORIS: o/p_kohya",
                f"{OTHERS}, which misread DoRA: the",
            ],
        ),
        ({"use_dora": True}, True, ["for diffusers and infer.py: o/p", f"{OTHERS}, which misread DoRA: the"]),
        (
            {"adapter": "loha", "output_kohya_format": True},
            True,
            ["for infer.py: o/p", "for diffusers: the LoRA of `convert", f"{OTHERS}: o/p_kohya"],
        ),
        (
            {"adapter": "lokr"},
            True,
            ["for infer.py: o/p", "for diffusers: the LoRA of `convert", f"{OTHERS}: the file of `convert"],
        ),
        ({"adapter": "hra"}, True, ["for infer.py: o/p", "for other programs: the base that `convert"]),
    ],
)
def test_every_kind_names_a_file_or_a_command_for_each_program(flags, has_kohya_names, expected):
    phrases = programs.readers({"adapter": "lora"} | flags, "o", has_kohya_names=has_kohya_names)
    assert len(phrases) == len(expected)
    for phrase, start in zip(phrases, expected, strict=True):
        assert phrase.replace("pytorch_lora_weights", "p").startswith(start)


@pytest.mark.trains
def test_the_last_line_of_a_run_names_the_files(tiny_base, photos_dir, tmp_path, capsys):
    words = ("--output_kohya_format", "--max_train_steps", "2", "--rank", "1")
    adapter = run_train(tiny_base, photos_dir, tmp_path / "out", *words)
    kohya = adapter.with_name("pytorch_lora_weights_kohya.safetensors")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"for diffusers and infer.py: {adapter}; {OTHERS}: {kohya}"
    with safe_open(kohya, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_steps"], metadata["ss_resolution"]) == ("2", "(64, 64)")


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (
            {"adapter": "lokr", "decompose_factor": 16},
            "--decompose_factor 16 is over the root of the width of",
        ),
        ({"adapter": "lokr", "decompose_factor": 4}, None),
        ({"adapter": "lokr"}, None),
        (
            {"use_dora": True, "output_kohya_format": True},
            "--output_kohya_format with --use_dora: only LyCORIS",
        ),
        ({"use_dora": True}, None),
    ],
)
def test_what_other_programs_cannot_read_is_said_before_training(flags, note, tiny_base):
    base = families.find(BaseOptions(str(tiny_base)))
    notes = adapter_targets.reader_notes(base, AdapterOptions(**flags), TextOptions())
    assert [text.startswith(str(note)) for text in notes] == ([] if note is None else [True])
