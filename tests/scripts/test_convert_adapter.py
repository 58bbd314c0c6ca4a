"""convert_adapter.py: what each command writes is what plain diffusers and peft make of the adapter; nothing is written of what is doubtful."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import convert_adapter
from dreambooth.adapter_files import deltas, reading, writing
from dreambooth.adapter_files import native as adapter_files
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Lora
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.adapters import apply
from dreambooth.bases import families
from dreambooth.errors import UserError
from dreambooth.options.training import BaseOptions
from dreambooth.runtime import stops
from tests.adapter_files.test_adapter_formats import (
    ATTENTION,
    KINDS,
    Models,
    expect_same_deltas,
    outputs,
    peft_file,
    with_adapter,
)
from tests.scripts.test_infer import rotation_file

ROOT = Path(__file__).parent.parent.parent
Modules = dict[str, dict[str, deltas.Module]]
INFO = {"resolution": 64, "seed": 3, "steps": 7, "clip_skip": 1}


def run(*words: object) -> None:
    convert_adapter.main(convert_adapter.parse_command([str(word) for word in words]))


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    return {
        "unet": unet.eval(),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder").eval(),
    }


@pytest.fixture(scope="module")
def loaded_xl(tiny_xl) -> Models:
    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_xl, subfolder="unet").eval(),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_xl, subfolder="text_encoder").eval(),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(
            tiny_xl, subfolder="text_encoder_2"
        ).eval(),
    }


@pytest.fixture(scope="module")
def adapted(loaded) -> Callable[[str], Models]:
    """Models of the base with an adapter of a kind by peft, one pair for each kind."""
    made: dict[str, Models] = {}

    def of_kind(kind: str) -> Models:
        if kind not in made:
            made[kind] = {
                name: with_adapter(copy.deepcopy(model), KINDS[kind](name)) for name, model in loaded.items()
            }
        return made[kind]

    return of_kind


@pytest.fixture(scope="module")
def native(adapted, layers, tmp_path_factory) -> Callable[[str], Path]:
    """The file of such an adapter in our layout."""
    folder = tmp_path_factory.mktemp("native")

    def of_kind(kind: str) -> Path:
        path = folder / f"{kind.replace(' ', '_')}.safetensors"
        if not path.exists():
            adapter = reading.read_additive(peft_file(folder / "peft.safetensors", adapted(kind)), layers)
            path.write_bytes(writing.write_native(adapter, INFO))
        return path

    return of_kind


@pytest.fixture(scope="module")
def layers(tiny_base) -> Layers:
    return families.find(BaseOptions(str(tiny_base))).layers()


@pytest.fixture(scope="module")
def xl_adapter(loaded_xl, tiny_xl, tmp_path_factory) -> Path:
    """LoRA on the UNet and both text encoders of the small Stable Diffusion XL."""
    folder = tmp_path_factory.mktemp("xl_adapter")
    targets = {
        name: ATTENTION["unet"] if name == "unet" else [*ATTENTION["text_encoder"], "fc1"]
        for name in loaded_xl
    }
    models = {
        n: with_adapter(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=3, target_modules=targets[n]))
        for n, model in loaded_xl.items()
    }
    adapter = reading.read_additive(
        peft_file(folder / "peft.safetensors", models), families.find(BaseOptions(str(tiny_xl))).layers()
    )
    (folder / "xl.safetensors").write_bytes(writing.write_native(adapter, INFO))
    return folder / "xl.safetensors"


def all_deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        f"{c}.{path}": deltas.delta(module)
        for c, modules in adapter.components.items()
        for path, module in modules.items()
    }


def expect_close(found: Adapter, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    own = all_deltas(found)
    assert own.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert (own[name] - expected).norm() <= tolerance * expected.norm(), name


# ---- inspect


def test_inspect_shows_kinds_ranks_scales_and_norms_without_a_base(adapted, tmp_path, capsys):
    run("inspect", peft_file(tmp_path / "a.safetensors", {"unet": adapted("mixed ranks")["unet"]}))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["unet", "lora"] in [line[:2] for line in lines]
    assert any("1.5" in line and "scale" not in line for line in lines)
    blocks = {
        line[1]: float(line[3])
        for line in lines
        if line[:1] == ["unet"] and len(line) == 5 and "_" in line[1]
    }
    assert {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"} == blocks.keys()
    layers_of = [
        m
        for name, m in adapted("mixed ranks")["unet"].named_modules()
        if name.startswith("mid_block.") and hasattr(m, "get_delta_weight")
    ]
    wanted = sum(float(m.get_delta_weight("default").detach().square().sum()) for m in layers_of) ** 0.5
    assert blocks["mid_block"] == pytest.approx(wanted, rel=1e-5)


def test_inspect_with_a_base_says_whether_it_fits(native, tiny_base, tiny_xl, capsys):
    run("inspect", native("lokr"), "--pretrained_model_name_or_path", tiny_base)
    out = capsys.readouterr().out
    assert f"fits {tiny_base} (Stable Diffusion 1.x / 2.x)" in out
    assert '"seed": 3' in out
    with pytest.raises(UserError, match="its UNet reads text 32 wide, and this one's 72"):
        run("inspect", native("lora"), "--pretrained_model_name_or_path", tiny_xl)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["locon", "loha cp", "lokr both", "dora"])
def test_inspect_reads_kohyas_names_without_a_base(kind, native, layers, tiny_base, tmp_path, capsys):
    """Names stay as in the file; norms are those of the same adapter with its base."""
    run(
        "convert",
        native(kind),
        "--to",
        "kohya",
        "--output",
        tmp_path / "k.safetensors",
        "--pretrained_model_name_or_path",
        tiny_base,
    )
    plain = reading.read_additive(tmp_path / "k.safetensors")
    whole = reading.read_additive(native(kind), layers)
    assert all(path.startswith("lora_") for modules in plain.components.values() for path in modules)
    for component, modules in whole.components.items():
        norms = [
            sorted(deltas.norm(module) for module in part.values())
            for part in (modules, plain.components[component])
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    capsys.readouterr()
    run("inspect", tmp_path / "k.safetensors")
    assert "unet down_blocks_1" in capsys.readouterr().out


def test_norms_are_those_of_the_dense_update(native, layers):
    for kind in ("locon", "loha cp", "lokr cp", "lokr dense"):
        for modules in reading.read_additive(native(kind), layers).components.values():
            for module in modules.values():
                assert deltas.norm(module) == pytest.approx(float(deltas.delta(module).norm()), rel=1e-5)
                assert deltas.shape(module) == deltas.delta(module).shape


# ---- convert


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kohya_and_back_gives_the_same_bytes(kind, native, tiny_base, adapted, layers, tmp_path):
    base = ("--pretrained_model_name_or_path", tiny_base)
    run("convert", native(kind), "--to", "kohya", "--output", tmp_path / "a.safetensors", *base)
    run(
        "convert", tmp_path / "a.safetensors", "--to", "native", "--output", tmp_path / "b.safetensors", *base
    )
    run("convert", tmp_path / "b.safetensors", "--to", "kohya", "--output", tmp_path / "c.safetensors", *base)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    adapter = reading.read_additive(tmp_path / "b.safetensors", layers)
    expect_same_deltas(adapter, adapted(kind))
    assert adapter_files.recorded(adapter.metadata) == INFO | {"prediction_type": "epsilon"}


def test_an_xl_adapter_goes_to_kohya_and_back(xl_adapter, tiny_xl, tmp_path):
    """Of a make with other names than the usual Stable Diffusion XL has: one resnet in a block, not two."""
    base = ("--pretrained_model_name_or_path", tiny_xl)
    run("convert", xl_adapter, "--to", "kohya", "--output", tmp_path / "k.safetensors", *base)
    keys = load_file(tmp_path / "k.safetensors").keys()
    assert {key.split("_")[1] for key in keys} == {"unet", "te1", "te2"}
    run(
        "convert", tmp_path / "k.safetensors", "--to", "native", "--output", tmp_path / "n.safetensors", *base
    )
    own = families.find(BaseOptions(str(tiny_xl))).layers()
    expect_close(
        reading.read_additive(tmp_path / "n.safetensors", own),
        all_deltas(reading.read_additive(xl_adapter, own)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loha", "loha cp", "lokr", "lokr dense"])
def test_loha_and_lokr_become_the_same_lora(kind, native, adapted, layers, tiny_base, tmp_path, capsys):
    words = ("convert", native(kind), "--to", "lora", "--pretrained_model_name_or_path", tiny_base)
    run(*words, "--output", tmp_path / "a.safetensors")
    assert "is kept" not in capsys.readouterr().out  # all of it
    adapter = reading.read_additive(tmp_path / "a.safetensors", layers)
    assert adapter.kinds == ("lora",)
    expect_same_deltas(adapter, adapted(kind))
    run(*words, "--output", tmp_path / "b.safetensors", "--rank", 2)
    small = reading.read_additive(tmp_path / "b.safetensors", layers)
    assert {module.rank for modules in small.components.values() for module in modules.values()} == {2}
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if "is kept" in line)
    for component, modules in adapter.components.items():
        values = [
            torch.linalg.svdvals(deltas.delta(module).flatten(1).double()).square()
            for module in modules.values()
        ]
        best = float(sum(v[:2].sum() for v in values) / sum(v.sum() for v in values))
        assert float(said[component].split("%")[0]) / 100 == pytest.approx(best, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["lora", "mixed ranks", "dora", "loha cp", "lokr factor", "lokr dense", "lokr cp"]
)
def test_peft_loads_the_folders_that_are_made_for_it(kind, native, adapted, loaded, tiny_base, tmp_path):
    run(
        "convert",
        native(kind),
        "--to",
        "peft",
        "--output",
        tmp_path / "peft",
        "--pretrained_model_name_or_path",
        tiny_base,
    )
    found = {
        name: PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft" / name).base_model.model
        for name, model in loaded.items()
    }
    for one, other, bare in zip(outputs(**found), outputs(**adapted(kind)), outputs(**loaded), strict=True):
        assert (other - bare).abs().max() > 1e-3
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp_min(1)
    run("inspect", tmp_path / "peft")  # and it is read again


def test_peft_loads_the_text_encoders_of_xl_too(xl_adapter, loaded_xl, tiny_xl, tmp_path):
    run("convert", xl_adapter, "--to", "peft", "--output", tmp_path / "peft")
    own = families.find(BaseOptions(str(tiny_xl))).layers()
    wanted = reading.read_additive(xl_adapter, own)
    for name, model in loaded_xl.items():
        merged = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft" / name).merge_and_unload()
        before, after = (dict(m.named_parameters()) for m in (model, merged))
        for path, module in wanted.components[name].items():
            key = next(key for key in before if key.removeprefix("text_model.") == f"{path}.weight")
            assert torch.allclose(after[key] - before[key], deltas.delta(module), atol=1e-5)


def test_a_lora_needs_no_base(native, layers, tmp_path):
    run("convert", native("locon"), "--to", "native", "--output", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == native("locon").read_bytes()


@pytest.mark.parametrize(
    ("width", "te", "name"),
    [(768, "lora_te_", "sd_v1"), (1024, "lora_te_", "sd_v2"), (2048, "lora_te1_", "sdxl_base_v1-0")],
)
def test_the_family_is_told_by_the_width_of_the_text(width, te, name, tmp_path):
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    modules: Modules = {
        "unet": {layer: Lora(torch.ones(1, width), torch.ones(640, 1))},
        "text_encoder": {"encoder.layers.0.self_attn.q_proj": Lora(torch.ones(1, 8), torch.ones(8, 1))},
    }
    (tmp_path / "a.safetensors").write_bytes(writing.write_native(Adapter(modules, {}), {}))
    run("convert", tmp_path / "a.safetensors", "--to", "kohya", "--output", tmp_path / "k.safetensors")
    assert any(key.startswith(te) for key in load_file(tmp_path / "k.safetensors"))
    assert reading.read_additive(tmp_path / "k.safetensors").metadata["ss_base_model_version"] == name


def test_half_precision_halves_the_file(native, tiny_base, tmp_path):
    for dtype in ("fp16", "bf16"):
        run(
            "convert",
            native("lora"),
            "--to",
            "native",
            "--dtype",
            dtype,
            "--output",
            tmp_path / f"{dtype}.safetensors",
        )
        tensors = load_file(tmp_path / f"{dtype}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {convert_adapter.DTYPES[dtype]}


# ---- merge, resize, extract


def test_merging_adds_weighted_updates(native, layers, tiny_base, tmp_path):
    """LoRA, LoHa and LoKr, over layers that not all of them have."""
    uses = (("locon", 0.5), ("loha", -1.5), ("lokr", 1.0))
    words = [f"{native(kind)}:{weight}" for kind, weight in uses[:2]] + [native("lokr")]
    run("merge", *words, "--output", tmp_path / "m.safetensors", "--pretrained_model_name_or_path", tiny_base)
    wanted: dict[str, torch.Tensor] = {}
    for kind, weight in uses:
        for name, delta in all_deltas(reading.read_additive(native(kind), layers)).items():
            wanted[name] = wanted.get(name, 0) + weight * delta
    merged = reading.read_additive(tmp_path / "m.safetensors", layers)
    expect_close(merged, wanted)
    assert adapter_files.recorded(merged.metadata) == INFO


def test_merging_to_a_rank_is_the_best_of_that_rank(native, layers, tmp_path, capsys):
    run("merge", native("lora"), f"{native('rslora')}:2", "--rank", 3, "--output", tmp_path / "m.safetensors")
    one, other = (all_deltas(reading.read_additive(native(kind), layers)) for kind in ("lora", "rslora"))
    small = reading.read_additive(tmp_path / "m.safetensors", layers)
    squares = {"unet": [0.0, 0.0], "text_encoder": [0.0, 0.0]}
    for name, delta in all_deltas(small).items():
        whole = one[name] + 2 * other[name]
        values = torch.linalg.svdvals(whole.double())
        assert float((whole - delta).norm()) == pytest.approx(
            float(values[3:].square().sum().sqrt()), rel=1e-4
        )
        component = name.split(".")[0]
        squares[component] = [
            squares[component][0] + float(values[:3].square().sum()),
            squares[component][1] + float(values.square().sum()),
        ]
    out = capsys.readouterr().out
    for component, (kept, total) in squares.items():
        assert f"{component}: {kept / total:.4%} of the update's energy is kept" in out


@pytest.mark.parametrize("kind", ["locon", "dora", "lokr dense"])
def test_resizing_is_the_optimal_truncation(kind, native, layers, tiny_base, tmp_path):
    run(
        "resize",
        native(kind),
        "--rank",
        2,
        "--output",
        tmp_path / "r.safetensors",
        "--pretrained_model_name_or_path",
        tiny_base,
    )
    small, whole = (
        reading.read_additive(path, layers) for path in (tmp_path / "r.safetensors", native(kind))
    )
    wanted = all_deltas(whole)
    for name, delta in all_deltas(small).items():
        values = torch.linalg.svdvals(wanted[name].flatten(1).double())
        best = float(values[2:].square().sum().sqrt())
        assert float((wanted[name] - delta).norm()) == pytest.approx(
            best, rel=1e-4, abs=1e-6 * float(values[0])
        )
    for component, modules in whole.components.items():
        for path, module in modules.items():
            found = small.components[component][path]
            assert isinstance(found, Lora)
            assert found.rank <= 2
            if module.magnitude is None:
                assert found.magnitude is None
            else:
                assert found.magnitude is not None
                assert torch.equal(found.magnitude, module.magnitude)


def test_extracting_finds_the_low_rank_update_that_was_baked_in(native, layers, tiny_base, tmp_path, capsys):
    base = ("--pretrained_model_name_or_path", tiny_base)
    run("bake", native("lora"), *base, "--merge_to", tmp_path / "tuned")
    run("extract", tmp_path / "tuned", *base, "--rank", 4, "--output", tmp_path / "e.safetensors")
    expect_close(
        reading.read_additive(tmp_path / "e.safetensors", layers),
        all_deltas(reading.read_additive(native("lora"), layers)),
        2e-5,
    )
    out = capsys.readouterr().out
    assert "unet: 100.0000% of what differs lies in the layers of --target_preset attn" in out
    assert "text_encoder: 100.0000% of the update's energy is kept" in out


def test_extracting_says_what_its_layers_leave_out(native, layers, tiny_base, tmp_path, capsys):
    base = ("--pretrained_model_name_or_path", tiny_base)
    run("bake", native("locon"), *base, "--merge_to", tmp_path / "tuned")
    found = {}
    for preset in ("attn", "attn_ff", "full"):
        capsys.readouterr()
        run(
            "extract",
            "--tuned",
            tmp_path / "tuned",
            *base,
            "--rank",
            3,
            "--target_preset",
            preset,
            "--output",
            tmp_path / "e.safetensors",
        )
        found[preset] = reading.read_additive(tmp_path / "e.safetensors", layers)
        share = next(
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("unet: ") and "what differs" in line
        )
        wanted = all_deltas(reading.read_additive(native("locon"), layers))
        total, own = (
            sum(float(wanted[n].square().sum()) for n in names if n.startswith("unet"))
            for names in (wanted, all_deltas(found[preset]))
        )
        assert float(share.split()[1].rstrip("%")) / 100 == pytest.approx(own / total, abs=1e-5)
    sizes = [len(all_deltas(adapter)) for adapter in found.values()]
    assert sizes == sorted(set(sizes))
    whole = all_deltas(reading.read_additive(native("locon"), layers))
    expect_close(found["full"], {n: whole[n] for n in all_deltas(found["full"])}, 2e-5)


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
        UserError, match=rf"is {name.upper()}, which turns weights: its own can be 1 only, got 0\.5"
    ):
        run("bake", f"{path}:0.5", *base, "--merge_to", tmp_path / "baked")
    run("bake", path, *base, "--merge_to", tmp_path / "baked")
    expect_weights_of_infer(tmp_path / "baked", tiny_base, layers, path, 1.0)
    with pytest.raises(UserError, match=r"`bake` works it into a base, and infer\.py draws with it"):
        run("convert", path, *base, "--to", "lora", "--output", tmp_path / "l.safetensors")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_baked_base_is_the_base_but_for_its_weights(adapted, layers, tiny_base, tmp_path):
    """The same keys and files; parts without an adapter, tokenizers and whatever else byte for byte; the same bytes again."""
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
    """The base as the hub has many: float16 as a variant, the UNet in several files, keys with `text_model.`, older files beside it, links, a part
    that is named and not there."""
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
    assert "note: unet/diffusion_pytorch_model.bin is left out" in said
    assert "note: whole.ckpt is left out" in said
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
    "half": r"has only up .*the adapter is not whole",
    "not finite": "values that are not finite",
    "no component": "does not say what part of a base it is for",
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
            r"is a loha, which does not say the size.*; give --pretrained_model_name_or_path",
        ),
        (["resize", native("lokr"), "--rank", 2], r"is a lokr, which does not say"),
        (
            ["convert", native("lora"), "--to", "kohya"],
            r"do not tell whether it is for Stable Diffusion 1, 2 or XL; give --pretrained",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(*words, *output)


def test_dora_is_not_merged(native, tmp_path):
    with pytest.raises(
        UserError,
        match=r"is a dora, which has lengths of rows as well \(e\.g\. unet\..*`bake` works it into a base",
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
        with pytest.raises(UserError, match="is the adapter that is read"):
            run("resize", given, "--rank", 1, "--output", output)
    with pytest.raises(UserError, match="is the adapter that is read"):
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
    for tuned, message in (
        (wide, r"--tuned: \d+ weights are of other shapes than the base's, e\.g\. .*32.*48"),
        (tiny_xl, "is a Stable Diffusion XL, and the base a Stable Diffusion 1"),
        (tiny_base, "nothing to extract: the two bases are the same"),
        (tmp_path, "--tuned: .* is not a diffusers pipeline folder"),
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
            "convert a --to kohya --output b.safetensors --rank 4",
            "--rank only works with --to lora",
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
    """What infer.py refuses is refused in the same words, and what is a file as it stands has the weight 1."""
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
    code = "import sys; sys.argv = ['convert_adapter.py', '--help']; import runpy\ntry: runpy.run_path('convert_adapter.py', run_name='__main__')\n"
    code += "except SystemExit as e: assert e.code == 0 and 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "extract" in done.stdout
