"""The bare training step on a GPU: forward, backward and fused AdamW of a UNet with LoRA, on fixed inputs.

    python -m benchmarks.bare_step BASE SIDE BATCH DEVICE STEPS REPORT

It is measured twice, launched kernel by kernel, and replayed from one CUDA graph. A program that trains
computes at least this. REPORT is a JSON file with the figures of each, by name: `step_s` (seconds a step,
the GPU synchronised before and after STEPS steps), `peak_gib` and `reserved_gib` (torch's maxima of
memory). The precision is bfloat16. On a CPU it is float32, nothing is replayed and no memory is counted:
the same step is measured twice.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.speed_bare import unet_with_lora

WARM_UP = 5  # steps
GIB = 2**30
Step = Callable[[], None]


def make_inputs(unet: Any, side: int, batch: int, device: str) -> dict[str, Any]:
    """Random inputs of the UNet by name, with what Stable Diffusion XL's takes besides."""
    config, dtype = unet.config, unet.dtype
    latents = torch.randn(batch, 4, side // 8, side // 8, device=device, dtype=dtype)
    inputs: dict[str, Any] = {
        "sample": latents.contiguous(memory_format=torch.channels_last),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(
            batch, 77, config.cross_attention_dim, device=device, dtype=dtype
        ),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, width, device=device, dtype=dtype),
            "time_ids": torch.zeros(batch, 6, device=device),
        }
    return inputs


def make_step(
    unet: Any, trained: list[torch.nn.Parameter], inputs: dict[str, Any], *, is_recorded: bool
) -> Step:
    """One step of training. One that will be recorded keeps its gradients in the same tensors."""
    target = torch.randn(inputs["sample"].shape, device=inputs["sample"].device)
    device = target.device.type
    # the state of a recorded AdamW must be on the GPU
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=is_recorded)

    def step() -> None:
        # autocast keeps casts of weights for later passes; a graph's memory must hold none from before it
        with torch.autocast(device, unet.dtype, enabled=device == "cuda", cache_enabled=not is_recorded):
            prediction = unet(**inputs).sample
        F.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not is_recorded)

    return step


def recorded(step: Step) -> Step:
    """The replay of `step`, recorded after a warm-up on a stream of its own, as CUDA graphs require."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_a_step(step: Step, steps: int, synchronize: Step) -> float:
    for _ in range(WARM_UP):
        step()
    synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - started) / steps


def main(base: str, side: int, batch: int, device: str, steps: int, report: str) -> None:
    on_gpu = device == "cuda"
    torch.manual_seed(0)
    unet, trained = unet_with_lora(base, torch.bfloat16 if on_gpu else torch.float32, device)
    inputs = make_inputs(unet, side, batch, device)
    figures: dict[str, dict[str, float]] = {}
    for name in ("launched", "replayed"):
        is_recorded = on_gpu and name == "replayed"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for parameter in trained:
            parameter.grad = None
        step = make_step(unet, trained, inputs, is_recorded=is_recorded)
        step = recorded(step) if is_recorded else step
        figures[name] = {
            "step_s": seconds_a_step(step, steps, torch.cuda.synchronize if on_gpu else lambda: None)
        }
        if on_gpu:
            figures[name]["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            figures[name]["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    Path(report).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), sys.argv[6])
