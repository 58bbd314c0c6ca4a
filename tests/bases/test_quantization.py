"""--quantize_base: the UNet's frozen layers in few bits, trained on, resumed, and drawn with."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks import kept
from dreambooth.adapter_files import native, reading
from dreambooth.adapters import apply, inject
from dreambooth.bases import quantization
from dreambooth.io.errors import UserError
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.speed import SpeedOptions
from dreambooth.training import validation
from tests.running import run_train

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
        ),
    )
    for kind, package in PACKAGES.items()
]
CPU = torch.device("cpu")
both_kinds = pytest.mark.parametrize("kind", KINDS)


def kept_for_backward(call) -> tuple[torch.Tensor, int]:
    """(what comes out; bytes of all tensors that autograd keeps)."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    return out, sum(kept.values())


def load_unet(base, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base / "unet", dtype=dtype).requires_grad_(False).eval()


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_layer_computes_with_the_weight_its_bits_stand_for(kind, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 192, dtype=dtype).requires_grad_(False)
    exact = layer.weight.clone()
    own = quantization.QuantizedLinear(layer, kind)
    assert (
        0
        < (own.weight.float() - exact.float()).abs().max()
        < {"int8": 0.01, "nf4": 0.2}[kind] * exact.abs().max()
    )
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    out, expected = own(x), torch.nn.functional.linear(same, own.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


@both_kinds
def test_nothing_dense_is_held_or_kept_for_backward(kind):
    own = quantization.QuantizedLinear(torch.nn.Linear(512, 512, bias=False).requires_grad_(False), kind)
    tensors = [*own.buffers(), *(getattr(own.rows, name) for name in ("qdata", "scale") if kind == "int8")]
    assert sum(tensor.nbytes for tensor in tensors) < {"int8": 1.1, "nf4": 0.6}[kind] * 512 * 512
    x = torch.randn(4, 512, requires_grad=True)
    assert kept_for_backward(lambda: own(x))[1] == 0


@both_kinds
def test_autocast_sets_the_precision_as_for_other_layers(kind):
    own = quantization.QuantizedLinear(
        torch.nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False), kind
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert own(torch.randn(2, 64)).dtype == torch.bfloat16


@both_kinds
@pytest.mark.parametrize("base", ["tiny_base", "tiny_xl", "tiny_if"])
def test_the_linear_layers_of_attention_blocks_are_quantized_and_no_others(kind, base, request):
    unet = load_unet(request.getfixturevalue(base))
    before = {name: type(layer) for name, layer in unet.named_modules()}
    count = quantization.quantize(unet, kind, CPU)
    changed = {name for name, layer in unet.named_modules() if type(layer) is not before[name]}
    assert len(changed) == count > 0
    assert all(before[name] is torch.nn.Linear and ".attentions." in name for name in changed)
    targeted = inject.layers_at(inject.UNET_TARGETS, inject.shapes_of(unet))
    assert changed >= {name for name in targeted if before[name] is torch.nn.Linear}


@pytest.mark.trains
@both_kinds
@pytest.mark.parametrize(
    "words",
    ["--adapter lora", "--adapter lora --use_dora --mixed_precision bf16", "--adapter lokr"],
    ids=["lora", "dora in bf16", "lokr"],
)
def test_a_resumed_quantized_run_equals_an_unbroken_one(
    kind, words, tiny_base, photos_dir, tmp_path, monkeypatch
):
    """The unbroken one draws pictures on its way, and with the finished file."""
    monkeypatch.setattr(validation, "_INFERENCE_STEPS", 2)
    words = [
        *words.split(),
        "--quantize_base",
        kind,
        "--checkpointing_steps",
        "2",
        "--rank",
        "2",
        "--learning_rate",
        "1e-2",
    ]
    pictures = [
        "--validation_prompt",
        "a photo of sks dog",
        "--num_validation_images",
        "1",
        "--validation_steps",
        "1",
    ]
    whole = run_train(tiny_base, photos_dir, tmp_path / "whole", *words, *pictures, "--max_train_steps", "3")
    assert {path.name for path in (tmp_path / "whole" / "validation").iterdir()} == {
        *(f"step-00000{step}-00.png" for step in (0, 1, 2)),
        *("image_0.png", "weight-0.50.png", "weight-0.75.png", "weight-1.25.png"),
    }
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "checkpoint-2")
    again = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]
    resumed = run_train(tiny_base, photos_dir, tmp_path / "resumed", *words, *again, "--max_train_steps", "3")
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.trains
@both_kinds
def test_the_adapter_has_the_names_and_shapes_of_any_other_and_other_numbers(
    kind, tiny_base, photos_dir, tmp_path
):
    dense = load_file(run_train(tiny_base, photos_dir, tmp_path / "dense", "--max_train_steps", "2"))
    quantized = load_file(
        run_train(tiny_base, photos_dir, tmp_path / kind, "--max_train_steps", "2", "--quantize_base", kind)
    )
    assert {name: tensor.shape for name, tensor in dense.items()} == {
        name: tensor.shape for name, tensor in quantized.items()
    }
    assert any(not torch.equal(tensor, quantized[name]) for name, tensor in dense.items())


