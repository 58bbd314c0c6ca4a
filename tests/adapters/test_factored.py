"""LoHa and LoKr without a dense update: peft's outputs and gradients, from less; and peft itself wherever it
is not that one adapter."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import adapters as adapters_benchmark
from dreambooth.adapter_files import deltas
from dreambooth.adapters.factored import use_factored_forward

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WIDE = [
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
]

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(24, 36),
    "linear without bias": lambda: nn.Linear(48, 40, bias=False),
    "odd linear": lambda: nn.Linear(37, 20),
    "prime linear": lambda: nn.Linear(37, 41),
    "1x1": lambda: nn.Conv2d(24, 36, 1),
    "1x1, stride": lambda: nn.Conv2d(13, 30, 1, stride=2),
    "3x3, stride, padding": lambda: nn.Conv2d(24, 36, 3, stride=2, padding=1),
    "3x3, dilation": lambda: nn.Conv2d(36, 12, 3, padding=2, dilation=2),
    "odd 3x3": lambda: nn.Conv2d(15, 35, 3, padding=(1, 0)),
}
KINDS: dict[str, Any] = {
    "loha": lambda rank: LoHaConfig(r=rank, alpha=2 * rank + 1, target_modules=["layer"]),
    **{
        f"lokr {factor}{' both' * both}{' cp' * core}": lambda rank, factor=factor, both=both, core=core: (
            LoKrConfig(
                r=rank,
                alpha=2 * rank + 1,
                target_modules=["layer"],
                decompose_factor=factor,
                decompose_both=both,
                use_effective_conv2d=core,
            )
        )
        for factor in (-1, 8)
        for both in (False, True)
        for core in (False, True)
    },
}


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, config: Any, seed: int = 0) -> Any:
    """A model of one layer with the adapter on it, in training, no tensor of it zero."""
    layer.requires_grad_(False)
    torch.manual_seed(seed)
    model = inject_adapter_in_model(config, Holder(layer)).train()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def factored(model: nn.Module) -> Any:
    """A copy of the model that uses the factored forward."""
    other = copy.deepcopy(model)
    assert use_factored_forward(other)
    return other


def input_of(layer: nn.Module, channels_last: bool = False) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 5, layer.in_features)
    pixels = torch.randn(2, layer.in_channels, 7, 6)  # type: ignore[call-overload]
    return pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels


def answers(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, the gradient of the input and those of all parameters that have one, for a fixed gradient
    of the output."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype))
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {"output": output.detach(), "input": x.grad, **gradients}


def kept_by(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that autograd keeps of a forward for backward."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return kept


def assert_near(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float = 1e-5
) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert (found[name] - tensor).norm() <= relative * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_gradients_are_pefts(layer, kind):
    """For ranks that leave the factors apart and ranks that make them dense, and both orders of an image in
    memory."""
    for rank in (1, 2, 4, 100) if kind != "loha" else (1, 2, 4, 9):
        model = adapted(LAYERS[layer](), KINDS[kind](rank))
        ours = factored(model)
        for channels_last in (False, True):
            x = input_of(model.layer.get_base_layer(), channels_last)
            for network in (model, ours):
                network.zero_grad(set_to_none=True)
            assert_near(answers(ours, x), answers(model, x))


class DenseLoHa(Holder):
    """A convolution with a LoHa by dense arithmetic, for autograd to differentiate."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layer
        parts = {
            name: getattr(layer, f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
        }
        own = {
            name.replace("_", ""): tensors["default"]
            for name, tensors in parts.items()
            if "default" in tensors
        }
        base = layer.get_base_layer()
        if "t1" not in own:  # peft has none for a 1x1 convolution
            own |= {name: own[name].reshape(*own[name].shape, 1, 1) for name in ("w1b", "w2b")}
        weight = base.weight + deltas.delta(deltas.LoHa(**own)) * layer.scaling["default"]
        return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)


