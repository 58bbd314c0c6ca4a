"""Frozen layers on a CPU, by oneDNN: what torch computes, to rounding, in the products that it is slow at.

torch gives float32 products to MKL, which on processors other than Intel's takes instructions of half the width; oneDNN does not. And it
reorders a convolution's weights at every call, which for the deepest layers of a UNet, many channels on few pixels, takes as long as the
convolution. Weights that are never trained need no gradient and no copy: these forwards are oneDNN's product on the weights as they lie, and
the backward passes are the same product with the weights turned.

    Linear, and Conv2d of 1 x 1     one product
    Conv2d on few pixels            the windows of all pixels side by side, then one product
    attention of many tokens        scores of a block of queries at a time, made again in backward: nothing of the size of the scores is kept
    LoRA                            base layer and update as one node; only the input and A x are kept

How many times as fast each is depends on the processor: `python -m benchmarks.layers` measures it, docs/speed.md has what was measured.
"""

import functools
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

# Changes whenever a layer's last bits do: what was computed with another is not quite the same.
ARITHMETIC = 2
# Pixels of the output, of all pictures together, up to which the product of windows beats the convolution: its cost is the copy of the windows,
# that of the convolution the reordering of the weights.
_FEW_PIXELS = 512
# Weights from which it does: below, what it takes to call so many operations outweighs that.
_MANY_WEIGHTS = {torch.float32: 2**20, torch.bfloat16: 2**23}
# Scores of one block: 4 MiB in float32. Fewer make products that are too flat, more do not fit into two cores' own caches.
_BLOCK = 2**20
# Queries and keys from which the blocks beat torch's attention.
_MANY_TOKENS = 512


def use_onednn(model: nn.Module) -> None:
    """Have the frozen layers of `model`, which is on a CPU, and its plain LoRA and attention compute by oneDNN. A second call changes nothing;
    layers of other kinds stay as they are. What is trained, saved, merged and unloaded stays as it was."""
    if not torch.backends.mkldnn.is_available():
        return
    lora = sys.modules.get(
        "peft.tuners.lora.layer"
    )  # where nobody has imported it no layer is one of its own
    for layer in model.modules():
        # another class, not another method: a layer that holds its own method is freed only when the garbage collector comes by
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
        elif (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            layer.__class__ = Conv2d
        elif lora is not None and type(layer) is lora.Linear:
            layer.__class__ = _lora_linear()
        elif isinstance(layer, Attention) and type(layer.processor) is AttnProcessor2_0:
            layer.processor = _Attend()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], transposed, plus bias. The weight may lie in memory either way round."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fits(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # what torch.compile makes has kernels of its own
        return False
    is_plain = (
        type(weight) in (torch.nn.Parameter, Tensor) and not weight.requires_grad
    )  # quantised ones are of types of their own
    return (
        is_plain and x.device.type == "cpu" and _knows(x.dtype) and weight.dtype == x.dtype and x.numel() > 0
    )


