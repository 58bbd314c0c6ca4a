"""Pictures drawn on a GPU with a recorded UNet."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)

from dreambooth.data import replayed_unet
from dreambooth.options.speed import GraphOptions
from dreambooth.runtime.graphs import Graphs
from tests import drawing

STEPS = 6
SAMPLERS = [
    ("tiny_base", None),  # DDIM
    ("tiny_base", DPMSolverMultistepScheduler),
    ("tiny_base", PNDMScheduler),
    ("tiny_base", LCMScheduler),
    ("tiny_base", EulerAncestralDiscreteScheduler),
    ("tiny_xl", TCDScheduler),
    ("tiny_xl", None),  # Euler
]


def recorded(device: torch.device) -> Graphs:
    return replayed_unet.graphs_of(GraphOptions(), device, pytest.fail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("base", "sampler"), [*SAMPLERS, ("tiny_edm", None), ("tiny_if", None)])
def test_pictures_are_those_of_launched_kernels(base, sampler, dtype, device, request):
    folder = request.getfixturevalue(base)
    pipeline, draw = drawing.load(folder, steps=STEPS, dtype=dtype, device=device, sampler=sampler)
    batches = [[1, 2], [3], [4, 5]]
    launched = [draw(seeds) for seeds in batches]
    graphs = recorded(device)
    with replayed_unet.replaying(pipeline, graphs):
        assert [draw(seeds) for seeds in batches] == launched
        assert [len(function.recordings) for function in graphs.functions] == [2]
    assert draw(batches[0]) == launched[0]


@pytest.mark.parametrize(("base", "sampler"), SAMPLERS)
def test_no_step_of_a_sampler_waits_for_the_gpu(base, sampler, device, request):
    folder, dtype = request.getfixturevalue(base), torch.float32
    pipeline, draw = drawing.load(folder, steps=STEPS, dtype=dtype, device=device, sampler=sampler)
    steps = []

    def check() -> None:
        steps.append(1)
        is_within = 3 <= len(steps) < STEPS  # the UNet is recorded at its second call
        torch.cuda.set_sync_debug_mode("error" if is_within else "default")

    try:
        with replayed_unet.replaying(pipeline, recorded(device)):
            draw([1, 2], check=check)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) >= STEPS
