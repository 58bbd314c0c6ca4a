"""How an adapter is stored: one safetensors file that plain diffusers loads.

Keys are peft's with the component in front. The text encoder's always have `text_model.`, whatever transformers calls its modules: older
stacks and other programs know no other spelling. Metadata holds, per component, the few stable fields of its LoraConfig, and a block of our
own about the training run. No local paths, nothing in an order that varies: the same adapter gives the same bytes.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dreambooth import safetensors_headers
from dreambooth.errors import UserError
from dreambooth.printable import shown

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
_TEXT_PREFIX = "text_model."
# As the reference script writes them.
_OLD_SPELLINGS = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B.", ".lora_linear_layer.down.": ".lora_A.", ".lora_linear_layer.up.": ".lora_B."}


def pack(state: dict[str, dict[str, torch.Tensor]], configs: dict[str, dict[str, object]], info: dict[str, Any]) -> bytes:
    """The bytes of an adapter file: `state` and `configs` by component name, `info` about the run.

    Raises ValueError if a tensor is not finite: such an adapter draws black pictures and must not replace a good one.
    """
    tensors: dict[str, torch.Tensor] = {}
    for component, adapter in state.items():
        for key, tensor in adapter.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{component}.{key} is not finite")
            if component.startswith("text_encoder"):
                key = _TEXT_PREFIX + key.removeprefix(_TEXT_PREFIX)
            tensors[f"{component}.{key}"] = tensor.detach().to("cpu", torch.float32).contiguous()
    lora = {f"{component}.{field}": value for component, fields in configs.items() for field, value in fields.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(lora, sort_keys=True), "dreambooth": json.dumps(info, sort_keys=True)}
    return stable_bytes(tensors, metadata)


def stable_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose header has its keys in sorted order; the library's own order of metadata varies from run to run."""
    data = save(dict(sorted(tensors.items())), metadata)
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of eight
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)  # less the umask, as other programs' files
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def find(path: str | Path, flag: str = "--adapter") -> Path:
    """The adapter file itself, where `path`, given by `flag`, may also be the folder of a run. Raises UserError if there is none."""
    found = Path(path)
    try:
        if found.is_dir():
            found = found / ADAPTER_NAME
        if not found.exists():
            raise UserError(f"{flag}: there is no file {shown(found)}")
    except OSError as error:  # a name that is too long, for one
        raise UserError(f"{flag}: {shown(found)} cannot be read: {error.strerror or error}") from None
    if found.suffix != ".safetensors":
        raise UserError(f"{flag}: {shown(found)} is not a .safetensors file; other formats can carry code and are not loaded")
    return found


def read(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """(tensors by component and by the key within it, metadata). `text_model.` is taken off the text encoder's keys.

    Raises UserError if the file is damaged, is larger than an adapter can be, has keys of no known component, values that are not finite,
    or metadata about its LoRA that is malformed or speaks of another one.
    """
    header = safetensors_headers.read(path, safetensors_headers.ADAPTER)
    places = {name: _place(path, name) for name in header.shapes}  # before a single tensor is read
    if not places:
        raise UserError(f"{shown(path)}: the adapter is empty")
    state: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, (component, key) in places.items():
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{shown(path)}: {name} has values that are not finite; the adapter is broken")
                if key in state.setdefault(component, {}):
                    raise UserError(f"{shown(path)}: {component}.{key} is there twice, in two spellings")
                state[component][key] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shown(path)}: not a whole safetensors file ({shown(' '.join(str(error).split()))})") from None
    lora_fields(path, state, header.metadata)
    return state, header.metadata


def _place(path: Path, name: str) -> tuple[str, str]:
    """(component, key within it in peft's spelling)."""
    component, _, key = name.partition(".")
    for old, new in _OLD_SPELLINGS.items():
        key = key.replace(old, new)
    if component not in ("unet", "text_encoder", "text_encoder_2") or "lora" not in key:
        raise UserError(f"{shown(path)}: the key {name!r} is not one of a LoRA in diffusers' layout (unet.*, text_encoder.*, text_encoder_2.*)")
    return component, key.removeprefix(_TEXT_PREFIX) if component.startswith("text_encoder") else key


