"""How an adapter is stored: one safetensors file that plain diffusers loads. `attach.read` reads it, and those of other programs.

Keys are peft's with the component in front. The text encoder's always have `text_model.`, whatever transformers calls its modules: older
stacks and other programs know no other spelling. Metadata holds, per component, the few stable fields of its LoraConfig, and a block of our
own about the training run. No local paths, nothing in an order that varies: the same adapter gives the same bytes.
"""

import json
import os
import secrets
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
_TEXT_PREFIX = "text_model."


def pack(
    state: dict[str, dict[str, torch.Tensor]], configs: dict[str, dict[str, object]], info: dict[str, Any]
) -> bytes:
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
    lora = {
        f"{component}.{field}": value
        for component, fields in configs.items()
        for field, value in fields.items()
    }
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(lora, sort_keys=True),
        "dreambooth": json.dumps(info, sort_keys=True),
    }
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
    # a number alone is not enough where containers share a folder: each counts its processes from 1
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.randbelow(10**9)}.tmp")
    descriptor = os.open(
        temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o666
    )  # less the umask, as other programs' files
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def recorded(metadata: dict[str, str]) -> dict[str, Any]:
    """What `pack` was given as `info`; {} for a file of another program, or one that says nonsense there."""
    try:
        found = json.loads(metadata.get("dreambooth", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
