"""What a training step computes with in place of a model's parameters, for the same bits from fewer kernels.

Adapters are trained in float32, and autocast computes their products in bf16 or fp16. It casts each weight in
each forward pass, and each gradient in each backward pass, by a kernel of its own; peft casts the inputs of
the layers to float32, and autocast casts them back. Here a few kernels cast all weights, the inputs stay as
they are, and the caller casts the gradients as one tensor.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class StepWeights:
    """Tensors in the place of parameters while a step is computed: low-precision copies of the weights of
    plain LoRA, and float32 copies of the frozen weights of norms.

    A weight of LoRA has a copy if autocast would cast it in every use. A has none in a layer with dropout,
    which peft computes in A's precision. Weights of DoRA, of embeddings and of the other kinds of adapters
    have none: parts of their arithmetic are in float32.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        dtype: torch.dtype,
        *,
        casts_norms: bool = False,
        adapter_name: str = "default",
    ):
        """`dtype` is autocast's; with float32 there are no copies. `casts_norms` says whether autocast
        computes norms in float32, as it does on CUDA."""
        modules = [module for model in models for module in model.modules()]
        layers = [module for module in modules if isinstance(module, LoraLayer)]
        is_low = dtype != torch.float32
        projections = [p for layer in layers if is_low for p in _projections(layer, adapter_name)]
        # one allocation each, as autocast makes them: kernels are chosen by the alignment of their operands
        self._parameters = [projection.weight for projection in projections]
        self._copies = [
            torch.empty_like(parameter, dtype=dtype, requires_grad=True) for parameter in self._parameters
        ]
        self._copy_of = dict(zip(map(id, self._parameters), self._copies, strict=True))
        # (module, name of its parameter, parameter, tensor in its place)
        self._places: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = [
            (projection, "weight", projection.weight, copy)
            for projection, copy in zip(projections, self._copies, strict=True)
        ]
        if is_low and casts_norms:
            self._places += [
                (norm, name, parameter, parameter.detach().float())
                for norm in modules
                if isinstance(norm, nn.LayerNorm | nn.GroupNorm)
                for name, parameter in norm.named_parameters(recurse=False)
                if not parameter.requires_grad
            ]

    def leaf(self, parameter: nn.Parameter) -> Tensor:
        """The leaf of autograd's graph that stands for `parameter` within `in_place`: its copy, or itself."""
        return self._copy_of.get(id(parameter), parameter)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the models use copies of the parameters' present values. Forward and backward pass
        are both in the block, since gradient checkpointing computes the forward pass again in the backward
        pass."""
        with torch.no_grad():
            if self._copies:
                torch._foreach_copy_(self._copies, self._parameters)
        for module, name, _, copy in self._places:
            module._parameters[name] = copy  # type: ignore[assignment]  # a plain tensor, within the block
        try:
            yield
        finally:
            for module, name, parameter, _ in self._places:
                module._parameters[name] = parameter


def _projections(layer: Any, name: str) -> list[Any]:
    """The modules of a LoRA layer, A and B, whose weights autocast casts in every use."""
    if name not in layer.lora_A or name in layer.lora_variant:  # an embedding; DoRA
        return []
    projections = [layer.lora_A[name], layer.lora_B[name]]
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        del projections[0]  # peft computes dropout in A's precision
    return [projection for projection in projections if type(projection) in (nn.Linear, nn.Conv2d)]
