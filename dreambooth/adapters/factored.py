"""LoHa and LoKr in training without the dense update: the same outputs as peft's, with less time and memory.

In every forward peft builds the update of a LoHa or LoKr layer as a matrix of the layer's size, [out, in(,
kh, kw)], applies it in parallel to the layer, and keeps it for backward. By these identities each kind is a
chain of small layers instead:

    LoHa   ((w1a @ w1b) * (w2a @ w2b)) x = B (A x)
           A [r * r, in] and B [out, r * r] are Khatri-Rao products of the halves
    LoKr   kron(w1, w2) x: w2 on each of the in1 groups of in2 channels, then w1 across the groups;
           if w2 = w2a @ w2b: w2b, then w1, then w2a

Each layer of a chain is called a link. A convolution's kernel, stride, padding and dilation belong to the
link with the input channels; the other links are 1x1. Only the layer's input and the adapter's tensors are
kept for backward, which recomputes everything between the links.

A chain is used where it needs less than SAVING times the multiplications of the dense update. Otherwise (LoHa
of a large rank on a narrow layer, LoKr on a prime width) the update is dense as in peft, but backward builds
it again instead of keeping it; that takes up to an eighth longer.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from torch import Tensor

from dreambooth.adapter_files.deltas import columns_and_rows, khatri_rao

# Measured forward and backward, Linear of 192 to 1280 and 3x3 of 128 and 320, ranks 2 to 20: chain and dense
# update take the same time where the chain needs 0.75 to 1 times the multiplications. Its products are small
# and many, which costs time.
SAVING = 0.75

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding and dilation


class _FactoredLayer:
    """The forward of peft's LoHa and LoKr layers if `factored_adapter` is the only active adapter. The
    classes in `_CLASSES` inherit from this class first, then from peft's."""

    factored_adapter: str

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.factored_adapter
        # the model may have active adapters that are not on this layer
        active = [adapter for adapter in self.active_adapters if adapter in self.scaling]
        is_alone = active == [name] and not self.disable_adapters and not self.merged
        drops = self.training and (self.rank_dropout[name] or self.module_dropout[name])
        if not is_alone or not self.cast_input_dtype_enabled or drops:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = self.base_layer(x, *args, **kwargs)
        chain = _loha_chain(self, name, x) if isinstance(self, loha.LoHaLayer) else _lokr_chain(self, name)
        return (result + _ChainUpdate.apply(chain, x, *chain.factors)).to(x.dtype)


# peft's class -> its subclass with the forward above
_CLASSES: dict[type, type] = {
    cls: type(f"Factored{cls.__name__}", (_FactoredLayer, cls), {"__module__": __name__})
    for cls in (loha.Linear, loha.Conv2d, lokr.Linear, lokr.Conv2d)
}


def use_factored_forward(model: torch.nn.Module, adapter_name: str = "default") -> list[str]:
    """Make the LoHa and LoKr layers of `model` compute this adapter's update without a dense matrix. Returns
    the names of these layers.

    Outputs and gradients are peft's except for rounding. Parameters stay peft's, so files, merging, deleting
    and unloading work as before. A second call changes nothing. A layer still uses peft's forward if other
    adapters are active on it, if adapters are merged or disabled, and in training with a rank_dropout or
    module_dropout other than 0.

    There are two differences from peft. First, in training peft draws a random number for each layer and
    forward, even with a module_dropout of 0, and leaves the adapter out if the number is exactly 0. No number
    is drawn here, so later draws from the same seed differ. Second, the gradients of w1_a and w2_a of a LoHa
    with cores (use_effective_conv2d) are the exact derivatives; peft 0.21.2 computes them with the other
    factor's core.

    Not changed are convolutions with groups or with padding given as a word ("same"), Conv1d, and other
    subclasses of peft's layers.
    """
    names = []
    for name, layer in model.named_modules():
        is_peft = type(layer) in _CLASSES or isinstance(layer, _FactoredLayer)
        if not is_peft or adapter_name not in layer.scaling:  # type: ignore[operator]
            continue
        base: Any = layer.get_base_layer()  # type: ignore[operator]
        if isinstance(base, torch.nn.Conv2d) and (base.groups != 1 or isinstance(base.padding, str)):
            continue
        # the class is replaced, not the instance's method: a bound method on its instance is a reference
        # cycle, which only the garbage collector frees
        layer.__class__ = _CLASSES.get(type(layer), type(layer))
        layer.factored_adapter = adapter_name  # type: ignore[assignment]
        names.append(name)
    return names


