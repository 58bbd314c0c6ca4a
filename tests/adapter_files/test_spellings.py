"""The names of layers in the files of other programs: one adapter in every spelling is one adapter."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

from dreambooth.adapter_files import deltas, layer_names, reading
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.bases import families
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions

Tensors = dict[str, torch.Tensor]

# ---- Stability's names

_XL: dict[str, object] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 72,
}
UNETS: dict[str, dict[str, object]] = {
    "Stable Diffusion 1.5": {},
    "Stable Diffusion 2.1": {"use_linear_projection": True, "attention_head_dim": (1, 2, 4, 4)},
    "Stable Diffusion XL": _XL,
    "one resnet in a block": {"layers_per_block": 1},
    "no attention at the top and the bottom": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_stability_s_names_of_all_layers_are_those_that_diffusers_converts(name):
    settings: dict[str, object] = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8} | UNETS[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings)  # type: ignore[arg-type]
    layers = [path for path, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    names = layer_names.sgm_names(layers)
    assert len(set(names.values())) == len(layers) > 150
    checkpoint = {
        f"model.diffusion_model.{sgm}.{end}": f"{path}.{end}"
        for path, sgm in names.items()
        for end in ("weight", "bias")
    }
    # the converter reads the weights of normalization layers without asking for them
    checkpoint |= {f"model.diffusion_model.{key}": key for key in ("out.0.weight", "out.0.bias")}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert {f"{path}.weight" for path in layers} <= converted.keys()
    assert all(key == path for key, path in converted.items() if path.removesuffix(".weight") in names)


def test_names_in_programs_tables():
    """As ComfyUI, A1111 and sd-scripts write them out."""
    layers = ["down_blocks.0.resnets.1.conv1", "up_blocks.1.attentions.0.proj_in"]
    layers += [f"up_blocks.{n}.upsamplers.0.conv" for n in (0, 1)]
    assert layer_names.sgm_names([*layers, "down_blocks.2.downsamplers.0.conv"]) == {
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "up_blocks.1.attentions.0.proj_in": "output_blocks.3.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
    }


# ---- one adapter in every spelling


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tiny_xl: Path) -> dict[str, Layers]:
    return {
        name: layer_names.plain_layers(families.find(BaseOptions(str(path))).layers())
        for name, path in (("sd", tiny_base), ("xl", tiny_xl))
    }


def modules_for(layers: Layers) -> dict[tuple[str, str], Tensors]:
    """A random LoRA of rank 2 and alpha 3 for every layer that may have one, by kohya's ends."""
    draw = torch.Generator().manual_seed(0)
    modules = {}
    for component, shapes in layers.items():
        for path, (*shape,) in shapes.items():
            if len(shape) in (2, 4) and not path.endswith(layer_names.EMBEDDINGS):
                outputs, inputs, *kernel = shape
                modules[component, path] = {
                    "lora_down.weight": torch.randn(2, inputs, *kernel, generator=draw),
                    "lora_up.weight": torch.randn(outputs, 2, *[1] * len(kernel), generator=draw),
                    "alpha": torch.tensor(3.0),
                }
    return modules


def comfy(component: str, path: str, sgm: str) -> str:
    part = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.get(component)
    text = path if path == "text_projection" else f"text_model.{path}"
    return f"text_encoders.{part}.transformer.{text}" if part else f"diffusion_model.{sgm}"


def checkpoint_names(component: str, path: str, sgm: str) -> str:
    """As in Stability's checkpoints of SD 1.x and of the first encoder of XL."""
    if component == "unet":
        return f"model.diffusion_model.{sgm}"
    prefix = {"text_encoder": "conditioner.embedders.0.transformer.text_model"}.get(component)
    return f"{prefix}.{path}" if prefix else open_clip(component, path, sgm)


