"""Adapter files that are written: what diffusers, peft and LyCORIS read in them is what peft computes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors.torch import load, save_file

from dreambooth.adapter_files import deltas, reading, writing
from dreambooth.adapter_files.adapter import to_lora
from tests.adapter_files.files_made import (
    KINDS,
    LYCORIS,
    Models,
    expect_same_deltas,
    needs_lycoris,
    outputs,
    peft_file,
    peft_state,
    read_bytes,
    rewritten,
    tuner_layers,
)

LORAS = ["lora", "rslora", "locon", "mixed ranks"]


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


# ---- every kind in every layout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_every_layout(kind, adapted, adapter_of, base, tmp_path):
    """From peft's own file, written in our layout and in kohya's, read again: each layer adds what peft
    computes for it."""
    models, adapter = adapted(kind), adapter_of(kind)
    expect_same_deltas(adapter, models)
    for layout in ("native", "kohya"):
        again = read_bytes(rewritten(adapter, layout), tmp_path / f"{layout}.safetensors", base)
        assert again.kinds == adapter.kinds
        expect_same_deltas(again, models)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "kohya"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_one_component_alone_is_an_adapter(component, layout, adapted, base, tmp_path):
    models = {component: adapted("loha")[component]}
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", models), base)
    expect_same_deltas(read_bytes(rewritten(adapter, layout), tmp_path / "again.safetensors", base), models)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_any_kind_becomes_the_same_lora(kind, adapted, adapter_of):
    """LoHa and LoKr too, with or without a core, to the last bits of float32."""
    lora, kept = to_lora(adapter_of(kind))
    assert lora.kinds == ("lora",)
    assert set(kept.values()) == {1.0}
    expect_same_deltas(lora, adapted(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float16) for kind in KINDS), ("dora", torch.bfloat16)]
)
def test_half_precision_costs_its_rounding_and_no_more(kind, dtype, adapter_of, base, tmp_path):
    adapter = adapter_of(kind)
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
def test_plain_diffusers_loads_lora_from_both_layouts(kind, layout, adapted, adapter_of, loaded, tmp_path):
    """Mixed ranks and alphas included, which diffusers gets wrong from kohya's files as they usually are."""
    adapter = adapter_of(kind)
    expect_same_outputs(loaded, adapted(kind), rewritten(adapter, layout), tmp_path)


@pytest.mark.slow
def test_plain_diffusers_loads_dora_from_our_layout(adapted, adapter_of, loaded, tmp_path):
    adapter = adapter_of("dora")
    expect_same_outputs(loaded, adapted("dora"), writing.write_native(adapter, {}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LYCORIS)
def test_plain_diffusers_loads_loha_and_lokr_as_lora(kind, adapted, loaded, adapter_of, tmp_path):
    """From our layout and from kohya's in turn: the test of LoRA has both."""
    layout = ("native", "kohya")[LYCORIS.index(kind) % 2]
    expect_same_outputs(loaded, adapted(kind), rewritten(to_lora(adapter_of(kind))[0], layout), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("lokr")])
def test_diffusers_unet_loads_lokr_from_our_layout(kind, adapted, adapter_of, loaded, tmp_path):
    """The metadata make peft cut every factor as the file has it."""
    adapter = adapter_of(kind)
    (tmp_path / "native.safetensors").write_bytes(writing.write_native(adapter, {}))
    unet = copy.deepcopy(loaded["unet"])
    unet.load_lora_adapter(tmp_path / "native.safetensors", prefix="unet", use_safetensors=True)
    found, _ = outputs(unet, loaded["text_encoder"])
    wanted, _ = outputs(adapted(kind)["unet"], loaded["text_encoder"])
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LYCORIS)
def test_peft_makes_the_same_modules_from_our_metadata(kind, adapter_of, loaded, tmp_path):
    adapter = adapter_of(kind)
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


@pytest.mark.slow
@needs_lycoris
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_computes_the_same_from_our_kohya_file(kind, adapted, adapter_of):
    """With LyCORIS' own functions and its rule for scales."""
    from lycoris.functional import locon, loha, lokr

    models, adapter = adapted(kind), adapter_of(kind)
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


def test_kohya_lora_has_one_rank_and_alpha_for_each_component(adapter_of, base, tmp_path):
    adapter = adapter_of("mixed ranks")
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
        "ss_v_parameterization": "True",
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
