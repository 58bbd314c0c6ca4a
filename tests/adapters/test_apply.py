"""Adapters on live models: put on, taken off, at weights, fused or not, of any kind and several at once."""

import copy
import functools
import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.adapter_files import deltas, reading
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Lora
from dreambooth.adapter_files.rotations import Rotations
from dreambooth.adapters import apply
from dreambooth.bases import families, pipelines
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from tests.drawn_adapters import (
    KINDS,
    ROTATIONS,
    adapter_of,
    by_hand,
    dora,
    loha,
    lora,
    mixed,
    models_of,
    outputs,
    rotation_file,
)

ROOT = Path(__file__).parent.parent.parent


def expect_close(found: Tensor, expected: Tensor, limit: float = 1e-6) -> None:
    # both parts have length 1
    assert (found - expected).norm() < limit * 3


# --- live models


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_an_adapter_of_any_kind_adds_exactly_what_it_says(kind, pipeline, layers):
    adapter = adapter_of(layers, KINDS.get(kind, mixed))
    before = outputs(pipeline)
    expected = outputs(by_hand(pipeline, [(adapter, lambda place: 1.0)]))
    apply.attach(models_of(pipeline), adapter, "subject")
    expect_close(outputs(pipeline), expected)
    assert (expected - before).norm() > 0.01


@pytest.mark.slow
def test_kinds_on_the_same_layers_add_up_at_their_weights_in_any_order(pipeline, layers):
    adapters = {kind: adapter_of(layers, make, seed=seed) for seed, (kind, make) in enumerate(KINDS.items())}
    weights = {"lora": 0.5, "dora": 0.7, "loha": -0.4, "doha": 0.3, "lokr": 1.2}
    expected = outputs(
        by_hand(
            pipeline,
            [(adapters[kind], functools.partial(lambda w, place: w, weights[kind])) for kind in KINDS],
        )
    )
    for order in (list(KINDS), ["lokr", "dora", "loha", "lora", "doha"]):
        own = copy.deepcopy(pipeline)
        for kind in order:
            apply.attach(models_of(own), adapters[kind], kind)
        apply.set_weights(models_of(own), {kind: weights[kind] for kind in order})
        expect_close(outputs(own), expected)