def open_clip(component: str, path: str, sgm: str) -> str:
    if component == "unet" or path == "text_projection":
        return f"{component}.{path}"
    names = {"encoder.layers": "transformer.resblocks", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj"}
    for name, other in names.items():
        path = path.replace(name, other)
    return f"conditioner.embedders.{int(component == 'text_encoder_2')}.model.{path}"


def with_text(component: str, path: str) -> str:
    return path if component == "unet" or path == "text_projection" else f"text_model.{path}"


_TE = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}
SPELLINGS: dict[str, Callable[[str, str, str], str]] = {
    "diffusers": lambda c, path, sgm: f"{c}.{path}",
    "peft": lambda c, path, sgm: f"{c}.base_model.model.{path}",
    "peft outside": lambda c, path, sgm: f"base_model.model.{c}.{with_text(c, path)}",
    "compiled": lambda c, path, sgm: f"{c}._orig_mod.{with_text(c, path)}",
    "several processes": lambda c, path, sgm: f"module.{c}.{path}",
    "on another adapter": lambda c, path, sgm: f"{c}.{path}.base_layer",
    "kohya": lambda c, path, sgm: f"lora_{_TE[c]}_{with_text(c, path)}".replace(".", "_"),
    "kohya, Stability's": lambda c, path, sgm: f"lora_{_TE[c]}_{with_text(c, sgm)}".replace(".", "_"),
    "kohya, dotted": lambda c, path, sgm: f"lora_{_TE[c]}.{with_text(c, sgm)}",
    "kohya, half dotted": lambda c, path, sgm: f"lora_{_TE[c]}_{path}",
    "kohya, to_out": lambda c, path, sgm: f"lora_{_TE[c]}_{with_text(c, path)}".replace(
        "to_out.0", "to_out"
    ).replace(".", "_"),
    "OneTrainer": lambda c, path, sgm: (
        f"unet.{sgm}" if c == "unet" else f"clip_{'lg'[c == 'text_encoder_2']}.{with_text(c, path)}"
    ),
    "ComfyUI": comfy,
    "ComfyUI without wrapper": lambda c, path, sgm: comfy(c, path, sgm).replace(".transformer.", "."),
    "UNet alone, Stability's": lambda c, path, sgm: sgm if c == "unet" else f"{c}.{path}",
    "UNet alone, flat": lambda c, path, sgm: path.replace(".", "_") if c == "unet" else f"{c}.{path}",
    "lycoris": lambda c, path, sgm: (
        f"lycoris_{path}".replace(".", "_") if c == "unet" else f"lycoris_{_TE[c]}_{path}".replace(".", "_")
    ),
    "lycoris_unet": lambda c, path, sgm: f"lycoris_{c}_{path}".replace(".", "_"),
    "processors": lambda c, path, sgm: f"{c}.{path}".replace(".to_", ".processor.to_"),
    "checkpoint": checkpoint_names,
    "OpenCLIP": open_clip,
}
ENDS = {
    "lora_up": {"lora_down.weight": "lora_down.weight", "lora_up.weight": "lora_up.weight"},
    "lora_A": {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"},
    "lora_A without weight": {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"},
    "lora.down": {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"},
}


def spelled(layers: Layers, spelling: str, ends: Mapping[str, str]) -> Tensors:
    sgm = layer_names.sgm_names(layers["unet"])
    return {
        f"{SPELLINGS[spelling](component, path, sgm.get(path, path))}.{ends.get(end, end)}": tensor
        for (component, path), module in modules_for(layers).items()
        for end, tensor in module.items()
    }


def assert_same(adapter: Adapter, other: Adapter) -> None:
    assert adapter.components.keys() == other.components.keys()
    for component, modules in adapter.components.items():
        assert modules.keys() == other.components[component].keys()
        for path, module in modules.items():
            for name, tensor in vars(module).items():
                wanted = vars(other.components[component][path])[name]
                assert (tensor is wanted is None) or torch.equal(tensor, wanted), f"{component}.{path}"


@pytest.mark.parametrize(
    ("family", "spelling"),
    [("xl", name) for name in SPELLINGS]
    + [("sd", name) for name in ("kohya, Stability's", "ComfyUI", "UNet alone, Stability's")],
)
def test_one_adapter_in_every_spelling_has_the_same_tensors(family, spelling, bases, tmp_path):
    layers = bases[family]
    save_file(spelled(layers, "diffusers", {}), tmp_path / "native.safetensors")
    wanted = reading.read_additive(tmp_path / "native.safetensors", layers)
    assert sum(map(len, wanted.components.values())) == len(modules_for(layers)) > 60
    ends = list(ENDS.values())[len(spelling) % len(ENDS)]
    save_file(spelled(layers, spelling, ends), tmp_path / "a.safetensors")
    assert_same(reading.read_additive(tmp_path / "a.safetensors", layers), wanted)
    without_base = reading.read_additive(tmp_path / "a.safetensors")  # for `inspect`
    assert {c: len(m) for c, m in without_base.components.items()} == {
        c: len(m) for c, m in wanted.components.items()
    }


@pytest.mark.parametrize("ends", ENDS)
def test_a_layer_s_tensors_have_one_meaning_under_every_name(ends, bases, tmp_path):
    layers = {"unet": {"conv_in": bases["sd"]["unet"]["conv_in"]}}
    save_file(spelled(layers, "diffusers", {}), tmp_path / "native.safetensors")
    save_file(spelled(layers, "ComfyUI", ENDS[ends]), tmp_path / "a.safetensors")
    wanted, found = (
        reading.read_additive(tmp_path / f"{n}.safetensors", bases["sd"]) for n in ("native", "a")
    )
    assert_same(found, wanted)


def test_a_fused_layer_is_split_into_its_three(bases, tmp_path):
    """The queries, keys and values are thirds of the rows of OpenCLIP's `in_proj_weight`."""
    layers = bases["xl"]
    width, draw = layers["text_encoder_2"]["encoder.layers.1.self_attn.q_proj"][0], torch.Generator()
    down, up = torch.randn(2, width, generator=draw), torch.randn(3 * width, 2, generator=draw)
    stem = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    modules = reading.read_additive(tmp_path / "a.safetensors", layers).components["text_encoder_2"]
    names = [f"encoder.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert modules.keys() == set(names)
    assert torch.equal(torch.cat([deltas.delta(modules[name]) for name in names]), up @ down)
    save_file(tensors | {f"{stem}.lora_up.weight": up[:-1].clone()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"one module for three layers .* cannot be split into three"):
        reading.read_additive(tmp_path / "a.safetensors", layers)
    other = "lora_te2_text_model_encoder_layers_1_self_attn_k_proj"
    tensors |= {f"{other}.lora_down.weight": down.clone(), f"{other}.lora_up.weight": up[:width].clone()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"k_proj occurs twice, in two spellings"):
        reading.read_additive(tmp_path / "a.safetensors", layers)


def test_a_difference_of_a_full_weight_is_read_exactly(bases, tmp_path):
    layers = bases["sd"]
    draw = torch.Generator().manual_seed(0)
    wanted = {
        path: torch.randn(layers["unet"][path], generator=draw)
        for path in ("conv_in", "down_blocks.0.resnets.0.time_emb_proj")
    }
    sgm = layer_names.sgm_names(layers["unet"])
    save_file({f"diffusion_model.{sgm[p]}.diff": t for p, t in wanted.items()}, tmp_path / "a.safetensors")
    modules = reading.read_additive(tmp_path / "a.safetensors", layers).components["unet"]
    assert modules.keys() == wanted.keys()
    assert all(torch.equal(deltas.delta(modules[path]), tensor) for path, tensor in wanted.items())


CLIP = "text_encoders.clip_l.transformer.text_model"
NOT_READ = {
    "a bias": ({"diffusion_model.out.2.diff_b": torch.ones(4)}, "a difference of a bias"),
    "a norm": ({"diffusion_model.out.0.diff": torch.ones(32)}, "a difference of a normalization layer"),
    "a replaced weight": ({"diffusion_model.out.2.set_weight": torch.ones(4)}, "replaces the base's"),
    "a controlnet": (
        {"controlnet.down_blocks.0.resnets.0.conv1.lora_up.weight": torch.ones(32, 1)},
        r"controlnet\.down_blocks\.0\.resnets\.0\.conv1\.lora_up\.weight; the layer with the most similar"
        r" name is unet\.down_blocks\.0\.resnets\.0\.conv1: the adapter is for another base, or has names",
    ),
    "an embedding": (
        {f"{CLIP}.embeddings.token_embedding.lora_up.weight": torch.ones(9, 1)},
        "a LoRA of an embedding",
    ),
    "both encoders": (
        {"lycoris_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(37, 1)},
        "could be for text_encoder and text_encoder_2",
    ),
    "the transpose of a Linear": (
        {"conditioner.embedders.1.model.text_projection.lora_up.weight": torch.ones(24, 1)},
        "no layer of this base",
    ),
    "only an embedding": (
        {"bundle_emb.dog.clip_l": torch.ones(2, 32)},
        r"the adapter is empty: it holds only embeddings",
    ),
    "flux": (
        {"transformer.single_blocks.0.linear1.lora_A.weight": torch.ones(1, 32)},
        r"a transformer \(Stable Diffusion 3, Flux\), not a UNet",
    ),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_not_read_is_named(case, bases, tmp_path):
    tensors, message = NOT_READ[case]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        reading.read_additive(tmp_path / "a.safetensors", bases["xl"])
    assert "not a complete safetensors file" not in str(refused.value)


# ---- what else a file may hold


def test_embeddings_are_left_out_with_a_note(bases, tmp_path):
    tensors = spelled(bases["sd"], "kohya", {})
    save_file(tensors, tmp_path / "a.safetensors")
    bundled = {
        "bundle_emb.my dog.clip_l": torch.ones(2, 32),
        "bundle_emb.<s1>.string_to_param.*": torch.ones(2, 32),
        "bundle_emb.\u200dcat.clip_g": torch.ones(2, 4, dtype=torch.int8),
    }
    save_file(tensors | bundled, tmp_path / "b.safetensors")
    plain, adapter = (reading.read_additive(tmp_path / f"{n}.safetensors", bases["sd"]) for n in "ab")
    assert_same(adapter, plain)
    assert plain.notes == ()
    (note,) = adapter.notes
    assert "embeddings (textual inversion) for <s1>, my dog, '\\u200dcat'. They are left out" in note


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_floating_point_dtype_is_read_exactly(dtype, bases, tmp_path):
    tensors = {key: tensor.to(dtype) for key, tensor in spelled(bases["sd"], "kohya", {}).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({key: tensor.float() for key, tensor in tensors.items()}, tmp_path / "b.safetensors")
    found, wanted = (reading.read_additive(tmp_path / f"{n}.safetensors", bases["sd"]) for n in "ab")
    assert_same(found, wanted)


def test_a_header_with_pictures_and_tags_is_no_damage(bases, tmp_path):
    tensors = spelled(bases["sd"], "kohya", {})
    tags = '{"10_dog": {' + ", ".join(f'"tag \\"{n}\\"": {n}' for n in range(300_000)) + "}}"
    metadata = {"modelspec.thumbnail": "data:image/png;base64," + 4_000_000 * "A", "ss_tag_frequency": tags}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") > 10_000_000
    adapter = reading.read_additive(tmp_path / "a.safetensors", bases["sd"])
    assert adapter.metadata == metadata
    assert len(load_file(tmp_path / "a.safetensors")) == len(tensors)


def test_a_header_over_the_format_s_limit_is_named_so(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_009)  # sparse
    with pytest.raises(UserError, match=r"over 100,000,000, the limit of the format"):
        reading.read_additive(tmp_path / "a.safetensors")


def test_the_kohya_names_of_xl_are_read_back(bases):
    """What this project writes for other programs it reads, for all layers."""
    layers = bases["xl"]
    names = layer_names.LayerNames(layers)
    depth = layer_names.depth_of(layers["unet"])
    for component, path in modules_for(layers):
        stem = layer_names.kohya_stem(component, path, "sdxl", depth)
        assert re.fullmatch(r"\w+", stem)
        assert names.place(stem, "") == (component, path)


def test_one_wrong_name_among_right_ones_is_not_called_another_base() -> None:
    names = layer_names.LayerNames({"unet": {"conv_in": (8, 4, 3, 3)}})
    assert "another base" not in names.nearest("lora_unet_conv_inn", fits_else=True)
    assert "unet.conv_in. The other keys are for layers of this base" in names.nearest("conv_inn", True)
    assert "another base" in names.nearest("lora_unet_conv_inn", fits_else=False)
