"""LoRA's weights are cast together: the losses and gradients of autocast, bit for bit, from fewer casts."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextModel

from dreambooth.adapters import inject
from dreambooth.adapters.inject import Component
from dreambooth.adapters.low_precision import StepWeights
from dreambooth.bases import quantization
from dreambooth.options.adapter import AdapterOptions
from dreambooth.training import recomputation
from tests import live_adapters

FULL = inject.unet_targets(AdapterOptions(target_preset="full"))
Loss = Callable[[], torch.Tensor]


def train_mode(component: Component) -> Component:
    (component,) = live_adapters.trained([component])
    component.model.train()
    return component


def unet_and_loss(
    base: Any, dtype: torch.dtype, *, checkpointing: bool = False, quantize: bool = False, **flags: Any
) -> tuple[Component, Loss]:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype)
    if quantize:
        quantization.quantize(unet, "int8", torch.device("cpu"))
    component = train_mode(inject.inject("unet", unet, AdapterOptions(**flags), FULL, seed=1))
    if checkpointing:
        recomputation.enable(unet, [])
    draw = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=draw).to(dtype).contiguous(memory_format=torch.channels_last)
    embeds, timesteps = torch.randn(2, 77, 32, generator=draw).to(dtype), torch.tensor([3, 700])

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype):
            return unet(latents, timesteps, embeds).sample.float().square().mean()

    return component, loss


def gradients(component: Component, loss: Loss, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """The loss and all gradients in float32; with `dtype` from weights that are cast together."""
    parameters = [parameter for _, parameter in component.named_parameters()]
    weights = StepWeights([component.model] if dtype else [], dtype or torch.float32)
    with weights.in_place():
        value = loss()
        grads = torch.autograd.grad(value, [weights.leaf(parameter) for parameter in parameters])
    return [value.detach(), *(grad.float() for grad in grads)]


@pytest.mark.parametrize(
    "case",
    [
        {"fp16": True},
        {"checkpointing": True},
        {"lora_dropout": 0.2},
        {"lora_dropout": 0.2, "checkpointing": True},
        {"lora_alpha": 3.0, "rank_pattern": "unet.up_blocks=2"},
        {"quantize": True},
        {"use_dora": True},
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_autocast_bit_for_bit(tiny_base, case):
    flags = {**case}
    dtype = torch.float16 if flags.pop("fp16", False) else torch.bfloat16
    component, loss = unet_and_loss(tiny_base, dtype, **flags)
    expected = gradients(component, loss, None)
    computed = gradients(component, loss, dtype)
    assert all(torch.equal(one, other) for one, other in zip(computed, expected, strict=True))
    assert all(bool(tensor.any()) for tensor in expected)


def test_a_text_encoder_has_them_too(tiny_base):
    encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder", dtype=torch.bfloat16)
    options = AdapterOptions(target_preset="attn_ff")
    component = train_mode(
        inject.inject("text_encoder", encoder, options, inject.text_targets(options), seed=1)
    )

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(torch.arange(77)[None])[0].float().square().mean()

    expected, computed = (gradients(component, loss, dtype) for dtype in (None, torch.bfloat16))
    assert all(torch.equal(one, other) for one, other in zip(computed, expected, strict=True))


def test_copies_follow_the_parameters_and_leave_after_an_error(tiny_base):
    component, loss = unet_and_loss(tiny_base, torch.bfloat16)
    parameters = [parameter for _, parameter in component.named_parameters()]
    weights = StepWeights([component.model], torch.bfloat16)
    first = loss()
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2)
    with weights.in_place():
        assert not torch.equal(loss(), first)
        assert not any(parameter.dtype == torch.float32 for parameter in component.model.parameters())
    with pytest.raises(KeyError), weights.in_place():
        raise KeyError
    left = [parameter for parameter in component.model.parameters() if parameter.requires_grad]
    assert all(one is other for one, other in zip(left, parameters, strict=True))


@pytest.mark.parametrize(
    "flags", [{"use_dora": True}, {"adapter": "loha"}, {"adapter": "lokr"}, {"adapter": "hra"}], ids=str
)
def test_parameters_that_are_used_in_float32_have_no_copies(tiny_base, flags):
    unet = live_adapters.load_models(tiny_base, torch.bfloat16)["unet"]
    component = inject.inject("unet", unet, AdapterOptions(**flags), inject.UNET_TARGETS, seed=1)
    weights = StepWeights([unet], torch.bfloat16)
    assert all(weights.leaf(parameter) is parameter for _, parameter in component.named_parameters())


def test_a_run_in_float32_has_no_copies(tiny_base):
    component, _ = unet_and_loss(tiny_base, torch.float32)
    weights = StepWeights([component.model], torch.float32)
    assert all(weights.leaf(parameter) is parameter for _, parameter in component.named_parameters())


class NormsInFloat32(TorchFunctionMode):
    """Norms as autocast computes them on CUDA: all their inputs are cast to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, F.group_norm):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_has_fewer_casts(tiny_base):
    component, loss = unet_and_loss(tiny_base, torch.bfloat16)
    trained = len(component.named_parameters())
    norms = sum(isinstance(m, nn.LayerNorm | nn.GroupNorm) for m in component.model.modules())
    plain, saving = (
        StepWeights([], torch.float32),
        StepWeights([component.model], torch.bfloat16, casts_norms=True),
    )
    results, counts = [], []
    for weights in (plain, saving):
        with Counted() as counted, NormsInFloat32(), weights.in_place():
            value = loss()
            leaves = [weights.leaf(parameter) for _, parameter in component.named_parameters()]
            grads = torch.autograd.grad(value, leaves)
        results.append([value, *(grad.float() for grad in grads)])
        counts.append(counted.counts)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    saved = counts[0] - counts[1]
    # each weight is cast in the forward pass, its gradient in the backward pass; a norm has two weights
    assert saved["aten::_to_copy"] >= 2 * trained + 2 * norms


def test_copies_are_compiled_once_for_all_steps():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
    model[0].compile(backend="eager", dynamic=False)
    weights = StepWeights([model], torch.bfloat16)
    graphs = torch._dynamo.utils.counters["stats"]
    parameters: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counts = []
    for _ in range(3):
        with weights.in_place(), torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.ones(2, 8, dtype=torch.bfloat16)).sum()
            torch.autograd.grad(loss, [weights.leaf(parameter) for parameter in parameters])
        with torch.no_grad():
            torch._foreach_mul_(parameters, 2.0)
        counts.append(graphs["unique_graphs"])
    assert counts[0] == counts[2] > 0