@dataclasses.dataclass(frozen=True)
class _Link:
    """One layer of a chain. Its input channels are [groups, from, inner] and its output channels [groups, to,
    inner]. The same weight is used for every group and every inner channel.

    With a `geometry` the link is a convolution with weight [to, from, kh, kw] and inner 1. Without one it
    works on each token or pixel separately, with weight [to, from].
    """

    groups: int = 1
    inner: int = 1
    geometry: Geometry | None = None


@dataclasses.dataclass(frozen=True)
class _Chain:
    """An update: the links in order, the adapter's tensors (`factors`), and the function that makes the
    links' weights from them."""

    links: list[_Link]
    factors: list[Tensor]
    weights: Callable[..., list[Tensor]]
    is_image: bool  # the input is [batch, channels, height, width], not [..., channels]


def _loha_chain(layer: Any, name: str, x: Tensor) -> _Chain:
    """The chain of a LoHa layer for this input: two links, or the dense update if that is cheaper."""
    factors = [getattr(layer, f"hada_{part}")[name] for part in ("w1_a", "w1_b", "w2_a", "w2_b")]
    if name in layer.hada_t1:
        factors += [layer.hada_t1[name], layer.hada_t2[name]]
    scale = layer.scaling[name]
    base = layer.get_base_layer()
    shape, geometry = base.weight.shape, _geometry(base)

    def in_two(*factors: Tensor) -> list[Tensor]:
        up, down = khatri_rao(*factors)
        return [_kernel(down.reshape(-1, *shape[1:]), geometry), up * scale]

    def dense(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, *cores: Tensor) -> list[Tensor]:
        columns1, rows1 = columns_and_rows(w1a, w1b, *cores[:1])
        columns2, rows2 = columns_and_rows(w2a, w2b, *cores[1:])
        product = ((columns1 * scale) @ rows1.flatten(1)) * (columns2 @ rows2.flatten(1))
        return [_kernel(product.reshape(shape), geometry)]

    rank = factors[1].shape[0]  # w1b is [rank, in], with a core or without
    outputs, inputs = shape[0], math.prod(shape[1:])
    tokens = x.numel() // shape[1]
    # the dense update is built from two products of this rank, at the cost of 2 * rank further tokens
    if rank**2 * (inputs + outputs) * tokens < SAVING * outputs * inputs * (tokens + 2 * rank):
        return _Chain([_Link(geometry=geometry), _Link()], factors, in_two, len(shape) == 4)
    return _Chain([_Link(geometry=geometry)], factors, dense, len(shape) == 4)


