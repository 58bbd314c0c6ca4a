"""The arithmetic of adapters: the update dW of each kind, and conversions between kinds and ranks, exact or
nearest.

Tensors contain their scale: no function here takes an alpha. Weights of a Linear are [out, in], those of a
Conv2d [out, in, kh, kw]. In the shapes below `(, kh, kw)` stands for the two sizes of the kernel, which a
convolution always has and a Linear never.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# eq=False: two tensors have no single answer to ==


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """dW = up @ down (LoRA, arXiv 2106.09685)."""

    down: Tensor  # [rank, in(, kh, kw)]
    up: Tensor  # [out, rank(, 1, 1)]
    magnitude: Tensor | None = None  # [out]: lengths that the rows of W + dW get (DoRA, arXiv 2402.09353)

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class LoHa:
    """dW = (w1a @ w1b) * (w2a @ w2b), entry by entry (FedPara, arXiv 2108.06098).

    A convolution may have cores t1 and t2; then each a @ b is a Tucker product with its core.
    """

    w1a: Tensor  # [out, rank]; with a core [rank, out]
    w1b: Tensor  # [rank, in(, kh, kw)]; with a core [rank, in]
    w2a: Tensor
    w2b: Tensor
    t1: Tensor | None = None  # [rank, rank, kh, kw]
    t2: Tensor | None = None
    magnitude: Tensor | None = None  # [out]

    @property
    def rank(self) -> int:
        return self.w1b.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class LoKr:
    """dW = kron(w1, w2), with out = l * k and in = m * n (LyCORIS, arXiv 2309.14859). Each factor is dense or
    a product."""

    w1: Tensor | None = None  # [l, m], or
    w1a: Tensor | None = None  # [l, rank] and
    w1b: Tensor | None = None  # [rank, m]
    w2: Tensor | None = None  # [k, n(, kh, kw)], or
    w2a: Tensor | None = None  # [k, rank] and; with a core [rank, k]
    w2b: Tensor | None = None  # [rank, n(, kh, kw)]; with a core [rank, n]
    t2: Tensor | None = None  # [rank, rank, kh, kw]
    magnitude: Tensor | None = None  # [out]

    @property
    def rank(self) -> int | None:
        """The rank of the second factor, else of the first; None if both are dense."""
        return next((pair.shape[0] for pair in (self.w2b, self.w1b) if pair is not None), None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(w1, w2), both dense: [l, m] and [k, n(, kh, kw)]."""
        return _dense(self.w1, self.w1a, self.w1b, None), _dense(self.w2, self.w2a, self.w2b, self.t2)


Module = Lora | LoHa | LoKr


def kind(module: Module) -> str:
    """lora, loha or lokr; with a magnitude dora, doha or dokr, as LyCORIS calls them."""
    name = {Lora: "lora", LoHa: "loha", LoKr: "lokr"}[type(module)]
    return name if module.magnitude is None else name.replace("l", "d", 1)


def factors_by_name(module: LoHa | LoKr) -> dict[str, Tensor | None]:
    """Its tensors but the magnitude, by the names that peft and LyCORIS share: w1a of a LoHa is hada_w1_a."""
    prefix = "hada" if isinstance(module, LoHa) else "lokr"
    return {
        "_".join([prefix, field.name[:2], *field.name[2:]]): getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name != "magnitude"
    }


def to(module: Module, device: torch.device) -> Module:
    """The module with its tensors on the device."""
    tensors = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    return dataclasses.replace(module, **{n: t.to(device) for n, t in tensors.items() if t is not None})


def ndim(module: Module) -> int:
    """Dimensions of the layer's weight: 2 for a Linear, 4 for a convolution."""
    return len(shape(module))


