"""Writes adapters in three layouts: this project's, kohya's (and LyCORIS'), and peft's folders.

The same adapter always gives the same bytes: keys and lists are sorted, and there are no paths and no times.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dreambooth.adapter_files import deltas, layer_names, native, run_info
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora, Module
from dreambooth.adapter_files.layer_names import KohyaFamily
from dreambooth.files import safetensors_files
from dreambooth.io.errors import UserError

# ---- this project's layout


def write_native(adapter: Adapter, info: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes of a file in the layout of `native`, with tensors in `dtype` and alpha = rank.

    diffusers loads LoRA and DoRA from it; this project and peft also read LoHa and LoKr. `info` is about the
    training run, without local paths. Raises UserError if the adapter is empty, if a component mixes kinds,
    which one configuration cannot describe, or if a value is not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for component, modules in adapter.components.items():
        _check_one_kind(component, modules)
        for path, module in modules.items():
            for name, tensor in _peft_tensors(module).items():
                tensors[f"{component}.{layer_names.stored(component, path)}.{name}"] = tensor
        fields |= {f"{component}.{name}": value for name, value in _peft_fields(modules).items()}
    return safetensors_files.stable_bytes(_stored(tensors, dtype), native.metadata(fields, info))


def _check_one_kind(component: str, modules: Mapping[str, Module]) -> None:
    """Raise UserError unless all modules are of one kind that peft has."""
    kinds = sorted({deltas.kind(module) for module in modules.values()})
    if len(kinds) > 1 or kinds[0] in ("doha", "dokr"):
        raise UserError(
            f"{component} has {' and '.join(kinds)}, which peft's layout cannot hold;"
            " convert to LoRA, or write kohya's layout"
        )


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the tensors on the CPU in `dtype`. Raises UserError if there are none, or if a value is not
    finite."""
    if not tensors:
        raise UserError("the adapter is empty")
    stored = {}
    for key, tensor in tensors.items():
        stored[key] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(stored[key]).all():
            raise UserError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}")
    return stored


def _peft_tensors(module: Module) -> dict[str, Tensor]:
    """A module's tensors by the ends of peft's keys."""
    if not isinstance(module, Lora):
        return _lycoris_tensors(module)
    tensors = {"lora_A.weight": module.down, "lora_B.weight": module.up}
    if module.magnitude is not None:
        is_conv = module.down.ndim > 2
        # with the parameter's `.weight`: without it peft ignores a text encoder's magnitude on loading
        tensors["lora_magnitude_vector.weight"] = (
            module.magnitude.reshape(1, -1, 1, 1) if is_conv else module.magnitude
        )
    return tensors


def _lycoris_tensors(module: LoHa | LoKr) -> dict[str, Tensor]:
    """A module's tensors by the names that peft and LyCORIS share. Both flatten the kernel of a product's
    second factor."""
    factors = deltas.factors_by_name(module)
    return {name: tensor.flatten(1) if name.endswith("_b") else tensor for name, tensor in factors.items()}


def _peft_fields(modules: Mapping[str, Module]) -> dict[str, Any]:
    """The fields of a configuration from which peft makes modules of these shapes, each with scale 1."""
    ranks = {path: _peft_rank(module) for path, module in modules.items()}
    counts = collections.Counter(module.rank for module in modules.values() if module.rank is not None)
    # r: the most frequent rank, the larger one in a tie; without any, a rank that makes all factors dense
    rank = max(counts, key=lambda r: (counts[r], r)) if counts else max(ranks.values())
    # rank_pattern: the layers of other ranks
    pattern = {}
    for path, module in modules.items():
        becomes_dense = module.rank is None and rank >= ranks[path]
        if ranks[path] != rank and not becomes_dense:
            pattern[path] = ranks[path]
    fields = {"r": rank, "target_modules": sorted(modules), "rank_pattern": pattern, "alpha_pattern": pattern}
    first = next(iter(modules.values()))
    if isinstance(first, Lora):
        return fields | {
            "peft_type": "LORA",
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": first.magnitude is not None,
        }
    if isinstance(first, LoHa):
        has_cores = any(isinstance(module, LoHa) and module.t1 is not None for module in modules.values())
        return fields | {"peft_type": "LOHA", "alpha": rank, "use_effective_conv2d": has_cores}
    lokrs = [module for module in modules.values() if isinstance(module, LoKr)]
    return fields | {
        "peft_type": "LOKR",
        "alpha": rank,
        "decompose_both": any(module.w1 is None for module in lokrs),
        "decompose_factor": _decompose_factor(lokrs),
        "use_effective_conv2d": any(module.t2 is not None for module in lokrs),
    }


def _peft_rank(module: Module) -> int:
    """The module's rank; if its factors are dense, the smallest rank for which peft makes them dense."""
    if module.rank is not None or not isinstance(module, LoKr):
        return module.rank or 1
    first, second = module.factors()
    return math.ceil(max(*second.shape[:2], *first.shape) / 2)


