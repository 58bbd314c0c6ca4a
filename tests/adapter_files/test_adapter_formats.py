"""Adapter files of every layout: what is read is what peft computes, what is written is what diffusers, peft and LyCORIS read, and nothing less."""

import copy
import importlib.util
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lokr.layer import factorization
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth.adapter_files import deltas, layer_names, native, reading, tables, writing
from dreambooth.adapter_files.adapter import Adapter, to_lora
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.bases import folders
from dreambooth.errors import UserError
from dreambooth.files import safetensors_files

Models = dict[str, torch.nn.Module]
ATTENTION = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
WIDE = {
    "unet": [
        *ATTENTION["unet"],
        "proj_in",
        "conv1",
        "conv_shortcut",
        "conv",
        "conv_in",
        "time_emb_proj",
        "ff.net.2",
    ],
    "text_encoder": [*ATTENTION["text_encoder"], "fc1"],
}
MIXED = {
    "unet": {
        "rank_pattern": {"to_k": 2, "attn2.to_v": 6},
        "alpha_pattern": {"to_k": 1.0, "down_blocks.1.attentions.0.proj_in": 3.0},
    },
    "text_encoder": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 1.0}},
}
# Scales other than 1 everywhere: a reader that forgets them is found out.
KINDS: dict[str, Callable[[str], object]] = {
    "lora": lambda c: LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION[c]),
    "rslora": lambda c: LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=ATTENTION[c]),
    "locon": lambda c: LoraConfig(r=3, lora_alpha=6, target_modules=WIDE[c]),
    "mixed ranks": lambda c: LoraConfig(r=4, lora_alpha=6, target_modules=WIDE[c], **MIXED[c]),
    "dora": lambda c: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=WIDE[c]),
    "loha": lambda c: LoHaConfig(r=2, alpha=3, target_modules=WIDE[c]),
    "loha cp": lambda c: LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=WIDE[c]),
    "loha mixed ranks": lambda c: LoHaConfig(
        r=2, alpha=3, target_modules=ATTENTION[c], rank_pattern=MIXED[c]["rank_pattern"]
    ),
    "lokr": lambda c: LoKrConfig(r=2, alpha=3, target_modules=WIDE[c]),
    "lokr factor": lambda c: LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=ATTENTION[c]),
    "lokr both": lambda c: LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=WIDE[c]),
    "lokr cp": lambda c: LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=WIDE[c]),
    "lokr dense": lambda c: LoKrConfig(r=10_000, alpha=5_000, target_modules=WIDE[c]),
}
LORAS = ["lora", "rslora", "locon", "mixed ranks"]
LYCORIS = [kind for kind in KINDS if kind.startswith("lo") and kind not in ("lora", "locon")]
HAS_LYCORIS = all(importlib.util.find_spec(name) for name in ("lycoris", "einops", "toml"))
needs_lycoris = pytest.mark.skipif(not HAS_LYCORIS, reason="needs the packages lycoris-lora, einops and toml")


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder")
    return {"unet": unet.eval(), "text_encoder": text_encoder.eval()}


@pytest.fixture(scope="module")
def base(tiny_base) -> Layers:
    """From the headers of the base's files, as the scripts have it, before anything is loaded."""
    shapes = {part: folders.weight_shapes(tiny_base, part, None) for part in ("unet", "text_encoder")}
    return {
        part: {key.removesuffix(".weight"): shape for key, shape in own.items() if key.endswith(".weight")}
        for part, own in shapes.items()
    }


@pytest.fixture(scope="module")
def adapted(loaded) -> Callable[[str], Models]:
    """Models with an adapter of a kind by peft, every tensor of it random; one pair for each kind."""
    made: dict[str, Models] = {}

    def of_kind(kind: str) -> Models:
        if kind not in made:
            made[kind] = {
                name: with_adapter(copy.deepcopy(model), KINDS[kind](name)) for name, model in loaded.items()
            }
        return made[kind]

    return of_kind


def with_adapter(model: torch.nn.Module, config: object) -> torch.nn.Module:
    inject_adapter_in_model(config, model, "default")
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else 0.2 * noise
    return model


def peft_state(models: Models) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for component, model in models.items():
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        found |= {f"{component}.{key}": tensor.clone() for key, tensor in state.items()}
    return found


def peft_file(path: Path, models: Models) -> Path:
    """What diffusers' own scripts write: peft's keys, and all that peft's configuration says."""
    fields: dict[str, object] = {}
    for component, model in models.items():
        config = model.peft_config["default"].to_dict()  # type: ignore[union-attr,operator,index]
        fields |= {
            f"{component}.{name}": sorted(value) if isinstance(value, set) else value
            for name, value in config.items()
        }
    save_file(
        peft_state(models), path, {"format": "pt", "lora_adapter_metadata": json.dumps(fields, default=str)}
    )
    return path


def tuner_layers(models: Models) -> dict[tuple[str, str], BaseTunerLayer]:
    layers = (
        (component, name, module)
        for component, model in models.items()
        for name, module in model.named_modules()
    )
    return {
        (component, name): module for component, name, module in layers if isinstance(module, BaseTunerLayer)
    }


def expect_same_deltas(adapter: Adapter, models: Models) -> None:
    """Every module of the one is in the other, and adds what peft itself computes."""
    layers = tuner_layers(models)
    assert {
        (component, path) for component, modules in adapter.components.items() for path in modules
    } == layers.keys()
    for (component, path), layer in layers.items():
        module = adapter.components[component][path]
        weight = layer.get_base_layer().weight.data
        with torch.no_grad():
            if module.magnitude is not None:
                merged = copy.deepcopy(layer)
                merged.merge()  # type: ignore[operator]
                expected, found = merged.get_base_layer().weight.data, deltas.adapted(module, weight)
            else:
                expected, found = layer.get_delta_weight("default"), deltas.delta(module)  # type: ignore[operator]
        assert found.shape == weight.shape
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 1e-6 * expected.norm(), f"{component}.{path}"
        assert expected.norm() > 1e-3  # an adapter that does nothing would equal any other


