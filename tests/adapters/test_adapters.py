"""Adapters on models, their files, and plain diffusers, which loads them as they were trained."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load, load_file, save_file

from dreambooth.adapter_files import native, reading
from dreambooth.adapter_files.deltas import Lora
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.adapters import inject as adapters
from dreambooth.adapters.inject import Component
from dreambooth.bases import families
from dreambooth.io import writer
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from tests import tiny
from tests.live_adapters import INFO, TARGETS, Models, inject, load_models, packed, trained

ROOT = Path(__file__).parent.parent.parent
NAMES = tuple(TARGETS)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    return load_models(tiny_base)


@pytest.fixture
def models(loaded) -> Models:
    """Models without an adapter, for one test."""
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def layers(tiny_base) -> Layers:
    return families.find(BaseOptions(str(tiny_base))).layers()


@pytest.fixture(scope="module")
def other_base(tmp_path_factory) -> Path:
    """A base whose text is 48 wide instead of 32."""
    return tiny.build_pipeline(tmp_path_factory.mktemp("other"), text_width=48)


def outputs(models: Models, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What text encoder and UNet give for fixed inputs, the UNet's text apart from the text encoder's."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, 77), generator=draw)
    latents = torch.randn(2, 4, 8, 8, generator=draw).to(dtype)
    text = torch.randn(2, 77, models["text_encoder"].config.hidden_size, generator=draw).to(dtype)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        return {
            "unet": models["unet"](latents, torch.tensor([10, 700]), text).sample,
            "text_encoder": models["text_encoder"](tokens)[0],
        }


def written(folder: Path, components: list[Component]) -> Path:
    path = folder / native.ADAPTER_NAME
    writer.write(path, packed(components))
    return path


# --- what is put on the models


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_at_step_0_the_adapted_models_are_the_base_bit_for_bit(rank, dtype, tiny_base):
    base = load_models(tiny_base, dtype)
    before = outputs(base, dtype)
    components = inject(base, rank)
    after = outputs(base, dtype)
    for name in NAMES:
        assert torch.equal(after[name], before[name]), name
    trained(components)
    changed = outputs(base, dtype)
    for name in NAMES:
        assert not torch.equal(changed[name], before[name]), name  # the adapter is there, and it is on


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_is_drawn_with_standard_deviation_one_over_rank_and_b_is_zero(rank, models):
    for component in inject(models, rank):
        a = torch.cat([p.flatten() for name, p in component.named_parameters() if "lora_A" in name])
        b = torch.cat([p.flatten() for name, p in component.named_parameters() if "lora_B" in name])
        assert abs(a.std() * rank - 1) < 0.15
        assert abs(a.mean() * rank) < 0.15
        assert (b == 0).all()
        assert len(b) > 0


def test_every_attention_projection_gets_an_adapter_and_nothing_else_does(models):
    """Dual LoRA: 4 layers in each of 2 attentions in each transformer block, 4 in each layer of the text
    encoder."""
    modules = {
        name: {
            key
            for key, _ in model.named_modules()
            if key.endswith(TARGETS[name]) and isinstance(dict(model.named_modules())[key], torch.nn.Linear)
        }
        for name, model in models.items()
    }
    assert len(modules["text_encoder"]) == 3 * 4
    assert len(modules["unet"]) % 8 == 0
    for component in inject(models):
        keys = component.state_dict()
        expected = {
            f"{module}.{factor}.weight"
            for module in modules[component.name]
            for factor in ("lora_A", "lora_B")
        }
        assert set(keys) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_adapter_is_float32_and_the_frozen_base_keeps_its_dtype(dtype, tiny_base):
    """In bfloat16 most of Adam's steps would round to nothing."""
    for component in inject(load_models(tiny_base, dtype)):
        for name, parameter in component.model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name
            assert parameter.dtype == (torch.float32 if "lora_" in name else dtype), name