@pytest.mark.slow
@both_kinds
@pytest.mark.parametrize(
    "adapter",
    [AdapterOptions(rank=2), AdapterOptions(rank=2, use_dora=True), AdapterOptions(rank=2, adapter="loha")],
    ids=["lora", "dora", "loha"],
)
def test_a_saved_adapter_on_a_quantized_unet_computes_what_it_did_in_training(
    kind, adapter, tiny_base, tmp_path
):
    """What the pictures at the end of a run are drawn with."""
    trained, drawn = (load_unet(tiny_base) for _ in range(2))
    for unet in (trained, drawn):
        quantization.quantize(unet, kind, CPU)
    component = inject.inject("unet", trained, adapter, inject.unet_targets(adapter), seed=0)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in component.named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(native.pack({"unet": component.state_dict()}, {"unet": inject.metadata(component)}, {}))
    question = torch.randn(1, 4, 8, 8, generator=generator), 5, torch.randn(1, 7, 32, generator=generator)
    models = {"unet": drawn}
    stack = apply.Stack(models)
    stack.add("saved", reading.read(path, apply.layers_of(models)))
    with torch.no_grad():
        base, expected = drawn(*question).sample, trained(*question).sample
        with stack.activated({"saved": 1.0}, "no"):
            torch.testing.assert_close(drawn(*question).sample, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3


@both_kinds
@pytest.mark.parametrize("adapter", ["oft", "boft", "hra"])
def test_adapters_that_need_whole_weights_are_refused_before_a_model_is_loaded(
    kind, adapter, tiny_base, photos_dir, tmp_path, no_models
):
    with pytest.raises(UserError, match=f"--quantize_base {kind}: --adapter {adapter} needs dense weights"):
        run_train(
            tiny_base,
            photos_dir,
            tmp_path,
            "--quantize_base",
            kind,
            "--adapter",
            adapter,
            "--max_train_steps",
            "1",
        )


@both_kinds
def test_a_compiled_quantized_run_is_refused_before_a_model_is_loaded(
    kind, tiny_base, photos_dir, tmp_path, no_models
):
    with pytest.raises(UserError, match=f"--quantize_base {kind}: --compile would keep every layer dense"):
        run_train(
            tiny_base, photos_dir, tmp_path, "--quantize_base", kind, "--compile", "--max_train_steps", "1"
        )


@both_kinds
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device works here")
def test_a_device_on_which_the_package_fails_is_refused_with_its_reason(kind):
    with pytest.raises(
        UserError,
        match=rf"--quantize_base {kind} does not work on this device \(cuda\): \w+Error: ",
    ):
        quantization.check(SpeedOptions(quantize_base=kind), "lora", torch.device("cuda"))


def test_the_page_has_the_sizes_that_were_counted():
    """The weights are counted again; what is kept for the backward pass takes minutes."""
    counted = json.loads(kept.RESULTS.read_text())
    assert {base: kept.weights(base) for base in kept.BASES} == {
        base: sizes["weights_gib"] for base, sizes in counted.items()
    }
    rows = [[f"{size:.1f}" for size in sizes["weights_gib"].values()] for sizes in counted.values()]
    page = (ROOT / "docs" / "memory.md").read_text()
    assert f"`nf4` | {' | '.join(', '.join(row) for row in rows)} |" in page
    for what, name in (
        ("rank 8, bf16", "kept_gib"),
        ("`--gradient_checkpointing`", "kept_with_checkpointing_gib"),
    ):
        assert f"{what} | {' | '.join(f'{sizes[name]:.1f}' for sizes in counted.values())} |" in page
