"""How other programs read adapter files: which keys each of them applies, and what it adds to a weight.

These are facts about ComfyUI (whose code Forge uses), A1111, kohya's sd-scripts, LyCORIS, InvokeAI and
diffusers, written down from their public sources. Nothing here uses the code that is tested.
`python -m tests.adapter_io.readers_table` writes the table in docs/adapters.md from them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

Family = Literal["sd1", "sdxl"]
Tensors = Mapping[str, Tensor]  # of one layer, by the part of the key after the layer's name
Rebuild = Callable[[Tensors, Tensor], Tensor]  # tensors, the base's weight -> the weight with the adapter

# ---- names of layers


def stability_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """By diffusers' name, each UNet layer's name in Stability's code, by counting blocks in order.

    There every resnet, with the attention behind it, is a block of its own, and so is every downsampler; an
    upsampler is the last part of its block.
    """
    starts = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            number += 1
            starts[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            starts[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
        if block.downsamplers:
            number += 1
            starts[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = -1
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            number += 1
            starts[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            starts[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
        if block.upsamplers:
            part = 2 if hasattr(block, "attentions") else 1
            starts[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number}.{part}.conv"
    inner = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    names = {}
    for name in layers_of(unet):
        start = max((s for s in starts if name == s or name.startswith(f"{s}.")), key=len)
        rest = name[len(start) + 1 :]
        tail = inner.get(rest, rest) if ".resnets." in start else rest
        names[name] = f"{starts[start]}.{tail}".rstrip(".")
    return names


def layers_of(model: nn.Module) -> list[str]:
    """The names of all linear layers and convolutions."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A base without weights, with the names that its layers have in the programs."""

    family: Family
    unet: UNet2DConditionModel
    text: dict[str, CLIPTextModel | CLIPTextModelWithProjection]  # by diffusers' name of the component

    def text_stems(self, prefixes: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        """(component, layer) by kohya's name, for the six projections of each layer of the text encoders.

        `prefixes` are those of the encoders' names, in order.
        """
        stems = {}
        for prefix, (component, model) in zip(prefixes, self.text.items(), strict=True):
            for name in layers_of(model):
                layer = name.removeprefix("text_model.")
                if layer.startswith("encoder.layers."):
                    stems[f"{prefix}text_model_{layer.replace('.', '_')}"] = (component, layer)
        return stems

    @property
    def kohya_text(self) -> dict[str, tuple[str, str]]:
        return self.text_stems(("lora_te_",) if self.family == "sd1" else ("lora_te1_", "lora_te2_"))


Table = dict[str, tuple[str, str]]  # the part of a key that names the layer -> (component, layer)


def _flat_unet(names: Mapping[str, str]) -> Table:
    """`names`: by diffusers' name, the name in a program."""
    return {f"lora_unet_{name.replace('.', '_')}": ("unet", layer) for layer, name in names.items()}


@functools.cache
def comfyui_table(base: Base) -> Table:
    """UNet: flat names of diffusers and of Stability; in diffusers' files the names of old attention
    processors. Text encoders: kohya's names and diffusers'."""
    stability = stability_names(base.unet)
    table = _flat_unet({name: name for name in stability}) | _flat_unet(stability)
    for layer, name in stability.items():
        table[f"diffusion_model.{name}"] = ("unet", layer)
        old = layer.replace(".to_", ".processor.to_")
        table[f"unet.{old.removesuffix('.0') if old.endswith('.to_out.0') else old}"] = ("unet", layer)
    for component, layer in base.kohya_text.values():
        table[f"{component}.text_model.{layer}"] = (component, layer)
    return table | base.kohya_text


@functools.cache
def a1111_table(base: Base) -> Table:
    """diffusers' names are translated for Stable Diffusion 1.x, Stability's are used for XL."""
    stability = stability_names(base.unet)
    if base.family == "sdxl":
        return _flat_unet(stability) | base.kohya_text
    modules = {f"diffusion_model_{name.replace('.', '_')}": layer for layer, name in stability.items()}
    table = {}
    for layer in stability:
        stem = f"lora_unet_{layer.replace('.', '_')}"
        if (name := _a1111_name(stem)) in modules:
            table[stem] = ("unet", modules[name])
    return table | base.kohya_text


def _a1111_name(stem: str) -> str:
    """The name that A1111 looks up for a name of diffusers'."""
    inner = {"conv1": "in_layers_2", "conv2": "out_layers_3"}
    inner |= {"time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}
    if stem in ("lora_unet_conv_in", "lora_unet_conv_out"):
        return f"diffusion_model_{'input_blocks_0_0' if stem.endswith('in') else 'out_2'}"
    if match := re.fullmatch(r"lora_unet_time_embedding_linear_(\d)", stem):
        return f"diffusion_model_time_embed_{2 * int(match[1]) - 2}"
    if match := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", stem):
        is_resnet = match[1] == "resnets"
        number, tail = (2 * int(match[2]), inner.get(match[3], match[3])) if is_resnet else (1, match[3])
        return f"diffusion_model_middle_block_{number}_{tail}"
    match = re.fullmatch(r"lora_unet_(down|up)_blocks_(\d)_(attentions|resnets|\w+samplers)_(\d)_(.+)", stem)
    if not match:
        return stem
    direction, block, part, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if part == "downsamplers":
        return f"diffusion_model_input_blocks_{3 * block + 3}_0_op"
    if part == "upsamplers":
        return f"diffusion_model_output_blocks_{3 * block + 2}_{2 if block else 1}_conv"
    half, number = ("input", 3 * block + index + 1) if direction == "down" else ("output", 3 * block + index)
    is_resnet = part == "resnets"
    tail = inner.get(rest, rest) if is_resnet else rest
    return f"diffusion_model_{half}_blocks_{number}_{0 if is_resnet else 1}_{tail}"


@functools.cache
def sd_scripts_table(base: Base) -> Table:
    """Layers within transformers, resnets and samplers; within attention and MLP of the text encoders."""
    stability = stability_names(base.unet)
    parents = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    names = {
        f"{name}.{child}"
        for name, module in base.unet.named_modules()
        if type(module).__name__ in parents
        for child in layers_of(module)
    }
    return _flat_unet({n: stability[n] if base.family == "sdxl" else n for n in names}) | base.kohya_text


@functools.cache
def invokeai_table(base: Base) -> Table:
    """diffusers' names; for Stable Diffusion XL those of Stability, translated."""
    stability = stability_names(base.unet)
    names = stability if base.family == "sdxl" else {name: name for name in stability}
    return _flat_unet(names) | base.kohya_text


@functools.cache
def diffusers_table(base: Base) -> Table:
    """Component, dot, layer in its own files; kohya's names in the others."""
    own = {f"unet.{name}": ("unet", name) for name in layers_of(base.unet)}
    for component, layer in base.kohya_text.values():
        own[f"{component}.text_model.{layer}"] = (component, layer)
    return own | invokeai_table(base)


# ---- what is added to a weight


class NotReadError(Exception):
    """The program does not apply these tensors."""


def _scale(tensors: Tensors, rank: int) -> float:
    """alpha / rank; 1 if the file has no alpha."""
    return float(tensors["alpha"]) / rank if "alpha" in tensors else 1.0


def _lora(tensors: Tensors, weight: Tensor) -> Tensor:
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    return (up @ down).reshape(weight.shape) * _scale(tensors, down.shape[0])


def _loha(tensors: Tensors, weight: Tensor) -> Tensor:
    halves = []
    for n in (1, 2):
        a, b = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]
        core = tensors.get(f"hada_t{n}")
        halves.append(a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a))
    scale = _scale(tensors, tensors["hada_w1_b"].shape[0])
    return (halves[0] * halves[1]).reshape(weight.shape) * scale


