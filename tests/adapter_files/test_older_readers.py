"""Adapter files of today are read right by the libraries of earlier years.

Those cannot be installed beside today's. What they drew with our files was recorded once
(tests/fixtures/make_older_readers.py says how, and how to do it again): here the same files are written anew,
and must be the ones that were shown to them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from dreambooth.adapter_files import native
from tests.fixtures import build_older_readers, make_older_readers
from tests.fixtures.build_older_readers import FILES, stems
from tests.fixtures.make_older_readers import (
    base_hashes,
    content,
    draw,
    draw_with,
    load,
    load_whole,
    models_of,
    some,
)
from tests.running import run_train

RECORD: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "older_readers.json").read_text()
)
READERS = {f"diffusers {reader['versions']['diffusers']}": reader for reader in RECORD["readers"]}
NAMES = [
    f"{family}/{stem}" for family, names in FILES.items() for name in names for stem in stems(family, name)
]
AGAIN = "older libraries were never shown this: record again, as tests/fixtures/make_older_readers.py says"
TOLERANCE = 1e-4  # of the largest value

Drawn = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shown")


@pytest.fixture(scope="module")
def trained(folder) -> dict[str, Drawn]:
    """What the models draw with the adapter that was trained on them, by file; the files lie in `folder`."""
    return build_older_readers.build(folder)


def file_of(folder: Path, name: str) -> Path:
    family, _, stem = name.partition("/")
    return folder / family / "adapters" / f"{stem}.safetensors"


def distance(one: list[float], other: list[float]) -> float:
    return float((torch.tensor(one) - torch.tensor(other)).abs().max() / torch.tensor(one).abs().max())


def is_adapted(name: str, output: str) -> bool:
    return output == "unet" or name != "sd1/lora unet"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_writer_writes_what_older_libraries_were_shown(name, trained, folder):
    now, then = content(file_of(folder, name)), RECORD["files"][name]
    assert now["layers"] == then["layers"], AGAIN
    assert now["metadata"] == then["metadata"], AGAIN
    assert now["sha256"] == then["sha256"], AGAIN
    assert all(reader["adapters"][name]["sha256"] == now["sha256"] for reader in RECORD["readers"]), AGAIN


@pytest.mark.slow
@pytest.mark.parametrize("family", FILES)
def test_the_base_is_the_one_that_older_libraries_were_shown(family, trained, folder):
    hashes, drawn = base_hashes(folder / family), draw(family, models_of(load(folder / family)))
    for reader, record in READERS.items():
        then = record["bases"][family]
        assert hashes == then["sha256"], AGAIN
        for output, values in drawn.items():
            assert distance(some(values), then["drawn"][output]) < TOLERANCE, (reader, output)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reader", READERS)
def test_older_libraries_drew_what_was_trained(reader, name, trained):
    """Their UNet and text encoders gave the trained models' own numbers, which are far from the base's."""
    then = READERS[reader]["adapters"][name]
    for output, values in trained[name].items():
        assert distance(some(values), then["drawn"][output]) < TOLERANCE, output
        base = READERS[reader]["bases"][name.partition("/")[0]]["drawn"][output]
        effect = distance(base, then["drawn"][output])
        assert effect > 0.1 if is_adapted(name, output) else effect == 0, output
    # keys that they have no place for, values that they drew themselves: nothing of that
    assert [line for line in then["warned"] if not ("No LoRA keys" in line and name == "sd1/lora unet")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_of_today_draws_the_same(name, trained, folder):
    drawn, warned = draw_with(folder / name.partition("/")[0], file_of(folder, name))
    assert [line for line in warned if not ("No LoRA keys" in line and name == "sd1/lora unet")] == []
    for output, values in drawn.items():
        assert distance(some(trained[name][output]), some(values)) < TOLERANCE, output
        for reader in RECORD["readers"]:
            assert distance(reader["adapters"][name]["drawn"][output], some(values)) < TOLERANCE, output


@pytest.mark.trains
@pytest.mark.parametrize(("kind", "words"), [("lora", []), ("dora", ["--use_dora", "--lora_alpha", "6"])])
def test_a_whole_run_writes_files_of_the_form_that_older_libraries_read(
    kind, words, tiny_base, photos_dir, tmp_path
):
    """Keys and metadata, where numbers of blocks and layers are the base's matter."""
    adapter = run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        *words,
        "--train_text_encoder",
        "--max_train_steps",
        "1",
        "--output_kohya_format",
    )
    forms = {f"sd1/{kind}": adapter}
    if kind == "lora":  # diffusers knows no DoRA in kohya's layout
        forms["sd1/lora kohya"] = adapter.parent / native.KOHYA_NAME
    for name, path in forms.items():
        now, then = content(path), RECORD["files"][name]
        assert now["layers"] == then["layers"], AGAIN
        assert now["metadata"] == then["metadata"], AGAIN


def test_a_base_that_is_not_read_whole_is_refused(trained, folder, tmp_path):
    """Else the libraries would draw what is missing, and the record would be of another model for each."""
    whole = folder / "sd1" / "text_encoder"
    state = load_file(whole / "model.safetensors")
    lacking = next(key for key in state if key.endswith("fc1.weight"))
    save_file(
        {key: tensor for key, tensor in state.items() if key != lacking},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"missing_keys.*fc1\.weight"):
        load_whole(CLIPTextModel, tmp_path)


def test_the_weights_are_the_same_numbers_everywhere():
    """A formula's: no generator of any library has a part in them."""
    assert [round(value * 2**23) for value in make_older_readers.numbers("x", 3).tolist()] == [
        -6233086,
        5546832,
        -6442139,
    ]
