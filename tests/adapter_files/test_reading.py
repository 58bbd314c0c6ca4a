"""Adapter files that are read, other programs' too: what they hold is what peft computes."""

import copy
import json
import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth.adapter_files import deltas, layer_names, native, reading, tables, writing
from dreambooth.adapter_files.adapter import Adapter, to_lora
from dreambooth.adapter_files.deltas import Lora
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.io.errors import UserError
from tests.adapter_files.files_made import (
    ATTENTION,
    KINDS,
    SOME,
    Models,
    expect_same_deltas,
    needs_lycoris,
    peft_file,
    peft_state,
    read_bytes,
    rewritten,
    tuner_layers,
    with_adapter,
)

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


@pytest.mark.slow
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
    """`unet.save_attn_procs` once wrote them so; diffusers of today loads nothing from such a file, in
    silence."""
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
    """The pair that peft's examples write, and each of the two alone, which nothing but its layers tells
    apart."""
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
    """As diffusers writes them for a file that it loaded: ^ and the whole name; the first that fits is the
    one."""
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
    """The keys of each module decide its kind. peft's layout has one configuration for all and is refused."""
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
    with pytest.raises(UserError, match="text_encoder_2, but sd1 has none"):
        writing.write_kohya(Adapter({"text_encoder_2": dict(modules)}, {}), "sd1", {})