def outputs(unet: torch.nn.Module, text_encoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, 77), generator=draw)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 32, generator=draw)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 700]), text).sample, text_encoder(tokens)[0]


def expect_same_outputs(loaded: Models, models: Models, data: bytes, tmp_path: Path) -> None:
    """Plain diffusers, given the file, draws what the adapted models draw."""
    (tmp_path / "adapter.safetensors").write_bytes(data)
    unet, text_encoder = (copy.deepcopy(loaded[name]) for name in ("unet", "text_encoder"))
    pipeline = StableDiffusionPipeline(
        None, text_encoder, None, unet, None, None, None, requires_safety_checker=False
    )
    before = outputs(unet, text_encoder)
    pipeline.load_lora_weights(tmp_path / "adapter.safetensors", adapter_name="subject")
    expected = outputs(models["unet"], models["text_encoder"])
    for found, wanted, bare in zip(outputs(unet, text_encoder), expected, before, strict=True):
        assert (wanted - bare).abs().max() > 1e-2
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)


def rewritten(adapter: Adapter, layout: str) -> bytes:
    return (
        writing.write_native(adapter, {}) if layout == "native" else writing.write_kohya(adapter, "sd1", {})
    )


def read_bytes(data: bytes, path: Path, base: Layers) -> Adapter:
    path.write_bytes(data)
    return reading.read_additive(path, base)


# ---- every kind in every layout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_every_layout(kind, adapted, base, tmp_path):
    """From peft's own file, written in our layout and in kohya's, read again: each layer adds what peft computes for it."""
    models = adapted(kind)
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", models), base)
    expect_same_deltas(adapter, models)
    for layout in ("native", "kohya"):
        again = read_bytes(rewritten(adapter, layout), tmp_path / f"{layout}.safetensors", base)
        assert again.kinds == adapter.kinds
        expect_same_deltas(again, models)


@pytest.mark.parametrize("layout", ["native", "kohya"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_one_component_alone_is_an_adapter(component, layout, adapted, base, tmp_path):
    models = {component: adapted("loha")[component]}
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", models), base)
    expect_same_deltas(read_bytes(rewritten(adapter, layout), tmp_path / "again.safetensors", base), models)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_any_kind_becomes_the_same_lora(kind, adapted, base, tmp_path):
    """LoHa and LoKr too, with or without a core, to the last bits of float32."""
    models = adapted(kind)
    lora, kept = to_lora(reading.read_additive(peft_file(tmp_path / "peft.safetensors", models), base))
    assert lora.kinds == ("lora",)
    assert set(kept.values()) == {1.0}
    expect_same_deltas(lora, models)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_its_rounding_and_no_more(kind, dtype, adapted, base, tmp_path):
    models = adapted(kind)
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", models), base)
    again = read_bytes(writing.write_kohya(adapter, "sd1", {}, dtype), tmp_path / "half.safetensors", base)
    for component, modules in adapter.components.items():
        for path, module in modules.items():
            wanted = deltas.delta(module)
            assert (deltas.delta(again.components[component][path]) - wanted).norm() <= 2 * torch.finfo(
                dtype
            ).eps * wanted.norm()


# ---- other programs read what is written


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "kohya"])
@pytest.mark.parametrize("kind", LORAS)
def test_plain_diffusers_loads_lora_from_both_layouts(kind, layout, adapted, loaded, base, tmp_path):
    """Mixed ranks and alphas included, which diffusers gets wrong from kohya's files as they usually are."""
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted(kind)), base)
    expect_same_outputs(loaded, adapted(kind), rewritten(adapter, layout), tmp_path)


def test_plain_diffusers_loads_dora_from_our_layout(adapted, loaded, base, tmp_path):
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("dora")), base)
    expect_same_outputs(loaded, adapted("dora"), writing.write_native(adapter, {}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "kohya"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_plain_diffusers_loads_loha_and_lokr_as_lora(kind, layout, adapted, loaded, base, tmp_path):
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted(kind)), base)
    expect_same_outputs(loaded, adapted(kind), rewritten(to_lora(adapter)[0], layout), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("lokr")])
def test_diffusers_unet_loads_lokr_from_our_layout(kind, adapted, loaded, base, tmp_path):
    """The metadata make peft cut every factor as the file has it."""
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted(kind)), base)
    (tmp_path / "native.safetensors").write_bytes(writing.write_native(adapter, {}))
    unet = copy.deepcopy(loaded["unet"])
    unet.load_lora_adapter(tmp_path / "native.safetensors", prefix="unet", use_safetensors=True)
    found, _ = outputs(unet, loaded["text_encoder"])
    wanted, _ = outputs(adapted(kind)["unet"], loaded["text_encoder"])
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LYCORIS)
def test_peft_makes_the_same_modules_from_our_metadata(kind, adapted, loaded, base, tmp_path):
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted(kind)), base)
    (tmp_path / "native.safetensors").write_bytes(data := writing.write_native(adapter, {}))
    (size,) = torch.frombuffer(bytearray(data[:8]), dtype=torch.int64)
    fields = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["lora_adapter_metadata"])
    for component, model in loaded.items():
        own = {
            name.removeprefix(f"{component}."): value
            for name, value in fields.items()
            if name.startswith(f"{component}.")
        }
        config = {"LOHA": LoHaConfig, "LOKR": LoKrConfig}[own.pop("peft_type")](**own)
        made = copy.deepcopy(model)
        inject_adapter_in_model(config, made, "default")
        shapes = {
            key: tensor.shape
            for key, tensor in get_peft_model_state_dict(made, save_embedding_layers=False).items()
        }
        prefixes = (f"{component}.text_model.", f"{component}.")
        written = {key: tensor.shape for key, tensor in load(data).items() if key.startswith(f"{component}.")}
        assert {
            next(key.removeprefix(p) for p in prefixes if key.startswith(p)): shape
            for key, shape in written.items()
        } == shapes
        assert {layer.scaling["default"] for layer in made.modules() if isinstance(layer, LycorisLayer)} == {
            1.0
        }


