"""Safetensors files: headers are checked before the library reads a file, and files are written with stable
bytes.

A file may come from anyone. The safetensors library refuses broken headers, but it accepts a million empty
tensors (which take 20 seconds) and a key that appears twice. Any characters are allowed in a key: messages
must not print it unescaped. A file that breaks a rule of the format is called incomplete; one that is over a
limit of this program is not. Files of other formats are recognized by their first bytes, for a helpful
message. This module imports torch only to read and write tensors.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.io import reader
from dreambooth.io.errors import UserError, reason_of, shortened, shown

if TYPE_CHECKING:
    import torch

# Dtypes that torch converts to float32; only F64 loses digits.
FLOATS = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
_BITS = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
    | dict.fromkeys(("I8", "U8", "BOOL", *(name for name in FLOATS if name.startswith("F8"))), 8)
    | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
    | {"F4": 4}
)
# bytes; the format's own limit. Headers may hold pictures and the tags of a whole data set.
LARGEST_HEADER = 100_000_000
_LONGEST_KEY = 512
_MOST_DIMENSIONS = 8
# Quotes and brackets of a header for each tensor that is allowed; to parse more takes gigabytes. One tensor
# has 13, and a quote that is escaped, in a text of the metadata, does not count.
_MARKS = 32
_MAGIC = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it; such files can carry code",
    b"\x80\x02": "serialized Python objects, which can carry code",
    b"\x80\x03": "serialized Python objects, which can carry code",
    b"\x80\x04": "serialized Python objects, which can carry code",
    b"\x80\x05": "serialized Python objects, which can carry code",
    b"version https://git-lfs": "a pointer of git-lfs; fetch the file itself with `git lfs pull`",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest number of tensors and of the file's bytes that are accepted. Dtypes are checked where
    tensors are read."""

    tensors: int
    file_bytes: int


ADAPTER = Limits(tensors=20_000, file_bytes=2 * 2**30)
# Whether a part of a base has the tensors it needs is checked when it is loaded.
BASE = Limits(tensors=200_000, file_bytes=2**40)


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a file. Tensors are listed by key, in the file's order."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    places: dict[str, tuple[str, int]]  # dtype, and the byte of the file at which the values begin


class _Broken(Exception):
    """A rule of the format that the file breaks. The message describes the fault."""


class _OverLimit(Exception):
    """A limit of this program that the file is over. The message describes it."""


def read(path: Path, limits: Limits) -> Header:
    """The header of a file. Raises UserError unless it is within `limits` and describes exactly the bytes
    that follow."""
    try:
        with reader.opened(path) as file:
            file_size = os.fstat(file.fileno()).st_size
            if file_size > limits.file_bytes:
                raise _OverLimit(f"{file_size:,} bytes are over {limits.file_bytes:,}")
            start = file.read(24)
            if len(start) < 8:
                raise _Broken(f"it has {len(start)} bytes; it was not written to its end")
            (size,) = struct.unpack("<Q", start[:8])
            others = [name for magic, name in _MAGIC.items() if start.startswith(magic)]
            if others and (size > file_size - 8 or start[8:9] != b"{"):
                raise _Broken(f"it is {others[0]}")
            if size > file_size - 8:
                raise _Broken(
                    f"its header should have {size:,} bytes, and {file_size - 8:,} follow: "
                    "cut off, or no safetensors file"
                )
            if size > LARGEST_HEADER:
                raise _Broken(
                    f"its header of {size:,} bytes is over {LARGEST_HEADER:,}, the limit of the format"
                )
            file.seek(8)
            header = file.read(size)
            marks = sum(map(header.count, (b'"', b"[", b"{"))) - header.count(b'\\"')
            if marks > _MARKS * limits.tensors:
                raise _OverLimit(
                    f"its header describes more than {limits.tensors:,} tensors, or metadata with as many"
                    f" quotes and brackets ({marks:,})"
                )
        content = reader.parsed_json_table(header, "its header", LARGEST_HEADER, unique_keys=True)
        return _checked(content, 8 + size, file_size - 8 - size, limits)
    except (_Broken, UserError) as error:
        raise UserError(f"{shown(path)}: not a complete safetensors file ({error})") from None
    except _OverLimit as error:
        raise UserError(
            f"{shown(path)}: {error}, the most that is read here; the format itself has no such limit"
        ) from None
    except OSError as error:
        raise UserError(
            f"{shown(path)}: not a complete safetensors file (it cannot be read: {error.strerror or error})"
        ) from None