def shape(module: Module) -> tuple[int, ...]:
    """Shape of the layer's weight."""
    if isinstance(module, Lora):
        return (module.up.shape[0], *module.down.shape[1:])
    if isinstance(module, LoHa):
        return _product_shape(module.w1a, module.w1b, module.t1)
    first = module.w1.shape if module.w1 is not None else _product_shape(module.w1a, module.w1b, None)
    second = module.w2.shape if module.w2 is not None else _product_shape(module.w2a, module.w2b, module.t2)
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _product_shape(a: Tensor | None, b: Tensor | None, core: Tensor | None) -> tuple[int, ...]:
    if a is None or b is None:
        raise ValueError("a factor of a LoKr is neither dense nor a product")
    return (a.shape[0], *b.shape[1:]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _dense(dense: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    """`dense`, or the product of a, b and, if there is one, the core."""
    if dense is not None:
        return dense
    if a is None or b is None:
        raise ValueError("a factor of a LoKr is neither dense nor a product")
    columns, rows = columns_and_rows(a, b, core)
    return (columns @ rows.flatten(1)).reshape(columns.shape[0], *rows.shape[1:])


def columns_and_rows(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A product as [out, rank] and [rank, in(, kh, kw)]. A core becomes part of the second."""
    return (a, b) if core is None else (a.T, torch.einsum("ijkl,jr->irkl", core, b))


def delta(module: Module) -> Tensor:
    """dW, dense, in the shape of the layer's weight. Without the magnitude, which `adapted` applies."""
    if isinstance(module, Lora):
        return (module.up.flatten(1) @ module.down.flatten(1)).reshape(-1, *module.down.shape[1:])
    if isinstance(module, LoHa):
        return _dense(None, module.w1a, module.w1b, module.t1) * _dense(
            None, module.w2a, module.w2b, module.t2
        )
    first, second = module.factors()
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def norm(module: Module) -> float:
    """Frobenius norm of dW; for LoRA and LoKr computed without a dense dW."""
    if isinstance(module, Lora):
        up, down = module.up.flatten(1).double(), module.down.flatten(1).double()
        return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))
    if isinstance(module, LoKr):
        first, second = module.factors()
        return float(first.norm()) * float(second.norm())
    return float(delta(module).norm())


def adapted(module: Module, weight: Tensor) -> Tensor:
    """The layer's weight with the adapter in it: W + dW. With a magnitude, each output's row is then scaled
    to its length."""
    changed = weight + delta(module)
    if module.magnitude is None:
        return changed
    lengths = changed.flatten(1).norm(dim=1)
    return changed * (module.magnitude / lengths).reshape(-1, *[1] * (weight.ndim - 1))


def as_lora(module: Module) -> Lora:
    """The LoRA with the same dW and the same magnitude, exactly: of the smallest of its rank, the outputs and
    the inputs."""
    if isinstance(module, Lora):
        return module
    if isinstance(module, LoHa):
        outputs, *inner = shape(module)
        if module.rank * module.w2b.shape[0] >= (largest := min(outputs, math.prod(inner))):
            # the Khatri-Rao products of a wide convolution would be larger than dW (gigabytes), for ranks
            # that dW cannot have
            return dataclasses.replace(extract(delta(module), largest)[0], magnitude=module.magnitude)
    up, down = _khatri_rao(module) if isinstance(module, LoHa) else _kronecker(module)
    lora = Lora(down, up.reshape(*up.shape, *[1] * (down.ndim - 2)), module.magnitude)
    return shrink(lora, min(up.shape[0], math.prod(down.shape[1:])))[0]


def _khatri_rao(module: LoHa) -> tuple[Tensor, Tensor]:
    """(up, down) of a LoHa of ranks r and s, of rank r * s: each row and column is the product of one of each
    half."""
    columns1, rows1 = columns_and_rows(module.w1a, module.w1b, module.t1)
    columns2, rows2 = columns_and_rows(module.w2a, module.w2b, module.t2)
    down = (rows1[:, None] * rows2[None]).flatten(0, 1)
    return (columns1[:, :, None] * columns2[:, None, :]).flatten(1), down


def _kronecker(module: LoKr) -> tuple[Tensor, Tensor]:
    """(up, down) of a LoKr, of rank(w1) * rank(w2), from the singular value decompositions of w1 and w2.

    Singular values and vectors of a Kronecker product are the products of those of its factors.
    """
    # in float64: in float32 the rounding of a product a @ b would look like more ranks
    tensors = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    doubles = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    first, second = LoKr(**doubles).factors()
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(factor.flatten(1), full_matrices=False) for factor in (first, second)
    )
    # the products of singular values, largest first, without those that are zero but for rounding
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True, stable=True)
    kept = order[values[order] > 1e-10 * values.max()] if values.max() > 0 else order[:1]
    i, j = kept // len(s2), kept % len(s2)
    roots = values[kept].sqrt()
    up = ((u1[:, None, i] * u2[None, :, j]).flatten(0, 1) * roots).float()  # [l * k, rank]
    rows = v2[j].reshape(len(j), *second.shape[1:])  # [rank, n(, kh, kw)]
    down = v1[i].reshape(len(i), -1, *[1] * (rows.ndim - 1)) * rows[:, None]  # [rank, m, n(, kh, kw)]
    down = (down.flatten(1, 2) * roots.reshape(-1, *[1] * (rows.ndim - 1))).float()
    return up, down


