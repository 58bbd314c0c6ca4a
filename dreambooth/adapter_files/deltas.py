"""The arithmetic of adapters: the update dW of each kind, and conversions to LoRA and to smaller ranks.

The scale is multiplied into the tensors: no function here takes an alpha. Weights of a Linear are [out, in],
those of a Conv2d [out, in, kh, kw]. In the shapes below `(, kh, kw)` are the two sizes of the kernel, which a
convolution has and a Linear has not.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

# eq=False: == of two tensors is a tensor, not a bool


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """dW = up @ down (LoRA, arXiv 2106.09685)."""

    down: Tensor  # [rank, in(, kh, kw)]
    up: Tensor  # [out, rank(, 1, 1)]
    magnitude: Tensor | None = None  # [out]: norms to which the rows of W + dW are scaled (DoRA, 2402.09353)

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class LoHa:
    """dW = (w1a @ w1b) * (w2a @ w2b), where * multiplies entry by entry (FedPara, arXiv 2108.06098). A
    convolution may have cores t1 and t2. Each a @ b is then a Tucker product with its core."""

    w1a: Tensor  # [out, rank]; with a core [rank, out]
    w1b: Tensor  # [rank, in(, kh, kw)]; with a core [rank, in]
    w2a: Tensor  # as w1a
    w2b: Tensor  # as w1b
    t1: Tensor | None = None  # [rank, rank, kh, kw]
    t2: Tensor | None = None
    magnitude: Tensor | None = None  # [out]

    @property
    def rank(self) -> int:
        return self.w1b.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class LoKr:
    """dW = kron(w1, w2), with out = l * k and in = m * n (LyCORIS, arXiv 2309.14859). Each factor is either
    dense or a product: w1 = w1a @ w1b, w2 = w2a @ w2b, which may have a Tucker core t2."""

    w1: Tensor | None = None  # [l, m]
    w1a: Tensor | None = None  # [l, rank]
    w1b: Tensor | None = None  # [rank, m]
    w2: Tensor | None = None  # [k, n(, kh, kw)]
    w2a: Tensor | None = None  # [k, rank]; with a core [rank, k]
    w2b: Tensor | None = None  # [rank, n(, kh, kw)]; with a core [rank, n]
    t2: Tensor | None = None  # [rank, rank, kh, kw]
    magnitude: Tensor | None = None  # [out]

    @property
    def rank(self) -> int | None:
        """The rank of the second factor; if that is dense, of the first; None if both are dense."""
        return next((pair.shape[0] for pair in (self.w2b, self.w1b) if pair is not None), None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(w1, w2), both dense: [l, m] and [k, n(, kh, kw)]."""
        return _dense(self.w1, self.w1a, self.w1b, None), _dense(self.w2, self.w2a, self.w2b, self.t2)


Module = Lora | LoHa | LoKr
AnyModule = TypeVar("AnyModule", bound=Module)


def kind(module: Module) -> str:
    """lora, loha or lokr; with a magnitude dora, doha or dokr, as LyCORIS calls them."""
    name = {Lora: "lora", LoHa: "loha", LoKr: "lokr"}[type(module)]
    return name if module.magnitude is None else name.replace("l", "d", 1)


def factors_by_name(module: LoHa | LoKr) -> dict[str, Tensor]:
    """The module's tensors except the magnitude, by the names that peft and LyCORIS share: a LoHa's w1a is
    hada_w1_a."""
    prefix = "hada" if isinstance(module, LoHa) else "lokr"
    return {
        "_".join([prefix, name[:2], *name[2:]]): tensor
        for name, tensor in vars(module).items()
        if name != "magnitude" and tensor is not None
    }


def to(module: AnyModule, target: torch.device | torch.dtype) -> AnyModule:
    """The module with its tensors on the device, or in the dtype."""
    tensors = {name: tensor.to(target) for name, tensor in vars(module).items() if tensor is not None}
    return dataclasses.replace(module, **tensors)


def shape(module: Module) -> tuple[int, ...]:
    """Shape of the layer's weight: that of dW, which is computed without data."""
    return tuple(delta(to(module, torch.device("meta"))).shape)