def divided(width: int, factor: int) -> int:
    """The size of LoKr's first factor along a side of the weight with this `width`.

    It is `factor` if that divides the width. Else it is the width's largest divisor that is at most `factor`
    and at most the width's square root; -1 is no limit.
    """
    if factor > 0 and width % factor == 0:
        return factor
    limit = min(math.isqrt(width), factor if factor > 0 else width)
    return max(size for size in range(1, limit + 1) if width % size == 0)


def _decompose_factor(modules: Iterable[LoKr]) -> int:
    """peft's `decompose_factor` that gives every layer factors of these sizes; -1, the default, if there is
    none."""
    sizes: set[tuple[int, int]] = set()  # (width of the layer, size of the first factor) on each side
    for module in modules:
        first, second = module.factors()
        sizes |= {(first.shape[side] * second.shape[side], first.shape[side]) for side in (0, 1)}
    for factor in (-1, *sorted({size for _, size in sizes})):
        if all(divided(width, factor) == size for width, size in sizes):
            return factor
    return -1


# ---- kohya's layout


def write_kohya(
    adapter: Adapter,
    family: KohyaFamily,
    info: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    depth: int = layer_names.XL_DEPTH,
) -> bytes:
    """The bytes of a file that kohya's scripts, LyCORIS, ComfyUI, A1111 and Forge read, and diffusers if it
    is a LoRA.

    LoRA modules are padded with zeros to one rank for each component, and alpha is that rank: diffusers makes
    another adapter of mixed ranks without a warning. Magnitudes (DoRA) are written as LyCORIS reads them;
    `kohya_notes` says what the other programs make of them. Factors of a LoKr that some program cannot
    rebuild are stored as their product. `info` is about the training run; its resolution, seed and steps also
    go into kohya's fields. `depth`: see `layer_names.depth_of`. Raises UserError if the family lacks a
    component of the adapter, or if a value is not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    ranks: set[int] = set()
    for component, modules in adapter.components.items():
        if component not in layer_names.KOHYA_PREFIXES[family]:
            raise UserError(f"the adapter has a {component}, but {family} has none")
        largest = max([module.rank for module in modules.values() if isinstance(module, Lora)], default=0)
        for path, module in modules.items():
            if isinstance(module, Lora):
                module = deltas.pad(module, largest)
                parts = {"lora_down.weight": module.down, "lora_up.weight": module.up}
                alpha = largest
            else:
                module = _rebuildable(module) if isinstance(module, LoKr) else module
                parts = _lycoris_tensors(module)
                alpha = module.rank or 1  # readers ignore it if both factors are dense
            ranks.add(alpha)
            parts["alpha"] = torch.tensor(float(alpha))
            if module.magnitude is not None:
                parts["dora_scale"] = module.magnitude.reshape(-1, *[1] * (len(deltas.shape(module)) - 1))
            stem = layer_names.kohya_stem(component, path, family, depth)
            tensors |= {f"{stem}.{name}": tensor for name, tensor in parts.items()}
    metadata = _kohya_metadata(adapter, family, info, max(ranks, default=1))
    return safetensors_files.stable_bytes(_stored(tensors, dtype), metadata)


def _rebuildable(module: LoKr) -> LoKr:
    """The LoKr with those factors dense that some reader of kohya's files cannot rebuild; dW stays the same.

    ComfyUI applies no factor with a Tucker core. LyCORIS makes the second factor dense from half its larger
    side on, and expects a first factor that is a product only together with a second one. InvokeAI takes the
    scale from the rank of the first factor, ComfyUI from that of the second.
    """
    first_rank, second_rank = (None if b is None else b.shape[0] for b in (module.w1b, module.w2b))
    first, second = module.factors()
    if second_rank is None or module.t2 is not None or 2 * second_rank >= max(second.shape[:2]):
        second_rank = None
        module = dataclasses.replace(module, w2=second, w2a=None, w2b=None, t2=None)
    if first_rank is None or first_rank != second_rank or 2 * first_rank >= max(first.shape):
        module = dataclasses.replace(module, w1=first, w1a=None, w1b=None)
    return module


def kohya_notes(adapter: Adapter) -> list[str]:
    """What a user must know about the adapter's file in kohya's layout: which programs misread it."""
    layers = {
        f"{component}.{path}": module
        for component, modules in adapter.components.items()
        for path, module in modules.items()
    }
    notes = []
    if any(module.magnitude is not None for module in layers.values()):
        notes.append(
            f"{', '.join(kind for kind in adapter.kinds if kind.startswith('d'))}: in kohya's layout only"
            " LyCORIS reads the magnitudes as they were trained; ComfyUI, Forge, A1111, InvokeAI and kohya's"
            " own scripts draw other pictures from this file. `convert_adapter.py convert` with --to kohya,"
            " --rank N and --pretrained_model_name_or_path writes a LoRA near it, which they all read"
        )
    swapped = sorted(name for name, m in layers.items() if isinstance(m, LoKr) and _is_swapped(m))
    if swapped:
        notes.append(
            f"LyCORIS cannot read {len(swapped)} of {len(layers)} layers, e.g. {swapped[0]}: their first"
            " Kronecker factor is larger than the second (--decompose_factor over the root of a layer's"
            " width); the other programs can"
        )
    return notes


def _is_swapped(module: LoKr) -> bool:
    """Whether the first Kronecker factor is larger than the second along a side. LyCORIS always takes the
    smaller one as the first."""
    first, second = module.factors()
    return any(first.shape[side] > second.shape[side] for side in (0, 1))


def _kohya_metadata(
    adapter: Adapter, family: KohyaFamily, info: Mapping[str, Any], rank: int
) -> dict[str, str]:
    """The metadata by which kohya's scripts and A1111 recognize a file; `rank` is the largest. There are no
    names and no times in it: they differ between runs."""
    kinds = {kind.replace("d", "l", 1) for kind in adapter.kinds}
    modules = [module for part in adapter.components.values() for module in part.values()]
    arguments: dict[str, str] = {}
    if adapter.kinds != ("lora",):
        arguments["algo"] = next(iter(kinds)) if len(kinds) == 1 else "mixed"
        if any(module.magnitude is not None for module in modules):
            arguments |= {"dora_wd": "True", "wd_on_out": "True"}
    if any(len(deltas.shape(module)) > 2 for module in modules):
        arguments |= {"conv_dim": str(rank), "conv_alpha": str(rank)}
    is_v_prediction = info.get("prediction_type") == "v_prediction"
    versions = {"sd1": "sd_v1", "sd2": "sd_v2_v" if is_v_prediction else "sd_v2", "sdxl": "sdxl_base_v1-0"}
    metadata = {
        "ss_network_module": "networks.lora" if adapter.kinds == ("lora",) else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(arguments, sort_keys=True),
        "ss_base_model_version": versions[family],
        "ss_v2": str(family == "sd2"),
        "dreambooth": json.dumps(dict(info), sort_keys=True),
    }
    if (resolution := info.get("resolution")) is not None:
        metadata["ss_resolution"] = f"({resolution}, {resolution})"
    for name in ("seed", "steps"):
        if info.get(name) is not None:
            metadata[f"ss_{name}"] = str(info[name])
    return metadata | run_info.kohya_fields(info, family)


# ---- peft's folders


def write_peft(
    adapter: Adapter,
    text_prefixes: Mapping[str, str],
    info: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> dict[str, bytes]:
    """The bytes of files by relative path: for each component a folder for `PeftModel.from_pretrained`.

    `text_prefixes`: by text encoder, the prefix of its layers in the models that will load the folders
    (`layer_names.installed_text_prefixes`). `info` is about the training
    run. Raises UserError as `write_native` does, and if no configuration of peft makes modules of these
    shapes.
    """
    files: dict[str, bytes] = {}
    for component, modules in adapter.components.items():
        _check_one_kind(component, modules)
        prefix = text_prefixes.get(component, "")
        tensors = {
            f"base_model.model.{layer_names.with_prefix(path, prefix)}.{_peft_state_name(name)}": tensor
            for path, module in modules.items()
            for name, tensor in _peft_tensors(module).items()
        }
        fields = _peft_fields(modules) | {
            "base_model_name_or_path": None,
            "task_type": None,
            "inference_mode": True,
        }
        _check_peft_makes(component, modules, fields)
        config = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        metadata = {"format": "pt", "dreambooth": json.dumps(dict(info), sort_keys=True)}
        data = safetensors_files.stable_bytes(_stored(tensors, dtype), metadata)
        files[f"{component}/adapter_config.json"] = config.encode()
        files[f"{component}/adapter_model.safetensors"] = data
    return files


def _peft_state_name(name: str) -> str:
    """The end of a key in peft's state dicts: without the `.weight` of magnitudes, which peft removes on
    saving and adds on loading."""
    return name.removesuffix(".weight") if "magnitude" in name else name


def _check_peft_makes(component: str, modules: Mapping[str, Module], fields: Mapping[str, Any]) -> None:
    """Raise UserError unless peft makes modules of these shapes from the configuration. It is tried on layers
    without data."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    from dreambooth.adapter_files import peft_internals  # late: importing peft takes seconds

    # a model that has only these layers, at their paths
    root = torch.nn.Module()
    for path, module in modules.items():
        *parents, last = path.split(".")
        parent = root
        for name in parents:
            if not hasattr(parent, name):
                parent.add_module(name, torch.nn.Module())
            parent = getattr(parent, name)
        parent.add_module(last, peft_internals.stand_in(deltas.shape(module)))
    config = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}[fields["peft_type"]]
    inject_adapter_in_model(config(**fields), root, "default", low_cpu_mem_usage=True)
    # the shapes of peft's tensors against those of the modules
    state = get_peft_model_state_dict(root, save_embedding_layers=False)
    for path, module in modules.items():
        for name, tensor in _peft_tensors(module).items():
            made = state.get(f"{path}.{_peft_state_name(name)}")
            if made is None or made.shape != tensor.shape:
                raise UserError(
                    f"{component}.{path}: one configuration of peft cannot describe its {deltas.kind(module)}"
                    f" and those of the other layers of {component}; use --to lora"
                )