def _lokr(tensors: Tensors, weight: Tensor, *, rank_of: Literal["first", "second"]) -> Tensor:
    """`rank_of`: the factor whose rank the scale is taken from if both are products."""
    ranks = {}
    factors = []
    for n, factor in ((1, "first"), (2, "second")):
        if (dense := tensors.get(f"lokr_w{n}")) is None:
            a, b = tensors[f"lokr_w{n}_a"], tensors[f"lokr_w{n}_b"]
            dense, ranks[factor] = a @ b, b.shape[0]
        factors.append(dense)
    first, second = factors
    if second.ndim == 4:
        first = first[:, :, None, None]
    rank = ranks.get(rank_of) or next(iter(ranks.values()), None)
    scale = 1.0 if rank is None else _scale(tensors, rank)
    return torch.kron(first, second.contiguous()).reshape(weight.shape) * scale


def _update(tensors: Tensors, weight: Tensor, rank_of: Literal["first", "second"] = "second") -> Tensor:
    """dW without magnitudes, as every program that knows LoRA, LoHa and LoKr computes it."""
    if "lora_up.weight" in tensors:
        return _lora(tensors, weight)
    if "hada_w1_a" in tensors:
        return _loha(tensors, weight)
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        return _lokr(tensors, weight, rank_of=rank_of)
    raise NotReadError


def _lengths(weight: Tensor, side: int) -> Tensor:
    """Norms over all but one side of a weight, in a shape that divides it."""
    others = [d for d in range(weight.ndim) if d != side]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True)