def _checked(content: dict[str, Any], start: int, body: int, limits: Limits) -> Header:
    """The header from its JSON. The values begin at byte `start` of the file and take `body` bytes.

    Raises _Broken if an entry is wrong, or if the entries overlap, leave gaps, or do not fill the body;
    _OverLimit if there are too many.
    """
    metadata = content.pop("__metadata__", None) or {}  # the library accepts null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken("its metadata is not a table of strings")
    if len(content) > limits.tensors:
        raise _OverLimit(f"its {len(content):,} tensors are over {limits.tensors:,}")
    entries = {key: _entry(key, value) for key, value in content.items()}
    position = 0
    for begin, end, key in sorted((begin, end, key) for key, (_, _, begin, end) in entries.items()):
        if begin != position:
            fault = "overlaps with" if begin < position else "leaves a gap after"
            raise _Broken(f"{shown(key)} {fault} the tensor before it")
        position = end
    if position != body:
        fault = "cut off" if body < position else "bytes left over"
        raise _Broken(f"its tensors have {position:,} bytes and {body:,} follow the header: {fault}")
    return Header(
        {key: shape for key, (_, shape, _, _) in entries.items()},
        metadata,
        {key: (dtype, start + begin) for key, (dtype, _, begin, _) in entries.items()},
    )


def _entry(key: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of a tensor, begin and end in bytes after the header. Raises _Broken or
    _OverLimit."""
    if len(key) > _LONGEST_KEY:
        raise _OverLimit(f"the key {shortened(key)} of {len(key):,} characters is over {_LONGEST_KEY}")
    name = shown(key)
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _Broken(f"{name} lacks dtype, shape or data_offsets") from None
    if len(shape) > _MOST_DIMENSIONS:
        raise _OverLimit(f"the {len(shape)} dimensions of {name} are over {_MOST_DIMENSIONS}")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)):
        raise _Broken(f"{name} has an impossible shape or data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Broken(f"{name} has dtype {ascii(dtype)[:40]}; the format has {', '.join(sorted(_BITS))}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        size = end - begin
        raise _Broken(f"{name} of shape {shape} and dtype {dtype} does not fill its {size} bytes")
    return dtype, shape, begin, end


def check_values(where: str, header: Header, keys: Iterable[str], alphas: Container[str] = ()) -> None:
    """Raise UserError if a tensor of an adapter is empty, or not of floating-point numbers. `alphas` are the
    keys of tensors that may also be of whole numbers."""
    for key in keys:
        dtype, shape = header.places[key][0], header.shapes[key]
        if dtype not in FLOATS and not (key in alphas and dtype[0] in "IU"):
            allowed = ", ".join(sorted(FLOATS))
            raise UserError(f"{where}: {shown(key)} has dtype {dtype}; it must be one of {allowed}")
        if 0 in shape:
            raise UserError(f"{where}: {shown(key)} has no values: shape {shape}; the adapter is broken")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The library's reader of a file's tensors, for torch. Raises UserError if the file is not complete or
    cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shown(path)}: not a complete safetensors file ({reason_of(error)})") from None


def finite_tensors(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """(key, tensor as float32) for each of `keys` of an adapter. Raises UserError as `opened` does, and if a
    value is not finite."""
    with opened(path) as file:
        for key in keys:
            tensor = file.get_tensor(key).float()
            if not tensor.isfinite().all():
                raise UserError(
                    f"{shown(path)}: {shown(key)} has values that are not finite; the adapter is broken"
                )
            yield key, tensor


def stable_bytes(tensors: Mapping[str, "torch.Tensor"], metadata: dict[str, str]) -> bytes:
    """The bytes of a file with sorted keys. The library itself orders the metadata differently from run to
    run."""
    from safetensors.torch import save  # imports torch, which --help must not wait for

    data = save(dict(sorted(tensors.items())), metadata)
    (size,) = struct.unpack("<Q", data[:8])
    table = reader.parsed_json_table(data[8 : 8 + size], "the header", LARGEST_HEADER)
    header = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of eight
    return struct.pack("<Q", len(header)) + header + data[8 + size :]
