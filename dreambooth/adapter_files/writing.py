"""Adapters written in the layouts that other programs read: ours, kohya's and LyCORIS', peft's folders.

Keys and lists in sorted order, no paths, no times: the same adapter gives the same bytes.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dreambooth.adapter_files import deltas, layer_names
from dreambooth.adapter_files.adapter import Adapter, Family
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora, Module
from dreambooth.errors import UserError
from dreambooth.files import safetensors_files


def write_native(adapter: Adapter, info: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes of a file in our layout: peft's keys with the component in front, and the few stable fields of its configuration.

    Plain diffusers loads LoRA and DoRA from it, alpha = rank; LoHa and LoKr are for us and peft. `info` is about the run, without local paths.
    Raises UserError if a component mixes kinds, which one configuration cannot describe, or a value is not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for component, modules in adapter.components.items():
        _check_one_kind(component, modules)
        # older stacks and other programs know the text encoder's modules by this prefix only
        prefix = "text_model." if component != "unet" else ""
        for path, module in modules.items():
            for name, tensor in _peft_tensors(module).items():
                tensors[f"{component}.{layer_names.with_prefix(path, prefix)}.{name}"] = tensor
        fields |= {f"{component}.{name}": value for name, value in _peft_fields(modules).items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(fields, sort_keys=True),
        "dreambooth": json.dumps(dict(info), sort_keys=True),
    }
    return safetensors_files.stable_bytes(_stored(tensors, dtype), metadata)


def _check_one_kind(component: str, modules: Mapping[str, Module]) -> None:
    kinds = sorted({deltas.kind(module) for module in modules.values()})
    if len(kinds) > 1 or kinds[0] in ("doha", "dokr"):
        raise UserError(
            f"{component} has {' and '.join(kinds)}, which peft's layout cannot hold; convert to LoRA, or write kohya's layout"
        )


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if not tensors:
        raise UserError("the adapter is empty")
    stored = {}
    for key, tensor in tensors.items():
        stored[key] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(stored[key]).all():
            raise UserError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}")
    return stored


def _peft_tensors(module: Module) -> dict[str, Tensor]:
    if isinstance(module, Lora):
        tensors = {"lora_A.weight": module.down, "lora_B.weight": module.up}
        if module.magnitude is not None:
            is_conv = module.down.ndim > 2
            # `.weight`, as the parameter itself is called: without it a text encoder's is dropped on loading
            tensors["lora_magnitude_vector.weight"] = (
                module.magnitude.reshape(1, -1, 1, 1) if is_conv else module.magnitude
            )
        return tensors
    return _lycoris_tensors(module)


def _lycoris_tensors(module: LoHa | LoKr) -> dict[str, Tensor]:
    """Under the names that peft and LyCORIS share; a product's second factor flattened, as both have it."""
    prefix = "hada" if isinstance(module, LoHa) else "lokr"
    found = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name != "magnitude"
    }
    named = {"_".join([prefix, name[:2], *name[2:]]): tensor for name, tensor in found.items()}
    return {
        name: tensor.flatten(1) if name.endswith("_b") else tensor
        for name, tensor in named.items()
        if tensor is not None
    }


def _peft_fields(modules: Mapping[str, Module]) -> dict[str, Any]:
    """The fields of a component's configuration with which peft makes modules of these shapes, every scale 1."""
    ranks = {path: _peft_rank(module) for path, module in modules.items()}
    given = collections.Counter(module.rank for module in modules.values() if module.rank is not None)
    # of equally many the largest; without any, one so large that all factors become dense
    rank = max(given, key=lambda r: (given[r], r)) if given else max(ranks.values())
    other = {}
    for path, module in modules.items():
        becomes_dense = module.rank is None and rank >= ranks[path]
        if ranks[path] != rank and not becomes_dense:
            other[path] = ranks[path]
    common = {"r": rank, "target_modules": sorted(modules), "rank_pattern": other, "alpha_pattern": other}
    kinds = list(modules.values())
    if isinstance(kinds[0], Lora):
        same = {
            "peft_type": "LORA",
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
        }
        return common | same | {"use_dora": kinds[0].magnitude is not None}
    if isinstance(kinds[0], LoHa):
        has_cores = any(isinstance(module, LoHa) and module.t1 is not None for module in kinds)
        return common | {"peft_type": "LOHA", "alpha": rank, "use_effective_conv2d": has_cores}
    lokrs = [module for module in kinds if isinstance(module, LoKr)]
    return common | {
        "peft_type": "LOKR",
        "alpha": rank,
        "decompose_both": any(module.w1 is None for module in lokrs),
        "decompose_factor": _decompose_factor(lokrs),
        "use_effective_conv2d": any(module.t2 is not None for module in lokrs),
    }