@pytest.mark.parametrize("layer", ["1x1", "3x3, stride, padding", "3x3, dilation", "odd 3x3"])
def test_gradients_of_a_loha_with_cores_are_the_derivatives(layer):
    """Those of dense arithmetic. peft's own are not, for w1_a and w2_a: its backward contracts them with the
    other factor's core."""
    for rank in (2, 7):
        model = adapted(
            LAYERS[layer](),
            LoHaConfig(r=rank, alpha=3.0, target_modules=["layer"], use_effective_conv2d=True),
        )
        x = input_of(model.layer.get_base_layer())
        peft, ours, exact = (
            answers(network, x)
            for network in (copy.deepcopy(model), factored(model), DenseLoHa(copy.deepcopy(model.layer)))
        )
        assert_near(ours, exact)
        wrong = [name for name in exact if (exact[name] - peft[name]).norm() > 1e-5 * exact[name].norm()]
        assert wrong == ([] if layer == "1x1" else ["layer.hada_w1_a.default", "layer.hada_w2_a.default"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_kept_for_backward_but_the_input_and_parameters(layer, kind):
    for rank in (2, 9, 100):
        model = adapted(LAYERS[layer](), KINDS[kind](rank))
        x = input_of(model.layer.get_base_layer()).requires_grad_()
        there = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
        kept = []
        for network in (model, factored(model)):
            there |= {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
            kept.append(
                [tensor for tensor in kept_by(network, x) if tensor.untyped_storage().data_ptr() not in there]
            )
        dense = model.layer.get_base_layer().weight.numel()
        assert any(tensor.numel() == dense for tensor in kept[0]), (
            "peft keeps no dense update: is this module still needed?"
        )
        assert kept[1] == []


@pytest.mark.parametrize(
    "layer", [nn.Linear(320, 320), nn.Conv2d(320, 320, 3, padding=1)], ids=["linear", "3x3"]
)
@pytest.mark.parametrize(
    ("config", "most"),
    [
        (LoHaConfig(r=4, alpha=4, target_modules=["layer"]), 0.3),
        (LoHaConfig(r=32, alpha=32, target_modules=["layer"]), 1.25),
        (LoKrConfig(r=4, alpha=4, target_modules=["layer"]), 0.15),
        (LoKrConfig(r=8, alpha=8, target_modules=["layer"], decompose_factor=8), 0.15),
        (LoKrConfig(r=1000, alpha=1000, target_modules=["layer"], decompose_factor=8), 0.5),
    ],
    ids=["loha 4", "loha 32", "lokr 4", "lokr 8 by 8", "lokr whole by 8"],
)
def test_an_update_multiplies_less_often_than_pefts(layer, config, most):
    """As a share of peft's; where no chain is shorter, its own count and the second making of the dense
    update."""
    # the counter takes the gradient of a weight of a convolution in groups for one without groups, so the
    # truth is lower
    counts = []
    for network in (
        copy.deepcopy(layer).requires_grad_(False),
        model := adapted(copy.deepcopy(layer), config),
        factored(model),
    ):
        x = torch.randn(1, 320, 12, 12) if isinstance(layer, nn.Conv2d) else torch.randn(1, 400, 320)
        with FlopCounterMode(display=False) as counter:
            network(x.requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    base, peft, ours = counts
    assert ours - base < most * (peft - base)


def unet_with(base: Path, config: Any, name: str = "default") -> Any:
    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet").requires_grad_(False)
    torch.manual_seed(1)
    unet.add_adapter(config, name)
    return unet.train()


def batch(number: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    latents = torch.randn(2, 4, 8, 8, generator=draw).contiguous(memory_format=torch.channels_last)
    return latents, torch.tensor([10, 700]), torch.randn(2, 77, 32, generator=draw)


def predict(unet: Any, number: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return unet(*batch(number)).sample


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [
        (LoHaConfig(r=2, alpha=2, target_modules=WIDE), False),
        (LoKrConfig(r=4, alpha=8, target_modules=WIDE, decompose_factor=8), True),
    ],
    ids=["loha", "lokr with gradient checkpointing"],
)
def test_three_steps_train_the_same_adapter_as_peft(tiny_base, config, checkpointing):
    trained = []
    for ours in (False, True):
        unet = unet_with(tiny_base, config).to(memory_format=torch.channels_last)
        if ours:
            assert len(use_factored_forward(unet)) == len(
                {key.rpartition(".")[0] for key in get_peft_model_state_dict(unet)}
            )
            if checkpointing:
                unet.enable_gradient_checkpointing()
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
        for step in range(3):
            F.mse_loss(unet(*batch(step)).sample, batch(step + 7)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append({key: tensor.clone() for key, tensor in get_peft_model_state_dict(unet).items()})
    start = get_peft_model_state_dict(unet_with(tiny_base, config))
    assert sum(not torch.equal(tensor, trained[0][key]) for key, tensor in start.items()) > len(start) // 2
    assert_near(trained[1], trained[0])


def test_state_dict_and_parameters_stay_pefts_and_a_second_call_changes_nothing(tiny_base):
    unet = unet_with(tiny_base, LoKrConfig(r=2, alpha=2, target_modules=ATTENTION))
    before = dict(unet.named_parameters())
    names = use_factored_forward(unet)
    methods = [unet.get_submodule(name).forward for name in names]
    assert len(names) == sum(name.endswith(tuple(ATTENTION)) for name in names) > 10
    assert use_factored_forward(unet) == names
    assert [unet.get_submodule(name).forward for name in names] == methods
    assert dict(unet.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in unet.named_parameters())


def test_another_adapters_name_changes_no_layer(tiny_base):
    unet = unet_with(tiny_base, LoHaConfig(r=2, alpha=2, target_modules=["to_q"]))
    assert use_factored_forward(unet, "other") == []


def test_a_copy_of_a_model_has_its_own_adapter():
    model = factored(adapted(nn.Linear(24, 36), KINDS["loha"](2)))
    other = copy.deepcopy(model)
    x = input_of(other.layer.get_base_layer())
    before = other(x)
    randomize(other)
    assert not torch.equal(other(x), before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["loha", "lokr -1"])
def test_training_draws_no_random_numbers(kind):
    model = adapted(nn.Linear(24, 36), KINDS[kind](2))
    x = input_of(model.layer.get_base_layer())
    for network, draws in ((model, True), (factored(model), False)):
        before = torch.get_rng_state()
        network(x)
        assert torch.equal(torch.get_rng_state(), before) != draws


@pytest.mark.parametrize("kind", ["loha", "lokr -1"])
def test_evaluation_gives_pefts_output_without_gradients(kind):
    model = adapted(nn.Conv2d(24, 36, 3, padding=1), KINDS[kind](2)).eval()
    x = input_of(model.layer.get_base_layer())
    with torch.no_grad():
        assert_near({"": factored(model)(x)}, {"": model(x)})


@pytest.mark.parametrize("dropout", ["rank_dropout", "module_dropout"])
@pytest.mark.parametrize("kind", ["loha", "lokr -1"])
def test_dropout_is_pefts(kind, dropout):
    config = KINDS[kind](2)
    setattr(config, dropout, 0.5)
    model = adapted(nn.Linear(24, 36), config)
    ours, x = factored(model), input_of(nn.Linear(24, 36))
    seen = set()
    for seed in range(6):
        results = []
        for network in (model, ours):
            torch.manual_seed(seed)
            results.append(network(x))
        assert torch.equal(*results)
        seen.add(results[0].sum().item())
    assert len(seen) > 1
    assert_near({"": ours.eval()(x)}, {"": model.eval()(x)})


@pytest.mark.slow
def test_several_adapters_on_a_layer_add_up_as_pefts_do(tiny_base):
    """Of one kind and mixed, weighted, chosen, disabled and deleted; alone again it is peft's to rounding."""
    unet = unet_with(tiny_base, LoHaConfig(r=2, alpha=2, target_modules=ATTENTION))
    unet.add_adapter(LoHaConfig(r=3, alpha=6, target_modules=["to_q"]), "second")
    unet.add_adapter(LoKrConfig(r=2, alpha=2, target_modules=["to_k", "to_q"]), "third")
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_out.0"]), "fourth"
    )
    unet.requires_grad_(True)
    for name, parameter in unet.named_parameters():
        if name.endswith((".default", ".second", ".third")):
            nn.init.normal_(parameter, std=0.3)
    ours = factored(unet)
    for names, weights in [
        (["default", "second"], [0.5, 2.0]),
        (["default", "second", "third", "fourth"], [0.3, 0.4, 0.5, -1.0]),
        (["second", "fourth"], [1.0, 1.0]),
        (["third"], [0.7]),
        (["default"], [1.0]),
        (["default"], [0.25]),
    ]:
        results = []
        for network in (unet, ours):
            network.set_adapters(names, weights)
            results.append(predict(network))
        assert_near({str(names): results[1]}, {str(names): results[0]})
        assert (results[0] - predict(unet, 1)).abs().max() > 0
    plain = [network.disable_lora() or predict(network) for network in (unet, ours)]
    assert torch.equal(*plain)
    assert not torch.equal(plain[0], results[0])
    for network in (unet, ours):
        network.enable_lora()
        network.delete_adapters(["second", "fourth"])
        network.set_adapters(["default", "third"])
    assert_near({"": predict(ours)}, {"": predict(unet)})


def test_merged_adapters_are_not_added_twice(tiny_base):
    unet = unet_with(tiny_base, LoKrConfig(r=2, alpha=2, target_modules=ATTENTION, init_weights=False))
    apart = predict(unet)
    use_factored_forward(unet)
    unet.fuse_lora()
    assert (predict(unet) - apart).norm() < 1e-5 * apart.norm()
    unet.unfuse_lora()
    assert (predict(unet) - apart).norm() < 1e-5 * apart.norm()


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_unloading_gives_the_base_back(tiny_base, kind):
    base = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").train()
    unet = unet_with(tiny_base, kind(r=2, alpha=2, target_modules=WIDE, init_weights=False))
    use_factored_forward(unet)
    assert not torch.equal(predict(unet), predict(base))
    unet.unload_lora()
    assert [(name, type(module)) for name, module in unet.named_modules()] == [
        (name, type(module)) for name, module in base.named_modules()
    ]
    assert torch.equal(predict(unet), predict(base))


@pytest.mark.parametrize("kind", ["loha", "lokr -1", "lokr 8"])
@pytest.mark.parametrize("layer", ["linear", "1x1", "3x3, stride, padding"])
def test_half_precision_is_as_near_as_pefts(layer, kind):
    """Autocast to bfloat16 over a float32 base, and a bfloat16 base with a float32 adapter, in whose
    precision the update is then computed."""
    model = adapted(LAYERS[layer](), KINDS[kind](2))
    ours, x = factored(model), input_of(model.layer.get_base_layer())
    exact = answers(copy.deepcopy(model), x)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = answers(copy.deepcopy(ours), x), answers(copy.deepcopy(model), x)
    assert found["output"].dtype == wanted["output"].dtype
    assert all(
        tensor.dtype == exact[name].dtype and tensor.isfinite().all() for name, tensor in found.items()
    )
    assert_near(found, exact, 0.02)
    for network in (model, ours):
        network.layer.get_base_layer().bfloat16()
    assert_near(answers(ours, x.bfloat16()), answers(model, x.bfloat16()), 0.01)


def test_frozen_and_partly_frozen_adapters_pass_gradients_on():
    for frozen in (("",), ("w1",), ("w2_b",)):
        model = adapted(nn.Linear(24, 36), KINDS["lokr -1"](2))
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        x = input_of(model.layer.get_base_layer())
        assert_near(answers(factored(model), x), answers(model, x))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(24, 36, 3, groups=4), nn.Conv2d(24, 36, 3, padding="same"), nn.Conv1d(24, 36, 3)]
)
def test_layers_that_it_does_not_know_stay_pefts(layer):
    model = adapted(layer, KINDS["loha"](2))
    assert use_factored_forward(model) == []


def test_the_page_on_adapters_has_the_figures_that_were_measured():
    report = json.loads(adapters_benchmark.RESULTS.read_text())
    assert adapters_benchmark.table(report) in adapters_benchmark.DOCS.read_text(encoding="utf-8")
