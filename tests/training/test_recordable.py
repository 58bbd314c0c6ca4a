"""What a CUDA graph cannot hold: reads on the host, tensors from the host, and random states."""

import traceback
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_dreambooth_lora as train
from dreambooth.adapters import inject
from dreambooth.data.batches import MicroBatch
from dreambooth.options.adapter import AdapterOptions
from dreambooth.training import recomputation, step_inputs
from tests import tiny
from tests.running import prior_words, run_train


class DeviceOnly(TorchDispatchMode):
    """Fails at an operation that reads a value on the host or has a tensor of the host. The device is `meta`,
    whose tensors have shapes and no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))  # raises an error if the operation reads a value
        on_host = [
            tensor
            for tensor in tree_leaves((args, kwargs, result))
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        ]
        assert not on_host, f"{func} of a tensor on the host:\n{''.join(traceback.format_stack(limit=8))}"
        return result


def unet_pass(base: Any, *, checkpointing: bool = False, **flags: Any) -> None:
    """Forward and backward pass on the meta device."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    options = AdapterOptions(**flags)
    component = inject.inject("unet", unet, options, inject.unet_targets(options), seed=1)
    if checkpointing:
        recomputation.enable(unet, [])
    unet.train().to("meta")
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    with torch.device("meta"):
        latents, timesteps = torch.zeros(2, unet.config.in_channels, 8, 8), torch.zeros(2, dtype=torch.long)
        embeds = torch.zeros(2, 77, width)
        added = {"text_embeds": torch.zeros(2, 24), "time_ids": torch.zeros(2, 6)}
    backward_pass(
        component,
        lambda: unet(latents, timesteps, embeds, added_cond_kwargs=added).sample.square().mean(),
    )


def backward_pass(component: inject.Component, loss: Any) -> None:
    # on the meta device the model has other parameters than those that the component lists
    parameters = [parameter for parameter in component.model.parameters() if parameter.requires_grad]
    with DeviceOnly():
        gradients = torch.autograd.grad(loss(), parameters)
    assert len(gradients) == len(parameters) > 0


CASES: list[dict[str, Any]] = [
    {"target_preset": "full"},
    {"checkpointing": True},
    {"use_dora": True},
    {"lora_dropout": 0.1},
    {"adapter": "loha", "target_preset": "full"},
    {"adapter": "lokr", "target_preset": "full"},
    {"adapter": "oft", "oft_block_size": 4},
    {"adapter": "hra"},
]


@pytest.mark.parametrize("flags", CASES, ids=str)
def test_a_unet_reads_nothing_on_the_host_and_takes_nothing_from_it(tiny_base, flags):
    unet_pass(tiny_base, **flags)


@pytest.mark.parametrize("family", ["tiny_xl", "tiny_if"])
def test_nor_does_the_unet_of_another_family(request, family):
    unet_pass(request.getfixturevalue(family))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "cls"), [("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)]
)
def test_nor_does_a_text_encoder(tiny_xl, name, cls, checkpointing):
    encoder = cls.from_pretrained(tiny_xl, subfolder=name)
    options = AdapterOptions(target_preset="attn_ff")
    component = inject.inject(name, encoder, options, inject.text_targets(options), seed=1)
    if checkpointing:
        unet = UNet2DConditionModel.from_pretrained(tiny_xl, subfolder="unet")
        recomputation.enable(unet, [encoder])
    encoder.train().to("meta")
    input_ids = torch.zeros(2, 77, dtype=torch.long, device="meta")
    backward_pass(component, lambda: encoder(input_ids, output_hidden_states=True)[0].square().mean())


class Checked(Exception):
    """Raised after the first forward and backward pass of a run."""


def step_on_meta(self: train.Training, step: int, batches: Iterator[MicroBatch]) -> None:
    """The forward and backward pass of a step, with all that it works on on the meta device."""
    tensors = step_inputs.of_batch(next(batches), self.frozen, self.options.objective)
    inputs = {name: tensor.to("meta") for name, tensor in tensors.items()}
    self.device = torch.device("meta")
    for component in self.trainables.components:
        component.model.to(self.device)
    with DeviceOnly():
        outputs = self.forward_backward(inputs)
    assert outputs["gradients"].shape == (self.trainables.count,)
    assert outputs["gradients"].device == outputs["loss"].device == self.device
    raise Checked


@pytest.mark.trains
@pytest.mark.parametrize(
    ("base", "flags"),
    [
        ("tiny_base", "--train_text_encoder --snr_gamma 5 --noise_offset 0.1 --gradient_checkpointing"),
        ("tiny_xl", "--train_text_encoder"),
        ("tiny_edm", "--use_dora"),
        ("tiny_if", ""),
    ],
)
def test_the_function_that_is_recorded_stays_on_the_device(
    request, photos_dir, tmp_path, monkeypatch, base, flags
):
    monkeypatch.setattr(train.Training, "step", step_on_meta)
    monkeypatch.setattr(train.Training, "save_last_step", lambda *_: None)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # `to` keeps parameters
    words = prior_words(
        tiny.make_photos(tmp_path / "class", seed=1), *flags.split(), "--max_train_steps", "1"
    )
    with pytest.raises(Checked):
        run_train(request.getfixturevalue(base), photos_dir, tmp_path / "out", *words)


@pytest.mark.parametrize("flags", [{"module_dropout": 0.1}, {"rank_dropout": 0.1}], ids=str)
def test_dropout_that_is_drawn_on_the_host_is_noticed(tiny_base, flags):
    with pytest.raises(AssertionError, match="of a tensor on the host"):
        unet_pass(tiny_base, adapter="loha", **flags)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_random_state_is_read_only_for_dropout(tiny_base, dropout, monkeypatch):
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    options = AdapterOptions(lora_dropout=dropout)
    inject.inject("unet", unet, options, inject.UNET_TARGETS, seed=1)
    recomputation.enable(unet, [])
    read = unittest.mock.Mock(wraps=torch.get_rng_state)
    monkeypatch.setattr(torch, "get_rng_state", read)
    sample = unet.train()(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 77, 32)).sample
    sample.mean().backward()
    assert read.called == (dropout > 0)