def _dense(dense: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    """`dense`; if it is None, the product of a, b and the core, if there is one."""
    if dense is not None:
        return dense
    if a is None or b is None:
        raise ValueError("a factor of a LoKr is neither dense nor a product")
    columns, rows = columns_and_rows(a, b, core)
    return (columns @ rows.flatten(1)).reshape(columns.shape[0], *rows.shape[1:])


def columns_and_rows(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The factors of a product as [out, rank] and [rank, in(, kh, kw)]. A core is multiplied into the
    second."""
    return (a, b) if core is None else (a.T, torch.einsum("ijkl,jr->irkl", core, b))


def delta(module: Module) -> Tensor:
    """dW, dense, in the shape of the layer's weight. The magnitude is not in it; `adapted` applies that."""
    if isinstance(module, Lora):
        return (module.up.flatten(1) @ module.down.flatten(1)).reshape(-1, *module.down.shape[1:])
    if isinstance(module, LoHa):
        halves = (module.w1a, module.w1b, module.t1), (module.w2a, module.w2b, module.t2)
        first, second = (_dense(None, *half) for half in halves)
        return first * second
    first, second = module.factors()
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def norm(module: Module) -> float:
    """Frobenius norm of dW, without the magnitude. For LoRA and LoKr no dense dW is built."""
    if isinstance(module, Lora):
        up, down = module.up.flatten(1).double(), module.down.flatten(1).double()
        return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))
    if isinstance(module, LoKr):
        first, second = module.factors()
        return float(first.norm()) * float(second.norm())
    return float(delta(module).norm())


def adapted(module: Module, weight: Tensor) -> Tensor:
    """The layer's weight with the adapter merged into it: W + dW. With a magnitude, each output's row is then
    scaled to that norm."""
    changed = weight + delta(module)
    if module.magnitude is None:
        return changed
    lengths = changed.flatten(1).norm(dim=1)
    return changed * (module.magnitude / lengths).reshape(-1, *[1] * (weight.ndim - 1))


def as_lora(module: Module) -> Lora:
    """The LoRA with the same dW, exact but for rounding, and the same magnitude. Its rank is that of the
    exact conversion, or out or in * kh * kw if one of these is smaller. A LoRA is returned unchanged."""
    if isinstance(module, Lora):
        return module
    if isinstance(module, LoHa):
        outputs, *inner = shape(module)
        if module.rank * module.w2b.shape[0] >= (largest := min(outputs, math.prod(inner))):
            # dW cannot have more than this rank, and Khatri-Rao products would be larger than dW: gigabytes
            # for a wide convolution
            return dataclasses.replace(extract(delta(module), largest)[0], magnitude=module.magnitude)
        up, down = khatri_rao(module.w1a, module.w1b, module.w2a, module.w2b, module.t1, module.t2)
    else:
        up, down = _kronecker(module)
    lora = _shaped(down, up, down.shape[1:], module.magnitude)
    return shrink(lora, min(up.shape[0], math.prod(down.shape[1:])))[0]


