"""Layers computed by oneDNN: the same as torch's, to rounding, in what comes out and in every gradient."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTextModel

from dreambooth.bases import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest value


@pytest.fixture(autouse=True)
def windows_of_any_size(monkeypatch):
    """The layers here are too small to be worth it."""
    monkeypatch.setattr(onednn, "_MANY_WEIGHTS", dict.fromkeys(ROUNDING, 0))


def _unlike(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def _both(
    layer: torch.nn.Module, *inputs: torch.Tensor, autocast: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([what comes out, gradients] by oneDNN, the same by torch)."""
    results = []
    for is_fast in (True, False):
        model = copy.deepcopy(layer)
        if is_fast:
            onednn.use_onednn(model)
        own = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(*own)
        torch.manual_seed(1)
        out.backward(torch.randn_like(out))
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([out.detach(), *(x.grad for x in own), *trained])
    return results[0], results[1]


def _agree(
    layer: torch.nn.Module, *inputs: torch.Tensor, autocast: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    for found, wanted in zip(*_both(layer, *inputs, autocast=autocast), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert _unlike(found, wanted) < ROUNDING[torch.bfloat16 if autocast else dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear(dtype, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 24, bias=bias, dtype=dtype).requires_grad_(False)
    _agree(layer, torch.randn(2, 7, 40, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "side"),
    [
        (1, 1, 0, 9),
        (3, 1, 1, 9),
        (3, 2, 1, 9),
        (3, 2, 1, 8),
        (3, 2, 0, 9),
        (3, 1, 1, 40),
        (1, 2, 0, 7),
        ((3, 1), (1, 2), (1, 0), 8),
    ],
)
def test_convolution(dtype, kernel, stride, padding, side):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 12, kernel, stride, padding, dtype=dtype).requires_grad_(False)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    _agree(
        layer,
        torch.randn(2, 8, side, side + 1, dtype=dtype).contiguous(memory_format=torch.channels_last),
        dtype=dtype,
    )


def test_windows_are_for_convolutions_of_few_pixels_and_many_weights(monkeypatch):
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    layer = torch.nn.Sequential(convolution)
    onednn.use_onednn(layer)
    x, many = torch.randn(1, 8, 8, 8, requires_grad=True), torch.randn(1, 8, 32, 32, requires_grad=True)
    assert "_Windows" in layer(x).grad_fn.name()
    assert "_Windows" not in layer(many).grad_fn.name()
    monkeypatch.setattr(onednn, "_MANY_WEIGHTS", dict.fromkeys(ROUNDING, convolution.weight.numel() + 1))
    assert "_Windows" not in layer(x).grad_fn.name()


def test_lora_gives_its_own_gradients_with_and_without_autocast():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16)
    ).requires_grad_(False)
    adapted = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False), model
    )
    _agree(adapted, torch.randn(3, 5, 16))
    for parameter in adapted.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    _agree(adapted, torch.randn(3, 5, 16), autocast=True)


def test_lora_with_dropout_or_switched_off_goes_pefts_own_way():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16)).requires_grad_(False)
    model = inject_adapter_in_model(
        LoraConfig(r=4, lora_dropout=0.5, target_modules=["0"], init_lora_weights=False), model
    )
    onednn.use_onednn(model)
    x = torch.randn(64, 16)
    torch.manual_seed(0)
    one = model(x)
    torch.manual_seed(1)
    assert not torch.equal(model(x), one)
    model.eval()
    full = model(x)
    model[0].enable_adapters(False)
    assert torch.allclose(
        model(x),
        torch.nn.functional.linear(x, model[0].base_layer.weight, model[0].base_layer.bias),
        atol=1e-6,
    )
    assert not torch.allclose(model(x), full, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [onednn._MANY_TOKENS, onednn._MANY_TOKENS + 77, 1500])
def test_attention_of_many_tokens(dtype, tokens):
    torch.manual_seed(0)
    layer = (
        Attention(query_dim=32, heads=4, dim_head=32, processor=AttnProcessor2_0())
        .to(dtype)
        .requires_grad_(False)
    )
    _agree(layer, torch.randn(2, tokens, 32, dtype=dtype), dtype=dtype)


def test_attention_to_text_and_with_a_mask_are_torchs_own():
    torch.manual_seed(0)
    layer = Attention(
        query_dim=32, cross_attention_dim=16, heads=4, dim_head=8, processor=AttnProcessor2_0()
    ).requires_grad_(False)
    _agree(layer, torch.randn(1, 600, 32), torch.randn(1, 77, 16))
    masked = Attention(query_dim=32, heads=4, dim_head=8, processor=AttnProcessor2_0()).requires_grad_(False)
    fast = copy.deepcopy(masked)
    onednn.use_onednn(fast)
    x, mask = torch.randn(1, 600, 32), torch.zeros(1, 1, 600)
    mask[..., 300:] = -1e4
    assert torch.allclose(fast(x, attention_mask=mask), masked(x, attention_mask=mask), atol=1e-5)


def _unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=24,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
    )
    return unet.to(memory_format=torch.channels_last).train()


class _Whole(torch.nn.Module):
    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.unet(sample, torch.tensor([500, 10]), words).sample


def test_a_whole_unet_with_lora_and_gradient_checkpointing_too():
    model = _Whole(_unet())
    inputs = torch.randn(2, 4, 24, 24).contiguous(memory_format=torch.channels_last), torch.randn(2, 7, 32)
    found, wanted = _both(model, *inputs)
    for one, other in zip(found, wanted, strict=True):
        assert _unlike(one, other) < 2e-5  # rounding, through forty layers
    model.unet.enable_gradient_checkpointing()
    again, _ = _both(model, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_whole_unet_in_bfloat16_under_autocast_and_recomputed_there():
    model = _Whole(_unet())
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    inputs = (
        torch.randn(2, 4, 24, 24).bfloat16().contiguous(memory_format=torch.channels_last),
        torch.randn(2, 7, 32).bfloat16(),
    )
    found, wanted = _both(model, *inputs, autocast=True)
    for one, other in zip(found, wanted, strict=True):
        assert (
            torch.nn.functional.cosine_similarity(one.flatten().float(), other.flatten().float(), dim=0)
            > 0.98
        )
    model.unet.enable_gradient_checkpointing()
    again, _ = _both(model, *inputs, autocast=True)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_text_encoder(tiny_base):
    encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder").requires_grad_(False)
    ids = torch.tensor([[0, 5, 6, 7, 1]])
    plain = encoder(ids).last_hidden_state
    onednn.use_onednn(encoder)
    assert _unlike(encoder(ids).last_hidden_state, plain) < 1e-5


def test_it_is_what_a_unet_computes_with_and_nothing_that_is_saved(monkeypatch):
    unet = _unet()
    keys = list(unet.state_dict())
    product, calls = onednn.product, []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return product(*args)

    monkeypatch.setattr(onednn, "product", counted)
    onednn.use_onednn(unet)
    onednn.use_onednn(unet)
    unet(torch.randn(1, 4, 24, 24).contiguous(memory_format=torch.channels_last), 3, torch.randn(1, 7, 32))
    assert len(calls) > 50
    assert list(unet.state_dict()) == keys


def test_layers_that_are_trained_get_their_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    onednn.use_onednn(layer)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None
