"""Tiny bases as folders, and the same bases in single files, in the layouts that diffusers' and kohya's
conversion scripts write.

The keys are made by the inverse of the mapping that readers use, from the structure of the models."""

import functools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from dreambooth.bases import single_files
from dreambooth.io import reader
from tests import tiny

KINDS = ("sd1", "sd2", "sd2_v", "sdxl")
VOCABULARY = single_files.CONFIGS / "vocabulary"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


# ---- folders


@functools.cache
def _tokenizer(pad_token: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(VOCABULARY, pad_token=pad_token, model_max_length=77)


def build_folder(folder: Path, kind: str) -> Path:
    """A tiny base of this kind with CLIP's own tokenizers."""
    first, second = _tokenizer("<|endoftext|>"), _tokenizer("!")
    if kind == "sdxl":
        return tiny.build_xl(folder, tokenizers=(first, second))
    is_2 = kind != "sd1"
    prediction = "v_prediction" if kind == "sd2_v" else "epsilon"
    tokenizer = second if is_2 else first
    return tiny.build_pipeline(
        folder, tokenizer=tokenizer, prediction_type=prediction, use_linear_projection=is_2
    )


def make_configs(folder: Path, bases: Mapping[str, Path]) -> Path:
    """A folder as `single_files.CONFIGS`, with the configurations of the tiny `bases` by kind."""
    for kind, base in bases.items():
        for path in base.rglob("*.json"):
            if path.name not in ("tokenizer.json", "vocab.json"):
                target = folder / kind / path.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        for tokenizer in (folder / kind).glob("tokenizer*"):
            shutil.copy(single_files.CONFIGS / kind / tokenizer.name / "tokenizer_config.json", tokenizer)
    (folder / "vocabulary").symlink_to(VOCABULARY)
    return folder


# ---- files


def write(
    base: Path,
    kind: str,
    path: Path,
    *,
    kohya: bool = False,
    dtype: torch.dtype | None = None,
    without: tuple[str, ...] = (),
    metadata: dict[str, str] | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the base in a folder to one file, without the parts `without`, and with `more` tensors."""
    tensors: dict[str, Tensor] = {}
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])):
        if part not in without:
            config = reader.read_json_table(base / part / "config.json", part)
            (file,) = (base / part).glob("*.safetensors")
            tensors |= original(kind, part, load_file(file), config, kohya=kohya)
    if dtype:
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
    save_file(
        {key: value.contiguous() for key, value in (tensors | dict(more or {})).items()}, path, metadata
    )
    return path


def original(
    kind: str, part: str, state: Mapping[str, Tensor], config: Mapping[str, Any], *, kohya: bool = False
) -> dict[str, Tensor]:
    """The weights of a part in the original layout. With `kohya`, what its scripts add is there too."""
    if part == "unet":
        return {f"model.diffusion_model.{unet_key(key, config)}": value for key, value in state.items()}
    if part == "vae":
        blocks = len(config["block_out_channels"])
        tensors = {f"first_stage_model.{vae_key(key, blocks)}": value for key, value in state.items()}
        is_attention = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$").search
        return {key: value[..., None, None] if is_attention(key) else value for key, value in tensors.items()}
    state = {key if "text_projection" in key else f"text_model.{plain(key)}": v for key, v in state.items()}
    if kind == "sd1" or (kind == "sdxl" and part == "text_encoder"):
        prefix = "cond_stage_model" if kind == "sd1" else "conditioner.embedders.0"
        return {f"{prefix}.transformer.{key}": value for key, value in state.items()}
    prefix = "conditioner.embedders.1.model" if kind == "sdxl" else "cond_stage_model.model"
    tensors = open_clip(state)
    if kohya and kind != "sdxl":  # made up: a last layer that is not used, and two weights of the whole CLIP
        last = f"resblocks.{config['num_hidden_layers'] - 1}."
        more = {key.replace(last, "resblocks.23."): v.clone() for key, v in tensors.items() if last in key}
        tensors |= more | {"text_projection": torch.ones(config["hidden_size"], config["hidden_size"])}
    if kohya:
        tensors["logit_scale"] = torch.tensor(4.6)
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def plain(key: str) -> str:
    return key.removeprefix("text_model.")


def unet_key(key: str, config: Mapping[str, Any]) -> str:
    """The original name of a UNet's weight."""
    in_block = config["layers_per_block"] + 1
    for ours, theirs in _OUTER.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_in_layer(match[1], match[3])}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert match is not None, key
    side, block, what, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if what == "downsamplers":
        return f"input_blocks.{(block + 1) * in_block}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        slot = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{block * in_block + in_block - 1}.{slot}.{rest}"
    number = block * in_block + layer + (1 if side == "down" else 0)
    name = "input_blocks" if side == "down" else "output_blocks"
    return f"{name}.{number}.{1 if what == 'attentions' else 0}.{_in_layer(what, rest)}"


def _in_layer(what: str, rest: str) -> str:
    name, _, end = rest.partition(".")
    return f"{_RESNET[name]}.{end}" if what == "resnets" else rest


def vae_key(key: str, blocks: int) -> str:
    """The original name of a VAE's weight."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
        return re.sub(r"to_(q|k|v)\.", r"\1.", key.replace("to_out.0.", "proj_out."))
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    reverse = lambda match: f"up.{blocks - 1 - int(match[1])}."  # noqa: E731
    key = re.sub(r"up_blocks\.(\d)\.", reverse, key)
    return re.sub(r"(up\.\d)\.resnets\.", r"\1.block.", key).replace("upsamplers.0.", "upsample.")


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder as OpenCLIP stores it: query, key and value in one matrix, the projection transposed."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "text_projection.weight":
            tensors["text_projection"] = value.T
        elif match := re.match(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key):
            names = (key.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj"))
            merged = torch.cat([state[name] for name in names])
            tensors[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = merged
        elif not re.search(r"\.(k|v)_proj\.", key):
            tensors[_open_clip_key(plain(key))] = value
    return tensors


def _open_clip_key(key: str) -> str:
    for ours, theirs in (
        ("encoder.layers.", "transformer.resblocks."),
        ("embeddings.token_embedding", "token_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("final_layer_norm", "ln_final"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn", "attn"),
    ):
        key = key.replace(ours, theirs)
    return key