def _peft_rank(module: Module) -> int:
    """The module's rank; of one with dense factors, the smallest for which peft makes them dense."""
    if module.rank is not None or not isinstance(module, LoKr):
        return module.rank or 1
    first, second = module.factors()
    return math.ceil(max(*second.shape[:2], *first.shape) / 2)


def divided(width: int, factor: int) -> int:
    """The size of LoKr's first factor along a side: `factor` where it divides the width, else its largest divisor up to `factor` and the root."""
    if factor > 0 and width % factor == 0:
        return factor
    limit = min(math.isqrt(width), factor if factor > 0 else width)
    return max(size for size in range(1, limit + 1) if width % size == 0)


def _decompose_factor(modules: Iterable[LoKr]) -> int:
    """The factor with which peft divides every layer as these are; -1, peft's default, where there is none."""
    sides: set[tuple[int, int]] = set()
    for module in modules:
        first, second = module.factors()
        sides |= {(first.shape[side] * second.shape[side], first.shape[side]) for side in (0, 1)}
    return next(
        (
            f
            for f in (-1, *sorted({size for _, size in sides}))
            if all(divided(width, f) == size for width, size in sides)
        ),
        -1,
    )


def write_kohya(
    adapter: Adapter,
    family: Family,
    info: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    depth: int = layer_names.XL_DEPTH,
) -> bytes:
    """The bytes of a file that kohya's scripts, LyCORIS, ComfyUI, A1111, Forge and, for LoRA, any diffusers read.

    LoRA is filled up with zeros to one rank for each component, alpha = rank: of mixed ranks diffusers makes another adapter, in silence.
    Of `info`, resolution, seed and steps go into kohya's own fields. `depth` is that of the UNet of a Stable Diffusion XL of another make
    (`adapter_names.depth_of`). Raises UserError if a component is none of the family's, or a value is not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    ranks: set[int] = set()
    for component, modules in adapter.components.items():
        if component not in layer_names.KOHYA_PREFIXES[family]:
            raise UserError(f"the adapter has a {component}, and {family} has none")
        largest = max([module.rank for module in modules.values() if isinstance(module, Lora)], default=0)
        for path, module in modules.items():
            if isinstance(module, Lora):
                module = deltas.pad(module, largest)
                named = {"lora_down.weight": module.down, "lora_up.weight": module.up}
                alpha = largest
            else:
                named = _lycoris_tensors(module)
                alpha = module.rank or 1  # both factors dense: readers take no notice of it
            ranks.add(alpha)
            if module.magnitude is not None:
                named["dora_scale"] = module.magnitude.reshape(-1, *[1] * (deltas.ndim(module) - 1))
            stem = layer_names.KOHYA_PREFIXES[family][component] + layer_names.kohya_path(
                component, path, family, depth
            )
            tensors |= {
                f"{stem}.{name}": tensor
                for name, tensor in (named | {"alpha": torch.tensor(float(alpha))}).items()
            }
    metadata = _kohya_metadata(adapter, family, info, max(ranks, default=1))
    return safetensors_files.stable_bytes(_stored(tensors, dtype), metadata)


def _kohya_metadata(adapter: Adapter, family: Family, info: Mapping[str, Any], rank: int) -> dict[str, str]:
    """The fields by which kohya's scripts and A1111 know a file. No names, no times: they would differ from run to run."""
    kinds = {kind.replace("d", "l", 1) for kind in adapter.kinds}
    modules = [module for part in adapter.components.values() for module in part.values()]
    arguments: dict[str, str] = {}
    if adapter.kinds != ("lora",):
        arguments["algo"] = next(iter(kinds)) if len(kinds) == 1 else "mixed"
        if any(module.magnitude is not None for module in modules):
            arguments |= {"dora_wd": "True", "wd_on_out": "True"}
    if any(deltas.ndim(module) > 2 for module in modules):
        arguments |= {"conv_dim": str(rank), "conv_alpha": str(rank)}
    is_velocity = info.get("prediction_type") == "v_prediction"
    found = {
        "ss_network_module": "networks.lora" if adapter.kinds == ("lora",) else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(arguments, sort_keys=True),
        "ss_base_model_version": {
            "sd1": "sd_v1",
            "sd2": "sd_v2_v" if is_velocity else "sd_v2",
            "sdxl": "sdxl_base_v1-0",
        }[family],
        "ss_v2": str(family == "sd2"),
        "dreambooth": json.dumps(dict(info), sort_keys=True),
    }
    for field, name in (("ss_resolution", "resolution"), ("ss_seed", "seed"), ("ss_steps", "steps")):
        if info.get(name) is not None:
            found[field] = f"({info[name]}, {info[name]})" if name == "resolution" else str(info[name])
    return found


