"""Pictures drawn on a GPU with a recorded UNet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

from dreambooth.bases import families, pipelines
from dreambooth.data import replayed_unet
from dreambooth.options.speed import GraphOptions
from dreambooth.options.training import BaseOptions
from dreambooth.runtime.graphs import Graphs

STEPS = 6
Begin = Callable[[list[int], Callable[[], None]], Callable[[], list[bytes]]]
SAMPLERS = [
    ("tiny_base", None),  # DDIM
    ("tiny_base", DPMSolverMultistepScheduler),
    ("tiny_base", PNDMScheduler),
    ("tiny_xl", None),  # Euler
]


def load(folder: Path, sampler: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Begin]:
    """(pipeline, function that begins a batch of these seeds, with a function to call after each step)."""
    base = families.find(BaseOptions(str(folder)))
    pipeline = pipelines.load_pipeline(base, dtype, device)
    if sampler is not None:
        pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    with torch.no_grad():
        cache = pipelines.text_of(pipeline, base).encode_all(["a dog", ""], lambda: None)

    def begin(seeds: list[int], check: Callable[[], None]) -> Callable[[], list[bytes]]:
        prompts, negative = cache.of(["a dog"] * len(seeds)), cache.of([""])
        settings: Any = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "check": check}
        wait = pipelines.begin(pipeline, prompts, negative, seeds, **settings)
        return lambda: [image.tobytes() for image in wait()]

    return pipeline, begin


def recorded(device: torch.device) -> Graphs:
    return replayed_unet.graphs_of(GraphOptions(), device, pytest.fail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("base", "sampler"), [*SAMPLERS, ("tiny_edm", None), ("tiny_if", None)])
def test_pictures_are_those_of_launched_kernels(base, sampler, dtype, device, request):
    pipeline, begin = load(request.getfixturevalue(base), sampler, dtype, device)
    batches = [[1, 2], [3], [4, 5]]
    launched = [begin(seeds, lambda: None)() for seeds in batches]
    graphs = recorded(device)
    with replayed_unet.replaying(pipeline, graphs):
        begun = [begin(seeds, lambda: None) for seeds in batches]
        assert [wait() for wait in begun] == launched
        assert [len(function.recordings) for function in graphs.functions] == [2]
    assert begin(batches[0], lambda: None)() == launched[0]


@pytest.mark.parametrize(("base", "sampler"), SAMPLERS)
def test_no_step_of_a_sampler_waits_for_the_gpu(base, sampler, device, request):
    pipeline, begin = load(request.getfixturevalue(base), sampler, torch.float32, device)
    steps = []

    def check() -> None:
        steps.append(1)
        is_within = 3 <= len(steps) < STEPS  # the UNet is recorded at its second call
        torch.cuda.set_sync_debug_mode("error" if is_within else "default")

    try:
        with replayed_unet.replaying(pipeline, recorded(device)):
            begin([1, 2], check)()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) >= STEPS
