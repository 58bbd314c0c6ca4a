"""The UNet's frozen layers in 8 bits (torchao) or 4 bits (bitsandbytes' nf4, QLoRA, arXiv 2305.14314), to
save memory.

All linear layers of the attention blocks are quantized; convolutions, norms, embeddings and trained layers
are not. The packages only convert weights. Their own linear layers are not used: torchao's keeps a dense copy
of the weight for the backward pass, which undoes the saving; bitsandbytes' takes its precision from its first
input, and on some CPUs passes no gradients after it has drawn a picture. The layer here makes the dense
weight for each product, in the forward and again in the backward pass, and keeps nothing dense in between.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.io.errors import UserError, type_and_reason
from dreambooth.options.speed import SpeedOptions

# The other kinds rotate the weight itself and need it dense: BOFT and HRA in every call, OFT to draw
# pictures.
_ADAPTERS = ("lora", "loha", "lokr")
_BLOCK = 64  # weights that share a scale in nf4


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a quantized weight. Reading `weight` makes a dense copy: writing to it has
    no effect."""

    rows: Any
    """int8: torchao's quantized tensor."""
    packed: Tensor
    """nf4: two weights per byte."""
    scales: Tensor

    def __init__(self, layer: nn.Linear, kind: str):
        nn.Module.__init__(self)  # nn.Linear's __init__ would make a weight
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.weight_dtype = layer.weight.dtype
        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            # not the global settings of torch's compiler
            quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
            self.rows = layer.weight
        else:
            import bitsandbytes.functional

            packed, state = bitsandbytes.functional.quantize_4bit(
                layer.weight.data, quant_type="nf4", blocksize=_BLOCK, compress_statistics=False
            )
            self.register_buffer("packed", packed)
            self.register_buffer("scales", state.absmax)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, [out_features, in_features]."""
        if hasattr(self, "rows"):
            return self.rows.dequantize(dtype)
        from bitsandbytes import functional

        shape = torch.Size((self.out_features, self.in_features))
        state = functional.QuantState(
            absmax=self.scales, shape=shape, blocksize=_BLOCK, quant_type="nf4", dtype=dtype
        )
        return functional.dequantize_4bit(self.packed, state)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dense(self.weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # as autocast does for nn.Linear
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dense(grads[0].dtype), None


def check(speed: SpeedOptions, adapter: str, device: torch.device) -> None:
    """Raise UserError if --quantize_base does not work with --adapter, with --compile or on this device.

    A small layer is run on the device to find out.
    """
    kind = speed.quantize_base
    if kind is None:
        return
    flag = f"--quantize_base {kind}"
    if speed.compile:
        # The compiler sees the same dense weight in both passes and keeps it from one to the other.
        raise UserError(
            f"{flag}: --compile would keep every layer dense for the backward pass; leave one out"
        )
    if adapter not in _ADAPTERS:
        kinds = ", ".join(_ADAPTERS)
        raise UserError(f"{flag}: --adapter {adapter} needs dense weights; take {kinds}, or leave one out")
    try:
        layer = nn.Linear(_BLOCK, _BLOCK, device=device).requires_grad_(False)
        x = torch.ones(2, _BLOCK, device=device, requires_grad=True)
        QuantizedLinear(layer, kind)(x).sum().backward()
    except Exception as error:  # the packages raise anything where they lack something
        reason = type_and_reason(error)
        raise UserError(f"{flag} does not work on this device ({device.type}): {reason}") from None


def linear_layers(unet: nn.Module) -> list[str]:
    """Names of the linear layers in the attention blocks."""
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and ".attentions." in f".{name}"
    ]


def quantize(unet: nn.Module, kind: str, device: torch.device) -> int:
    """Move `unet` to `device` and quantize the linear layers of its attention blocks. Returns how many.

    They are moved one at a time, so that the device never holds the dense model.
    """
    names = linear_layers(unet)
    for name in names:
        layer: Any = unet.get_submodule(name)
        unet.set_submodule(name, QuantizedLinear(layer.to(device), kind))
    unet.to(device)
    return len(names)
