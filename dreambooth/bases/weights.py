"""Weights that are still in their safetensors files, with what `diffusers.loaders` does to tensors when it
converts a single-file checkpoint."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dreambooth.files import safetensors_files
from dreambooth.io import reader
from dreambooth.io.errors import UserError, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight that is still in its file.

    Indexing it with `...`, as transformers does, reads it into memory of its own. Any other index, and the
    methods that tensors have too, return a weight of another view, which is not read either: the functions
    of `diffusers.loaders.single_file_utils` convert weights as they convert tensors.
    """

    path: Path
    key: str
    dtype: str
    start: int
    stored_shape: tuple[int, ...]
    views: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    """What is done to the stored tensor, in this order."""

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        if not self.views:
            return self.stored_shape
        return tuple(self._viewed(torch.empty(self.stored_shape, device="meta")).shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.stored_shape) * self.torch_dtype.itemsize

    def read(self, buffer: torch.Tensor) -> torch.Tensor:
        """The weight in the first bytes of `buffer`, uint8 [bytes]; a view of them if the weight is one.
        Raises UserError if the file ends before."""
        data = buffer[: self.size]
        tensor = data.view(self.torch_dtype).view(self.stored_shape)
        if not self.size:
            return tensor
        values = memoryview(data.numpy())  # type: ignore[arg-type]
        with reader.opened(self.path) as file:
            file.seek(self.start)
            if file.readinto(values) < values.nbytes:
                raise UserError(
                    f"{shown(self.path)} ends within {self.key}: it has changed since it was checked"
                )
        return self._viewed(tensor)

    def __getitem__(self, index: Any) -> Any:
        if index is not ...:
            return self._view(lambda tensor: tensor[index])
        tensor = self.read(torch.empty(self.size, dtype=torch.uint8))
        # a copy: a view would keep the rest of the stored tensor in memory, and its alignment
        return tensor.clone(memory_format=torch.contiguous_format) if self.views else tensor

    # ---- what tensors have, as far as diffusers' conversion uses it

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> "Weight":
        return self._view(lambda tensor: tensor.T)

    def clone(self) -> "Weight":
        return self

    detach = contiguous = clone

    def _view(self, view: Callable[[torch.Tensor], torch.Tensor]) -> "Weight":
        return dataclasses.replace(self, views=(*self.views, view))

    def _viewed(self, tensor: torch.Tensor) -> torch.Tensor:
        for view in self.views:
            tensor = view(tensor)
        return tensor


def of_files(paths: Iterable[Path]) -> dict[str, Weight]:
    """The weights of all files by key. Raises UserError if a file is damaged."""
    weights: dict[str, Weight] = {}
    for path in paths:
        header = safetensors_files.read(path, safetensors_files.BASE)
        weights |= {
            key: Weight(path, key, dtype, start, header.shapes[key])
            for key, (dtype, start) in header.places.items()
        }
    return weights
