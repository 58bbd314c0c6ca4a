"""How an adapter is stored: one safetensors file that plain diffusers loads.

Keys are peft's with the component in front. The text encoder's always have `text_model.`, whatever transformers calls its modules: older
stacks and other programs know no other spelling. Metadata holds, per component, the few stable fields of its LoraConfig, and a block of our
own about the training run. No local paths, nothing in an order that varies: the same adapter gives the same bytes.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dreambooth.errors import UserError

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


def find(path: str | Path) -> Path:
    """The adapter file itself, where `path` may also be the folder of a run. Raises UserError if there is none."""
    found = Path(path)
    if found.is_dir():
        found = found / ADAPTER_NAME
    if not found.is_file():
        raise UserError(f"--adapter: there is no file {found}")
    if found.suffix != ".safetensors":
        raise UserError(f"--adapter: {found} is not a .safetensors file; other formats can carry code and are not loaded")
    return found


def read(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """(tensors by component and by the key within it, metadata). `text_model.` is taken off the text encoder's keys.

    Raises UserError if the file is damaged, has keys of no known component, or values that are not finite.
    """
    state: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                component, _, key = name.partition(".")
                for old, new in _OLD_SPELLINGS.items():
                    key = key.replace(old, new)
                if component not in ("unet", "text_encoder") or "lora" not in key:
                    raise UserError(f"{path}: the key {name!r} is not one of a LoRA in diffusers' layout (unet.* and text_encoder.*)")
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{path}: {name} has values that are not finite; the adapter is broken")
                state.setdefault(component, {})[key.removeprefix(_TEXT_PREFIX) if component == "text_encoder" else key] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())})") from None
    if not state:
        raise UserError(f"{path}: the adapter is empty")
    return state, metadata


def check_fits(path: Path, state: dict[str, dict[str, torch.Tensor]], models: dict[str, torch.nn.Module]) -> None:
    """Raise UserError unless every tensor of the file has a layer of the right width in `models`: a loader would skip it in silence."""
    for component, adapter in state.items():
        layers = dict(models[component].named_modules())
        for module in sorted({key.removesuffix(".weight").rpartition(".")[0] for key in adapter}):
            where = f"{path}: {component}.{module}"
            layer = layers.get(module) or layers.get(_TEXT_PREFIX + module)
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
                raise UserError(f"{where} is no layer of this base that can be adapted; the adapter is for another base")
            down, up = (adapter.get(f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
            if down is None or up is None:
                raise UserError(f"{where} has only one of lora_A and lora_B; the adapter is not whole")
            if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
                raise UserError(f"{where} has lora_A of shape {tuple(down.shape)} and lora_B of shape {tuple(up.shape)}, which do not multiply")
            for expected, found in ((weight.shape[1], down.shape[1]), (weight.shape[0], up.shape[0])):
                if expected != found:
                    raise UserError(f"{where} is {expected} wide in this base and {found} in the adapter, which is for another base")
