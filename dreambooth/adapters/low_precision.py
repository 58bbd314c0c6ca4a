"""LoRA's weights in the precision of the step: cast from float32 all at once, not one by one in every layer.

Adapters are trained in float32, and autocast computes their products in bf16 or fp16. It casts each weight in
each forward pass, and each gradient in each backward pass, by a kernel of its own; peft casts the inputs of
the layers to float32, and autocast casts them back. Here a few kernels cast all weights, the inputs stay as
they are, and the caller casts the gradients as one tensor. The results are the same bits.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class CastWeights:
    """Low-precision copies of the weights of plain LoRA, in the place of the float32 parameters while a step
    is computed.

    A weight has a copy if autocast would cast it in every use. LoRA's A has none in a layer with dropout,
    which peft computes in A's precision. Weights of DoRA, of embeddings and of the other kinds of adapters
    have none: parts of their arithmetic are in float32.
    """

    def __init__(self, models: Iterable[nn.Module], dtype: torch.dtype, adapter_name: str = "default"):
        """`dtype` is autocast's. With float32 no weight has a copy."""
        modules = [] if dtype == torch.float32 else [m for model in models for m in model.modules()]
        self._projections = [
            projection
            for layer in modules
            if isinstance(layer, LoraLayer)
            for projection in _projections(layer, adapter_name)
        ]
        # one allocation each, as autocast makes them: kernels are chosen by the alignment of their operands
        self._parameters = [projection.weight for projection in self._projections]
        self._copies = [
            torch.empty_like(parameter, dtype=dtype, requires_grad=True) for parameter in self._parameters
        ]
        self._copy_of = dict(zip(map(id, self._parameters), self._copies, strict=True))

    def leaf(self, parameter: nn.Parameter) -> Tensor:
        """The leaf of autograd's graph that stands for `parameter` within `in_place`: its copy, or itself."""
        return self._copy_of.get(id(parameter), parameter)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the layers use copies of the parameters' present values. Forward and backward pass
        are both in the block, since gradient checkpointing computes the forward pass again in the backward
        pass."""
        with torch.no_grad():
            if self._copies:
                torch._foreach_copy_(self._copies, self._parameters)
        for projection, copy in zip(self._projections, self._copies, strict=True):
            projection._parameters["weight"] = copy  # type: ignore[assignment]  # a tensor, for this time
        try:
            yield
        finally:
            for projection, parameter in zip(self._projections, self._parameters, strict=True):
                projection._parameters["weight"] = parameter


def _projections(layer: Any, name: str) -> list[Any]:
    """The modules of a LoRA layer, A and B, whose weights autocast casts in every use."""
    if name not in layer.lora_A or name in layer.lora_variant:  # of embeddings; DoRA
        return []
    pair = [layer.lora_A[name], layer.lora_B[name]]
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        pair = pair[1:]
    return [projection for projection in pair if type(projection) in (nn.Linear, nn.Conv2d)]