def shrink(lora: Lora, rank: int) -> tuple[Lora, float]:
    """(the nearest LoRA of at most `rank`, the share of dW's squared entries that it keeps).

    The optimum (Eckart and Young), without a dense dW: two thin QRs and the SVD of a core of rank x rank.
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
    """The LoRA of two matrices. `inner`: the layer's inputs and kernel sizes."""
    return Lora(down.reshape(-1, *inner), up.reshape(*up.shape, *[1] * (len(inner) - 1)), magnitude)


def pad(lora: Lora, rank: int) -> Lora:
    """The same dW with a larger rank, padded with zeros. Raises ValueError if `rank` is smaller than the
    LoRA's."""
    if rank < lora.rank:
        raise ValueError(f"a LoRA of rank {lora.rank} cannot be filled up to {rank}")
    more = rank - lora.rank
    down = torch.cat([lora.down, lora.down.new_zeros(more, *lora.down.shape[1:])])
    up = torch.cat([lora.up, lora.up.new_zeros(lora.up.shape[0], more, *lora.up.shape[2:])], dim=1)
    return Lora(down, up, lora.magnitude)


def concatenate(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """The LoRA whose dW is the weighted sum of the given ones, exactly; its rank is the sum of ranks.

    Raises ValueError for DoRA: magnitudes cannot be added.
    """
    if any(lora.magnitude is not None for lora in loras):
        raise ValueError("the magnitudes of DoRA do not add up")
    up = torch.cat([lora.up * weight for lora, weight in zip(loras, weights, strict=True)], dim=1)
    return Lora(torch.cat([lora.down for lora in loras]), up)


def extract(dense: Tensor, rank: int) -> tuple[Lora, float]:
    """(the LoRA of at most `rank` nearest to a dense dW, the share of dW's squared entries that it keeps).

    From the eigenvectors of dW's smaller Gram matrix, in float64: as exact as a singular value decomposition,
    and several times faster on wide layers.
    """
    flat = dense.flatten(1).double()  # [out, in * kh * kw]
    is_wide = flat.shape[0] <= flat.shape[1]
    side = flat if is_wide else flat.T
    rank = min(rank, side.shape[0])
    squares, vectors = torch.linalg.eigh(side @ side.T)  # ascending
    vectors = vectors[:, -rank:].flip(1)
    projected = vectors.T @ side  # [rank, other side]: the lengths of its rows are dW's singular values
    # the root of each singular value goes into each half: float16 keeps most digits of halves of one size
    roots = projected.norm(dim=1).sqrt()
    vectors, projected = vectors * roots, projected / roots.clamp_min(1e-30)[:, None]
    total = float(squares.sum())
    kept = float(squares[-rank:].sum()) / total if total > 0 else 1.0
    up, down = (vectors, projected) if is_wide else (projected.T, vectors.T)
    return _shaped(down.float(), up.float(), dense.shape[1:]), min(max(kept, 0.0), 1.0)
