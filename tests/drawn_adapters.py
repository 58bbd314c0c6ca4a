"""Adapters of every kind for a tiny base, and what its models compute with them."""

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import BOFTConfig, HRAConfig, OFTConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.adapter_files import deltas
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora
from dreambooth.adapter_files.layer_names import Layers

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


WIDE = (*ATTENTION, "conv1", "conv2", "proj_in", "ff.net.2", "time_emb_proj", "fc1")


Shape = tuple[int, ...]


Make = Callable[[Shape, torch.Generator], deltas.Module]


def tensor(draw: torch.Generator, *shape: int) -> Tensor:
    return 0.2 * torch.randn(*shape, generator=draw)


def lora(shape: Shape, draw: torch.Generator, rank: int = 3) -> Lora:
    outputs, inputs, *kernel = shape
    return Lora(tensor(draw, rank, inputs, *kernel), tensor(draw, outputs, rank, *[1] * len(kernel)))


def dora(shape: Shape, draw: torch.Generator) -> Lora:
    plain = lora(shape, draw, 2)
    return Lora(plain.down, plain.up, 0.5 + torch.rand(shape[0], generator=draw))


def loha(shape: Shape, draw: torch.Generator) -> LoHa:
    outputs, inputs, *kernel = shape
    if kernel:  # with a core
        w1a, w1b, w2a, w2b = (tensor(draw, 2, size) for size in (outputs, inputs, outputs, inputs))
        return LoHa(w1a, w1b, w2a, w2b, 3 * tensor(draw, 2, 2, *kernel), 3 * tensor(draw, 2, 2, *kernel))
    return LoHa(
        tensor(draw, outputs, 2), tensor(draw, 2, inputs), tensor(draw, outputs, 2), tensor(draw, 2, inputs)
    )


def doha(shape: Shape, draw: torch.Generator) -> LoHa:
    whole = LoHa(*(tensor(draw, *size) for size in ((shape[0], 2), (2, *shape[1:])) * 2))
    return LoHa(
        whole.w1a, whole.w1b, whole.w2a, whole.w2b, magnitude=0.5 + torch.rand(shape[0], generator=draw)
    )


def lokr(shape: Shape, draw: torch.Generator) -> LoKr:
    outputs, inputs, *kernel = shape
    first = 2 if outputs % 2 == 0 else 1
    if kernel:
        return LoKr(
            w1=tensor(draw, first, 2),
            w2a=tensor(draw, outputs // first, 2),
            w2b=tensor(draw, 2, inputs // 2, *kernel),
        )
    return LoKr(
        w1a=tensor(draw, first, 1), w1b=tensor(draw, 1, 2), w2=tensor(draw, outputs // first, inputs // 2)
    )


KINDS: dict[str, Make] = {"lora": lora, "dora": dora, "loha": loha, "doha": doha, "lokr": lokr}


def adapter_of(layers: Layers, make: Make, ends: tuple[str, ...] = WIDE, seed: int = 0) -> Adapter:
    """An adapter of random tensors on all layers with these ends, text encoders included."""
    draw = torch.Generator().manual_seed(seed)
    components = {}
    for component, own in layers.items():
        names = {name.removeprefix("text_model."): shape for name, shape in own.items()}
        components[component] = {
            name: make(shape, draw)
            for name, shape in names.items()
            if f".{name}".endswith(tuple(f".{e}" for e in ends))
        }
    return Adapter(components, {})


def mixed(shape: Shape, draw: torch.Generator) -> deltas.Module:
    """Another kind and rank for every layer."""
    choice = random.Random(int(torch.randint(2**31, (1,), generator=draw)))
    return choice.choice([*KINDS.values(), lambda s, d: lora(s, d, 5)])(shape, draw)


def models_of(pipeline: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


@torch.no_grad()
def outputs(pipeline: StableDiffusionPipeline) -> Tensor:
    """What UNet and text encoder give for one fixed input, each divided by its size."""
    draw = torch.Generator().manual_seed(5)
    noise, words = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 32, generator=draw)
    ids = torch.randint(0, 100, (2, 77), generator=draw)
    found = pipeline.unet(noise, 10, words).sample, pipeline.text_encoder(ids)[0]
    return torch.cat([one.flatten() / one.norm() for one in found])


def by_hand(
    pipeline: StableDiffusionPipeline, terms: list[tuple[Adapter, Callable[[str], float]]]
) -> StableDiffusionPipeline:
    """A copy whose weights are W + the sum of w * (W' - W), the weight of each layer by its place."""
    found = copy.deepcopy(pipeline)
    for component, model in models_of(found).items():
        own = {name.removeprefix("text_model."): module for name, module in model.named_modules()}
        sums: dict[str, Tensor] = {}
        for adapter, weight in terms:
            for name, module in adapter.components.get(component, {}).items():
                before = own[name].weight.detach()
                sums[name] = sums.get(name, 0) + weight(f"{component}.{name}") * (
                    deltas.adapted(module, before) - before
                )
        for name, total in sums.items():
            own[name].weight.data += total
    return found


# --- adapters that turn weights


ROTATIONS = {
    "oft": OFTConfig(r=0, oft_block_size=8, target_modules=[*ATTENTION, "proj_in"]),
    "oft exact": OFTConfig(
        r=0, oft_block_size=8, use_cayley_neumann=False, block_share=True, target_modules=list(ATTENTION)
    ),
    "coft": OFTConfig(r=0, oft_block_size=4, coft=True, eps=0.1, target_modules=list(ATTENTION)),
    "boft": BOFTConfig(boft_block_size=4, target_modules=[*ATTENTION, "conv1"]),
    "hra": HRAConfig(r=4, target_modules=[*ATTENTION, "conv1"]),
    "hra ordered": HRAConfig(r=4, apply_GS=True, target_modules=list(ATTENTION)),
}


_FIELDS = ("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "apply_GS")


def rotation_file(pipeline: StableDiffusionPipeline, name: str, path: Path) -> Path:
    """Put a random one on the pipeline by peft itself, and save it in our layout."""
    tensors: dict[str, Tensor] = {}
    fields: dict[str, object] = {}
    draw = torch.Generator().manual_seed(2)
    for component, model in models_of(pipeline).items():
        config = copy.deepcopy(ROTATIONS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no CUDA extension
            inject_adapter_in_model(config, model, "default")
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
        prefix = f"{component}.text_model." if component != "unet" else "unet."
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        tensors |= {prefix + key.removeprefix("text_model."): tensor.clone() for key, tensor in state.items()}
        own = {
            "peft_type": config.peft_type.value,
            "target_modules": sorted(config.target_modules),
            "r": getattr(config, "r", 0),
        }
        own |= {field: getattr(config, field) for field in _FIELDS if hasattr(config, field)}
        fields |= {f"{component}.{field}": value for field, value in own.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    return path