def test_only_the_adapter_is_trained(models):
    before = {
        f"{name}.{key}": p.clone() for name, model in models.items() for key, p in model.state_dict().items()
    }
    components = inject(models)
    parameters = dict(pair for component in components for pair in component.named_parameters())
    assert len(parameters) == sum(
        len(list(component.named_parameters())) for component in components
    )  # unique over components
    assert all(name.startswith(NAMES) and "lora_" in name for name in parameters)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(2):  # the first moves B alone: its product with A was zero
        text = models["text_encoder"](torch.arange(77)[None] % 50)[0]
        models["unet"](torch.ones(1, 4, 8, 8), torch.tensor([10]), text).sample.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in parameters.items():
        assert not torch.equal(p, start[name]), name
    for name, model in models.items():
        for key, p in model.state_dict().items():
            if "lora_" not in key:
                assert torch.equal(p, before[f"{name}.{key.replace('.base_layer', '')}"]), key


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(loaded):
    torch.manual_seed(3)
    first = inject(copy.deepcopy(loaded), seed=7)
    torch.manual_seed(4)
    again, other = inject(copy.deepcopy(loaded), seed=7), inject(copy.deepcopy(loaded), seed=8)
    for one, same, different in zip(first, again, other, strict=True):
        for key, tensor in one.state_dict().items():
            assert torch.equal(same.state_dict()[key], tensor)
            assert torch.equal(different.state_dict()[key], tensor) == ("lora_B" in key)


def test_injecting_leaves_torch_s_own_generator_alone(models):
    torch.manual_seed(1)
    undisturbed = torch.randn(4)
    torch.manual_seed(1)
    inject(models)
    assert torch.equal(torch.randn(4), undisturbed)


def test_dropout_works_in_training_alone(models):
    for component in trained(inject(models, dropout=0.5)):
        component.model.eval()
    first = outputs(models)
    assert all(torch.equal(outputs(models)[name], first[name]) for name in NAMES)
    models["unet"].train()
    assert not torch.equal(outputs(models)["unet"], first["unet"])


def test_the_table_of_what_is_trained_counts_modules_and_parameters(models):
    components = inject(models, rank=16)
    lines = adapters.describe(components).splitlines()
    assert [line.split()[0] for line in lines] == ["trained", *NAMES]
    for component, line in zip(components, lines[1:], strict=True):
        sizes = {key: tensor.numel() for key, tensor in component.state_dict().items()}
        frozen = sum(p.numel() for p in component.model.parameters() if not p.requires_grad)
        _, modules, parameters, share, size, unit = line.split()
        assert (modules, parameters) == (f"{len(sizes) // 2:,}", f"{sum(sizes.values()):,}")
        assert share == f"{sum(sizes.values()) / frozen:.3%}"
        assert (size, unit) == (f"{sum(sizes.values()) * 4 / 2**20:.2f}", "MiB")


# --- what the file looks like


def test_keys_are_those_that_other_programs_know(models, tmp_path):
    """`lora` in every key, and the text encoder's `text_model.` whatever transformers calls its modules."""
    tensors = load_file(written(tmp_path, inject(models)))
    assert {key.partition(".")[0] for key in tensors} == set(NAMES)
    assert all("lora" in key for key in tensors)
    assert all(
        key.startswith("text_encoder.text_model.encoder.layers.")
        for key in tensors
        if key.startswith("text_encoder")
    )
    assert not any(
        "base_model" in key or "default" in key or "text_model.text_model" in key for key in tensors
    )


def test_a_unet_alone_makes_a_file_without_text_encoder_keys(models, tmp_path):
    assert all(
        key.startswith("unet.") for key in load_file(written(tmp_path, inject({"unet": models["unet"]})))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_read_is_what_was_packed(dtype, tiny_base, layers, tmp_path):
    components = trained(inject(load_models(tiny_base, dtype), rank=8))
    adapter = reading.read(written(tmp_path, components), layers)
    assert tuple(adapter.components) == NAMES
    for component in components:
        found: dict[str, torch.Tensor] = {}
        for path, module in adapter.components[component.name].items():
            assert isinstance(module, Lora)
            found |= {f"{path}.lora_A.weight": module.down, f"{path}.lora_B.weight": module.up}
        wanted = component.state_dict()
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key], tensor)


def test_a_component_takes_what_another_gives(loaded):
    for old, new in zip(
        trained(inject(copy.deepcopy(loaded))), inject(copy.deepcopy(loaded), seed=8), strict=True
    ):
        wanted = old.state_dict()
        new.load_state_dict(wanted)
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in new.state_dict().items())