def write_peft(
    adapter: Adapter, text_prefixes: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> dict[str, bytes]:
    """The bytes of files by their path in a folder: for each component a folder of its own that `PeftModel.from_pretrained` takes.

    `text_prefixes` says what stands before a text encoder's modules in the models that they are for: "" or `text_model.`. Raises UserError as
    `write_native`, and if peft's own configuration would make a module of another shape.
    """
    files: dict[str, bytes] = {}
    for component, modules in adapter.components.items():
        _check_one_kind(component, modules)
        prefix = text_prefixes.get(component, "")
        tensors = {
            # peft itself takes `.weight` off and puts it back
            f"base_model.model.{layer_names.with_prefix(path, prefix)}.{name.removesuffix('.weight') if 'magnitude' in name else name}": tensor
            for path, module in modules.items()
            for name, tensor in _peft_tensors(module).items()
        }
        fields = _peft_fields(modules) | {
            "base_model_name_or_path": None,
            "task_type": None,
            "inference_mode": True,
        }
        _check_peft_makes(component, modules, fields)
        files[f"{component}/adapter_config.json"] = (
            json.dumps(fields, indent=2, sort_keys=True) + "\n"
        ).encode()
        files[f"{component}/adapter_model.safetensors"] = safetensors_files.stable_bytes(
            _stored(tensors, dtype), {"format": "pt"}
        )
    return files


def _check_peft_makes(component: str, modules: Mapping[str, Module], fields: Mapping[str, Any]) -> None:
    """Raise UserError unless peft, given the configuration, makes modules of these shapes: asked of peft, on layers without weights."""
    from peft import (
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        get_peft_model_state_dict,
        inject_adapter_in_model,
    )  # seconds

    root = torch.nn.Module()
    for path, module in modules.items():
        *parents, last = path.split(".")
        place = root
        for name in parents:
            if not hasattr(place, name):
                place.add_module(name, torch.nn.Module())
            place = getattr(place, name)
        place.add_module(last, _stand_in(deltas.shape(module)))
    config = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}[fields["peft_type"]]
    inject_adapter_in_model(config(**fields), root, "default", low_cpu_mem_usage=True)
    made = {
        key: tuple(t.shape) for key, t in get_peft_model_state_dict(root, save_embedding_layers=False).items()
    }
    for path, module in modules.items():
        for name, tensor in _peft_tensors(module).items():
            key = f"{path}.{name.replace('lora_magnitude_vector.weight', 'lora_magnitude_vector')}"
            if made.pop(key, None) != tuple(tensor.shape):
                raise UserError(
                    f"{component}.{path}: no one configuration of peft makes its {deltas.kind(module)} together with the others'; use --to lora"
                )


def _stand_in(shape: tuple[int, ...]) -> torch.nn.Module:
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    return torch.nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=False, device="meta")