@functools.cache
def _knows(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in it on this processor: in bfloat16 not on all."""
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _autocast(x: Tensor) -> Tensor:
    """The input in the dtype that autocast, if it is on, has layers compute in."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return product(grads[0], ctx.weight.t()), None, None


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        if not _fits(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias)


# ---- convolutions


class _Windows(torch.autograd.Function):
    """A convolution as one product. The weight, [out, in, kh, kw] in channels_last, is [out, kh * kw * in] as it lies."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.weight, ctx.stride, ctx.padding, ctx.size = weight, stride, padding, x.shape
        kernel = weight.shape[2:]
        pixels = F.pad(
            x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])
        )  # [B, H, W, in]
        windows = pixels.unfold(1, kernel[0], stride[0]).unfold(
            2, kernel[1], stride[1]
        )  # [B, oh, ow, in, kh, kw]
        batch, height, width = windows.shape[:3]
        rows = windows.permute(0, 1, 2, 4, 5, 3).reshape(batch * height * width, -1)
        return product(rows, _rows(weight), bias).view(batch, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch, channels, height, width = ctx.size
        (top, left), (down, across) = ctx.padding, ctx.stride
        kernel = ctx.weight.shape[2:]
        grad = grads[0].permute(0, 2, 3, 1)  # [B, oh, ow, out]
        oh, ow = grad.shape[1:3]
        windows = product(grad.reshape(batch * oh * ow, -1), _rows(ctx.weight).t()).view(
            batch, oh, ow, *kernel, channels
        )
        found = windows.new_zeros(batch, height + 2 * top, width + 2 * left, channels)
        for y in range(kernel[0]):
            for x in range(kernel[1]):
                found[:, y : y + down * oh : down, x : x + across * ow : across] += windows[:, :, :, y, x]
        return found[:, top : top + height, left : left + width].permute(0, 3, 1, 2), None, None, None, None


def _rows(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        if _fits(x, self.weight) and self.dilation == (1, 1) and x.dim() == 4:
            if kernel == stride == (1, 1) and padding == (0, 0):
                return _Product.apply(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(
                    0, 3, 1, 2
                )
            size = [(x.shape[2 + i] + 2 * int(padding[i]) - kernel[i]) // stride[i] + 1 for i in (0, 1)]
            is_deep = (
                x.shape[0] * size[0] * size[1] <= _FEW_PIXELS
                and self.weight.numel() >= _MANY_WEIGHTS[x.dtype]
            )
            if is_deep and self.weight.is_contiguous(memory_format=torch.channels_last):
                return _Windows.apply(x, self.weight, self.bias, stride, padding)
        return F.conv2d(x, self.weight, self.bias, stride, padding, self.dilation, self.groups)


# ---- LoRA


class _Update(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T; A and B are float32, and computed in the input's dtype as under autocast."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        down, up = a.to(x.dtype), b.to(x.dtype)
        inner = product(x, down)
        result = product(x, weight, bias)
        flat = result.view(-1, result.shape[-1])
        torch.addmm(flat, inner.view(-1, inner.shape[-1]), up.t(), alpha=scale, out=flat)
        ctx.save_for_backward(x, inner, a, b)
        ctx.weight, ctx.scale = weight, scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        grad = grads[0]
        flat = grad.reshape(-1, grad.shape[-1])
        inner_grad = (flat @ b.to(x.dtype)).mul_(ctx.scale)  # [rows, rank]
        grad_b = (flat.t() @ inner.view(-1, inner.shape[-1])).mul_(ctx.scale).to(b.dtype)
        grad_a = (inner_grad.t() @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, ctx.weight.t())
            rows = grad_x.view(-1, grad_x.shape[-1])
            torch.addmm(rows, inner_grad, a.to(x.dtype), out=rows)
        return grad_x, None, None, grad_a, grad_b, None


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = self.base_layer
    active = [name for name in self.active_adapters if name in self.lora_A]
    if (
        not args
        and not kwargs
        and not self.disable_adapters
        and not self.merged
        and len(active) == 1
        and type(base) in (nn.Linear, Linear)
    ):
        name = active[0]
        up, down = self.lora_B[name], self.lora_A[name]
        is_plain = (
            name not in self.lora_variant
            and up.bias is None
            and not (self.training and getattr(self.lora_dropout[name], "p", 0.0))
        )
        cast = _autocast(x)
        if is_plain and _fits(cast, base.weight):
            return _Update.apply(cast, base.weight, base.bias, down.weight, up.weight, self.scaling[name])
    return self.forward_by_peft(x, *args, **kwargs)


@functools.cache
def _lora_linear() -> type:
    """peft's class of LoRA on a linear layer, whose forward is `_lora_forward` where that can be."""
    from peft.tuners.lora.layer import Linear as own

    return type(
        "LoraLinear",
        (own,),
        {"forward": _lora_forward, "forward_by_peft": own.forward, "__module__": __name__},
    )  # type: ignore[attr-defined]


# ---- attention


class _Blocks(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v, [B, heads, tokens, D], a block of scores at a time: forward of some queries with all keys, backward of some keys
    with all queries, from the sum of each query's exponentials that forward keeps (FlashAttention-2, arXiv 2307.08691). Scores and sums over
    blocks are float32 in bfloat16 too, whose steps are too wide for scores. Exponentials are of base 2, which torch computes three times as fast."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, width = query.shape
        found = query.new_empty(batch, length, heads, width)
        q, k, v = _scores_query(query), _heads(key).float(), _heads(value.transpose(2, 3))
        sums = q.new_empty(batch * heads, length)  # log2 of each query's sum
        for number in range(batch * heads):
            into = found[number // heads, :, number % heads]
            for rows in _blocks(length, k.shape[1]):
                scores = product(q[number, rows], k[number])  # [queries, keys]
                most = scores.amax(-1, keepdim=True)
                shares = scores.sub_(most).exp2_()
                total = shares.sum(-1, keepdim=True)
                into[rows] = product(v[number], shares.div_(total).to(v.dtype)).t()
                sums[number, rows] = total.log2_().add_(most)[:, 0]
        out = found.transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        (heads, length, width), tokens = query.shape[1:], key.shape[2]
        dots = (grads[0].float() * out.float()).sum(-1).flatten(0, 1).neg_()  # [B * heads, queries]
        less = sums.neg()
        q, k, v, grad = _scores_query(query), _heads(key).float(), _heads(value), _heads(grads[0])
        turned_q, turned_k, turned_grad = (
            _heads(tensor.transpose(2, 3)) for tensor in (query, key, grads[0])
        )
        grad_query, grad_key, grad_value = (
            tensor.new_empty(tensor.transpose(1, 2).shape) for tensor in (query, key, value)
        )
        for number in range(len(q)):
            place, head = divmod(number, heads)
            query_sum = q.new_zeros(width, length)
            for rows in _blocks(tokens, length):
                shares = (
                    product(k[number, rows], q[number], less[number]).exp2_().to(v.dtype)
                )  # [keys, queries]
                grad_value[place, rows, head] = product(turned_grad[number], shares).t()
                scores_grad = product(v[number, rows], grad[number], dots[number]).mul_(shares)
                grad_key[place, rows, head] = product(turned_q[number], scores_grad).t()
                query_sum += product(turned_k[number][:, rows].contiguous(), scores_grad.t())
            grad_query[place, :, head] = query_sum.t()
        scale = width**-0.5
        return (
            grad_query.mul_(scale).transpose(1, 2),
            grad_key.mul_(scale).transpose(1, 2),
            grad_value.transpose(1, 2),
        )


def attention_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, all of them [B, heads, tokens, D] on a CPU, in float32 or bfloat16; keeps one number a query besides them."""
    return _Blocks.apply(query, key, value)


def _scores_query(query: Tensor) -> Tensor:
    """What times the keys gives scores, [B * heads, tokens, D] float32, as powers of 2."""
    return _heads(query).float() * (query.shape[-1] ** -0.5 * math.log2(math.e))


def _heads(tensor: Tensor) -> Tensor:
    """[B, heads, ...] as [B * heads, ...], one after another in memory."""
    return tensor.contiguous().flatten(0, 1)


def _blocks(length: int, others: int) -> list[slice]:
    """Of `length` rows, each with a score for all `others`."""
    rows = max(1, min(length, _BLOCK // others))
    return [slice(start, start + rows) for start in range(0, length, rows)]


@functools.cache
def _is_for_blocks(dtype: torch.dtype) -> bool:
    """Whether attention in it is better in blocks. Where bfloat16 has instructions for whole tiles (AMX), float32 scores would be the slower part."""
    return _knows(dtype) and (
        dtype == torch.float32 or not torch.cpu.get_capabilities().get("amx_bf16", False)
    )


class _Attend:
    """diffusers' attention for the plain case: no mask, no norms but those of its layers around it."""

    def __init__(self) -> None:
        self.other = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        norms = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
        is_plain = (
            attention_mask is None
            and not others
            and hidden_states.dim() == 3
            and not any(norms)
            and not attn.residual_connection
        )
        is_large = min(hidden_states.shape[1], source.shape[1]) >= _MANY_TOKENS
        is_here = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (is_plain and is_large and is_here and _is_for_blocks(_autocast(hidden_states).dtype)):
            return self.other(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **others)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, tokens, D]

        found = attention_in_blocks(
            heads(attn.to_q(hidden_states)), heads(attn.to_k(source)), heads(attn.to_v(source))
        )
        out = attn.to_out[1](attn.to_out[0](found.transpose(1, 2).flatten(2)))
        return out / attn.rescale_output_factor if attn.rescale_output_factor != 1 else out