@needs_lycoris
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_computes_the_same_from_our_kohya_file(kind, adapted, base, tmp_path):
    """With LyCORIS' own functions and its rule for scales."""
    from lycoris.functional import locon, loha, lokr

    models = adapted(kind)
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", models), base)
    tensors = load(writing.write_kohya(adapter, "sd1", {}))
    stems = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    for (component, path), layer in tuner_layers(models).items():
        stem = stems[component] + path.replace(".", "_")
        own = {
            key.removeprefix(f"{stem}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{stem}.")
        }
        shape = layer.get_base_layer().weight.shape
        alpha = float(own.pop("alpha"))
        if "lora_down.weight" in own:
            rank = own["lora_down.weight"].shape[0]
            found = locon.diff_weight(
                own["lora_down.weight"], own["lora_up.weight"], None, gamma=alpha / rank
            )
        elif "hada_w1_a" in own:
            factors = [own.get(f"hada_{name}") for name in ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")]
            found = loha.diff_weight(*factors, gamma=torch.tensor(alpha / own["hada_w1_b"].shape[0]))
        else:
            factors = [own.get(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
            scale = next(
                (alpha / own[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in own), 1.0
            )
            found = lokr.kron_weight(*factors, scale=scale)
        with torch.no_grad():
            if kind == "dora":
                module = adapter.components[component][path]
                assert own["dora_scale"].shape == (shape[0], *[1] * (len(shape) - 1))
                expected = deltas.delta(module)
            else:
                expected = layer.get_delta_weight("default")  # type: ignore[operator]
        assert (found.reshape(shape) - expected).norm() <= 1e-6 * expected.norm()


def test_kohya_lora_has_one_rank_and_alpha_for_each_component(adapted, base, tmp_path):
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("mixed ranks")), base)
    tensors = load(
        data := writing.write_kohya(
            adapter, "sd2", {"resolution": 768, "seed": 5, "prediction_type": "v_prediction"}
        )
    )
    for prefix, rank in (("lora_unet_", 6), ("lora_te_", 4)):
        assert {
            t.shape[0]
            for key, t in tensors.items()
            if key.startswith(prefix) and key.endswith("lora_down.weight")
        } == {rank}
        assert {
            float(t) for key, t in tensors.items() if key.startswith(prefix) and key.endswith("alpha")
        } == {rank}
    (tmp_path / "kohya.safetensors").write_bytes(data)
    metadata = reading.read_additive(tmp_path / "kohya.safetensors", base).metadata
    assert {key: value for key, value in metadata.items() if key.startswith("ss_")} == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "6",
        "ss_network_alpha": "6.0",
        "ss_network_args": '{"conv_alpha": "6", "conv_dim": "6"}',
        "ss_base_model_version": "sd_v2_v",
        "ss_v2": "True",
        "ss_resolution": "(768, 768)",
        "ss_seed": "5",
    }


@pytest.mark.parametrize("layout", ["native", "kohya"])
def test_the_same_adapter_gives_the_same_bytes(layout, adapted, base, tmp_path):
    """Whatever the order of the file that it came from."""
    state = peft_state(adapted("locon"))
    files = []
    for n, keys in enumerate((sorted(state), sorted(state, reverse=True))):
        save_file(
            {key: state[key] for key in keys},
            tmp_path / f"{n}.safetensors",
            {"b": "1", "a": "2"} if n else {"a": "2", "b": "1"},
        )
        files.append(rewritten(reading.read_additive(tmp_path / f"{n}.safetensors", base), layout))
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0]


# ---- other programs' layouts are read


def in_layout(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """Peft's keys in the spelling of an older diffusers."""
    renamed = {}
    for key, tensor in state.items():
        side = "down" if "lora_A" in key else "up"
        module = key.rpartition(".lora_")[0]
        if layout == "diffusers":
            end = "lora.{}.weight" if key.startswith("unet") else "lora_linear_layer.{}.weight"
            renamed[f"{module}.{end.format(side)}"] = tensor
        else:
            names = {
                "to_out.0": "to_out",
                "q_proj": "to_q",
                "k_proj": "to_k",
                "v_proj": "to_v",
                "out_proj": "to_out",
            }
            parent, last = next(
                (module.removesuffix(f".{n}"), n)
                for n in (*names, "to_q", "to_k", "to_v")
                if module.endswith(f".{n}")
            )
            processor = ".processor" if key.startswith("unet") else ""
            renamed[f"{parent}{processor}.{names.get(last, last)}_lora.{side}.weight"] = tensor
    return renamed


@pytest.mark.parametrize("text_model", ["", "text_model."])
@pytest.mark.parametrize("layout", ["peft", "peft, named", "diffusers", "processors"])
def test_spellings_without_metadata_are_read_with_scale_one(layout, text_model, loaded, base, tmp_path):
    models = {
        name: with_adapter(
            copy.deepcopy(model), LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION[name])
        )
        for name, model in loaded.items()
    }
    state = {
        key.replace("text_encoder.", f"text_encoder.{text_model}"): tensor
        for key, tensor in peft_state(models).items()
    }
    if layout == "peft, named":  # the name of the adapter was left in
        state = {key.replace(".weight", ".default_0.weight"): tensor for key, tensor in state.items()}
    save_file(state if layout.startswith("peft") else in_layout(state, layout), tmp_path / "a.safetensors")
    expect_same_deltas(reading.read_additive(tmp_path / "a.safetensors", base), models)