def recorded(metadata: dict[str, str]) -> dict[str, Any]:
    """What `pack` was given as `info`; {} for a file of another program, or one that says nonsense there."""
    try:
        found = json.loads(metadata.get("dreambooth", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by their keys in a file, `text_model.` put back."""
    prefixes = {component: f"{component}.{_TEXT_PREFIX if component.startswith('text_encoder') else ''}" for component in state}
    return {prefixes[component] + key: tensor for component, adapter in state.items() for key, tensor in adapter.items()}


def lora_fields(path: Path, state: dict[str, dict[str, torch.Tensor]], metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What a LoraConfig may take from a file, by component: rank, alpha, targets; {} for a component that the metadata is silent about.

    Everything else in the metadata is left alone: it goes into constructors of other packages, and whoever made the file wrote it.
    Raises UserError if a field is not what it must be, or the rank is not that of the tensors.
    """
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{shown(path)}: its metadata about the LoRA is not a JSON table")
    fields: dict[str, dict[str, Any]] = {}
    for component, tensors in state.items():
        found = {name: content[f"{component}.{name}"] for name in _RULES if f"{component}.{name}" in content}
        for name, value in found.items():
            rule, is_right = _RULES[name]
            if not is_right(value):
                raise UserError(f"{shown(path)}: its metadata has {component}.{name} = {ascii(value)[:80]}; it must be {rule}")
        ranks = {tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key and tensor.ndim > 1}
        said = {found["r"], *found.get("rank_pattern", {}).values()} if "r" in found else ranks
        if ranks - said:
            raise UserError(f"{shown(path)}: its metadata says rank {found['r']} for {component}, and there are tensors of rank {min(ranks - said)}")
        if found:
            rank = found.get("r", min(ranks, default=1))
            fields[component] = {"r": rank, "lora_alpha": rank} | {name: found[name] for name in found if name not in _REFUSED}
            if "target_modules" in found:  # matched from their ends, with `text_model.` or without
                fields[component]["target_modules"] = [target.removeprefix(_TEXT_PREFIX) for target in found["target_modules"]]
    return fields


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")  # peft takes patterns for regular expressions: no more than a name goes through
_MAX_RANK = 1024


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6


def _is_names(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 20_000 and all(isinstance(v, str) and _NAME.fullmatch(v) for v in value)


def _is_pattern(value: object, is_right: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and len(value) <= 20_000 and all(_NAME.fullmatch(k) and is_right(v) for k, v in value.items())


# Field of a LoraConfig -> (what it must be, whether a value is). Those in _REFUSED change what the tensors mean, in ways not supported here.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": (f"a whole number from 1 to {_MAX_RANK}", _is_rank),
    "lora_alpha": ("a number over 0", _is_alpha),
    "target_modules": ("a list of names", _is_names),
    "rank_pattern": ("a table of ranks", lambda value: _is_pattern(value, _is_rank)),
    "alpha_pattern": ("a table of numbers over 0", lambda value: _is_pattern(value, _is_alpha)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "use_dora": ("false: DoRA is not supported", lambda value: value is False),
    "bias": ("none: trained biases are not supported", lambda value: value == "none"),
}
_REFUSED = ("use_dora", "bias")


def check_fits(
    path: Path, state: dict[str, dict[str, torch.Tensor]], models: Mapping[str, torch.nn.Module], fields: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Raise UserError unless every tensor of the file has a layer of the right width in `models`: a loader would skip it in silence.

    With the file's `lora_fields`, every layer that they name as a target must have its tensors too: half an adapter draws pictures as well.
    """
    shapes = {}
    for component in state:
        weights = ((name, getattr(module, "weight", None)) for name, module in models[component].named_modules())
        shapes[component] = {name: tuple(weight.shape) for name, weight in weights if isinstance(weight, torch.Tensor)}
    check_shapes(path, state, shapes, fields)


def check_shapes(
    path: Path,
    state: dict[str, dict[str, torch.Tensor]],
    base: Mapping[str, Mapping[str, tuple[int, ...]]],
    fields: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """`check_fits` for a base that is not loaded: shapes of its weights by component and module."""
    for component, adapter in state.items():
        layers = {module.removeprefix(_TEXT_PREFIX): shape for module, shape in base[component].items()}
        modules = {key.removesuffix(".weight").rpartition(".")[0] for key in adapter}
        for module in sorted(modules):
            where = f"{shown(path)}: {component}.{module}"
            weight = layers.get(module, ())
            if len(weight) < 2:
                raise UserError(f"{where} is no layer of this base that can be adapted; the adapter is for another base")
            down, up = (adapter.get(f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
            if down is None or up is None:
                raise UserError(f"{where} has only one of lora_A and lora_B; the adapter is not whole")
            if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
                raise UserError(f"{where} has lora_A of shape {tuple(down.shape)} and lora_B of shape {tuple(up.shape)}, which do not multiply")
            for expected, found in ((weight[1], down.shape[1]), (weight[0], up.shape[0])):
                if expected != found:
                    raise UserError(f"{where} is {expected} wide in this base and {found} in the adapter, which is for another base")
        targets = (fields or {}).get(component, {}).get("target_modules", [])
        ends = tuple(f".{target}" for target in targets)
        expected_modules = {module for module, shape in layers.items() if len(shape) > 1 and f".{module}".endswith(ends)} if ends else set()
        if lacking := sorted(expected_modules - modules):
            of = f"{len(lacking)} of the {len(expected_modules)} layers of {component} that it was trained on"
            raise UserError(f"{shown(path)} lacks {of}, e.g. {lacking[0]}; the adapter is not whole")
