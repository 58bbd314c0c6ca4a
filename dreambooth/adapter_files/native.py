"""This project's layout of an adapter file: one safetensors file that diffusers loads without this project.

A key is the component, then peft's key; names of layers are those of `layer_names.stored`. The metadata holds
the fields of each component's peft configuration that readers need, and a block about the training run. The
same adapter always gives the same bytes: there are no local paths and no times, and keys are sorted.
`reading.read` reads such files.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from dreambooth.adapter_files import layer_names
from dreambooth.files import safetensors_files

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"  # the same adapter under kohya's keys


def pack(
    state: Mapping[str, Mapping[str, torch.Tensor]],
    configs: Mapping[str, Mapping[str, object]],
    info: Mapping[str, Any],
) -> bytes:
    """The bytes of an adapter file. Tensors are stored in float32.

    `state` has the tensors by component and peft's key, `configs` the fields of peft's configuration by
    component. `info` is about the training run. Raises ValueError if a tensor is not finite: such an adapter
    draws black pictures and must not replace a good one.
    """
    tensors: dict[str, torch.Tensor] = {}
    for component, adapter in state.items():
        for key, tensor in adapter.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{component}.{key} is not finite")
            name = layer_names.stored(component, layer_names.plain(key))
            tensors[f"{component}.{name}"] = tensor.detach().to("cpu", torch.float32).contiguous()
    fields = {
        f"{component}.{field}": value
        for component, config in configs.items()
        for field, value in config.items()
    }
    return safetensors_files.stable_bytes(tensors, metadata(fields, info))


def by_component(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a file in the form of `pack`'s `state`: by component and peft's key, with plain names of
    layers."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        component, _, key = name.partition(".")
        state.setdefault(component, {})[layer_names.plain(key)] = tensor
    return state


def metadata(fields: Mapping[str, object], info: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file. `fields` are those of peft's configuration by `component.field`; `info` is
    about the training run."""
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(dict(fields), sort_keys=True),
        "dreambooth": json.dumps(dict(info), sort_keys=True),
    }
