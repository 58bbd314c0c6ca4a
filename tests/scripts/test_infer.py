"""infer.py with adapters of any kind, in sets, at weights, on one process or two."""

import copy
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from dreambooth.adapter_files import reading, writing
from dreambooth.adapters import apply
from dreambooth.adapters.variants import Variant
from dreambooth.bases import families, pipelines
from dreambooth.files import pictures
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io.errors import UserError
from dreambooth.options import adapter_sets
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions
from tests.drawn_adapters import (
    ATTENTION,
    KINDS,
    adapter_of,
    by_hand,
    lora,
    mixed,
    rotation_file,
)
from tests.running import main_on_two_processes

# --- words: files, weights, sets


def test_a_weight_is_split_off_unless_a_file_has_that_name(tmp_path):
    assert adapter_sets.split("out", "--adapter") == (Path("out"), 1.0)
    assert adapter_sets.split("out:0.5", "--adapter") == (Path("out"), 0.5)
    assert adapter_sets.split("out:-1e-1", "--adapter") == (Path("out"), -0.1)
    assert adapter_sets.split("a:b/c", "--adapter") == (Path("a:b/c"), 1.0)
    assert adapter_sets.split("run 12:30.safetensors:2", "--adapter") == (Path("run 12:30.safetensors"), 2.0)
    odd = tmp_path / "out:2"
    odd.mkdir()
    assert adapter_sets.split(str(odd), "--adapter") == (odd, 1.0)
    assert adapter_sets.split(f"{odd}:3", "--adapter") == (odd, 3.0)
    assert adapter_sets.split(":2", "--adapter") == (
        Path(":2"),
        1.0,
    )  # not the folder that the script is started in


def sets_of(words: list[str]) -> list[adapter_sets.AdapterSet]:
    options = parse(InferOptions, "", words)
    return adapter_sets.of(options.adapter, options.adapter_weights, options.adapters_file)


def test_factors_are_for_all_or_for_one_by_name(tmp_path):
    words = [
        "--pretrained_model_name_or_path",
        "b",
        "--prompt",
        "p",
        "--adapter",
        "runs/dog/pytorch_lora_weights.safetensors:0.5",
        "my cat.safetensors",
    ]
    words += ["--adapter_weights", "unet=0.8,text_encoder=0", "my_cat:unet=2,unet.up_blocks=3"]
    (found,) = sets_of(words)
    assert [(choice.name, choice.weight) for choice in found.adapters] == [("dog", 0.5), ("my_cat", 1.0)]
    assert found.adapters[0].weights == {"": 0.5, "unet": 0.4, "text_encoder": 0.0}
    assert found.scaled(0.5).adapters[1].weights == {
        "": 0.5,
        "unet": 1.0,
        "text_encoder": 0.0,
        "unet.up_blocks": 1.5,
    }


def test_a_key_that_is_twice_in_a_set_is_refused(tmp_path):
    path = tmp_path / "sets.yaml"
    path.write_text("dog:\n  adapters: [my_dog]\n  prompts: a dog\n  adapters: [other]\n")
    words = ["--pretrained_model_name_or_path", "b", "--prompt", "p", "--adapters_file", str(path)]
    with pytest.raises(UserError, match=r"sets\.yaml: line 4: adapters is given twice"):
        sets_of(words)


