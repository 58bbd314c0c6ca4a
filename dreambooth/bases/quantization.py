"""The UNet's frozen layers in 8 bits (torchao) or 4 (bitsandbytes' nf4, arXiv 2305.14314): a fraction of the
memory, another result.

All linear layers of the attention blocks are kept so; convolutions, norms and embeddings are not, nor is what
is trained. The packages turn weights into few bits and back. Their own layers are not used: torchao's keeps a
dense copy of each weight for the backward pass, which is the memory that was saved; bitsandbytes' takes its
precision from its first input, and on some CPUs, once it has drawn a picture, it passes no gradient on. Here
a weight is dense while its product is computed, forward and again backward, and nothing dense is kept between
them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.errors import UserError, type_and_reason
from dreambooth.options.speed import SpeedOptions

# The others turn the weight itself: BOFT and HRA compute with it dense in every call and keep that, and OFT's
# pictures are drawn with it.
_ADAPTERS = ("lora", "loha", "lokr")
_BLOCK = 64  # weights that share a scale in nf4


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in few bits. `weight` is a dense copy, made at each reading: what is written into
    it is lost."""

    rows: Any
    """int8: torchao's tensor."""
    packed: Tensor
    """nf4: two weights a byte."""
    scales: Tensor

    def __init__(self, layer: nn.Linear, kind: str):
        nn.Module.__init__(self)  # nn.Linear's would draw a weight
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.weight_dtype = layer.weight.dtype
        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            # the settings of torch's compiler are everybody's
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
        """The weight that the bits stand for, [out_features, in_features]."""
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
        if torch.is_autocast_enabled(x.device.type):  # as it is done for other linear layers
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
    """Raise UserError if --quantize_base does not go with --adapter or --compile, or not on this device: a
    small layer is tried there."""
    kind = speed.quantize_base
    if kind is None:
        return
    if (
        speed.compile
    ):  # the compiler finds the same dense weight in both passes and keeps it from one to the other
        raise UserError(
            f"--quantize_base {kind}: --compile would keep every layer whole for the backward pass; leave one out"
        )
    if adapter not in _ADAPTERS:
        raise UserError(
            f"--quantize_base {kind}: --adapter {adapter} needs the weights whole; take {', '.join(_ADAPTERS)}, or leave one out"
        )
    try:
        x = torch.ones(2, _BLOCK, device=device, requires_grad=True)
        QuantizedLinear(nn.Linear(_BLOCK, _BLOCK, device=device).requires_grad_(False), kind)(
            x
        ).sum().backward()
    except Exception as error:  # whatever the package raises where it lacks something
        reason = type_and_reason(error)
        raise UserError(
            f"--quantize_base {kind} does not work on this device ({device.type}): {reason}"
        ) from None


def linear_layers(unet: nn.Module) -> list[str]:
    """Names of the linear layers of its attention blocks."""
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and ".attentions." in f".{name}"
    ]


def quantize(unet: nn.Module, kind: str, device: torch.device) -> int:
    """Put `unet` on `device` with the linear layers of its attention blocks in few bits; how many. They are
    moved one at a time, so that the device never holds the dense model."""
    names = linear_layers(unet)
    for name in names:
        layer: Any = unet.get_submodule(name)
        unet.set_submodule(name, QuantizedLinear(layer.to(device), kind))
    unet.to(device)
    return len(names)