def comfyui(tensors: Tensors, weight: Tensor) -> Tensor:
    """A magnitude is divided by the length of the base's row. diffusers' own ends of keys are known too."""
    if "lora_B.weight" in tensors:
        if any("magnitude" in name for name in tensors):
            raise NotReadError
        up, down = tensors["lora_B.weight"], tensors["lora_A.weight"]
        return weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if "lokr_t2" in tensors:
        raise NotReadError  # an error is logged, and the layer stays as it is
    changed = weight + _update(tensors, weight)
    if (magnitude := tensors.get("dora_scale")) is not None:
        changed = changed * magnitude / _lengths(weight, 0)
    return changed


def a1111(tensors: Tensors, weight: Tensor) -> Tensor:
    """Lengths are those of inputs."""
    changed = weight + _update(tensors, weight)
    if (magnitude := tensors.get("dora_scale")) is not None:
        changed = changed * magnitude / _lengths(changed, 1)
    return changed


def invokeai(tensors: Tensors, weight: Tensor) -> Tensor:
    """As A1111; a magnitude is known with LoRA only."""
    if "dora_scale" in tensors and "lora_up.weight" not in tensors:
        raise NotReadError
    changed = weight + _update(tensors, weight, "first")
    if (magnitude := tensors.get("dora_scale")) is not None:
        changed = changed * magnitude / _lengths(changed, 1)
    return changed


def sd_scripts(tensors: Tensors, weight: Tensor) -> Tensor:
    """LoRA only; a magnitude is dropped."""
    if "lora_up.weight" not in tensors:
        raise NotReadError
    return weight + _lora(tensors, weight)


def lycoris(tensors: Tensors, weight: Tensor) -> Tensor:
    """A LoKr is built anew from a rank and a factor, and must then have the tensors' shapes."""
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        _check_lycoris_builds(tensors, (weight.shape[0], weight.shape[1]))
    changed = weight + _update(tensors, weight, "first")
    if (magnitude := tensors.get("dora_scale")) is not None:
        changed = changed * magnitude / _lengths(changed, 0)
    return changed


def divisors(width: int, factor: int) -> tuple[int, int]:
    """LyCORIS' split of a width, the smaller part first: the factor and its partner if it divides the width,
    else the most even split whose smaller part is at most the factor (-1: any)."""
    if factor > 0 and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    limit = min(math.isqrt(width), factor if factor > 0 else width)
    small = max(size for size in range(1, limit + 1) if width % size == 0)
    return small, width // small


def _check_lycoris_builds(tensors: Tensors, sides: tuple[int, int]) -> None:
    """Raise NotReadError unless LyCORIS builds factors of these shapes."""
    if "lokr_t2" in tensors:
        raise NotReadError
    first = tensors.get("lokr_w1")
    size1 = (
        tuple(first.shape)
        if first is not None
        else (tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1])
    )
    size2 = tuple(side // part for side, part in zip(sides, size1, strict=True))
    splits = list(zip(size1, size2, strict=True))
    factor = -1
    if size1 != tuple(divisors(side, -1)[0] for side in sides):
        factor = min(max(size1), max(size2))
        for candidate in (max(size1), max(size2)):
            if all(side % candidate == 0 for side in sides) and all(candidate in pair for pair in splits):
                factor = candidate
                break
    if splits != [divisors(side, factor) for side in sides]:
        raise NotReadError
    is_first_dense, is_second_dense = first is not None, "lokr_w2" in tensors
    if is_second_dense:
        if not is_first_dense:
            raise NotReadError
        return
    rank = (tensors["lokr_w2_a"] if is_first_dense else tensors["lokr_w1_a"]).shape[1]
    builds_first = not is_first_dense and rank < max(size1) / 2
    if builds_first == is_first_dense or rank >= max(size2) / 2:
        raise NotReadError


def diffusers(tensors: Tensors, weight: Tensor) -> Tensor:
    """LoRA under both layouts; magnitudes in its own only."""
    if "lora_B.weight" in tensors:
        up, down = tensors["lora_B.weight"].flatten(1), tensors["lora_A.weight"].flatten(1)
        changed = weight + (up @ down).reshape(weight.shape)
        if (magnitude := tensors.get("lora_magnitude_vector.weight")) is not None:
            changed = changed * magnitude.reshape(-1, *[1] * (weight.ndim - 1)) / _lengths(changed, 0)
        return changed
    if "lora_up.weight" in tensors and "dora_scale" not in tensors:
        return weight + _lora(tensors, weight)
    raise NotReadError


PROGRAMS: dict[str, tuple[Callable[[Base], Table], Rebuild]] = {
    "diffusers": (diffusers_table, diffusers),
    "ComfyUI, Forge": (comfyui_table, comfyui),
    "A1111": (a1111_table, a1111),
    "InvokeAI": (invokeai_table, invokeai),
    "sd-scripts": (sd_scripts_table, sd_scripts),
    "LyCORIS": (sd_scripts_table, lycoris),
}
