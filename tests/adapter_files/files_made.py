"""Adapters of every kind, made by peft on small models, and their files in every layout."""

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from dreambooth.adapter_files import deltas, reading, writing
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.layer_names import Layers

Models = dict[str, torch.nn.Module]


ATTENTION = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


WIDE = {
    "unet": [
        *ATTENTION["unet"],
        "proj_in",
        "conv1",
        "conv_shortcut",
        "conv",
        "conv_in",
        "time_emb_proj",
        "ff.net.2",
    ],
    "text_encoder": [*ATTENTION["text_encoder"], "fc1"],
}


MIXED = {
    "unet": {
        "rank_pattern": {"to_k": 2, "attn2.to_v": 6},
        "alpha_pattern": {"to_k": 1.0, "down_blocks.1.attentions.0.proj_in": 3.0},
    },
    "text_encoder": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 1.0}},
}


# Scales other than 1 everywhere: a reader that forgets them is found out.
KINDS: dict[str, Callable[[str], object]] = {
    "lora": lambda c: LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION[c]),
    "rslora": lambda c: LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=ATTENTION[c]),
    "locon": lambda c: LoraConfig(r=3, lora_alpha=6, target_modules=WIDE[c]),
    "mixed ranks": lambda c: LoraConfig(r=4, lora_alpha=6, target_modules=WIDE[c], **MIXED[c]),
    "dora": lambda c: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=WIDE[c]),
    "loha": lambda c: LoHaConfig(r=2, alpha=3, target_modules=WIDE[c]),
    "loha cp": lambda c: LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=WIDE[c]),
    "loha mixed ranks": lambda c: LoHaConfig(
        r=2, alpha=3, target_modules=ATTENTION[c], rank_pattern=MIXED[c]["rank_pattern"]
    ),
    "lokr": lambda c: LoKrConfig(r=2, alpha=3, target_modules=WIDE[c]),
    "lokr factor": lambda c: LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=ATTENTION[c]),
    "lokr both": lambda c: LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=WIDE[c]),
    "lokr cp": lambda c: LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=WIDE[c]),
    "lokr dense": lambda c: LoKrConfig(r=10_000, alpha=5_000, target_modules=WIDE[c]),
}


LYCORIS = [kind for kind in KINDS if kind.startswith("lo") and kind not in ("lora", "locon")]


HAS_LYCORIS = all(importlib.util.find_spec(name) for name in ("lycoris", "einops", "toml"))


needs_lycoris = pytest.mark.skipif(not HAS_LYCORIS, reason="needs the packages lycoris-lora, einops and toml")


def with_adapter(model: torch.nn.Module, config: object) -> torch.nn.Module:
    inject_adapter_in_model(config, model, "default")
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else 0.2 * noise
    return model


def peft_state(models: Models) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for component, model in models.items():
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        found |= {f"{component}.{key}": tensor.clone() for key, tensor in state.items()}
    return found


def peft_file(path: Path, models: Models) -> Path:
    """What diffusers' own scripts write: peft's keys, and all that peft's configuration says."""
    fields: dict[str, object] = {}
    for component, model in models.items():
        config = model.peft_config["default"].to_dict()  # type: ignore[union-attr,operator,index]
        fields |= {
            f"{component}.{name}": sorted(value) if isinstance(value, set) else value
            for name, value in config.items()
        }
    save_file(
        peft_state(models), path, {"format": "pt", "lora_adapter_metadata": json.dumps(fields, default=str)}
    )
    return path


def tuner_layers(models: Models) -> dict[tuple[str, str], BaseTunerLayer]:
    layers = (
        (component, name, module)
        for component, model in models.items()
        for name, module in model.named_modules()
    )
    return {
        (component, name): module for component, name, module in layers if isinstance(module, BaseTunerLayer)
    }


def expect_same_deltas(adapter: Adapter, models: Models) -> None:
    """Every module of the one is in the other, and adds what peft itself computes."""
    layers = tuner_layers(models)
    assert {
        (component, path) for component, modules in adapter.components.items() for path in modules
    } == layers.keys()
    for (component, path), layer in layers.items():
        module = adapter.components[component][path]
        weight = layer.get_base_layer().weight.data
        with torch.no_grad():
            if module.magnitude is not None:
                merged = copy.deepcopy(layer)
                merged.merge()  # type: ignore[operator]
                expected, found = merged.get_base_layer().weight.data, deltas.adapted(module, weight)
            else:
                expected, found = layer.get_delta_weight("default"), deltas.delta(module)  # type: ignore[operator]
        assert found.shape == weight.shape
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 1e-6 * expected.norm(), f"{component}.{path}"
        assert expected.norm() > 1e-3  # an adapter that does nothing would equal any other


def outputs(unet: torch.nn.Module, text_encoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, 77), generator=draw)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 32, generator=draw)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 700]), text).sample, text_encoder(tokens)[0]


def rewritten(adapter: Adapter, layout: str) -> bytes:
    return (
        writing.write_native(adapter, {}) if layout == "native" else writing.write_kohya(adapter, "sd1", {})
    )


def read_bytes(data: bytes, path: Path, base: Layers) -> Adapter:
    path.write_bytes(data)
    return reading.read_additive(path, base)


SOME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
