"""One frozen model of a base, read from its files: every weight once, straight into the dtype, layout and place in which it is used.

`from_pretrained` maps whole files into memory and casts from there, so that file and model are resident together, and leaves weights that need no
cast at the odd addresses that they have in the file, where a row times a matrix has other last bits. Here a weight is read into memory of its own.
Which key of a file is which weight, what stays in float32, what is tied and which buffers there are: that is still the libraries' own code.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from dreambooth.errors import UserError, shown
from dreambooth.files import safetensors_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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
_READERS = 2  # at once: each holds one weight twice, as it is in the file and as it is wanted


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight in its file. Indexed with `...`, as transformers does when it wants the values, it is read."""

    path: Path
    key: str
    dtype: str
    start: int
    shape: tuple[int, ...]

    def __getitem__(self, _: Any) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=_DTYPES[self.dtype])
        left = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                count = file.readinto(left)
                if not count:
                    raise UserError(
                        f"{shown(self.path)} ends within {self.key}: it has changed since it was checked"
                    )
                left = left[count:]
        return tensor


def load(
    kind: type,
    folder: Path,
    files: Sequence[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool = False,
) -> Any:
    """The model of class `kind`, of diffusers or transformers, with the config of `folder` and the weights of `files`, all of them safetensors.

    It is on `device`, in `dtype` but for what the library keeps in float32, in eval mode and without gradients. `channels_last` is the layout of
    weights with four dimensions. What the files have besides is left out, as `from_pretrained` does: many bases hold the rest of CLIP, or what a
    trainer added. Raises UserError if the files lack weights of the model, or have them in other shapes.
    """
    weights = _weights(files)
    if issubclass(kind, ModelMixin):
        model = _of_diffusers(
            kind,
            folder,
            weights,
            dtype,
            device,
            torch.channels_last if channels_last else torch.preserve_format,
        )
    else:
        model = _of_transformers(kind, folder, weights, dtype)
    model.requires_grad_(False).eval().to(device)
    if channels_last:
        model.to(
            memory_format=torch.channels_last
        )  # buffers, and weights of a single pixel and channel, of which both layouts are true
    return model


def _weights(files: Iterable[Path]) -> dict[str, _Weight]:
    found: dict[str, _Weight] = {}
    for path in files:
        header = safetensors_files.read(path, safetensors_files.BASE)
        found |= {
            key: _Weight(path, key, dtype, start, header.shapes[key])
            for key, (dtype, start) in header.places.items()
        }
    return found


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _of_diffusers(
    kind: Any,
    folder: Path,
    weights: Mapping[str, _Weight],
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format,
) -> Any:
    with _default_dtype(dtype), no_init_weights(), accelerate.init_empty_weights():
        model = kind.from_config(kind.load_config(folder))
    keys = {key: key for key in weights}
    model._fix_state_dict_keys_on_load(keys)  # the attention of older VAEs has other names
    wanted = model.state_dict()
    mismatched = [
        (name, weights[key].shape, wanted[name].shape) for name, key in keys.items() if name in wanted
    ]
    _check(wanted.keys() - keys.keys(), mismatched)

    def read(name: str) -> torch.Tensor:
        tensor = weights[keys[name]][...]
        own = dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.is_floating_point() and any(
            part in name.split(".") for part in kind._keep_in_fp32_modules or ()
        ):
            own = torch.float32
        return tensor.to(device, own, memory_format=layout if tensor.dim() == 4 else torch.preserve_format)

    with ThreadPoolExecutor(_READERS) as pool:
        model.load_state_dict(dict(zip(wanted, pool.map(read, wanted), strict=True)), assign=True)
    model.register_to_config(_name_or_path=str(folder))
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of what fits and what does not: what matters of it is raised."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_let_through(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger.addFilter(
        is_let_through
    )  # at a higher level of its own it would have another module warn of what is not sharded
    try:
        yield
    finally:
        logger.removeFilter(is_let_through)


def _of_transformers(kind: Any, folder: Path, weights: Mapping[str, _Weight], dtype: torch.dtype) -> Any:
    config = kind.config_class.from_pretrained(folder)
    with _without_report():
        model, said = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check(said["missing_keys"], said["mismatched_keys"])
    model.config.name_or_path = str(folder)
    return model


def _check(missing: Iterable[str], shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raise UserError, with all of it on one line, unless every weight of the model is there in its shape. `shapes` are (name, found, wanted)."""
    faults = []
    if names := sorted(missing):
        faults.append(f"lack {shown(names[0])}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    if unlike := sorted(
        (name, tuple(found), tuple(wanted)) for name, found, wanted in shapes if tuple(found) != tuple(wanted)
    ):
        name, found, wanted = unlike[0]
        more = f" and {len(unlike) - 1} more of other shapes" if len(unlike) > 1 else ""
        faults.append(f"have {shown(name)} of shape {found}, which must be {wanted}{more}")
    if faults:
        raise UserError(f"its weights do not fit its config.json: they {'; they '.join(faults)}")
