"""Metadata that change pictures are obeyed, kept or said, as the table in docs/adapters.md says."""

import re
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_adapter
from dreambooth.adapter_files import reading, run_info, writing
from dreambooth.adapters import variants
from dreambooth.bases import families
from dreambooth.io.errors import UserError
from dreambooth.options import adapter_sets
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions
from tests.drawn_adapters import ATTENTION, adapter_of, lora

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
KOHYA = {"ss_base_model_version": "sd_v1", "ss_clip_skip": "2"}


@pytest.mark.parametrize(
    ("metadata", "info"),
    [
        ({}, {}),
        (KOHYA, {"clip_skip": 1}),
        ({"ss_clip_skip": "1"}, {"clip_skip": 0}),
        ({"ss_clip_skip": " 3 "}, {"clip_skip": 2}),
        *[({"ss_clip_skip": text}, {}) for text in ("None", "", "0", "-2", "2.5", "two", "999", "\u0662")],
        ({"ss_clip_skip": "2", "ss_base_model_version": "sdxl_base_v1-0"}, {}),
        ({"ss_clip_skip": "2", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, {}),
        ({"ss_clip_skip": "2", "dreambooth": '{"clip_skip": 0}'}, {"clip_skip": 0}),
        ({"ss_clip_skip": "2", "dreambooth": '{"clip_skip": true}'}, {"clip_skip": 1}),
        *[({"dreambooth": text}, {}) for text in ("[", "[1]", "null", '{"clip_skip": -1}', "[" * 10_000)],
        ({"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ({"ss_v_parameterization": "False"}, {"prediction_type": "epsilon"}),
        ({"ss_base_model_version": "sd_v2_v"}, {"prediction_type": "v_prediction"}),
        ({"ss_base_model_version": "sd_v2"}, {}),
        ({"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, {"prediction_type": "v_prediction"}),
        ({"ss_zero_terminal_snr": "True"}, {"zero_terminal_snr": True}),
        (
            {"ss_resolution": "(512, 512)", "ss_seed": "3", "ss_steps": "9"},
            {"resolution": 512, "seed": 3, "steps": 9},
        ),
        ({"ss_resolution": "(512, 768)", "ss_seed": "x"}, {}),
    ],
)
def test_the_run_is_read_from_the_metadata(metadata, info):
    assert run_info.of(metadata) == info


@pytest.fixture(scope="module")
def kohya_file(layers, tmp_path_factory):
    """A function: the file of a LoRA in kohya's layout with these fields, without our record."""
    data = writing.write_kohya(adapter_of(layers, lora, ATTENTION), "sd1", {})
    folder = tmp_path_factory.mktemp("kohya")
    (folder / "plain.safetensors").write_bytes(data)

    def with_fields(name: str, **fields: str) -> Path:
        path = folder / f"{name}.safetensors"
        save_file(load_file(folder / "plain.safetensors"), path, fields)
        return path

    return with_fields


def converted(source: Path, output: Path, to: str, base: Path, *more: str) -> Path:
    words = ["convert", source, "--to", to, "--output", output, *more]
    convert_adapter.main(
        convert_adapter.parse_command([*map(str, words), "--pretrained_model_name_or_path", str(base)])
    )
    return output


def test_clip_skip_is_kept_by_every_conversion(kohya_file, tiny_base, layers, tmp_path):
    source = kohya_file("skipping", **KOHYA)
    native = converted(source, tmp_path / "native.safetensors", "native", tiny_base)
    peft = converted(native, tmp_path / "peft", "peft", tiny_base)
    lora = converted(peft, tmp_path / "lora.safetensors", "lora", tiny_base, "--rank", "2")
    back = converted(lora, tmp_path / "kohya.safetensors", "kohya", tiny_base)
    for path in (source, native, peft, lora, back):
        assert run_info.of(reading.read(path, layers).metadata)["clip_skip"] == 1, path
    with safe_open(back, "pt") as file:
        assert file.metadata()["ss_clip_skip"] == "2"


def test_kohya_fields_count_as_the_programs_do_and_are_left_out_where_nothing_changes():
    assert run_info.kohya_fields({"clip_skip": 1}, "sd1") == {"ss_clip_skip": "2"}
    assert run_info.kohya_fields({"clip_skip": 1}, "sdxl") == {"ss_clip_skip": "3"}
    for info in ({}, {"clip_skip": 0}, {"clip_skip": None}, {"prediction_type": "epsilon"}):
        assert run_info.kohya_fields(info, "sd1") == {}
    assert run_info.kohya_fields({"prediction_type": "v_prediction", "zero_terminal_snr": True}, "sd2") == {
        "ss_v_parameterization": "True",
        "ss_zero_terminal_snr": "True",
    }


def merged(first: Path, second: Path, output: Path, base: Path) -> dict:
    words = ["merge", first, f"{second}:0.5", "--output", output, "--pretrained_model_name_or_path", base]
    convert_adapter.main(convert_adapter.parse_command(list(map(str, words))))
    return run_info.of(reading.read(output).metadata)


def test_merging_keeps_equal_values_and_says_different_ones(kohya_file, tiny_base, tmp_path, capsys):
    one, two = kohya_file("one", **KOHYA), kohya_file("two", ss_v_parameterization="True", **KOHYA)
    info = merged(one, two, tmp_path / "a.safetensors", tiny_base)
    assert info == {"clip_skip": 1, "prediction_type": "v_prediction"}
    assert "different" not in capsys.readouterr().out
    other = kohya_file("other", ss_v_parameterization="False")
    assert merged(two, other, tmp_path / "b.safetensors", tiny_base) == {}
    said = capsys.readouterr().out
    assert re.search(
        r"note: the adapters were trained with different clip_skip \(.*two.*: 1, .*other.*: 0\)", said
    )
    assert "different prediction_type" in said


def test_drawing_obeys_clip_skip_and_a_flag_replaces_it(kohya_file, tiny_base):
    base = families.find(BaseOptions(str(tiny_base)))
    sets = adapter_sets.of([str(kohya_file("drawn", **KOHYA))], (), None)
    for flag, skipped in ((None, 1), (0, 0)):
        (adapter,) = variants.read_adapters(sets, base, flag).values()
        assert adapter.clip_skip == skipped


def test_more_skipped_layers_than_the_base_has_are_refused_with_the_file(kohya_file, tiny_base):
    base = families.find(BaseOptions(str(tiny_base)))
    path = str(kohya_file("deep", ss_clip_skip="12"))
    options = InferOptions(base.options, prompt=("dog",), adapter=(path,))
    sets = adapter_sets.of([path], (), None)
    loaded = variants.read_adapters(sets, base, None)
    with pytest.raises(UserError, match=r"--clip_skip must be at most .*deep\.safetensors; give --clip_skip"):
        variants.check(options.drawing, 2, variants.plan(options, sets, loaded, ["dog"]), loaded, base)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (KOHYA, None),
        ({"ss_v_parameterization": "True"}, "predicts v_prediction, and this base predicts epsilon"),
        ({"modelspec.prediction_type": "edm"}, "predicts edm, and this base predicts epsilon"),
        ({"ss_zero_terminal_snr": "True"}, "ss_zero_terminal_snr"),
        (
            {"ss_base_model_version": "sd_v2"},
            "is for Stable Diffusion 2.x, and this base is a Stable Diffusion 1",
        ),
        ({"ss_base_model_version": "flux1"}, "is for flux1"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "is for Stable Diffusion XL"),
        ({"ss_clip_skip": "-2"}, "ss_clip_skip -2 of x is not used"),
        ({"ss_noise_offset": "0.1", "ss_scale_weight_norms": "1.0", "ss_network_args": "{}"}, None),
        ({"dreambooth": '{"prediction_type": [1], "zero_terminal_snr": 3}'}, None),
    ],
)
def test_what_speaks_against_the_base_is_noted(fields, said, tiny_base):
    notes = run_info.notes("x", fields, families.find(BaseOptions(str(tiny_base))))
    assert (notes == []) if said is None else (len(notes) == 1 and said in notes[0]), notes


def test_a_velocity_adapter_on_its_own_base_gives_no_note(tiny_v_base):
    base = families.find(BaseOptions(str(tiny_v_base)))
    assert run_info.notes("x", {"ss_v_parameterization": "True"}, base) == []
    assert "predicts epsilon" in run_info.notes("x", {"ss_v_parameterization": "False"}, base)[0]


def test_inspect_shows_what_is_understood(kohya_file, capsys):
    path = kohya_file("shown", ss_v_parameterization="True", **KOHYA)
    convert_adapter.main(convert_adapter.parse_command(["inspect", str(path)]))
    said = capsys.readouterr().out
    assert re.search(r"^clip_skip +1 ", said, re.MULTILINE)
    assert re.search(r"^prediction_type +v_prediction", said, re.MULTILINE)


def test_the_table_of_the_documentation_says_what_is_done(tiny_base):
    """Each field of the table is put into metadata, alone, with a value against a plain base."""
    rows = re.findall(
        r"^\| `((?:ss_|modelspec\.)[\w.]+)` \| `([^`]+)` \| (\w+)\b", DOCS.read_text(), re.MULTILINE
    )
    assert len(rows) >= 10
    base = families.find(BaseOptions(str(tiny_base)))
    for field, value, action in rows:
        metadata = {field: value}
        is_kept = run_info.of(metadata) != {}
        is_noted = run_info.notes("x", metadata, base) != []
        expected = {
            "obeyed": (True, False),
            "kept": (True, False),
            "said": (is_kept, True),
            "unused": (False, False),
        }
        assert (is_kept, is_noted) == expected[action], (field, action)
