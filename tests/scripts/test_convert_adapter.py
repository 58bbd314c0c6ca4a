"""convert_adapter.py: what each command writes is what plain diffusers and peft make of the adapter."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import convert_adapter
from dreambooth.adapter_files import deltas, reading, run_info, writing
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Lora
from dreambooth.bases import families
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from tests.adapter_files.files_made import KINDS, expect_same_deltas, outputs, peft_file
from tests.scripts.converting import INFO, Modules, all_deltas, expect_close, run

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
    with pytest.raises(UserError, match="its UNet takes text of width 32, this one's 72"):
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


@pytest.mark.slow
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
    assert run_info.of(adapter.metadata) == INFO | {"prediction_type": "epsilon"}


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_a_dora_becomes_the_nearest_lora_of_a_rank_with_its_base(
    to, native, layers, tiny_base, tmp_path, capsys
):
    """What it changes in the base's weights, magnitudes included, and the share that is kept."""
    base = ("--pretrained_model_name_or_path", tiny_base)
    run("convert", native("dora"), "--to", to, "--rank", 5, *base, "--output", tmp_path / "a.safetensors")
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if "is kept" in line)
    small = reading.read_additive(tmp_path / "a.safetensors", layers)
    assert small.kinds == ("lora",)
    dora = reading.read_additive(native("dora"), layers)
    for component, modules in dora.components.items():
        model = families.find(BaseOptions(str(tiny_base))).folder / component
        weights = {
            key.removeprefix("text_model.").removesuffix(".weight"): tensor
            for key, tensor in load_file(next(model.glob("*.safetensors"))).items()
        }
        kept = total = 0.0
        for path, module in modules.items():
            change = (deltas.adapted(module, weights[path]) - weights[path]).flatten(1).double()
            values = torch.linalg.svdvals(change).square()
            lost = (change - deltas.delta(small.components[component][path]).flatten(1)).square().sum()
            assert float(lost) == pytest.approx(float(values[5:].sum()), rel=1e-3, abs=1e-9)
            kept, total = kept + float(values[:5].sum()), total + float(values.sum())
        assert float(said[component].split("%")[0]) / 100 == pytest.approx(kept / total, abs=1e-5)


def test_a_dora_in_kohyas_layout_comes_with_a_note(native, tiny_base, tmp_path, capsys):
    base = ("--pretrained_model_name_or_path", tiny_base)
    for kind, is_noted in (("dora", True), ("lora", False), ("lokr cp", False)):
        run("convert", native(kind), "--to", "kohya", *base, "--output", tmp_path / f"{kind}.safetensors")
        assert ("note: dora: in kohya's layout only LyCORIS reads" in capsys.readouterr().out) == is_noted
    assert not any("lokr_t2" in key for key in load_file(tmp_path / "lokr cp.safetensors"))


def test_the_rank_of_a_dora_needs_the_base(native, tmp_path):
    with pytest.raises(
        UserError, match=r"--rank: .* is a dora, .*; give --pretrained_model_name_or_path, or"
    ):
        run("convert", native("dora"), "--to", "lora", "--rank", 4, "--output", tmp_path / "a.safetensors")


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
    assert run_info.of(merged.metadata) == INFO


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


@pytest.mark.slow
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
    assert "unet: 100.0000% of the difference is in the layers of --target_preset attn" in out
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
            tmp_path / f"{preset}.safetensors",
        )
        found[preset] = reading.read_additive(tmp_path / f"{preset}.safetensors", layers)
        share = next(
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("unet: ") and "of the difference" in line
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
