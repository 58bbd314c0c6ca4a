"""infer.py with adapters of any kind, several at once, in sets, at weights, fused or not, on one process or two."""

import copy
import functools
import hashlib
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import BOFTConfig, HRAConfig, OFTConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import infer
from dreambooth.adapter_files import deltas, reading, writing
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.adapter_files.rotations import Rotations
from dreambooth.adapters import apply
from dreambooth.adapters.variants import Variant
from dreambooth.bases import families, pipelines
from dreambooth.errors import UserError
from dreambooth.files import pictures
from dreambooth.options import adapter_sets
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions
from tests.running import main_on_two_processes

ROOT = Path(__file__).parent.parent.parent
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


@pytest.fixture(scope="module")
def layers(tiny_base) -> Layers:
    return families.find(BaseOptions(str(tiny_base))).layers()


@pytest.fixture
def pipeline(loaded) -> StableDiffusionPipeline:
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def loaded(tiny_base) -> StableDiffusionPipeline:
    found = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


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


# --- words: files, weights, sets


def test_a_weight_is_split_off_unless_a_file_has_that_name(tmp_path):
    assert adapter_sets.split("out", "--adapter") == (Path("out"), 1.0)
    assert adapter_sets.split("out:0.5", "--adapter") == (Path("out"), 0.5)
    assert adapter_sets.split("out:-1e-1", "--adapter") == (Path("out"), -0.1)
    assert adapter_sets.split("a:b/c", "--adapter") == (Path("a:b/c"), 1.0)
    assert adapter_sets.split("run 12:30.safetensors:2", "--adapter") == (Path("run 12:30.safetensors"), 2.0)
    odd = tmp_path / "out:2"
    odd.mkdir()
    assert adapter_sets.split(str(odd), "--adapter") == (odd, 1.0)
    assert adapter_sets.split(f"{odd}:3", "--adapter") == (odd, 3.0)
    assert adapter_sets.split(":2", "--adapter") == (
        Path(":2"),
        1.0,
    )  # not the folder that the script is started in


def sets_of(words: list[str]) -> list[adapter_sets.AdapterSet]:
    options = parse(InferOptions, "", words)
    return adapter_sets.of(options.adapter, options.adapter_weights, options.adapters_file)


def test_factors_are_for_all_or_for_one_by_name(tmp_path):
    words = [
        "--pretrained_model_name_or_path",
        "b",
        "--prompt",
        "p",
        "--adapter",
        "runs/dog/pytorch_lora_weights.safetensors:0.5",
        "my cat.safetensors",
    ]
    words += ["--adapter_weights", "unet=0.8,text_encoder=0", "my_cat:unet=2,unet.up_blocks=3"]
    (found,) = sets_of(words)
    assert [(choice.name, choice.weight) for choice in found.adapters] == [("dog", 0.5), ("my_cat", 1.0)]
    assert found.adapters[0].weights == {"": 0.5, "unet": 0.4, "text_encoder": 0.0}
    assert found.scaled(0.5).adapters[1].weights == {
        "": 0.5,
        "unet": 1.0,
        "text_encoder": 0.0,
        "unet.up_blocks": 1.5,
    }


def test_a_key_that_is_twice_in_a_set_is_refused(tmp_path):
    path = tmp_path / "sets.yaml"
    path.write_text("dog:\n  adapters: [my_dog]\n  prompts: a dog\n  adapters: [other]\n")
    words = ["--pretrained_model_name_or_path", "b", "--prompt", "p", "--adapters_file", str(path)]
    with pytest.raises(UserError, match=r"sets\.yaml: set dog has 'adapters' twice"):
        sets_of(words)