def test_keys_without_a_component_find_the_one_that_has_such_layers(adapted, base, tmp_path):
    """`unet.save_attn_procs` once wrote them so; diffusers of today loads nothing from such a file, in silence."""
    unet = {"unet": adapted("lora")["unet"]}
    tensors = {
        key.removeprefix("unet."): tensor for key, tensor in in_layout(peft_state(unet), "processors").items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = reading.read_additive(tmp_path / "a.safetensors", base)
    assert list(adapter.components) == ["unet"]
    assert len(adapter.components["unet"]) == len(tuner_layers(unet))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha cp", "lokr dense"])
def test_folders_saved_by_peft_are_read(kind, adapted, loaded, base, tmp_path):
    """The pair that peft's examples write, and each of the two alone, which nothing but its layers tells apart."""
    models = adapted(kind)
    for component, model in loaded.items():
        wrapped = PeftModel(copy.deepcopy(model), KINDS[kind](component))
        state = {
            f"base_model.model.{key}": t
            for key, t in get_peft_model_state_dict(models[component], save_embedding_layers=False).items()
        }
        wrapped.save_pretrained(tmp_path / "out" / component, state_dict=None, save_embedding_layers=False)
        saved = load((tmp_path / "out" / component / "adapter_model.safetensors").read_bytes())
        assert saved.keys() == state.keys()  # peft's own names
        save_file(
            {key: t.contiguous().clone() for key, t in state.items()},
            tmp_path / "out" / component / "adapter_model.safetensors",
        )
    expect_same_deltas(reading.read_additive(tmp_path / "out", base), models)
    for component in loaded:
        (tmp_path / "out" / component).rename(tmp_path / f"my_{component}")
        expect_same_deltas(
            reading.read_additive(tmp_path / f"my_{component}", base), {component: models[component]}
        )


def test_patterns_of_whole_names_are_read_as_peft_reads_them(adapted, base, tmp_path):
    """As diffusers writes them for a file that it loaded: ^ and the whole name; the first that fits is the one."""
    models = {"unet": adapted("lora")["unet"]}
    path = SOME.removeprefix("unet.")
    patterns = {"^to_k": 60.0, f"^{path}": 3.0, "to_k": 12.0}
    fields = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": patterns}
    save_file(peft_state(models), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    modules = reading.read_additive(tmp_path / "a.safetensors", base).components["unet"]
    layers = tuner_layers(models)
    for name, scale in (
        (path, 0.75),
        (path.replace("attn2", "attn1"), 3.0),
        (path.replace("to_k", "to_q"), 1.0),
    ):
        wanted = scale / 1.5 * layers["unet", name].get_delta_weight("default").detach()  # type: ignore[operator]
        assert torch.allclose(deltas.delta(modules[name]), wanted, atol=1e-6)


def test_a_file_of_one_model_alone_has_its_alpha_without_a_prefix(adapted, base, tmp_path):
    """`unet.save_lora_adapter` writes neither keys nor metadata with a component in front."""
    model = copy.deepcopy(adapted("mixed ranks")["unet"])
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    model.save_lora_adapter(tmp_path)  # type: ignore[operator]
    assert not any(key.startswith("unet.") for key in load((tmp_path / native.ADAPTER_NAME).read_bytes()))
    expect_same_deltas(reading.read_additive(tmp_path, base), {"unet": adapted("mixed ranks")["unet"]})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default_0", "my_dog", "weight-2"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_any_one_name_of_the_adapter_in_all_keys_is_taken_off(name, kind, adapted, base, tmp_path):
    models = adapted(kind)
    parts = r"lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+"
    tensors = {
        re.sub(rf"\.({parts})(?=\.weight$|$)", rf".\1.{name}", key): tensor
        for key, tensor in peft_state(models).items()
    }
    assert all(f".{name}" in key for key in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(peft_state(models), tmp_path / "b.safetensors")
    found, wanted = (reading.read_additive(tmp_path / f"{file}.safetensors", base) for file in "ab")
    assert writing.write_kohya(found, "sd1", {}) == writing.write_kohya(wanted, "sd1", {})
    (key, tensor) = next(iter(tensors.items()))
    other = {k: t for k, t in tensors.items() if k != key} | {key.replace(f".{name}", ".another"): tensor}
    save_file(other, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="belong to no kind of adapter"):
        reading.read_additive(tmp_path / "a.safetensors", base)


def test_the_unet_is_diffusion_model_in_files_of_other_programs(adapted, base, tmp_path):
    models = {"unet": adapted("lora")["unet"]}
    tensors = {
        key.replace("unet.", "diffusion_model.", 1): tensor for key, tensor in peft_state(models).items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with_base, without = (
        reading.read_additive(tmp_path / "a.safetensors", base),
        reading.read_additive(tmp_path / "a.safetensors"),
    )
    assert (
        with_base.components["unet"].keys()
        == without.components["unet"].keys()
        == {path for _, path in tuner_layers(models)}
    )


def test_a_run_folder_is_read_by_its_adapter(adapted, base, tmp_path):
    peft_file(tmp_path / native.ADAPTER_NAME, adapted("lora"))
    expect_same_deltas(reading.read_additive(tmp_path, base), adapted("lora"))


@pytest.mark.slow
@pytest.mark.parametrize("text_model", ["", "text_model_"])
@pytest.mark.parametrize("te", ["lora_te_", "lora_te1_"])
@pytest.mark.parametrize("alpha_dtype", [torch.float16, torch.int64])
def test_kohya_files_are_read_with_their_alphas(text_model, te, alpha_dtype, adapted, base, tmp_path):
    models = adapted("mixed ranks")
    tensors = {}
    for key, tensor in peft_state(models).items():
        component, module, end = (
            key.split(".", 1)[0],
            key.split(".", 1)[1].rpartition(".lora_")[0],
            key.rpartition(".lora_")[2],
        )
        stem = ("lora_unet_" if component == "unet" else te + text_model) + module.replace(".", "_")
        tensors[f"{stem}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = tensor
        layer = tuner_layers(models)[component, module]
        tensors[f"{stem}.alpha"] = torch.tensor(layer.lora_alpha["default"]).to(alpha_dtype)  # type: ignore[union-attr,index]
    save_file(tensors, tmp_path / "kohya.safetensors")
    expect_same_deltas(reading.read_additive(tmp_path / "kohya.safetensors", base), models)


def one_layer(base: Layers, path: str = "down_blocks.1.resnets.0.conv1") -> tuple[str, tuple[int, ...]]:
    return "lora_unet_" + path.replace(".", "_"), tuple(base["unet"][path])


@needs_lycoris
def test_a_locon_with_a_core_is_read_as_the_lora_that_it_is(base, tmp_path):
    from lycoris.functional import locon

    stem, (outputs, inputs, *kernel) = one_layer(base)
    down, up, mid = torch.randn(3, inputs, 1, 1), torch.randn(outputs, 3, 1, 1), torch.randn(3, 3, *kernel)
    tensors = {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "lora_mid.weight": mid,
        "alpha": torch.tensor(1.5),
    }
    save_file({f"{stem}.{name}": t for name, t in tensors.items()}, tmp_path / "a.safetensors")
    (module,) = reading.read_additive(tmp_path / "a.safetensors", base).components["unet"].values()
    wanted = locon.diff_weight(down, up, mid, gamma=0.5)
    assert isinstance(module, Lora)
    assert (deltas.delta(module) - wanted).norm() <= 1e-6 * wanted.norm()


@needs_lycoris
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_lycoris_own_modules_are_read_with_their_magnitudes(kind, loaded, base, tmp_path):
    """From LyCORIS' module to our file and back: the weight that it merges is the one that we make."""
    from lycoris.modules import LoConModule, LohaModule, LokrModule

    made = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}[kind]
    layer = loaded["unet"].get_submodule("down_blocks.1.resnets.0.conv1")
    stem, _ = one_layer(base)
    module = made(stem, layer, lora_dim=2, alpha=2, weight_decompose=True, factor=4)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name != "dora_scale":
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    module.dora_scale.data *= 1.3
    save_file(
        {f"{stem}.{name}": t.detach().clone() for name, t in module.custom_state_dict().items()},
        tmp_path / "a.safetensors",
    )
    adapter = reading.read_additive(tmp_path / "a.safetensors", base)
    assert adapter.kinds == ({"lora": "dora", "loha": "doha", "lokr": "dokr"}[kind],)
    with torch.no_grad():
        wanted = module.get_merged_weight(shape=layer.weight.shape)[0]
    for again in (
        adapter,
        to_lora(adapter)[0],
        read_bytes(rewritten(adapter, "kohya"), tmp_path / "b.safetensors", base),
    ):
        (found,) = again.components["unet"].values()
        assert (deltas.adapted(found, layer.weight.data) - wanted).norm() <= 2e-6 * wanted.norm()


def test_modules_of_different_kinds_stand_in_one_file(adapted, base, tmp_path):
    """Each module is what its own keys say; peft's layout, with one configuration for all, is refused for it."""
    parts = [
        reading.read_additive(peft_file(tmp_path / "a.safetensors", adapted(kind)), base)
        for kind in ("locon", "loha", "lokr")
    ]
    paths = sorted(parts[0].components["unet"])
    mixed = Adapter(
        {"unet": {path: parts[n % 3].components["unet"][path] for n, path in enumerate(paths)}}, {}
    )
    again = read_bytes(writing.write_kohya(mixed, "sd1", {}), tmp_path / "b.safetensors", base)
    assert again.kinds == ("loha", "lokr", "lora")
    for path, module in mixed.components["unet"].items():
        assert torch.allclose(deltas.delta(again.components["unet"][path]), deltas.delta(module), atol=1e-6)
    assert "loha" in tables.table(again)
    with pytest.raises(UserError, match="unet has loha and lokr and lora"):
        writing.write_native(mixed, {})


# ---- Stable Diffusion XL


@pytest.fixture(scope="module")
def xl_shapes() -> dict[str, tuple[int, ...]]:
    """The layers of the real UNet, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def test_xl_names_are_those_that_diffusers_reads(xl_shapes):
    """All 794 layers of the real UNet: unlike names, and diffusers' own converter finds the way back."""
    names = {path: "lora_unet_" + layer_names.sgm_name(path, 2).replace(".", "_") for path in xl_shapes}
    assert len(xl_shapes) == len(set(names.values())) == 794
    # as in files that kohya's scripts wrote
    assert (
        names["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
        == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert names["up_blocks.0.attentions.2.proj_out"] == "lora_unet_output_blocks_2_1_proj_out"
    assert names["down_blocks.0.downsamplers.0.conv"] == "lora_unet_input_blocks_3_0_op"
    assert names["mid_block.resnets.1.time_emb_proj"] == "lora_unet_middle_block_2_emb_layers_1"

    class Config:
        layers_per_block = 2

    # a rank that only this layer has says which one it became
    numbered = {f"{name}.lora_down.weight": n for n, name in enumerate(names.values())}
    mapped = {
        _convert_unet_lora_key(key): n
        for key, n in _maybe_map_sgm_blocks_to_diffusers(numbered, Config()).items()
    }
    found = {
        key.removesuffix(".lora_A.weight"): n for key, n in convert_unet_state_dict_to_peft(mapped).items()
    }
    assert found == {path: n for n, path in enumerate(names)}


@pytest.fixture(scope="module")
def xl() -> Models:
    """Stable Diffusion XL in miniature: three blocks, two text encoders, the second with a projection."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=8,
        cross_attention_dim=40,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    text = {
        "vocab_size": 100,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 24,
    }
    first = CLIPTextModel(CLIPTextConfig(hidden_size=16, **text))
    second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, **text))
    return {"unet": unet.eval(), "text_encoder": first.eval(), "text_encoder_2": second.eval()}


def xl_layers(models: Models) -> dict[str, dict[str, tuple[int, ...]]]:
    named = {
        component: [(name, getattr(m, "weight", None)) for name, m in model.named_modules()]
        for component, model in models.items()
    }
    return {
        component: {name: tuple(w.shape) for name, w in pairs if isinstance(w, torch.Tensor)}
        for component, pairs in named.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "kohya"])
def test_plain_diffusers_loads_an_xl_adapter(layout, xl, tmp_path):
    """UNet with every kind of layer, both text encoders and the projection, from both layouts."""
    text = [*ATTENTION["text_encoder"], "text_projection"]
    linear = [*ATTENTION["unet"], "proj_out", "conv1", "conv_shortcut", "conv", "time_emb_proj", "conv_out"]
    models = {
        name: with_adapter(
            copy.deepcopy(model),
            LoraConfig(r=2, lora_alpha=3, target_modules=linear if name == "unet" else text),
        )
        for name, model in xl.items()
    }
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", models), xl_layers(xl))
    assert list(adapter.components) == ["unet", "text_encoder", "text_encoder_2"]
    assert len(adapter.components["text_encoder_2"]) == 9
    data = (
        writing.write_native(adapter, {}) if layout == "native" else writing.write_kohya(adapter, "sdxl", {})
    )
    (tmp_path / "a.safetensors").write_bytes(data)
    again = reading.read_additive(tmp_path / "a.safetensors", xl_layers(xl))
    for component, modules in adapter.components.items():
        assert again.components[component].keys() == modules.keys()
        for path, module in modules.items():
            assert torch.allclose(
                deltas.delta(again.components[component][path]), deltas.delta(module), atol=1e-6
            )

    bare = {name: copy.deepcopy(model) for name, model in xl.items()}
    pipeline = StableDiffusionXLPipeline(
        None, bare["text_encoder"], bare["text_encoder_2"], None, None, bare["unet"], None
    )
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="subject")
    assert_same_xl_outputs(bare, models)


def assert_same_xl_outputs(found: Models, wanted: Models) -> None:
    def drawn(models: Models) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(4)
        latents, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 7, 40, generator=draw)
        more = {
            "text_embeds": torch.randn(1, 24, generator=draw),
            "time_ids": torch.randn(1, 6, generator=draw),
        }
        tokens = torch.randint(0, 90, (1, 7), generator=draw)
        with torch.no_grad():
            unet = models["unet"](latents, torch.tensor([500]), text, added_cond_kwargs=more).sample
            return [unet, models["text_encoder"](tokens)[0], models["text_encoder_2"](tokens).text_embeds]

    for one, other in zip(drawn(found), drawn(wanted), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp_min(1)


def test_an_xl_file_with_diffusers_names_is_read_too(xl, tmp_path):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    width = xl_layers(xl)["unet"][path][1]
    for stem in (
        "lora_unet_" + path.replace(".", "_"),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ):
        save_file(
            {
                f"{stem}.lora_down.weight": torch.ones(1, width),
                f"{stem}.lora_up.weight": torch.ones(width, 1),
            },
            tmp_path / "a.safetensors",
        )
        assert list(reading.read_additive(tmp_path / "a.safetensors", xl_layers(xl)).components["unet"]) == [
            path
        ]


def test_a_second_text_encoder_is_no_part_of_stable_diffusion_1(xl):
    modules = {"text_projection": Lora(torch.ones(1, 24), torch.ones(24, 1))}
    with pytest.raises(UserError, match="text_encoder_2, and sd1 has none"):
        writing.write_kohya(Adapter({"text_encoder_2": dict(modules)}, {}), "sd1", {})


# ---- refusals


@pytest.fixture(scope="module")
def lora_tensors(adapted) -> dict[str, torch.Tensor]:
    return peft_state(adapted("lora"))


SOME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def broken(case: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    a, b = f"{SOME}.lora_A.weight", f"{SOME}.lora_B.weight"
    if case == "half":
        del tensors[b]
    elif case == "not finite":
        tensors[a] = torch.full_like(tensors[a], float("nan"))
    elif case == "unknown key":
        tensors[f"{SOME}.lora_C.weight"] = torch.ones(2)
    elif case == "oft":
        tensors = {f"{SOME}.oft_R.weight": torch.ones(2, 2)}
    elif case == "bias":
        tensors[f"{SOME}.lora_B.bias"] = torch.ones(2)
    elif case == "other component":
        tensors = {key.replace("unet.", "transformer.", 1): tensor for key, tensor in tensors.items()}
    elif case == "other layer":
        tensors = {key.replace("down_blocks.1", "down_blocks.7"): tensor for key, tensor in tensors.items()}
    elif case == "second text encoder":
        tensors = {
            key.replace("text_encoder.", "text_encoder_2.", 1): tensor for key, tensor in tensors.items()
        }
    elif case == "twice":
        tensors[f"{SOME}.lora.down.weight"] = tensors[a].clone()
    elif case == "two kinds":
        tensors[f"{SOME}.hada_w1_a"] = torch.ones(64, 2)
    elif case == "other rank":
        tensors[b] = torch.ones(64, 3)
    elif case == "stable diffusion 2":
        is_cross = [key for key in tensors if "attn2.to_k.lora_A" in key or "attn2.to_v.lora_A" in key]
        tensors |= {key: torch.ones(4, 1024) for key in is_cross}
    elif case == "alpha 0":
        tensors[f"{SOME}.alpha"] = torch.zeros(())
    elif case == "magnitude of inputs":
        tensors[f"{SOME}.dora_scale"] = torch.ones(1, 32)
    elif case == "a bundled embedding":
        tensors["bundle_emb.dog.string_to_param.*"] = torch.ones(2, 32)
    elif case == "a star in a layer":
        tensors |= {
            key.replace("to_k", "*"): tensor.clone() for key, tensor in tensors.items() if "to_k" in key
        }
    elif case == "whole numbers":
        tensors[a] = tensors[a].long()
    return tensors


REFUSALS = {
    "half": rf"{SOME} has only down; that is no whole LoRA",
    "not finite": rf"{SOME}\.lora_A\.weight has values that are not finite",
    "unknown key": r"1 of \d+ keys belong to no kind of adapter that is read here, e\.g\. .*lora_C",
    "oft": "OFT",
    "bias": "a trained bias",
    "other component": "keys are for no layer of this base",
    "other layer": "keys are for no layer of this base",
    "second text encoder": "it has no text_encoder_2",
    "twice": "there twice, in two spellings",
    "two kinds": "is no whole LoRA, LoHa or LoKr",
    "other rank": r"its up has shape \(64, 3\); for this layer of \(64, 32\) it must be of shape \(64, 4\)",
    "stable diffusion 2": "another base: its UNet reads text Stable Diffusion 2.x's 1024 wide, and this one's 32",
    "alpha 0": "alpha must be one number other than 0, up to a million",
    "magnitude of inputs": "lengths of inputs",
    "whole numbers": "whole numbers",
    "a bundled embedding": r"e\.g\. bundle_emb\.dog\.string_to_param\.\*: an embedding \(textual inversion\)",
    "a star in a layer": r"belong to no kind of adapter that is read here, e\.g\. .*\*",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_is_taken_whole_or_refused_in_one_line(case, lora_tensors, base, tmp_path):
    save_file(broken(case, lora_tensors), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=REFUSALS[case]) as caught:
        reading.read_additive(tmp_path / "a.safetensors", base)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_file_without_tensors_is_no_adapter(base, tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the adapter is empty"):
        reading.read_additive(tmp_path / "a.safetensors", base)
    with pytest.raises(UserError, match="the adapter is empty"):
        writing.write_native(Adapter({}, {}), {})


def test_a_folder_without_an_adapter_says_what_it_holds(base, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no adapter is in this folder, which holds notes\.txt"):
        reading.read_additive(tmp_path, base)
    with pytest.raises(UserError, match="there is no such file"):
        reading.read_additive(tmp_path / "absent.safetensors", base)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json and no adapter_model\.safetensors"):
        reading.read_additive(tmp_path, base)


METADATA = {
    "no JSON": ("[", "is not a JSON table"),
    "other kind": ('{"unet.peft_type": "OFT"}', "has peft_type = 'OFT'"),
    "other rank": ('{"unet.r": 5, "unet.lora_alpha": 5}', "has rank 4, and its metadata says 5"),
    "odd alpha": (
        '{"unet.r": 4, "unet.lora_alpha": "much"}',
        "has lora_alpha = 'much'; it must be a number other than 0",
    ),
    "pissa": ('{"unet.r": 4, "unet.init_lora_weights": "pissa"}', "leaves the base's weights alone"),
    "trained biases": ('{"unet.r": 4, "unet.bias": "all"}', "bias = 'all'"),
    "a pattern": ('{"unet.r": 4, "unet.rank_pattern": {"(a+)+b": 4}}', "only names of layers are read"),
    "missing layers": (
        '{"unet.r": 4, "unet.target_modules": ["to_k", "conv1"]}',
        r"lacks \d+ of the \d+ layers of unet .*conv1",
    ),
    "half an adapter": (
        '{"unet.r": 4, "unet.lora_alpha": 6, "text_encoder.r": 4, "text_encoder_2.r": 4}',
        "has metadata about a text_encoder_2 and no tensor of it; the adapter is not whole",
    ),
    "no component": (
        '{"r": 4, "lora_alpha": 6}',
        "its metadata has r, which is for no part of this adapter of text_encoder and unet",
    ),
    "another component": (
        '{"unet.r": 4, "transformer.lora_alpha": 6}',
        r"its metadata has transformer\.lora_alpha, which is for no part",
    ),
    "transposed": ('{"unet.fan_in_fan_out": true}', "fan_in_fan_out"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_change_the_meaning_are_refused(case, lora_tensors, base, tmp_path):
    text, message = METADATA[case]
    save_file(lora_tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=message):
        reading.read_additive(tmp_path / "a.safetensors", base)


def test_values_that_half_precision_cannot_hold_are_not_written():
    adapter = Adapter({"unet": {"conv_in": Lora(torch.full((1, 4), 1e6), torch.ones(4, 1))}}, {})
    with pytest.raises(UserError, match="not finite in float16"):
        writing.write_kohya(adapter, "sd1", {}, torch.float16)


def test_damaged_files_are_refused_or_read_and_never_crash(adapted, base, tmp_path):
    """A hundred files with bytes changed, mostly in the header, which names and measures everything."""
    source = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("lokr cp")), base)
    whole = [rewritten(source, layout) for layout in ("native", "kohya")]
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    for n in range(100):
        data = bytearray(whole[n % 2])
        header = int.from_bytes(data[:8], "little")
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(8 + header) if draw.random() < 0.9 else draw.randrange(len(data))
            data[place] = draw.choice(
                (data[place] ^ 1 << draw.randrange(8), ord(draw.choice('019{}[]",:._ab')))
            )
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        (tmp_path / "damaged.safetensors").write_bytes(data)
        message = ""
        try:
            reading.read_additive(tmp_path / "damaged.safetensors", base)
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        outcomes[not message] += 1
    assert outcomes[False] > 60  # most damage is found, and not because everything is refused:
    assert reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("lora")), base)


# ---- arithmetic


def random_lora(rank: int, shape: tuple[int, ...], seed: int = 0) -> Lora:
    draw = torch.Generator().manual_seed(seed)
    ones = [1] * (len(shape) - 2)
    return Lora(
        torch.randn(rank, *shape[1:], generator=draw), torch.randn(shape[0], rank, *ones, generator=draw)
    )


@pytest.mark.parametrize("shape", [(24, 17), (12, 5, 3, 3)])
def test_shrinking_is_as_good_as_a_full_decomposition(shape):
    lora = random_lora(8, shape)
    small, kept = deltas.shrink(lora, 3)
    dense = deltas.delta(lora)
    values = torch.linalg.svdvals(dense.flatten(1).double())
    best = float(values[:3].square().sum() / values.square().sum())
    assert small.rank == 3
    assert kept == pytest.approx(best, rel=1e-6)
    residual = (dense - deltas.delta(small)).norm() / dense.norm()
    assert float(residual) == pytest.approx((1 - best) ** 0.5, rel=1e-5)
    assert deltas.shrink(lora, 8) == (lora, 1.0)


@pytest.mark.parametrize("shape", [(24, 17), (17, 24), (12, 5, 3, 3)])
def test_extraction_finds_a_low_rank_and_the_best_of_a_high_one(shape):
    dense = deltas.delta(random_lora(4, shape))
    found, kept = deltas.extract(dense, 4)
    assert kept == pytest.approx(1)
    assert (deltas.delta(found) - dense).norm() <= 1e-6 * dense.norm()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(noise.flatten(1).double())
    found, kept = deltas.extract(noise, 5)
    assert kept == pytest.approx(float(values[:5].square().sum() / values.square().sum()), rel=1e-6)
    assert float((deltas.delta(found) - noise).norm()) == pytest.approx(
        float(values[5:].square().sum().sqrt()), rel=1e-5
    )
    assert deltas.extract(torch.zeros(shape), 2)[1] == 1.0
    assert not deltas.delta(deltas.extract(torch.zeros(shape), 2)[0]).any()


def test_padding_and_concatenating_are_exact():
    shape = (12, 5, 3, 3)
    one, other = random_lora(3, shape), random_lora(2, shape, seed=1)
    assert torch.equal(deltas.delta(deltas.pad(one, 7)), deltas.delta(one))
    both = deltas.concatenate([one, other], [0.5, -2.0])
    assert both.rank == 5
    assert torch.allclose(deltas.delta(both), 0.5 * deltas.delta(one) - 2 * deltas.delta(other), atol=1e-5)
    with pytest.raises(ValueError, match="rank 3"):
        deltas.pad(one, 2)
    with pytest.raises(ValueError, match="do not add up"):
        deltas.concatenate([Lora(one.down, one.up, torch.ones(12)), other], [1, 1])


def test_ranks_of_exact_loras_are_products():
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    loha = LoHa(tensor(40, 3), tensor(3, 50), tensor(40, 4), tensor(4, 50))
    assert deltas.as_lora(loha).rank == 12
    lokr = LoKr(w1a=tensor(4, 2), w1b=tensor(2, 5), w2a=tensor(10, 3), w2b=tensor(3, 10))
    assert deltas.as_lora(lokr).rank == 6
    wide = LoHa(tensor(20, 8), tensor(8, 50), tensor(20, 8), tensor(8, 50))
    assert deltas.as_lora(wide).rank == 20  # never more than the layer has
    for module in (loha, lokr, wide):
        assert (deltas.delta(deltas.as_lora(module)) - deltas.delta(module)).norm() <= 1e-6 * deltas.delta(
            module
        ).norm()


def test_no_step_of_an_exact_lora_is_larger_than_the_layer(monkeypatch):
    """A LoHa of rank 64 on a wide convolution has 4096 products of ranks; written out, each with its kernel, they are gigabytes."""
    draw = torch.Generator().manual_seed(0)
    sizes: list[int] = []
    for name in ("qr", "svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, measured(getattr(torch.linalg, name), sizes))
    w1a, w2a = (torch.randn(20, 9, generator=draw) for _ in range(2))
    w1b, w2b = (torch.randn(9, 10, 3, 3, generator=draw) for _ in range(2))
    loha = LoHa(w1a, w1b, w2a, w2b, magnitude=torch.arange(20.0))
    found = deltas.as_lora(loha)
    assert found.rank == 20
    assert found.magnitude is loha.magnitude
    assert (deltas.delta(found) - deltas.delta(loha)).norm() <= 1e-6 * deltas.delta(loha).norm()
    assert max(sizes) <= 20 * 10 * 9


def measured(function: Callable[..., object], sizes: list[int]) -> Callable[..., object]:
    def wrapped(tensor: torch.Tensor, *args: object, **others: object) -> object:
        sizes.append(tensor.numel())
        return function(tensor, *args, **others)

    return wrapped


def test_a_module_that_does_nothing_becomes_a_lora_that_does_nothing():
    lokr = LoKr(w1=torch.zeros(4, 5), w2=torch.ones(10, 10))
    assert not deltas.delta(deltas.as_lora(lokr)).any()


def test_sides_are_divided_as_peft_divides_them():
    for width in (1, 7, 12, 320, 640, 768, 1024, 1280, 2816, 5120):
        for factor in (-1, 1, 4, 5, 8, 16, 100):
            assert writing.divided(width, factor) == factorization(width, factor)[0]


def test_a_shrunk_adapter_says_what_it_keeps(adapted, base, tmp_path):
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("loha")), base)
    small, kept = to_lora(adapter, rank=2)
    assert {module.rank for modules in small.components.values() for module in modules.values()} == {2}
    assert all(0.3 < share < 1 for share in kept.values())
    expected = len(tuner_layers({"unet": adapted("loha")["unet"]}))
    assert tables.table(small).splitlines()[1].split() == ["unet", "lora", str(expected), "2"]


def test_settings_that_are_a_pipe_or_too_many_or_overflow_are_refused(base, tmp_path):
    def written(up: float, **fields: Any) -> Path:
        path = tmp_path / "a.safetensors"
        tensors = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 64, 1, 1)}
        tensors["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.full((64, 2, 1, 1), up)
        about = {f"unet.{name}": value for name, value in fields.items()}
        path.write_bytes(
            safetensors_files.stable_bytes(tensors, {"lora_adapter_metadata": json.dumps(about)})
        )
        return path

    assert reading.read_additive(written(1.0, r=2), base)
    with pytest.raises(UserError, match="not finite once its scale is worked in"):
        reading.read_additive(written(1e35, r=2, lora_alpha=1e6), base)
    with pytest.raises(UserError, match="at most 5,000 names"):
        reading.read_additive(written(1.0, r=2, rank_pattern={f"layer{n}": 2 for n in range(5001)}), base)
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(written(1.0).read_bytes())
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(UserError, match="is not a regular file"):
        reading.read_additive(folder, base)