def test_metadata_has_the_stable_fields_in_sorted_order_and_no_path(models, layers, tmp_path):
    """Readers build a LoraConfig from it: an unknown field breaks old ones, and peft's own dump has the
    user's folder in it."""
    components = inject(models, rank=8, dropout=0.25)
    path = written(tmp_path, components)
    metadata = reading.read(path, layers).metadata
    assert set(metadata) == {"format", "lora_adapter_metadata", "dreambooth"}
    assert metadata["format"] == "pt"
    fields = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,  # dropout is of training
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    expected = {f"{name}.{field}": value for name in NAMES for field, value in fields.items()}
    expected |= {f"{name}.target_modules": sorted(TARGETS[name]) for name in NAMES}
    assert json.loads(metadata["lora_adapter_metadata"]) == expected
    assert json.loads(metadata["dreambooth"]) == INFO
    for name in ("lora_adapter_metadata", "dreambooth"):
        assert metadata[name] == json.dumps(json.loads(metadata[name]), sort_keys=True)
    assert str(tmp_path.parent).encode() not in path.read_bytes()
    assert os.fsencode(ROOT) not in path.read_bytes()


def test_tensors_lie_at_multiples_of_eight_after_a_sorted_header(models):
    data = packed(inject(models))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


@pytest.mark.slow
def test_the_same_adapter_gives_the_same_bytes(tiny_base, models):
    """In other processes, each with an order of its own for sets, too: tests/project/test_faults.py."""
    components = trained(inject(models))
    assert packed(components) == packed(components)
    assert packed(trained(inject(load_models(tiny_base)))) == packed(components)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_is_not_finite_is_never_packed(name, value, models):
    components = inject(models)
    (component,) = [component for component in components if component.name == name]
    component.named_parameters()[-1][1].data.view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"^{name}\..*is not finite"):
        packed(components)


# --- which files are refused


def unreadable(tmp_path: Path, models: Models, what: str) -> Path:
    """An adapter file that is damaged in one way."""
    path = written(tmp_path, trained(inject(models)))
    data = path.read_bytes()
    if what == "truncated":
        path.write_bytes(data[:-100])
    elif what == "header cut":
        path.write_bytes(data[:100])
    elif what == "longer than it says":
        path.write_bytes(data + b"x")
    elif what == "text":
        path.write_text("a photo of sks dog, a photo of sks dog")
    elif what == "a third text encoder":
        save_file({**load(data), "text_encoder_3.text_model.q_proj.lora_A.weight": torch.zeros(4, 32)}, path)
    elif what == "a base's weights":
        save_file({"unet.conv_in.weight": torch.zeros(4, 32)}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("truncated", "not a complete safetensors file (its tensors have "),
        ("header cut", "not a complete safetensors file (its header should have "),
        ("longer than it says", "bytes left over"),
        ("text", "cut off, or no safetensors file"),
        (
            "a third text encoder",
            "keys are for no layer of this base, e.g. text_encoder_3.text_model.q_proj.lora_A.weight",
        ),
        (
            "a base's weights",
            "1 of 1 keys belong to no kind of adapter that is supported, e.g. unet.conv_in.weight",
        ),
    ],
)
def test_a_file_that_is_no_whole_adapter_is_refused_by_name(what, reason, models, layers, tmp_path):
    path = unreadable(tmp_path, models, what)
    with pytest.raises(UserError) as refused:
        reading.read(path, layers)
    assert str(refused.value).startswith(f"{path}: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


# --- which adapters are refused


def dropped(state: dict[str, torch.Tensor], key: str) -> None:
    del state[key]


def added(state: dict[str, torch.Tensor], key: str) -> None:
    state[f"mid_block.{key}"] = state[key]


def widened(state: dict[str, torch.Tensor], key: str) -> None:
    state[key] = torch.zeros(state[key].shape[0] + 1, *state[key].shape[1:])


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (dropped, ["lacks 1 of", "{key}"]),
        (added, ["has 1 tensors that {name} does not have", "mid_block.{key}"]),
        (widened, ["{key} of shape (5, 32)", "needs (4, 32)"]),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_missing_foreign_or_of_another_shape_are_named(name, change, fragments, models):
    """peft would load the rest in silence. Nothing is changed where it is refused."""
    (component,) = inject({name: models[name]})
    before = {key: tensor.clone() for key, tensor in component.state_dict().items()}
    key = next(key for key, tensor in before.items() if tensor.shape == (4, 32))
    state = {key: tensor + 1 for key, tensor in before.items()}
    change(state, key)
    with pytest.raises(UserError) as refused:
        component.load_state_dict(state)
    for fragment in fragments:
        assert fragment.format(key=key, name=name) in str(refused.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in component.state_dict().items())


def test_another_rank_is_refused(loaded):
    four, eight = inject(copy.deepcopy(loaded), rank=4), inject(copy.deepcopy(loaded), rank=8)
    for component, other in zip(four, eight, strict=True):
        with pytest.raises(UserError, match=f"{component.name} needs"):
            component.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unet", "the adapter is for another base: its UNet takes text of width 32, this one's 48"),
        (
            "text_encoder",
            "has shape (32, 4); for this layer of (48, 48) it must be of shape (48, 4);"
            " the adapter is for another base, or broken",
        ),
    ],
)
def test_an_adapter_of_a_base_with_other_text_is_refused_with_both_widths(
    name, reason, models, other_base, tmp_path
):
    path = written(tmp_path, inject({name: models[name]}))
    with pytest.raises(UserError) as refused:
        reading.read(path, families.find(BaseOptions(str(other_base))).layers())
    assert str(refused.value).startswith(f"{path}: {name}.")
    assert reason in str(refused.value)


