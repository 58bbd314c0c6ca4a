"""Measures the memory that a full-size UNet keeps for the backward pass, and that of its weights.

    python -m benchmarks.kept

The input is one picture; LoRA of rank 8 is on the attention layers; the precision is bfloat16. It is computed
on a CPU with normalisations in float32, as autocast does on CUDA. Every tensor that autograd saves counts,
each storage once, with the inputs of checkpointed blocks and without weights. Writes
`benchmarks/results/kept.json`. Takes some minutes, and 18 GiB for Stable Diffusion XL.
"""

import contextlib
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from dreambooth.adapters import inject
from dreambooth.bases import quantization
from dreambooth.options.adapter import AdapterOptions

RESULTS = Path(__file__).parent / "results" / "kept.json"
GIB = 2**30
XL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
BASES: dict[str, tuple[dict[str, Any], int]] = {
    "SD 1.5, 512 pixels": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 64),
    "SDXL, 1024 pixels": (XL_UNET, 128),
}


def weights(base: str) -> dict[str, float]:
    """GiB of the UNet's weights in bf16, and with --quantize_base."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**BASES[base][0])
    linear = [unet.get_submodule(name).weight for name in quantization.linear_layers(unet)]
    quantized, rows = sum(weight.numel() for weight in linear), sum(len(weight) for weight in linear)  # type: ignore[arg-type]
    bf16 = 2 * sum(p.numel() for p in unet.parameters())
    # int8 has a scale of four bytes and a zero point of one for each row, nf4 a scale of four bytes for 64
    # weights
    sizes = {
        "bf16": bf16,
        "int8": bf16 - quantized + 5 * rows,
        "nf4": bf16 - 2 * quantized + quantized / 2 + quantized / 16,
    }
    return {name: round(size / GIB, 2) for name, size in sizes.items()}


@contextlib.contextmanager
def norms_in_float32() -> Iterator[None]:
    """Within the block, layer and group norms compute in float32, as under autocast on CUDA."""
    before = F.layer_norm, F.group_norm

    def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.float()

    F.layer_norm = lambda x, shape, w=None, b=None, eps=1e-5: before[0](
        x.float(), shape, wide(w), wide(b), eps
    )  # type: ignore[assignment]
    F.group_norm = lambda x, groups, w=None, b=None, eps=1e-5: before[1](
        x.float(), groups, wide(w), wide(b), eps
    )  # type: ignore[assignment]
    try:
        yield
    finally:
        F.layer_norm, F.group_norm = before  # type: ignore[assignment]


def kept(base: str, *, checkpointing: bool) -> float:
    """GiB that one forward pass keeps for the backward pass."""
    config, side = BASES[base]
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**config)
    unet = unet.bfloat16().to_empty(device="cpu").to(memory_format=torch.channels_last)
    for parameter in unet.parameters():
        parameter.data.fill_(0.01)
    inject.inject("unet", unet, AdapterOptions(rank=8), inject.UNET_TARGETS, seed=0)
    unet.train()
    parameters = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that no address is used twice
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    if checkpointing:
        unet.enable_gradient_checkpointing()
    latents = torch.randn(1, 4, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
    text = torch.randn(1, 77, config["cross_attention_dim"]).bfloat16()
    added = (
        {"text_embeds": torch.randn(1, 1280).bfloat16(), "time_ids": torch.zeros(1, 6)}
        if config is XL_UNET
        else None
    )
    with (
        norms_in_float32(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        # the output is held, and with it all that autograd keeps
        output = unet(latents, torch.tensor([500]), text, added_cond_kwargs=added).sample
    assert output.requires_grad
    return round(sum(storage.nbytes() for storage in storages.values()) / GIB, 2)


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    for base in BASES:
        results[base] = {"weights_gib": weights(base)}
        for name, checkpointing in (("kept_gib", False), ("kept_with_checkpointing_gib", True)):
            # a separate process, whose memory is freed at its end
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results[base][name] = pool.apply(kept, (base,), {"checkpointing": checkpointing})
        print(base, results[base], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