@pytest.mark.parametrize("how", ["yes", "no"])
def test_fusing_needs_an_adapter(how, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(InferOptions, "", ["--pretrained_model_name_or_path", "b", "--prompt", "p", "--fuse", how])
    assert refused.value.code == 2
    assert "--fuse needs an --adapter" in capsys.readouterr().err


def test_sets_come_from_a_file(tmp_path):
    path = tmp_path / "sets.yaml"
    path.write_text(
        "dog: [my_dog, style.safetensors:0.6]\nplain: []\n2:"
        " {adapters: my_cat, prompts: a cat, weights: [unet=0.5]}\n"
    )
    words = ["--pretrained_model_name_or_path", "b", "--prompt", "p", "--adapters_file", str(path)]
    dog, plain, cat = sets_of(words)
    assert [(str(choice.path), choice.weight) for choice in dog.adapters] == [
        ("my_dog", 1.0),
        ("style.safetensors", 0.6),
    ]
    assert (dog.prompts, plain.adapters, cat.name, cat.prompts) == ((), (), "2", ("a cat",))
    assert cat.adapters[0].weights == {"": 1.0, "unet": 0.5}


# --- the script


@pytest.fixture(scope="module")
def files(layers, base_pipeline, tmp_path_factory) -> Path:
    """Adapter files of several kinds and layouts."""
    folder = tmp_path_factory.mktemp("adapters")
    plain = adapter_of(layers, lora, ATTENTION)
    (folder / "lora.safetensors").write_bytes(writing.write_native(plain, {}))
    (folder / "kohya.safetensors").write_bytes(writing.write_kohya(plain, "sd1", {}))
    for kind in ("dora", "loha"):
        (folder / f"{kind}.safetensors").write_bytes(
            writing.write_native(adapter_of(layers, KINDS[kind], ATTENTION), {"clip_skip": 1})
        )
    (folder / "mixed.safetensors").write_bytes(writing.write_kohya(adapter_of(layers, mixed), "sd1", {}))
    rotation_file(copy.deepcopy(base_pipeline), "oft", folder / "oft.safetensors")
    return folder


def words_of(base: Path, out: Path, *more: str) -> list[str]:
    words = [
        "--pretrained_model_name_or_path",
        str(base),
        "--num_inference_steps",
        "2",
        "--output_dir",
        str(out),
        *more,
    ]
    return words if "--prompt" in words else [*words, "--prompt", "a dog"]


def run(base: Path, out: Path, *more: str) -> list[dict]:
    """Draw in process; the records of the pictures."""
    infer.main(parse(InferOptions, "", words_of(base, out, *more)))
    return json.loads((out / "images.json").read_text())


def pixels(out: Path, records: list[dict]) -> list[bytes]:
    return [np.asarray(Image.open(out / record["file"])).tobytes() for record in records]


@pytest.mark.slow
def test_a_kohya_file_draws_what_the_native_file_draws(tiny_base, files, tmp_path):
    found = [
        pixels(
            tmp_path / name, run(tiny_base, tmp_path / name, "--adapter", str(files / f"{name}.safetensors"))
        )
        for name in ("lora", "kohya")
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_dora_on_the_text_encoder_draws_as_its_arithmetic_says(
    tiny_base, files, layers, base_pipeline, tmp_path
):
    """diffusers drops its magnitudes there when they have peft's own spelling."""
    path = str(files / "dora.safetensors")
    records = run(
        tiny_base, tmp_path / "ours", "--adapter", path, "--fuse", "no", "--seeds", "3", "--clip_skip", "0"
    )
    own = by_hand(base_pipeline, [(reading.read(Path(path), layers), lambda place: 1.0)])  # type: ignore[list-item]
    expected = own(["a dog"], num_inference_steps=2, generator=[torch.Generator().manual_seed(3)]).images[0]
    found = np.asarray(Image.open(tmp_path / "ours" / records[0]["file"])).astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 1
    half = copy.deepcopy(base_pipeline)
    half.unet = own.unet
    wrong = half(["a dog"], num_inference_steps=2, generator=[torch.Generator().manual_seed(3)]).images[0]
    assert np.abs(found - np.asarray(wrong)).max() > 1


@pytest.mark.slow
def test_a_sweep_is_a_row_of_weights_from_the_base_on(tiny_base, files, tmp_path, capsys):
    words = ["--adapter", str(files / "lora.safetensors"), f"{files / 'mixed.safetensors'}:0.5"]
    records = run(
        tiny_base, tmp_path / "sweep", *words, "--sweep", "0,0.5,1", "--compare", "--seeds", "3", "4"
    )
    said = capsys.readouterr().out
    assert [record["adapters"][0]["weight"] if record["adapters"] else None for record in records] == [
        None,
        None,
        0,
        0,
        0.5,
        0.5,
        1,
        1,
    ]
    assert [record["adapters"][1]["weight"] for record in records[2:]] == [0, 0, 0.25, 0.25, 0.5, 0.5]
    assert records[0]["adapter"] is None
    assert records[2]["adapter"] is None
    assert records[4]["adapter"] == "lora.safetensors + mixed.safetensors"
    digest = records[4]["adapters"][0]["sha256"]
    assert digest == hashlib.sha256((files / "lora.safetensors").read_bytes()).hexdigest()[:16]
    found = pixels(tmp_path / "sweep", records)
    assert found[:2] == found[2:4]  # weight 0 is the base, bit for bit
    assert len(set(found)) == 6
    settings = json.loads(Image.open(tmp_path / "sweep" / records[4]["file"]).info["dreambooth"])
    assert settings == {key: value for key, value in records[4].items() if key != "file"}
    assert Image.open(tmp_path / "sweep" / "contact_sheet.png").width > 8 * 160
    assert all(word in said for word in ("adapter x 0.5", "dora", "lokr", "(fused)"))
    alone = run(tiny_base, tmp_path / "alone", *words, "--seeds", "3", "4")
    assert pixels(tmp_path / "alone", alone) == found[6:]


@pytest.mark.slow
def test_sets_are_swapped_without_loading_the_base_again(tiny_base, files, tmp_path, monkeypatch, capsys):
    (tmp_path / "sets.yaml").write_text(
        f"one: [{files}/lora.safetensors]\ntwo: [{files}/loha.safetensors:0.5]\nturned:"
        f" [{files}/oft.safetensors]\n"
        f"again:\n  adapters: {files}/lora.safetensors\n  prompts: [a dog, a cat]\nplain: []\n"
    )
    loads = []
    load = pipelines.load_pipeline

    def counted(*args: Any) -> Any:
        loads.append(args)
        return load(*args)

    monkeypatch.setattr(pipelines, "load_pipeline", counted)
    records = run(
        tiny_base,
        tmp_path / "out",
        "--adapters_file",
        str(tmp_path / "sets.yaml"),
        "--compare",
        "--batch_size",
        "1",
    )
    said = capsys.readouterr().out
    assert len(loads) == 1
    assert [(record["set"], record["prompt"]) for record in records] == [
        *((None, prompt) for prompt in ("a dog", "a cat")),
        *((name, "a dog") for name in ("one", "two", "turned")),
        *(("again", prompt) for prompt in ("a dog", "a cat")),
        ("plain", "a dog"),
    ]
    base, _, one, two, turned, again, _, plain = pixels(tmp_path / "out", records)
    assert one == again
    assert len({one, two, turned}) == 3
    assert base == plain
    assert (records[2]["clip_skip"], records[3]["clip_skip"]) == (0, 1)
    assert "note: the sets are drawn with different clip_skip" in said


@pytest.mark.slow
def test_parts_have_factors_on_the_command_line(tiny_base, files, tmp_path):
    path = str(files / "mixed.safetensors")
    base = run(tiny_base, tmp_path / "base")
    none = run(tiny_base, tmp_path / "none", "--adapter", path, "--adapter_weights", "unet=0,text_encoder=0")
    some = run(
        tiny_base,
        tmp_path / "some",
        "--adapter",
        path,
        "--adapter_weights",
        "unet=0,text_encoder=0",
        "mixed:unet.up_blocks=0.5",
    )
    assert pixels(tmp_path / "none", none) == pixels(tmp_path / "base", base)
    assert pixels(tmp_path / "some", some) != pixels(tmp_path / "base", base)
    assert some[0]["adapters"][0]["weights"] == {"unet": 0.0, "text_encoder": 0.0, "unet.up_blocks": 0.5}


def test_the_table_says_what_will_be_drawn(tiny_base, files, tmp_path, capsys):
    run(
        tiny_base,
        tmp_path / "out",
        "--adapter",
        str(files / "lora.safetensors"),
        f"{files / 'dora.safetensors'}:0.5",
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["adapter", "lora", "unet", "lora", "32", "3", "1", "(fused)"] in lines
    assert ["adapter", "dora", "text_encoder", "dora", "12", "2", "0.5", "(fused)"] in lines
    assert "note: the adapters were trained with different clip_skip" in " ".join(
        " ".join(line) for line in lines
    )


@pytest.mark.slow
def test_both_text_encoders_of_xl_wear_adapters(tiny_xl, tmp_path):
    base = families.find(BaseOptions(str(tiny_xl)))
    adapter = adapter_of(base.layers(), mixed)
    assert adapter.components.keys() == {"unet", "text_encoder", "text_encoder_2"}
    path = tmp_path / "xl.safetensors"
    path.write_bytes(writing.write_kohya(adapter, "sdxl", {}, depth=1))
    plain = run(tiny_xl, tmp_path / "plain")
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        others = ",".join(f"{name}={int(name == part)}" for name in adapter.components)
        records = run(tiny_xl, tmp_path / part, "--adapter", str(path), "--adapter_weights", others)
        found[part] = pixels(tmp_path / part, records)[0]
    assert len({*found.values(), *pixels(tmp_path / "plain", plain)}) == 4

    pipeline = pipelines.load_pipeline(base, torch.float32, torch.device("cpu"))
    models = {part: getattr(pipeline, part) for part in adapter.components}
    stack = apply.Stack(models)
    stack.add("xl", reading.read(path, base.layers()))
    found_embeds, found_pooled = [], []
    for how in ("yes", "no"):
        with stack.activated({"xl": 1.0}, how), torch.no_grad():
            told = pipelines.text_of(pipeline, base)(["a dog"])
        assert told.pooled is not None
        found_embeds.append(told.embeds)
        found_pooled.append(told.pooled)
    assert torch.allclose(found_embeds[0], found_embeds[1], atol=1e-5)
    assert torch.allclose(found_pooled[0], found_pooled[1], atol=1e-5)


def test_adapters_of_two_bases_are_refused(tiny_base, tiny_xl, files, tmp_path):
    other = tmp_path / "xl.safetensors"
    adapter = adapter_of(families.find(BaseOptions(str(tiny_xl))).layers(), lora, ATTENTION)
    other.write_bytes(writing.write_native(adapter, {}))
    with pytest.raises(UserError, match=r"--adapter: .*xl\.safetensors.*base"):
        run(tiny_base, tmp_path / "out", "--adapter", str(files / "lora.safetensors"), str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_draw_the_bytes_of_one(tiny_base, files, tmp_path, capfd):
    (tmp_path / "sets.yaml").write_text(
        f"one: [{files}/lora.safetensors]\ntwo: [{files}/mixed.safetensors:0.5, {files}/loha.safetensors]\n"
    )
    words = [
        "--adapters_file",
        str(tmp_path / "sets.yaml"),
        "--compare",
        "--batch_size",
        "2",
        "--num_threads",
        "1",
        "--seeds",
        "1",
        "2",
        "3",
    ]
    words += ["--prompt", "a dog", "a cat"]
    records = run(tiny_base, tmp_path / "one", *words)
    options = parse(InferOptions, "", words_of(tiny_base, tmp_path / "two", *words))
    capfd.readouterr()
    main_on_two_processes(infer.main, options)
    assert capfd.readouterr().out.count("wrote 18 pictures") == 1
    names = [*(record["file"] for record in records), "images.json", "contact_sheet.png"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        *names,
        ".lock",
        ".written.jsonl",
        ".written.1.jsonl",
    }


@pytest.mark.slow
def test_who_drew_the_sets_before_does_not_change_a_picture(tiny_base, files, layers, tmp_path, monkeypatch):
    """The second of two processes draws none of the first set: its layers must lie one in another as if it
    had."""
    wide = {kind: adapter_of(layers, KINDS[kind]) for kind in ("loha", "lokr")}
    for kind, adapter in wide.items():
        (tmp_path / f"{kind}.safetensors").write_bytes(writing.write_native(adapter, {}))
    loha, lokr = (f"{tmp_path}/{kind}.safetensors" for kind in wide)
    sets = f"one: [{loha}]\ntwo: [{lokr}, {loha}]\n"
    (tmp_path / "sets.yaml").write_text(sets)
    words = ["--adapters_file", str(tmp_path / "sets.yaml"), "--mixed_precision", "bf16"]
    (_, second) = run(tiny_base, tmp_path / "alone", *words)
    draw_all = infer.draw_all

    def as_second(*args: Any) -> None:
        *front, _, watch = args
        peers: Any = SimpleNamespace(world=2, rank=1, is_main=True)
        draw_all(*front, peers, watch)  # type: ignore[call-arg]

    monkeypatch.setattr(infer, "draw_all", as_second)
    monkeypatch.setattr(infer, "collect", lambda *_: None)  # of pictures that the first would have drawn
    infer.main(parse(InferOptions, "", words_of(tiny_base, tmp_path / "second", *words)))
    assert [path.name for path in (tmp_path / "second").glob("*.png")] == [second["file"]]
    assert pixels(tmp_path / "second", [second]) == pixels(tmp_path / "alone", [second])


@pytest.mark.parametrize("size", [(512, 384), (321, 200), (160, 160), (100, 90), (64, 64)])
def test_the_sheet_is_that_of_the_pictures_at_full_size_and_holds_none_of_them(size, tmp_path, monkeypatch):
    options = parse(InferOptions, "", words_of(Path("b"), tmp_path, "--seeds", "1", "2"))
    noise = np.random.default_rng(0)
    records = [{"file": f"{number}.png"} for number in range(2)]
    images = [Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in records]
    for image, record in zip(images, records, strict=True):
        image.save(tmp_path / record["file"])
    wanted = pictures.contact_sheet([("a dog", images)], ["seed 1", "seed 2"])
    held: list[tuple[int, int]] = []
    contact_sheet = pictures.contact_sheet

    def watched(rows, *args):
        held.extend(image.size for _, own in rows for image in own)
        return contact_sheet(rows, *args)

    monkeypatch.setattr(pictures, "contact_sheet", watched)
    columns = [Variant("base", None, 0, (("a dog", 1), ("a dog", 2)))]
    infer.collect(options, columns, records, WrittenFiles(tmp_path))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "contact_sheet.png")), np.asarray(wanted))
    assert all(max(own) <= 160 for own in held)


def test_a_run_that_is_stopped_leaves_whole_pictures_and_no_list(tiny_base, tmp_path, monkeypatch):
    """Not even that of an earlier run in the same folder."""
    out = tmp_path / "out"
    run(tiny_base, out, "--seeds", "1", "2")
    draw, calls = pipelines.draw, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 15)
        return draw(*args, **kwargs)

    monkeypatch.setattr(pipelines, "draw", stopping)
    with pytest.raises(SystemExit) as stopped:
        run(tiny_base, out, "--seeds", "5", "6", "--batch_size", "1")
    assert stopped.value.code == 128 + 15
    assert {path.name for path in out.iterdir()} == {
        *(".lock", ".written.jsonl", "00000_1.png", "00001_2.png", "00000_5.png")
    }
    Image.open(out / "00000_5.png").load()


def test_a_picture_is_written_whole_or_not_at_all(tiny_base, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit):
        run(tiny_base, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}