def first_a(state: State) -> str:
    return min(key for key in state if key.startswith("unet.") and "lora_A" in key)


def without_b(state: State) -> None:
    for key in [key for key in state if "lora_B" in key]:
        del state[key]


def without_one_a(state: State) -> None:
    del state[first_a(state)]


def of_two_ranks(state: State) -> None:
    rank, inputs = state[first_a(state)].shape
    state[first_a(state)] = torch.zeros(rank + 1, inputs)


def flattened(state: State) -> None:
    state[first_a(state)] = state[first_a(state)].flatten()


def of_a_missing_layer(state: State) -> None:
    state["text_encoder.text_model.encoder.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)


def of_a_norm(state: State) -> None:
    state["unet.conv_norm_out.lora_A.weight"] = torch.zeros(4, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_b, "has only down; that is not a complete LoRA, LoHa or LoKr; the adapter is incomplete"),
        (without_one_a, "has only up; that is not a complete LoRA, LoHa or LoKr; the adapter is incomplete"),
        (of_two_ranks, "4); for this layer of (64, 64) it must be of shape (64, 5)"),
        (flattened, "the adapter is for another base, or broken"),
        (
            of_a_missing_layer,
            "no layer of this base, e.g."
            " text_encoder.text_model.encoder.layers.7.self_attn.q_proj.lora_A.weight",
        ),
        (of_a_norm, "no layer of this base, e.g. unet.conv_norm_out.lora_A.weight"),
    ],
)
def test_an_adapter_with_a_part_that_has_no_place_is_refused(change, reason, models, layers, tmp_path):
    """diffusers would draw on without it, stop with a traceback, or, given A without B, multiply by memory as
    it was found."""
    path = written(tmp_path, trained(inject(models)))
    state = load(path.read_bytes())
    change(state)
    save_file(state, path)
    with pytest.raises(UserError) as refused:
        reading.read(path, layers)
    assert str(refused.value).startswith(f"{path}: ")
    assert reason in str(refused.value)


# --- plain diffusers


@pytest.mark.slow
@pytest.mark.parametrize("names", [("unet",), ("text_encoder",), NAMES], ids=" and ".join)
def test_plain_diffusers_draws_what_training_saw(names, tiny_base, models, tmp_path):
    """`StableDiffusionPipeline.load_lora_weights` gives the models that were trained."""
    base = outputs(models)
    written(tmp_path, trained(inject({name: models[name] for name in names}, rank=8)))
    wanted = outputs(models)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path))
    found = outputs({name: getattr(pipeline, name) for name in NAMES})
    for name in NAMES:
        assert (found[name] - wanted[name]).abs().max() <= 1e-5, name
        assert ((found[name] - base[name]).abs().max() > 1e-3) == (name in names), name