def _lokr_chain(layer: Any, name: str) -> _Chain:
    """The chain of a LoKr layer: of several forms the one with the fewest multiplications."""
    # the adapter's tensors and the sizes of w1 [out1, in1] and w2 [out2, in2(, kh, kw)]
    first_parts = ("lokr_w1", "lokr_w1_a", "lokr_w1_b")
    second_parts = ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    first = [getattr(layer, part)[name] for part in first_parts if name in getattr(layer, part)]
    second = [getattr(layer, part)[name] for part in second_parts if name in getattr(layer, part)]
    scale, base = layer.scaling[name], layer.get_base_layer()
    shape, geometry = base.weight.shape, _geometry(base)
    out1, in1 = first[0].shape[0], first[-1].shape[1]
    out2, in2 = shape[0] // out1, shape[1] // in1

    # `in_...` and `dense` make the weights of one candidate's links from the adapter's tensors

    def split(factors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(w1, dense, times the scale; the tensors of w2)."""
        mixing = factors[0] if len(first) == 1 else factors[0] @ factors[1]
        return mixing * scale, factors[len(first) :]

    def in_three(*factors: Tensor) -> list[Tensor]:
        mixing, second_factors = split(factors)
        columns, rows = columns_and_rows(*second_factors)
        return [_kernel(rows.reshape(-1, in2, *shape[2:]), geometry), mixing, columns]

    def dense_second(second_factors: tuple[Tensor, ...]) -> Tensor:
        """w2, [out2, in2(, kh, kw)]."""
        if len(second_factors) == 1:
            return second_factors[0]
        columns, rows = columns_and_rows(*second_factors)
        return (columns @ rows.flatten(1)).reshape(out2, in2, *shape[2:])

    def in_two(*factors: Tensor) -> list[Tensor]:
        mixing, second_factors = split(factors)
        return [_kernel(dense_second(second_factors), geometry), mixing]

    def in_two_mixed_first(*factors: Tensor) -> list[Tensor]:
        return in_two(*factors)[::-1]

    def dense(*factors: Tensor) -> list[Tensor]:
        mixing, second_factors = split(factors)
        mixing = mixing.reshape(out1, in1, *[1] * (len(shape) - 2))
        return [_kernel(torch.kron(mixing, dense_second(second_factors).contiguous()), geometry)]

    size = math.prod(shape[2:])  # of the kernel
    conv = _Link(geometry=geometry)
    grouped_conv = _Link(groups=in1, geometry=geometry)
    mixed_conv = _Link(groups=out1, geometry=geometry)
    # (multiplications for each token, links, weights)
    candidates: list[tuple[float, list[_Link], Callable[..., list[Tensor]]]] = [
        (SAVING * math.prod(shape), [conv], dense),
        (shape[1] * size * out2 + in1 * shape[0], [grouped_conv, _Link(inner=out2)], in_two),
        (out1 * shape[1] + in2 * size * shape[0], [_Link(inner=in2), mixed_conv], in_two_mixed_first),
    ]
    if len(second) > 1:
        rank = second[1].shape[0]  # w2b is [rank, in2(* kh * kw)], with a core or without
        links = [grouped_conv, _Link(inner=rank), _Link(groups=out1)]
        multiplications = shape[1] * size * rank + out1 * in1 * rank + rank * shape[0]
        candidates.append((multiplications, links, in_three))
    _, links, weights = min(candidates, key=lambda candidate: candidate[0])
    return _Chain(links, first + second, weights, len(shape) == 4)


def _geometry(base: Any) -> Geometry | None:
    """Stride, padding and dilation of a convolution; None for a layer that works on each token or pixel
    separately."""
    if not isinstance(base, torch.nn.Conv2d):
        return None
    if base.kernel_size == (1, 1) and base.stride == (1, 1) and base.padding == (0, 0):
        return None
    return base.stride, base.padding, base.dilation  # type: ignore[return-value]


def _kernel(weight: Tensor, geometry: Geometry | None) -> Tensor:
    """The weight of a link: [to, from, kh, kw] with a geometry, else [to, from]."""
    return weight if geometry is not None else weight.flatten(1)


class _ChainUpdate(torch.autograd.Function):
    """The chain's output for x. For backward it keeps x and the adapter's tensors, which are in memory
    anyway."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, x: Tensor, *factors: Tensor) -> Tensor:
        # as in peft, the input and the product of the factors get autocast's dtype, or without autocast the
        # adapter's
        device = x.device.type
        ctx.autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if ctx.autocasts else factors[0].dtype
        ctx.chain = chain
        ctx.save_for_backward(x, *factors)
        with torch.autocast(device, enabled=False) if ctx.autocasts else contextlib.nullcontext():
            hidden = x.to(ctx.dtype)
            for link, weight in zip(chain.links, chain.weights(*factors), strict=True):
                hidden = _through(link, weight.to(ctx.dtype), hidden, chain.is_image)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        chain: _Chain = ctx.chain
        _, x_needed, *needed = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False) if ctx.autocasts else contextlib.nullcontext():
            # forward again: the weights of the links, with a graph to the factors, and the input of each link
            with torch.enable_grad():
                leaves = [
                    factor.detach().requires_grad_(need) for factor, need in zip(factors, needed, strict=True)
                ]
                weights = [weight.to(ctx.dtype) for weight in chain.weights(*leaves)]
            values = [weight.detach() for weight in weights]
            inputs = [x.to(ctx.dtype)]
            for link, value in zip(chain.links[:-1], values, strict=False):
                inputs.append(_through(link, value, inputs[-1], chain.is_image))
            # backward through the links, last to first
            trained: list[Tensor] = []
            weight_gradients: list[Tensor] = []
            for index, link in reversed(list(enumerate(chain.links))):
                wanted = (x_needed or index > 0, weights[index].requires_grad)
                x_grad, weight_grad = _back(
                    link, values[index], inputs.pop(), gradient, chain.is_image, wanted
                )
                if weight_grad is not None:
                    trained.append(weights[index])
                    weight_gradients.append(weight_grad)
                gradient = x_grad  # type: ignore[assignment]  # None only where it is not needed
            # gradients of the factors from those of the links' weights
            wanted_leaves = [leaf for leaf in leaves if leaf.requires_grad]
            factor_gradients = iter(
                torch.autograd.grad(trained, wanted_leaves, weight_gradients) if wanted_leaves else ()
            )
        return (
            None,
            gradient.to(x.dtype) if x_needed else None,
            *(next(factor_gradients) if need else None for need in needed),
        )