@pytest.mark.slow
def test_attaching_adds_to_what_is_active_and_says_nothing(pipeline, layers, capfd):
    adapters = [adapter_of(layers, mixed, seed=seed) for seed in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, adapter in enumerate(adapters):
            apply.attach(models_of(pipeline), adapter, f"number_{number}")
    expect_close(
        outputs(pipeline),
        outputs(
            by_hand(copy.deepcopy(clean(pipeline)), [(adapter, lambda place: 1.0) for adapter in adapters])
        ),
    )
    assert capfd.readouterr() == ("", "")
    for name in ("a.b", "items", "number_0"):
        with pytest.raises(ValueError, match=r"name|already"):
            apply.attach(models_of(pipeline), adapters[0], name)


def clean(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy without adapters."""
    found = copy.deepcopy(pipeline)
    found.unload_lora_weights()
    return found


@pytest.mark.slow
def test_what_diffusers_does_to_adapters_works_on_all_kinds(pipeline, layers):
    """set_adapters, fuse_lora, unfuse_lora, disable_lora, delete_adapters, unload_lora_weights."""
    before = outputs(pipeline)
    first, second = adapter_of(layers, mixed, seed=1), adapter_of(layers, mixed, seed=2)
    expected = outputs(by_hand(pipeline, [(first, lambda place: 0.5), (second, lambda place: 1.0)]))
    alone = outputs(by_hand(pipeline, [(second, lambda place: 1.0)]))
    apply.attach(models_of(pipeline), first, "first")
    apply.attach(models_of(pipeline), second, "second")
    assert pipeline.get_list_adapters() == {"unet": ["first", "second"], "text_encoder": ["first", "second"]}
    pipeline.set_adapters(["first", "second"], [0.5, 1.0])
    expect_close(outputs(pipeline), expected)
    pipeline.disable_lora()
    assert torch.equal(outputs(pipeline), before)
    pipeline.enable_lora()
    pipeline.fuse_lora(components=["unet", "text_encoder"])
    expect_close(outputs(pipeline), expected, 3e-6)
    pipeline.unfuse_lora(components=["unet", "text_encoder"])
    pipeline.delete_adapters("first")
    pipeline.set_adapters(["second"])
    expect_close(outputs(pipeline), alone, 3e-6)
    pipeline.unload_lora_weights()
    expect_close(outputs(pipeline), before, 3e-6)
    assert not any(
        "peft" in type(module).__module__
        for model in models_of(pipeline).values()
        for module in model.modules()
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["yes", "no"])
def test_weight_0_and_taking_off_leave_the_base_bit_for_bit(how, pipeline, layers):
    before = outputs(pipeline)
    stack = apply.Stack(models_of(pipeline))
    for number, make in enumerate(KINDS.values()):
        stack.add(f"a{number}", adapter_of(layers, make, seed=number))
    weights = dict.fromkeys(stack.adapters, 0.7)
    with stack.activated(weights, how):
        first = outputs(pipeline)
    assert torch.equal(outputs(pipeline), before)
    with stack.activated(dict.fromkeys(weights, 0.0), how):
        assert torch.equal(outputs(pipeline), before)
    with stack.activated({"a1": {"": 0.0, "unet.up_blocks": 0.0}}, how):
        assert torch.equal(outputs(pipeline), before)
    with stack.activated({"a0": 1.0}, how):
        assert not torch.equal(outputs(pipeline), before)
    with stack.activated(weights, how):
        assert torch.equal(outputs(pipeline), first)  # swapped to and fro: the same bits


def test_an_error_within_leaves_the_base_as_it_was(pipeline, layers):
    before = outputs(pipeline)
    stack = apply.Stack(models_of(pipeline))
    stack.add("a", adapter_of(layers, loha))
    for how in ("yes", "no"):
        with pytest.raises(KeyError), stack.activated({"a": 1.0}, how):
            raise KeyError
        assert torch.equal(outputs(pipeline), before)


@pytest.mark.slow
def test_fused_equals_live(pipeline, layers):
    stack = apply.Stack(models_of(pipeline))
    for number in range(3):
        stack.add(f"a{number}", adapter_of(layers, mixed, seed=number))
    weights: dict[str, apply.Weight] = {
        "a0": 0.5,
        "a1": -0.3,
        "a2": {"": 0.2, "unet.mid_block": 1.0, "text_encoder": 0.0},
    }
    found = []
    for how in ("yes", "no"):
        with stack.activated(weights, how):
            found.append(outputs(pipeline))
    expect_close(found[0], found[1])


@pytest.mark.parametrize(
    "path", ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1.resnets.0.conv1"]
)
def test_dora_keeps_lengths_that_are_close_to_the_bases_in_bfloat16(path, pipeline):
    """Lengths 0.3 % larger, as short runs train them: a factor that bfloat16 alone would round to 1."""
    unet = pipeline.unet
    weight = unet.get_submodule(path).weight.detach().clone()
    near = Lora(
        torch.zeros(1, *weight.shape[1:]),
        torch.zeros(weight.shape[0], 1, *[1] * (weight.ndim - 2)),
        1.003 * weight.flatten(1).norm(dim=1),
    )
    unet.to(torch.bfloat16)
    layer = unet.get_submodule(path)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(
        (64, weight.shape[1]) if weight.ndim == 2 else (1, weight.shape[1], 8, 8), generator=draw
    ).bfloat16()
    stack = apply.Stack({"unet": unet})
    stack.add("near", Adapter({"unet": {path: near}}, {}))
    with torch.no_grad():
        plain = layer(x).float()
        with stack.activated({"near": 50.0}, "no"):  # far enough from the base for bfloat16 to show it
            found = unet.get_submodule(path)(x).float() - plain
    bias = layer.bias.float().reshape(-1, *[1] * (weight.ndim - 2)) if layer.bias is not None else 0
    wanted = 50 * 0.003 * (plain - bias)
    assert (found * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("how", ["no", "yes"])
def test_the_projection_of_a_text_encoder_wears_an_adapter(how, tiny_xl):
    """It lies beside `text_model`, not in it, in whichever version of transformers."""
    base = families.find(BaseOptions(str(tiny_xl)))
    model = pipelines.load_pipeline(base, torch.float32, torch.device("cpu")).text_encoder_2
    weight = model.text_projection.weight.detach().clone()
    adapter = Adapter(
        {"text_encoder_2": {"text_projection": lora(tuple(weight.shape), torch.Generator().manual_seed(0))}},
        {},
    )
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    stack = apply.Stack({"text_encoder_2": model})
    stack.add("projecting", adapter)
    with stack.activated({"projecting": 0.5}, how), torch.no_grad():
        found = model.text_projection(x)
    expect_close(
        found, x @ (weight + 0.5 * deltas.delta(adapter.components["text_encoder_2"]["text_projection"])).T
    )


def test_blocks_have_weights_of_their_own(pipeline, layers):
    """The longest part that fits holds, and nothing is multiplied twice."""
    adapter = adapter_of(layers, mixed)

    def weight(place: str) -> float:
        if place.startswith("unet.up_blocks.0.resnets."):
            return 0.0
        return 1.2 if place.startswith("unet.up_blocks.") else 0.8 if place.startswith("unet.") else 0.5

    parts = {
        "": 9.0,
        "unet": 0.8,
        "unet.up_blocks": 1.2,
        "unet.up_blocks.0.resnets": 0.0,
        "text_encoder": 0.5,
    }
    expected = outputs(by_hand(pipeline, [(adapter, weight)]))
    stack = apply.Stack(models_of(pipeline))
    stack.add("a", adapter)
    for how in ("yes", "no"):
        with stack.activated({"a": parts}, how):
            expect_close(outputs(pipeline), expected)


def test_what_is_fused_by_itself():
    plain, other = (
        Adapter({"unet": {"x": lora((4, 4), torch.Generator())}}, {}),
        Adapter({"unet": {"x": loha((4, 4), torch.Generator())}}, {}),
    )
    turned = Rotations({"unet": {}}, {"unet": ("OFT", {})}, {})
    full, half = torch.float32, torch.bfloat16
    assert [apply.is_fused([plain], how, full) for how in ("auto", "yes", "no")] == [False, True, False]
    assert [apply.is_fused([plain, other], how, full) for how in ("auto", "yes", "no")] == [True, True, False]
    assert not apply.is_fused([other], "auto", half)  # bfloat16 would round a small update away
    assert apply.is_fused([turned, plain], "auto", half)
    assert not apply.is_fused([], "yes", full)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROTATIONS)
def test_adapters_that_turn_weights_are_what_peft_makes_of_them(name, pipeline, layers, tmp_path, capfd):
    theirs = copy.deepcopy(pipeline)
    path = rotation_file(theirs, name, tmp_path / "turned.safetensors")
    expected, before = outputs(theirs), outputs(pipeline)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack = apply.Stack(models_of(pipeline))
        stack.add("turned", reading.read(path, layers))
        with stack.activated({"turned": 1.0}, "auto"):
            expect_close(outputs(pipeline), expected, 3e-6)
    assert torch.equal(outputs(pipeline), before)
    assert (expected - before).norm() > 1e-3
    assert capfd.readouterr() == ("", "")


def test_a_turned_weight_and_an_update_add_up(pipeline, layers, tmp_path):
    path = rotation_file(copy.deepcopy(pipeline), "hra", tmp_path / "turned.safetensors")
    stack = apply.Stack(models_of(pipeline))
    stack.add("turned", reading.read(path, layers))
    stack.add("dora", adapter_of(layers, dora))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipeline.unet.get_submodule(name)
    before = layer.weight.detach().clone()
    with stack.activated({"turned": 1.0}):
        turned = layer.weight.detach().clone()
    with stack.activated({"turned": 1.0, "dora": 0.5}):
        found = layer.weight.detach().clone()
    update = deltas.adapted(stack.adapters["dora"].components["unet"][name], before) - before  # type: ignore[arg-type]
    assert torch.allclose(found, turned + 0.5 * update, atol=1e-6)
    assert torch.equal(layer.weight, before)


def test_two_butterfly_factors_are_refused(layers, tmp_path):
    path = tmp_path / "boft.safetensors"
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{stem}.boft_R": torch.zeros(2, 16, 4, 4), f"{stem}.boft_s": torch.ones(64, 1)},
        path,
        {"lora_adapter_metadata": json.dumps({"unet.peft_type": "BOFT"})},
    )
    with pytest.raises(UserError, match="2 butterfly factors need peft's CUDA extension"):
        reading.read(path, layers)
