"""convert_adapter.py bake: the base with an adapter in its weights draws what base and adapter draw."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import convert_adapter
from dreambooth.adapter_files import reading, writing
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Lora
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.adapters import apply
from dreambooth.io.errors import UserError
from dreambooth.runtime import stops
from tests.adapter_files.files_made import peft_file
from tests.drawn_adapters import rotation_file
from tests.scripts.converting import Modules, run

# ---- bake


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a photo of sks dog",
        num_inference_steps=2,
        generator=generator,
        output_type="np",
        height=64,
        width=64,
    ).images


def open_pipeline(folder: Path) -> Any:
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    extra = {"add_watermarker": False} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    return kind.from_pretrained(folder, **extra)


def expect_same_pictures(baked: Path, base: Path, uses: list[tuple[Path, float]]) -> None:
    """The new base alone draws what plain diffusers draws with the base and the adapters."""
    pipeline = open_pipeline(base)
    bare = draw(pipeline)
    for number, (path, _) in enumerate(uses):
        pipeline.load_lora_weights(path, adapter_name=f"number{number}")
    pipeline.set_adapters([f"number{number}" for number in range(len(uses))], [weight for _, weight in uses])
    wanted, found = draw(pipeline), draw(open_pipeline(baked))
    assert np.abs(wanted - bare).max() > 1e-2
    assert np.abs(found - wanted).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "locon", "dora", "loha cp", "lokr"])
def test_a_baked_base_draws_what_base_and_adapter_draw(kind, native, tiny_base, tmp_path):
    base = ("--pretrained_model_name_or_path", tiny_base)
    weight = 1.0 if kind == "dora" else 0.7  # at any other weight peft's own DoRA is another model
    run("bake", f"{native(kind)}:{weight}", *base, "--merge_to", tmp_path / "baked")
    plain = native(kind)
    if kind.startswith(("loha", "lokr")):  # which plain diffusers does not load
        plain = tmp_path / "plain.safetensors"
        run("convert", native(kind), "--to", "lora", "--output", plain, *base)
    expect_same_pictures(tmp_path / "baked", tiny_base, [(plain, weight)])


@pytest.mark.slow
def test_a_baked_xl_draws_what_base_and_adapter_draw(xl_adapter, tiny_xl, tmp_path):
    run("bake", xl_adapter, "--pretrained_model_name_or_path", tiny_xl, "--merge_to", tmp_path / "baked")
    expect_same_pictures(tmp_path / "baked", tiny_xl, [(xl_adapter, 1.0)])


@pytest.mark.slow
def test_several_baked_adapters_add_up_dora_too(native, tiny_base, tmp_path):
    words = [native("dora"), f"{native('lora')}:-0.4"]
    run("bake", *words, "--pretrained_model_name_or_path", tiny_base, "--merge_to", tmp_path / "baked")
    expect_same_pictures(tmp_path / "baked", tiny_base, [(native("dora"), 1.0), (native("lora"), -0.4)])


def expect_weights_of_infer(baked: Path, base: Path, layers: Layers, adapter: Path, weight: float) -> None:
    """The new base has the weights that infer.py draws with when it works the adapter in."""
    pipeline, found = open_pipeline(base), open_pipeline(baked)
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    changed = 0
    before = {name: model.state_dict() for name, model in copy.deepcopy(models).items()}
    with apply.fused(models, [(reading.read(adapter, layers), weight)]):
        for name, model in models.items():
            own = getattr(found, name).state_dict()
            for key, tensor in model.state_dict().items():
                change = tensor - before[name][key]
                changed += bool(change.any())
                assert (own[key] - tensor).norm() <= 1e-3 * change.norm(), key
    assert changed > 10


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.01, 0.5, -2])
def test_the_weight_of_a_baked_dora_is_that_of_all_it_changes(weight, native, layers, tiny_base, tmp_path):
    run(
        "bake",
        f"{native('dora')}:{weight}",
        "--pretrained_model_name_or_path",
        tiny_base,
        "--merge_to",
        tmp_path / "baked",
    )
    expect_weights_of_infer(tmp_path / "baked", tiny_base, layers, native("dora"), weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oft", "boft", "hra"])
def test_what_turns_weights_is_shown_and_baked(name, layers, tiny_base, tmp_path, capsys):
    path = rotation_file(open_pipeline(tiny_base), name, tmp_path / "turned.safetensors")
    base = ("--pretrained_model_name_or_path", tiny_base)
    run("inspect", path, *base)
    shown = capsys.readouterr().out
    assert re.search(rf"^unet +{name} +\d+  {8 if name == 'oft' else 4}$", shown, re.MULTILINE)
    assert "fits" in shown
    with pytest.raises(
        UserError, match=rf"is {name.upper()}, which rotates weights: its own weight must be 1, got 0\.5"
    ):
        run("bake", f"{path}:0.5", *base, "--merge_to", tmp_path / "baked")
    run("bake", path, *base, "--merge_to", tmp_path / "baked")
    expect_weights_of_infer(tmp_path / "baked", tiny_base, layers, path, 1.0)
    with pytest.raises(UserError, match=r"`bake` merges it into a base, and infer\.py draws with it"):
        run("convert", path, *base, "--to", "lora", "--output", tmp_path / "l.safetensors")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_baked_base_is_the_base_but_for_its_weights(adapted, layers, tiny_base, tmp_path):
    """The same keys and files; parts without an adapter, tokenizers and whatever else byte for byte; the same
    bytes again."""
    adapter = reading.read_additive(
        peft_file(tmp_path / "peft.safetensors", {"unet": adapted("lora")["unet"]}), layers
    )
    (tmp_path / "a.safetensors").write_bytes(writing.write_native(adapter, {}))
    for name in ("one", "two"):
        run(
            "bake",
            tmp_path / "a.safetensors",
            "--pretrained_model_name_or_path",
            tiny_base,
            "--merge_to",
            tmp_path / name,
        )
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    before, after = tree(tiny_base), tree(tmp_path / "one")
    assert after.keys() == before.keys()
    assert {name for name, data in after.items() if data != before[name]} == {
        "unet/diffusion_pytorch_model.safetensors"
    }
    old, new = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (tiny_base, tmp_path / "one")
    )
    assert new.keys() == old.keys()
    changed = {
        key.removesuffix(".weight") for key, tensor in new.items() if not torch.equal(tensor, old[key])
    }
    assert changed == adapter.components["unet"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors",
        "one",
        "peft.safetensors",
        "two",
    ]  # nothing half done


@pytest.fixture(scope="module")
def odd_base(tiny_base, tmp_path_factory) -> Path:
    """The base as the hub has many: float16 as a variant, the UNet in several files, keys with `text_model.`,
    older files beside it, links, a part that is named and not there."""
    folder = tmp_path_factory.mktemp("odd") / "base"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None, dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="300KB")
    assert (
        len(
            list((folder / "unet").glob("*.fp16-*.safetensors"))
            + list((folder / "unet").glob("*-of-*.fp16.safetensors"))
        )
        > 1
    )
    (text,) = (folder / "text_encoder").glob("model*.safetensors")
    tensors = load_file(text)
    save_file(
        {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()},
        text,
        {"format": "pt"},
    )
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"older")
    (folder / "whole.ckpt").write_bytes(b"everything")
    (folder / ".git").mkdir()
    (folder / "real.md").write_text("hello")
    (folder / "README.md").symlink_to("real.md")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_variants_and_files_in_pieces_come_out_as_a_plain_base(dtype, odd_base, native, tmp_path, capsys):
    words = ["--pretrained_model_name_or_path", odd_base, "--variant", "fp16", "--merge_to", tmp_path / "new"]
    run("bake", native("lora"), *words, *(["--dtype", dtype] if dtype else []))
    names = tree(tmp_path / "new")
    assert not [name for name in names if "fp16" in name or name.endswith((".bin", ".ckpt"))]
    assert names["README.md"] == b"hello"
    said = capsys.readouterr().out
    assert "note: unet/diffusion_pytorch_model.bin is not copied" in said
    assert "note: whole.ckpt is not copied" in said
    assert "no folder safety_checker" in said
    wanted = {None: torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for part in ("unet", "text_encoder"):
        for path in (tmp_path / "new" / part).glob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(path).values()} == {wanted}
    assert all(
        key.startswith("text_model.")
        for key in load_file(tmp_path / "new" / "text_encoder" / "model.safetensors")
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "new", dtype=torch.float32)
    base = StableDiffusionPipeline.from_pretrained(
        odd_base, variant="fp16", dtype=torch.float32, safety_checker=None
    )
    base.load_lora_weights(native("lora"))
    base.fuse_lora()
    base.unload_lora_weights()
    for part in ("unet", "text_encoder"):
        found, expected = (dict(getattr(p, part).named_parameters()) for p in (pipeline, base))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(
                found[key], tensor.to(wanted).float(), rtol=2 * torch.finfo(wanted).eps, atol=1e-6
            ), key


def test_a_value_too_large_for_half_precision_is_refused_and_leaves_nothing(tiny_base, tmp_path):
    modules: Modules = {
        "unet": {"conv_in": Lora(torch.full((1, 4, 3, 3), 300.0), torch.full((32, 1, 1, 1), 300.0))}
    }
    (tmp_path / "a.safetensors").write_bytes(writing.write_native(Adapter(modules, {}), {}))
    words = (
        "bake",
        tmp_path / "a.safetensors",
        "--pretrained_model_name_or_path",
        tiny_base,
        "--merge_to",
        tmp_path / "new",
        "--dtype",
        "fp16",
    )
    with pytest.raises(
        UserError, match=r"unet\.conv_in\.weight is not finite in float16; give another --dtype"
    ):
        run(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_signal_in_the_middle_leaves_nothing(native, tiny_base, tmp_path, monkeypatch):
    def interrupted(*args: object) -> None:
        raise stops.Stop("interrupted", 130)

    monkeypatch.setattr(convert_adapter.base_weights, "save_file", interrupted)
    with pytest.raises(SystemExit) as left:
        run(
            "bake",
            native("lora"),
            "--pretrained_model_name_or_path",
            tiny_base,
            "--merge_to",
            tmp_path / "new",
        )
    assert left.value.code == 130
    assert not list(tmp_path.iterdir())