def _through(link: _Link, weight: Tensor, x: Tensor, is_image: bool) -> Tensor:
    """The link's output for x."""
    if link.geometry is not None:
        stride, padding, dilation = link.geometry
        return F.conv2d(x, weight.repeat(link.groups, 1, 1, 1), None, stride, padding, dilation, link.groups)
    if is_image and _pixels_first(x):
        return _through(link, weight, x.permute(0, 2, 3, 1), False).permute(0, 3, 1, 2)
    rows = _rows(link, weight.shape[1], x, is_image)
    if rows.shape[2] == 1:
        output = F.linear(rows.squeeze(2), weight)
    else:
        output = torch.bmm(weight.expand(rows.shape[0], -1, -1), rows)
    channels = link.groups * weight.shape[0] * link.inner
    shape = (x.shape[0], channels, *x.shape[2:]) if is_image else (*x.shape[:-1], channels)
    return output.reshape(shape)


def _back(
    link: _Link, weight: Tensor, x: Tensor, gradient: Tensor, is_image: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the link's input, gradient of its weight), from `gradient`, that of its output. `wanted`
    says which of the two are needed; the other is None."""
    if link.geometry is not None:
        stride, padding, dilation = link.geometry
        kernels = weight.repeat(link.groups, 1, 1, 1)
        x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            *(gradient, x, kernels, None, stride, padding, dilation),
            *(False, (0, 0), link.groups, (*wanted, False)),  # not transposed, no output padding, no bias
        )
        return x_grad, weight_grad.reshape(link.groups, *weight.shape).sum(0) if wanted[1] else None
    if is_image and _pixels_first(x):
        x, gradient = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
        x_grad, weight_grad = _back(link, weight, x, gradient, False, wanted)
        return x_grad.permute(0, 3, 1, 2) if x_grad is not None else None, weight_grad
    inputs = _rows(link, weight.shape[1], x, is_image)  # [rows, from, inner]
    outputs = _rows(link, weight.shape[0], gradient, is_image)  # gradients, [rows, to, inner]
    x_grad = weight_grad = None
    if inputs.shape[2] == 1:
        inputs, outputs = inputs.squeeze(2), outputs.squeeze(2)
        if wanted[0]:
            x_grad = (outputs @ weight).reshape(x.shape)
        if wanted[1]:
            weight_grad = outputs.T @ inputs
        return x_grad, weight_grad
    if wanted[0]:
        x_grad = torch.bmm(weight.T.expand(outputs.shape[0], -1, -1), outputs).reshape(x.shape)
    if wanted[1]:
        _, to, inner = outputs.shape
        if to * weight.shape[1] <= inner * (to + weight.shape[1]):
            weight_grad = torch.bmm(outputs, inputs.mT).sum(0)
        else:  # a weight gradient for each row would be larger than the rows
            weight_grad = outputs.transpose(0, 1).flatten(1) @ inputs.transpose(0, 1).flatten(1).T
    return x_grad, weight_grad


def _pixels_first(x: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory (channels_last)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _rows(link: _Link, channels: int, x: Tensor, is_image: bool) -> Tensor:
    """x as [rows, channels, inner]. Each group of a token or an image is a row; the pixels of an image count
    as inner channels."""
    if is_image:
        return x.reshape(x.shape[0] * link.groups, channels, -1)
    return x.reshape(-1, channels, link.inner)
