"""How an adapter is stored: one safetensors file that plain diffusers loads. `attach.read` reads it, and those of other programs.

Keys are peft's with the component in front. The text encoder's always have `text_model.`, whatever transformers calls its modules: older
stacks and other programs know no other spelling. Metadata holds, per component, the few stable fields of its LoraConfig, and a block of our
own about the training run. No local paths, nothing in an order that varies: the same adapter gives the same bytes.
"""

import json
from typing import Any

import torch

from dreambooth.files import safetensors_files

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"  # the same adapter under kohya's keys
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
    return safetensors_files.stable_bytes(tensors, metadata)


def recorded(metadata: dict[str, str]) -> dict[str, Any]:
    """What `pack` was given as `info`; {} for a file of another program, or one that says nonsense there."""
    try:
        found = json.loads(metadata.get("dreambooth", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