@pytest.mark.parametrize("how", ["yes", "no"])
def test_fusing_needs_an_adapter(how, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(InferOptions, "", ["--pretrained_model_name_or_path", "b", "--prompt", "p", "--fuse", how])
    assert refused.value.code == 2
    assert "--fuse needs an --adapter" in capsys.readouterr().err


def test_sets_come_from_a_file(tmp_path):
    path = tmp_path / "sets.yaml"
    path.write_text(
        "dog: [my_dog, style.safetensors:0.6]\nplain: []\n2: {adapters: my_cat, prompts: a cat, weights: [unet=0.5]}\n"
    )
    words = ["--pretrained_model_name_or_path", "b", "--prompt", "p", "--adapters_file", str(path)]
    dog, plain, cat = sets_of(words)
    assert [(str(choice.path), choice.weight) for choice in dog.adapters] == [
        ("my_dog", 1.0),
        ("style.safetensors", 0.6),
    ]
    assert (dog.prompts, plain.adapters, cat.name, cat.prompts) == ((), (), "2", ("a cat",))
    assert cat.adapters[0].weights == {"": 1.0, "unet": 0.5}


# --- the script


@pytest.fixture(scope="module")
def files(layers, loaded, tmp_path_factory) -> Path:
    """Adapter files of several kinds and layouts."""
    folder = tmp_path_factory.mktemp("adapters")
    plain = adapter_of(layers, lora, ATTENTION)
    (folder / "lora.safetensors").write_bytes(writing.write_native(plain, {}))
    (folder / "kohya.safetensors").write_bytes(writing.write_kohya(plain, "sd1", {}))
    for kind in ("dora", "loha"):
        (folder / f"{kind}.safetensors").write_bytes(
            writing.write_native(adapter_of(layers, KINDS[kind], ATTENTION), {"clip_skip": 1})
        )
    (folder / "mixed.safetensors").write_bytes(writing.write_kohya(adapter_of(layers, mixed), "sd1", {}))
    rotation_file(copy.deepcopy(loaded), "oft", folder / "oft.safetensors")
    return folder


def words_of(base: Path, out: Path, *more: str) -> list[str]:
    words = [
        "--pretrained_model_name_or_path",
        str(base),
        "--num_inference_steps",
        "2",
        "--output_dir",
        str(out),
        *more,
    ]
    return words if "--prompt" in words else [*words, "--prompt", "a dog"]


def run(base: Path, out: Path, *more: str) -> list[dict]:
    """Draw in process; the records of the pictures."""
    infer.main(parse(InferOptions, "", words_of(base, out, *more)))
    return json.loads((out / "images.json").read_text())


def pixels(out: Path, records: list[dict]) -> list[bytes]:
    return [np.asarray(Image.open(out / record["file"])).tobytes() for record in records]


@pytest.mark.slow
def test_a_kohya_file_draws_what_the_native_file_draws(tiny_base, files, tmp_path):
    found = [
        pixels(
            tmp_path / name, run(tiny_base, tmp_path / name, "--adapter", str(files / f"{name}.safetensors"))
        )
        for name in ("lora", "kohya")
    ]
    assert found[0] == found[1]


def test_dora_on_the_text_encoder_draws_as_its_arithmetic_says(tiny_base, files, layers, loaded, tmp_path):
    """diffusers drops its magnitudes there when they have peft's own spelling."""
    path = str(files / "dora.safetensors")
    records = run(
        tiny_base, tmp_path / "ours", "--adapter", path, "--fuse", "no", "--seeds", "3", "--clip_skip", "0"
    )
    own = by_hand(loaded, [(reading.read(Path(path), layers), lambda place: 1.0)])  # type: ignore[list-item]
    expected = own(["a dog"], num_inference_steps=2, generator=[torch.Generator().manual_seed(3)]).images[0]
    found = np.asarray(Image.open(tmp_path / "ours" / records[0]["file"])).astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 1
    half = copy.deepcopy(loaded)
    half.unet = own.unet
    wrong = half(["a dog"], num_inference_steps=2, generator=[torch.Generator().manual_seed(3)]).images[0]
    assert np.abs(found - np.asarray(wrong)).max() > 1


@pytest.mark.slow
def test_a_sweep_is_a_row_of_weights_from_the_base_on(tiny_base, files, tmp_path, capsys):
    words = ["--adapter", str(files / "lora.safetensors"), f"{files / 'mixed.safetensors'}:0.5"]
    records = run(
        tiny_base, tmp_path / "sweep", *words, "--sweep", "0,0.5,1", "--compare", "--seeds", "3", "4"
    )
    said = capsys.readouterr().out
    assert [record["adapters"][0]["weight"] if record["adapters"] else None for record in records] == [
        None,
        None,
        0,
        0,
        0.5,
        0.5,
        1,
        1,
    ]
    assert [record["adapters"][1]["weight"] for record in records[2:]] == [0, 0, 0.25, 0.25, 0.5, 0.5]
    assert records[0]["adapter"] is None
    assert records[2]["adapter"] is None
    assert records[4]["adapter"] == f"{files.name}/lora.safetensors + {files.name}/mixed.safetensors"
    digest = records[4]["adapters"][0]["sha256"]
    assert digest == hashlib.sha256((files / "lora.safetensors").read_bytes()).hexdigest()[:16]
    found = pixels(tmp_path / "sweep", records)
    assert found[:2] == found[2:4]  # weight 0 is the base, bit for bit
    assert len(set(found)) == 6
    settings = json.loads(Image.open(tmp_path / "sweep" / records[4]["file"]).info["dreambooth"])
    assert settings == {key: value for key, value in records[4].items() if key != "file"}
    assert Image.open(tmp_path / "sweep" / "contact_sheet.png").width > 8 * 160
    assert all(word in said for word in ("adapter x 0.5", "dora", "lokr", "(fused)"))
    alone = run(tiny_base, tmp_path / "alone", *words, "--seeds", "3", "4")
    assert pixels(tmp_path / "alone", alone) == found[6:]


@pytest.mark.slow
def test_sets_are_swapped_without_loading_the_base_again(tiny_base, files, tmp_path, monkeypatch, capsys):
    (tmp_path / "sets.yaml").write_text(
        f"one: [{files}/lora.safetensors]\ntwo: [{files}/loha.safetensors:0.5]\nturned: [{files}/oft.safetensors]\n"
        f"again:\n  adapters: {files}/lora.safetensors\n  prompts: [a dog, a cat]\nplain: []\n"
    )
    loads = []
    load = pipelines.load_pipeline

    def counted(*args: Any) -> Any:
        loads.append(args)
        return load(*args)

    monkeypatch.setattr(pipelines, "load_pipeline", counted)
    records = run(
        tiny_base,
        tmp_path / "out",
        "--adapters_file",
        str(tmp_path / "sets.yaml"),
        "--compare",
        "--batch_size",
        "1",
    )
    said = capsys.readouterr().out
    assert len(loads) == 1
    assert [(record["set"], record["prompt"]) for record in records] == [
        *((None, prompt) for prompt in ("a dog", "a cat")),
        *((name, "a dog") for name in ("one", "two", "turned")),
        *(("again", prompt) for prompt in ("a dog", "a cat")),
        ("plain", "a dog"),
    ]
    base, _, one, two, turned, again, _, plain = pixels(tmp_path / "out", records)
    assert one == again
    assert len({one, two, turned}) == 3
    assert base == plain
    assert (records[2]["clip_skip"], records[3]["clip_skip"]) == (0, 1)
    assert "note: the sets are drawn with different clip_skip" in said


def test_parts_have_factors_on_the_command_line(tiny_base, files, tmp_path):
    path = str(files / "mixed.safetensors")
    base = run(tiny_base, tmp_path / "base")
    none = run(tiny_base, tmp_path / "none", "--adapter", path, "--adapter_weights", "unet=0,text_encoder=0")
    some = run(
        tiny_base,
        tmp_path / "some",
        "--adapter",
        path,
        "--adapter_weights",
        "unet=0,text_encoder=0",
        "mixed:unet.up_blocks=0.5",
    )
    assert pixels(tmp_path / "none", none) == pixels(tmp_path / "base", base)
    assert pixels(tmp_path / "some", some) != pixels(tmp_path / "base", base)
    assert some[0]["adapters"][0]["weights"] == {"unet": 0.0, "text_encoder": 0.0, "unet.up_blocks": 0.5}


def test_the_table_says_what_wprepared(tiny_base, files, tmp_path, capsys):
    run(
        tiny_base,
        tmp_path / "out",
        "--adapter",
        str(files / "lora.safetensors"),
        f"{files / 'dora.safetensors'}:0.5",
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["adapter", "lora", "unet", "lora", "32", "3", "1", "(fused)"] in lines
    assert ["adapter", "dora", "text_encoder", "dora", "12", "2", "0.5", "(fused)"] in lines
    assert "note: the adapters were trained with different clip_skip" in " ".join(
        " ".join(line) for line in lines
    )


@pytest.mark.slow
def test_both_text_encoders_of_xl_wear_adapters(tiny_xl, tmp_path):
    base = families.find(BaseOptions(str(tiny_xl)))
    adapter = adapter_of(base.layers(), mixed)
    assert adapter.components.keys() == {"unet", "text_encoder", "text_encoder_2"}
    path = tmp_path / "xl.safetensors"
    path.write_bytes(writing.write_kohya(adapter, "sdxl", {}, depth=1))
    plain = run(tiny_xl, tmp_path / "plain")
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        others = ",".join(f"{name}={int(name == part)}" for name in adapter.components)
        records = run(tiny_xl, tmp_path / part, "--adapter", str(path), "--adapter_weights", others)
        found[part] = pixels(tmp_path / part, records)[0]
    assert len({*found.values(), *pixels(tmp_path / "plain", plain)}) == 4

    pipeline = pipelines.load_pipeline(base, torch.float32, torch.device("cpu"))
    models = {part: getattr(pipeline, part) for part in adapter.components}
    stack = apply.Stack(models)
    stack.add("xl", reading.read(path, base.layers()))
    found_embeds, found_pooled = [], []
    for how in ("yes", "no"):
        with stack.activated({"xl": 1.0}, how), torch.no_grad():
            told = pipelines.text_of(pipeline, base)(["a dog"])
        assert told.pooled is not None
        found_embeds.append(told.embeds)
        found_pooled.append(told.pooled)
    assert torch.allclose(found_embeds[0], found_embeds[1], atol=1e-5)
    assert torch.allclose(found_pooled[0], found_pooled[1], atol=1e-5)


def test_adapters_of_two_bases_are_refused(tiny_base, tiny_xl, files, tmp_path):
    other = tmp_path / "xl.safetensors"
    adapter = adapter_of(families.find(BaseOptions(str(tiny_xl))).layers(), lora, ATTENTION)
    other.write_bytes(writing.write_native(adapter, {}))
    with pytest.raises(UserError, match=r"--adapter: .*xl\.safetensors.*base"):
        run(tiny_base, tmp_path / "out", "--adapter", str(files / "lora.safetensors"), str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_draw_the_bytes_of_one(tiny_base, files, tmp_path, capfd):
    (tmp_path / "sets.yaml").write_text(
        f"one: [{files}/lora.safetensors]\ntwo: [{files}/mixed.safetensors:0.5, {files}/loha.safetensors]\n"
    )
    words = [
        "--adapters_file",
        str(tmp_path / "sets.yaml"),
        "--compare",
        "--batch_size",
        "2",
        "--num_threads",
        "1",
        "--seeds",
        "1",
        "2",
        "3",
    ]
    words += ["--prompt", "a dog", "a cat"]
    records = run(tiny_base, tmp_path / "one", *words)
    options = parse(InferOptions, "", words_of(tiny_base, tmp_path / "two", *words))
    capfd.readouterr()
    main_on_two_processes(infer.main, options)
    assert capfd.readouterr().out.count("wrote 18 pictures") == 1
    names = [*(record["file"] for record in records), "images.json", "contact_sheet.png"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert {path.name for path in (tmp_path / "two").iterdir()} == {*names, ".lock"}


@pytest.mark.slow
def test_who_drew_the_sets_before_does_not_change_a_picture(tiny_base, files, layers, tmp_path, monkeypatch):
    """The second of two processes draws none of the first set: its layers must lie one in another as if it had."""
    wide = {kind: adapter_of(layers, KINDS[kind]) for kind in ("loha", "lokr")}
    for kind, adapter in wide.items():
        (tmp_path / f"{kind}.safetensors").write_bytes(writing.write_native(adapter, {}))
    sets = f"one: [{tmp_path}/loha.safetensors]\ntwo: [{tmp_path}/lokr.safetensors, {tmp_path}/loha.safetensors]\n"
    (tmp_path / "sets.yaml").write_text(sets)
    words = ["--adapters_file", str(tmp_path / "sets.yaml"), "--mixed_precision", "bf16"]
    (_, second) = run(tiny_base, tmp_path / "alone", *words)
    draw_all = infer.draw_all

    def as_second(options, pipeline, base, columns, loaded, _, watch):
        peers: Any = SimpleNamespace(world=2, rank=1, is_main=True)
        return draw_all(options, pipeline, base, columns, loaded, peers, watch)

    monkeypatch.setattr(infer, "draw_all", as_second)
    monkeypatch.setattr(infer, "collect", lambda *_: None)  # of pictures that the first would have drawn
    infer.main(parse(InferOptions, "", words_of(tiny_base, tmp_path / "second", *words)))
    assert [path.name for path in (tmp_path / "second").glob("*.png")] == [second["file"]]
    assert pixels(tmp_path / "second", [second]) == pixels(tmp_path / "alone", [second])


@pytest.mark.parametrize("size", [(512, 384), (321, 200), (160, 160), (100, 90), (64, 64)])
def test_the_sheet_is_that_of_the_pictures_at_full_size_and_holds_none_of_them(size, tmp_path, monkeypatch):
    options = parse(InferOptions, "", words_of(Path("b"), tmp_path, "--seeds", "1", "2"))
    noise = np.random.default_rng(0)
    records = [{"file": f"{number}.png"} for number in range(2)]
    images = [Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in records]
    for image, record in zip(images, records, strict=True):
        image.save(tmp_path / record["file"])
    wanted = pictures.contact_sheet([("a dog", images)], ["seed 1", "seed 2"])
    held: list[tuple[int, int]] = []
    contact_sheet = pictures.contact_sheet

    def watched(rows, *args):
        held.extend(image.size for _, own in rows for image in own)
        return contact_sheet(rows, *args)

    monkeypatch.setattr(pictures, "contact_sheet", watched)
    infer.collect(options, [Variant("base", None, 0, (("a dog", 1), ("a dog", 2)))], records)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "contact_sheet.png")), np.asarray(wanted))
    assert all(max(own) <= 160 for own in held)


def test_a_run_that_is_stopped_leaves_whole_pictures_and_no_list(tiny_base, tmp_path, monkeypatch):
    """Not even that of an earlier run in the same folder."""
    out = tmp_path / "out"
    run(tiny_base, out, "--seeds", "1", "2")
    draw, calls = pipelines.draw, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 15)
        return draw(*args, **kwargs)

    monkeypatch.setattr(pipelines, "draw", stopping)
    with pytest.raises(SystemExit) as stopped:
        run(tiny_base, out, "--seeds", "5", "6", "--batch_size", "1")
    assert stopped.value.code == 128 + 15
    assert {path.name for path in out.iterdir()} == {".lock", "00000_1.png", "00001_2.png", "00000_5.png"}
    Image.open(out / "00000_5.png").load()


def test_a_picture_is_written_whole_or_not_at_all(tiny_base, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run(tiny_base, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}