def khatri_rao(
    w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, t1: Tensor | None = None, t2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(up, down) of rank r * s, for a LoHa whose two products have ranks r and s. Each column of `up` is the
    entry-wise product of a column of each half, each row of `down` that of two rows."""
    columns1, rows1 = columns_and_rows(w1a, w1b, t1)
    columns2, rows2 = columns_and_rows(w2a, w2b, t2)
    down = (rows1[:, None] * rows2[None]).flatten(0, 1)
    return (columns1[:, :, None] * columns2[:, None, :]).flatten(1), down


def _kronecker(module: LoKr) -> tuple[Tensor, Tensor]:
    """(up, down) of rank(w1) * rank(w2), from the singular value decompositions of w1 and w2. The singular
    values and vectors of a Kronecker product are the Kronecker products of those of its factors."""
    # in float64: in float32 the rounding of a product a @ b would appear as further ranks
    first, second = to(module, torch.float64).factors()
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(factor.flatten(1), full_matrices=False) for factor in (first, second)
    )
    # indices of the products of singular values, largest first, without those that are only rounding
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True, stable=True)
    nonzero = order[values[order] > 1e-10 * values.max()] if values.max() > 0 else order[:1]
    i, j = nonzero // len(s2), nonzero % len(s2)
    roots = values[nonzero].sqrt()
    up = ((u1[:, None, i] * u2[None, :, j]).flatten(0, 1) * roots).float()  # [l * k, rank]
    rows = v2[j].reshape(len(j), *second.shape[1:])  # [rank, n(, kh, kw)]
    down = v1[i].reshape(len(i), -1, *[1] * (rows.ndim - 1)) * rows[:, None]  # [rank, m, n(, kh, kw)]
    down = (down.flatten(1, 2) * roots.reshape(-1, *[1] * (rows.ndim - 1))).float()
    return up, down


def shrink(lora: Lora, rank: int) -> tuple[Lora, float]:
    """(the nearest LoRA of at most `rank`, the share of dW's squared entries that it keeps).

    It is the best approximation in the Frobenius norm (Eckart and Young). No dense dW is built: two thin QR
    decompositions and the SVD of a matrix of the LoRA's rank squared.
    """
    if rank >= lora.rank:
        return lora, 1.0
    left, core_left = torch.linalg.qr(lora.up.flatten(1).double())
    right, core_right = torch.linalg.qr(lora.down.flatten(1).double().T)
    u, s, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    rank = min(rank, len(s))
    roots = s[:rank].sqrt()
    up = (left @ u[:, :rank] * roots).float()
    down = (roots[:, None] * (v[:rank] @ right.T)).float()
    total = float(s.square().sum())
    kept = float(s[:rank].square().sum()) / total if total else 1.0
    return _shaped(down, up, lora.down.shape[1:], lora.magnitude), kept


def _shaped(down: Tensor, up: Tensor, inner: Sequence[int], magnitude: Tensor | None = None) -> Lora:
    """The LoRA of the matrices down [rank, in * kh * kw] and up [out, rank]. `inner` is (in(, kh, kw))."""
    return Lora(down.reshape(-1, *inner), up.reshape(*up.shape, *[1] * (len(inner) - 1)), magnitude)


def pad(lora: Lora, rank: int) -> Lora:
    """The LoRA with its factors padded with zeros to `rank`, at least its own: dW stays the same."""
    more = rank - lora.rank
    down = torch.cat([lora.down, lora.down.new_zeros(more, *lora.down.shape[1:])])
    up = torch.cat([lora.up, lora.up.new_zeros(lora.up.shape[0], more, *lora.up.shape[2:])], dim=1)
    return Lora(down, up, lora.magnitude)


def concatenate(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """The LoRA whose dW is the weighted sum of the dW of `loras`, exactly. Its rank is the sum of their
    ranks. None may have a magnitude: these cannot be added."""
    up = torch.cat([lora.up * weight for lora, weight in zip(loras, weights, strict=True)], dim=1)
    return Lora(torch.cat([lora.down for lora in loras]), up)


def extract(dense: Tensor, rank: int) -> tuple[Lora, float]:
    """(the LoRA of at most `rank` that is nearest to a dense dW, the share of dW's squared entries that it
    keeps).

    It is computed in float64 from the eigenvectors of dW's smaller Gram matrix. This is several times faster
    on wide layers than a singular value decomposition, and as exact at float32.
    """
    flat = dense.flatten(1).double()  # [out, in * kh * kw]
    is_wide = flat.shape[0] <= flat.shape[1]
    wide = flat if is_wide else flat.T  # no more rows than columns
    rank = min(rank, wide.shape[0])
    squares, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    vectors = vectors[:, -rank:].flip(1)
    projected = vectors.T @ wide  # [rank, columns of `wide`]: the norms of its rows are dW's singular values
    # each factor gets the root of each singular value: float16 keeps the most digits of equally large factors
    roots = projected.norm(dim=1).sqrt()
    vectors, projected = vectors * roots, projected / roots.clamp_min(1e-30)[:, None]
    total = float(squares.sum())
    kept = float(squares[-rank:].sum()) / total if total > 0 else 1.0
    up, down = (vectors, projected) if is_wide else (projected.T, vectors.T)
    return _shaped(down.float(), up.float(), dense.shape[1:]), min(max(kept, 0.0), 1.0)
