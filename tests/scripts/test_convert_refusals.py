"""convert_adapter.py: what is doubtful is refused, and nothing is written of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_adapter
from dreambooth.adapter_files import native as adapter_files
from dreambooth.adapter_files import reading, writing
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Lora
from dreambooth.io.errors import UserError
from tests.scripts.converting import Modules, all_deltas, expect_close, run

ROOT = Path(__file__).parent.parent.parent


# ---- refusals


def damaged(case: str, source: Path, target: Path) -> Path:
    tensors = load_file(source)
    key = next(key for key in sorted(tensors) if key.endswith("to_k.lora_A.weight"))
    if case == "unknown key":
        tensors[key.replace("lora_A", "lora_C")] = torch.ones(2)
    elif case == "half":
        del tensors[key]
    elif case == "not finite":
        tensors[key][0, 0] = float("inf")
    elif case == "no component":
        tensors = {name.replace("unet.", "net."): tensor for name, tensor in tensors.items()}
    elif case == "other width":
        tensors[key] = torch.ones(4, 1024)
    save_file(tensors, target)
    return target


DAMAGED = {
    "unknown key": "belong to no kind of adapter",
    "half": r"has only up .*the adapter is incomplete",
    "not finite": "values that are not finite",
    "no component": "does not name the part of a base that it is for",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_doubtful_file_is_refused_in_one_line_and_nothing_is_written(case, native, tmp_path):
    source = damaged(case, native("lora"), tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    for words in (
        ["convert", source, "--to", "native"],
        ["resize", source, "--rank", 2],
        ["merge", source, native("lora")],
    ):
        with pytest.raises(UserError, match=DAMAGED[case]) as caught:
            run(*words, "--output", output)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=DAMAGED[case]):
        run("inspect", source)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_for_another_base_is_refused(native, tiny_base, tmp_path):
    source = damaged("other width", native("lora"), tmp_path / "a.safetensors")
    for words in (
        ["convert", source, "--to", "native", "--output", tmp_path / "b.safetensors"],
        ["bake", source, "--merge_to", tmp_path / "new"],
    ):
        with pytest.raises(UserError, match=r"has shape .*1024.* for another base"):
            run(*words, "--pretrained_model_name_or_path", tiny_base)
    with pytest.raises(
        UserError, match=r"different bases: unet\..*to_k of shape \(64, 64\) in .* and \(64, 1024\) in"
    ):
        run("merge", native("lora"), source, "--output", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_only_a_base_tells_is_asked_for(native, tiny_base, tmp_path):
    kohya = tmp_path / "k.safetensors"
    run(
        "convert",
        native("lora"),
        "--to",
        "kohya",
        "--output",
        kohya,
        "--pretrained_model_name_or_path",
        tiny_base,
    )
    output = ("--output", tmp_path / "b.safetensors")
    for words, message in (
        (
            ["convert", kohya, "--to", "native"],
            r"is a name in kohya's layout.*; give --pretrained_model_name_or_path",
        ),
        (
            ["convert", native("loha"), "--to", "lora"],
            r"is a loha, which has no kernel size; give --pretrained_model_name_or_path",
        ),
        (["resize", native("lokr"), "--rank", 2], r"is a lokr, which has no kernel size"),
        (
            ["convert", native("lora"), "--to", "kohya"],
            r"do not show which version it is for .*; give --pretrained",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(*words, *output)


def test_dora_is_not_merged(native, tmp_path):
    with pytest.raises(
        UserError,
        match=r"is a dora \(e\.g\. unet\..*magnitudes cannot be added; `bake` merges it into a base",
    ):
        run("merge", native("lora"), native("dora"), "--output", tmp_path / "m.safetensors")


def test_an_exact_lora_of_any_rank_is_written_and_read(tmp_path):
    modules: Modules = {"unet": {"x.to_k": Lora(torch.ones(600, 8), torch.ones(8, 600))}}
    (tmp_path / "a.safetensors").write_bytes(writing.write_native(Adapter(modules, {}), {}))
    run(
        "merge",
        tmp_path / "a.safetensors",
        f"{tmp_path / 'a.safetensors'}:2",
        "--output",
        tmp_path / "m.safetensors",
    )
    found = reading.read_additive(tmp_path / "m.safetensors")
    assert found.components["unet"]["x.to_k"].rank == 1200
    expect_close(found, {"unet.x.to_k": torch.full((8, 8), 1800.0)})


def test_the_input_is_never_written_over(native, tmp_path):
    source = tmp_path / adapter_files.ADAPTER_NAME
    source.write_bytes(before := native("lora").read_bytes())
    (tmp_path / "link.safetensors").symlink_to(source)
    for given, output in ((source, source), (tmp_path, source), (source, tmp_path / "link.safetensors")):
        with pytest.raises(UserError, match="exists; name a new file, or remove this one first"):
            run("resize", given, "--rank", 1, "--output", output)
    with pytest.raises(UserError, match="exists; name a new file, or remove this one first"):
        run("merge", f"{source}:2", native("lora"), "--output", source)
    assert source.read_bytes() == before


def test_folders_that_hold_something_are_left_alone(native, tiny_base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    bake = ("bake", native("lora"), "--pretrained_model_name_or_path", tiny_base, "--merge_to")
    peft = ("convert", native("lora"), "--to", "peft", "--output")
    for words, flag in ((bake, "--merge_to"), (peft, "--output")):
        with pytest.raises(UserError, match=rf"{flag}: .*full is not empty, it holds notes\.txt"):
            run(*words, tmp_path / "full")
        with pytest.raises(UserError, match=rf"{flag}: .* is a file"):
            run(*words, tmp_path / "full" / "notes.txt")
    with pytest.raises(UserError, match="which is read; name a folder outside of it"):
        run(*bake, tiny_base / "new")
    assert not (tiny_base / "new").exists()
    run(*bake, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").exists()


def test_bases_of_other_shapes_or_of_no_difference_have_nothing_to_extract(tiny_base, tiny_xl, tmp_path):
    from tests import tiny

    wide = tiny.build_pipeline(tmp_path / "wide", text_width=48)
    words = (
        "--pretrained_model_name_or_path",
        tiny_base,
        "--rank",
        2,
        "--output",
        tmp_path / "e.safetensors",
    )
    (tmp_path / "empty").mkdir()
    for tuned, message in (
        (wide, r"--tuned: \d+ weights have other shapes than the base's, e\.g\. .*32.*48"),
        (tiny_xl, "is a Stable Diffusion XL, and the base a Stable Diffusion 1"),
        (tiny_base, "nothing to extract: the two bases are the same"),
        (tmp_path / "empty", "--tuned: .* is not a diffusers pipeline folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run("extract", tuned, *words)
        assert "--pretrained_model_name_or_path" not in str(caught.value)
    assert not (tmp_path / "e.safetensors").exists()


# ---- flags


def refusal(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as refused:
        convert_adapter.parse_command([str(word) for word in words])
    out, err = capsys.readouterr()
    assert refused.value.code == 2
    assert out == ""
    return " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "",
            "the first word must be a command, one of inspect, convert, merge, resize, extract, bake; got ''",
        ),
        ("convret a", "got 'convret'"),
        ("convert a --to kohya --output b", "--output must be the name of a .safetensors file, got b"),
        (
            "convert a --to peft --output b.safetensors",
            "--output must be the name of a folder with --to peft",
        ),
        (
            "convert a --to native --output b.safetensors --rank 4",
            "--rank only works with --to lora or kohya",
        ),
        ("merge a --output b.safetensors", "--adapter: give 2 files or more, got 1"),
        ("merge a b:0 --output c.safetensors", "the weight must be a number other than 0, got b:0"),
        (
            "merge a b:nan --output c.safetensors",
            "--adapter: the weight of b must be a number from -100 to 100, got 'nan'",
        ),
        ("resize a --rank 0 --output b.safetensors", "--rank must be at least 1, got 0"),
        ("inspect a --variant fp16", "--variant only works with --pretrained_model_name_or_path"),
        (
            "bake a --pretrained_model_name_or_path b --variant ../x --merge_to c",
            "--variant must be letters and digits",
        ),
    ],
)
def test_a_wrong_flag_is_one_message_and_status_2(words, message, capsys):
    assert message in refusal(capsys, *words.split())


def test_two_wrong_flags_are_two_lines(capsys):
    message = refusal(capsys, "resize", "a", "--rank", 0, "--output", "b")
    assert "--rank must be" in message
    assert "--output must be" in message


def test_files_and_weights_are_told_apart_as_infer_does(native, layers, tmp_path, monkeypatch, capsys):
    """What infer.py refuses is refused in the same words, and what is a file as it stands has the weight
    1."""
    from dreambooth.options import adapter_sets

    for weight in ("1000", "nan"):
        with pytest.raises(UserError) as theirs:
            adapter_sets.split(f"b:{weight}", "--adapter")
        assert str(theirs.value) in refusal(capsys, "merge", "a", f"b:{weight}", "--output", "c.safetensors")
    monkeypatch.chdir(tmp_path)
    Path("a:2.safetensors").write_bytes(native("lora").read_bytes())
    run("merge", "a:2.safetensors", "a:2.safetensors:-0.5", "--output", "m.safetensors")
    whole = all_deltas(reading.read_additive(native("lora"), layers))
    expect_close(
        reading.read_additive(Path("m.safetensors"), layers),
        {name: 0.5 * delta for name, delta in whole.items()},
    )


def test_flags_come_from_a_file_too(native, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"adapter: {native('lora')}\nrank: 3\noutput: {tmp_path / 'r.safetensors'}\n"
    )
    run("resize", "--config", tmp_path / "c.yaml", "--rank", 1)
    assert {
        tensor.shape[0] for key, tensor in load_file(tmp_path / "r.safetensors").items() if "lora_A" in key
    } == {1}


@pytest.mark.slow
def test_the_script_answers_mistakes_without_its_slow_imports(tmp_path):
    """As a process: status 2, one line, no traceback; and no torch for --help."""
    words = [sys.executable, "convert_adapter.py", "inspect", str(tmp_path / "none.safetensors")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.safetensors'}: there is no such file\n"
    code = (
        "import sys; sys.argv = ['convert_adapter.py', '--help']; import runpy\ntry: "
        "runpy.run_path('convert_adapter.py', run_name='__main__')\n"
    )
    code += "except SystemExit as e: assert e.code == 0 and 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "extract" in done.stdout
