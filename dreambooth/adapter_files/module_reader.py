"""Makes a module of `deltas` from the tensors of one layer in a file: its kind, shapes, scale and
magnitude."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dreambooth.adapter_files import peft_config
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora, Module
from dreambooth.adapter_files.layer_names import Shape
from dreambooth.adapter_files.peft_config import AdapterConfig
from dreambooth.io.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModuleReader:
    """Makes the module of one layer from its tensors, which are given by part (`layer_names.split`).

    `where` begins messages. `shape` is that of the layer's weight, `path` the layer's plain name. `hint` ends
    the message about tensors that do not fit. All methods raise UserError for tensors of wrong shapes.
    """

    where: str
    shape: Shape
    path: str
    config: AdapterConfig
    hint: str

    def module(self, tensors: Mapping[str, Tensor]) -> Module:
        """The LoRA, LoHa or LoKr of these tensors, with its magnitude. Raises UserError if they are none of
        these."""
        parts = tensors.keys() - {"alpha", "dora_scale", "magnitude"}
        if parts in ({"down", "up"}, {"down", "up", "mid"}):
            module: Module = self.lora(tensors)
        elif parts in (_LOHA, _LOHA | {"hada_t1", "hada_t2"}):
            module = self.loha(tensors)
        elif parts & _LOKR_FIRST in _LOKR_FORMS_FIRST and parts - _LOKR_FIRST in _LOKR_FORMS_SECOND:
            module = self.lokr(tensors)
        elif parts == {"diff"}:  # a difference of the full weight is the Kronecker product of 1 and itself
            module = LoKr(w1=torch.ones(1, 1), w2=self.fit(tensors, "diff", *self.shape))
        else:
            raise UserError(
                f"{self.where} has only {', '.join(sorted(tensors))};"
                " that is not a complete LoRA, LoHa or LoKr; the adapter is incomplete"
            )
        return dataclasses.replace(module, magnitude=self.magnitude(tensors))

    def lora(self, tensors: Mapping[str, Tensor]) -> Lora:
        """The LoRA, with the scale in `up`."""
        outputs, inputs, *kernel = self.shape
        rank = _rows(tensors["down"])
        ones = [1] * len(kernel)
        up = self.fit(tensors, "up", outputs, rank, *ones) * self.scale(tensors, rank)
        if "mid" not in tensors:
            return Lora(self.fit(tensors, "down", rank, inputs, *kernel), up)
        # LyCORIS' Tucker form of a convolution: the core is multiplied into `down`
        core = self.fit(tensors, "mid", rank, rank, *kernel)
        down = self.fit(tensors, "down", rank, inputs, *ones).flatten(1)
        return Lora(torch.einsum("ij...,jr->ir...", core, down), up)

    def loha(self, tensors: Mapping[str, Tensor]) -> LoHa:
        """The LoHa, with the scale in `w1a`."""
        outputs, inputs, *kernel = self.shape
        parts: dict[str, Tensor] = {}
        for n in (1, 2):
            a, b, core = f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}"
            rank = _rows(tensors[b])
            if "hada_t1" in tensors:
                parts[f"w{n}a"] = self.fit(tensors, a, rank, outputs)
                parts[f"w{n}b"] = self.fit(tensors, b, rank, inputs)
                parts[f"t{n}"] = self.fit(tensors, core, rank, rank, *kernel)
            else:
                parts[f"w{n}a"] = self.fit(tensors, a, outputs, rank)
                parts[f"w{n}b"] = self.fit(tensors, b, rank, inputs, *kernel)
        parts["w1a"] = parts["w1a"] * self.scale(tensors, _rows(tensors["hada_w1_b"]))
        return LoHa(**parts)

    def lokr(self, tensors: Mapping[str, Tensor]) -> LoKr:
        """The LoKr, with the scale in `w1` or `w1a`."""
        outputs, inputs, *kernel = self.shape
        rank1, rank2 = (
            _rows(tensors[name]) if name in tensors else None for name in ("lokr_w1_b", "lokr_w2_b")
        )
        scale = self.scale(tensors, rank2 if rank2 is not None else rank1)
        # the sizes of the first factor decide those of the second
        upper, lower = ("lokr_w1", "lokr_w1") if rank1 is None else ("lokr_w1_a", "lokr_w1_b")
        rows, columns = _rows(tensors[upper]), tensors[lower].shape[1] if tensors[lower].ndim > 1 else 0
        if not rows or not columns or outputs % rows or inputs % columns:
            raise self.misfit(upper, tensors[upper], "of a size that divides the layer's")
        k, n = outputs // rows, inputs // columns
        parts: dict[str, Tensor] = {}
        if rank1 is None:
            parts["w1"] = self.fit(tensors, "lokr_w1", rows, columns) * scale
        else:
            parts["w1a"] = self.fit(tensors, "lokr_w1_a", rows, rank1) * scale
            parts["w1b"] = self.fit(tensors, "lokr_w1_b", rank1, columns)
        if rank2 is None:
            parts["w2"] = self.fit(tensors, "lokr_w2", k, n, *kernel)
        elif "lokr_t2" in tensors:
            parts["w2a"] = self.fit(tensors, "lokr_w2_a", rank2, k)
            parts["w2b"] = self.fit(tensors, "lokr_w2_b", rank2, n)
            parts["t2"] = self.fit(tensors, "lokr_t2", rank2, rank2, *kernel)
        else:
            parts["w2a"] = self.fit(tensors, "lokr_w2_a", k, rank2)
            parts["w2b"] = self.fit(tensors, "lokr_w2_b", rank2, n, *kernel)
        return LoKr(**parts)

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The magnitude, [out]; None if there is none."""
        outputs, ones = self.shape[0], (1,) * (len(self.shape) - 2)
        spellings = [name for name in ("dora_scale", "magnitude") if name in tensors]
        if not spellings:
            return None
        if len(spellings) > 1:
            raise UserError(f"{self.where} has its magnitude twice, in two spellings")
        is_peft = spellings[0] == "magnitude"
        tensor = tensors[spellings[0]]
        # for a convolution, peft's is [1, out, 1, 1] and LyCORIS' is [out, 1, 1, 1]
        shape = (1, outputs, *ones) if is_peft else (outputs, 1, *ones)
        if tuple(tensor.shape) not in ((outputs,), shape):
            # LyCORIS' [1, in, ...] has one norm for each input: another method
            hint = self.hint
            if not is_peft and tensor.ndim > 1 and tensor.shape[0] == 1:
                hint = ": magnitudes of inputs (LyCORIS without wd_on_out) are not supported"
            raise UserError(
                f"{self.where}: its magnitude of shape {tuple(tensor.shape)}"
                f" does not have one number for each of {outputs} outputs{hint}"
            )
        return tensor.flatten()

    def scale(self, tensors: Mapping[str, Tensor], rank: int | None) -> float:
        """The factor of dW: alpha / rank from the module's alpha, else from peft's configuration, else 1.
        Raises UserError if alpha is not a usable number, or if the configuration has another rank."""
        config_rank = self.config.rank_of(self.path)
        if "alpha" in tensors:
            if tensors["alpha"].numel() != 1 or not peft_config.is_alpha(alpha := tensors["alpha"].item()):
                raise UserError(f"{self.where}: its alpha must be one number other than 0, up to a million")
            return alpha / rank if rank else 1.0  # LyCORIS, ComfyUI and A1111 ignore an alpha without a rank
        if rank and config_rank and config_rank != rank:
            raise UserError(f"{self.where} has rank {rank}, but its metadata has {config_rank}")
        config_alpha, divisor = self.config.alpha_of(self.path), config_rank or rank
        if divisor is None or (config_alpha is None and not self.config.use_rslora):
            return 1.0
        config_alpha = divisor if config_alpha is None else config_alpha
        return config_alpha / (math.sqrt(divisor) if self.config.use_rslora else divisor)

    def fit(self, tensors: Mapping[str, Tensor], name: str, *expected: int) -> Tensor:
        """The tensor `name` in the expected shape. A flattened kernel is unflattened. A kernel of 1x1 may be
        written or left out. Raises UserError for another shape."""
        tensor = tensors[name]
        flattened = (expected[0], math.prod(expected[1:]))
        if tuple(tensor.shape) in (expected, (*expected, 1, 1), flattened, (*flattened, 1, 1)):
            return tensor.reshape(expected)
        raise self.misfit(name, tensor, f"of shape {expected}")

    def misfit(self, name: str, tensor: Tensor, expected: str) -> UserError:
        """The error for a tensor that does not fit; `expected` describes the right one."""
        return UserError(
            f"{self.where}: its {name} has shape {tuple(tensor.shape)}; for this layer of {self.shape}"
            f" it must be {expected}{self.hint or '; the adapter is for another base, or broken'}"
        )


def _rows(tensor: Tensor) -> int:
    """Size of the first dimension; 0 for a single number."""
    return tensor.shape[0] if tensor.ndim else 0


_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR_FIRST = {"lokr_w1", "lokr_w1_a", "lokr_w1_b"}
_LOKR_FORMS_FIRST: tuple[set[str], ...] = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_LOKR_FORMS_SECOND: tuple[set[str], ...] = (
    {"lokr_w2"},
    {"lokr_w2_a", "lokr_w2_b"},
    {"lokr_w2_a", "lokr_w2_b", "lokr_t2"},
)
