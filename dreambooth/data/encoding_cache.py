"""Where encodings are kept: in memory, or on disk, one safetensors file an entry, found again by what its numbers follow from.

An entry is called by the hash of everything that decides its numbers, so that a change of any of it is another entry, and an old one is never
taken for it. Names say nothing of paths: folders may move, and runs may share one. Each file carries a hash of its name and tensors, compared
at every reading; what is damaged counts as missing while the run starts. A folder that fills up costs the cache, not the run: what it does not
take stays in memory. So does what takes the place of a file that may not be read: it is somebody else's, and stays as it is.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from dreambooth.errors import UserError, reason_of, shown
from dreambooth.files import atomic, safetensors_files
from dreambooth.runtime.stops import Stop

Tensors = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_LAYOUT = 1  # of the files, and of how photos and prompts are encoded: another one shares no entry with it
_LIMITS = safetensors_files.Limits(
    header_bytes=2**16,
    tensors=8,
    file_bytes=2**34,
    dtypes=frozenset({"F32", "F16", "BF16"}),
    empty_tensors=False,
)


_FILE = re.compile(r"(latents|prompt)-[0-9a-f]{64}\.safetensors|photos\.json")
_OLD = 24 * 60 * 60  # seconds: who still writes is younger, whatever the clocks say


class _Damaged(Exception):
    """What is wrong with an entry's file, in words."""


class _Missing(_Damaged):
    """There is no file."""


class _Forbidden(_Damaged):
    """The file may not be read."""


def name_of(kind: str, what: Mapping[str, Any]) -> str:
    """The name of the entry whose numbers follow from `what`, as JSON takes it."""
    text = json.dumps({"layout": _LAYOUT, "kind": kind, **what}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}"


def sweep(folder: Path) -> list[str]:
    """Remove what runs that died left half written, and return its names. Runs that share the folder may be at work: what is new stays."""
    swept = []
    for path in sorted(folder.iterdir()) if os.access(folder, os.R_OK) else ():
        try:
            if (
                _FILE.fullmatch(atomic.target_of(path.name) or "")
                and path.lstat().st_mtime < time.time() - _OLD
            ):
                path.unlink()
                swept.append(path.name)
        except OSError:  # another user's, or another run has just removed it: neither stands in the way
            continue
    return swept


class Entries:
    """Encodings by name: in `folder`, or in memory if that is None. `warn` is told of a folder that takes no more, and of files that may not be
    read."""

    def __init__(self, folder: Path | None, warn: Callable[[str], None]):
        self.folder, self.warn = folder, warn
        self.held: dict[str, Tensors] = {}
        self.shapes: dict[str, Shapes] = {}
        self.damaged: list[str] = []  # names of files that are made anew
        self.is_full = False
        self.forbidden: set[str] = set()

    def has(self, name: str, shapes: Shapes) -> bool:
        """Whether the entry is here, whole and of these shapes."""
        self.shapes[name] = shapes
        if name in self.held:
            return True
        if self.folder is None:
            return False
        try:
            self._read(name)
        except _Missing:
            return False
        except _Forbidden as error:
            if not self.forbidden:
                self.warn(
                    f"{error}: what it and others like it may hold is encoded anew, and kept in memory for this run alone"
                )
            self.forbidden.add(name)
            return False
        except _Damaged:
            self.damaged.append(self._path(name).name)
            return False
        return True

    def keep(self, name: str, tensors: Tensors) -> None:
        """Keep an entry whose shapes `has` was told."""
        own = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        found = {key: tuple(tensor.shape) for key, tensor in own.items()}
        assert found == dict(self.shapes[name]), f"{name} has shapes {found}, not {self.shapes[name]}"
        if self.folder is not None and not self.is_full and name not in self.forbidden:
            try:
                data = safetensors_files.stable_bytes(own, {"format": "pt", "sha256": _digest(name, own)})
                atomic.write(self._path(name), data)
                return
            except OSError as error:
                self.is_full = True
                reason = error.strerror or error
                self.warn(
                    f"{shown(self.folder)} cannot be written to ({reason}): what is encoded from here on is kept in memory for this run alone"
                )
        self.held[name] = own

    def read(self, name: str) -> Tensors:
        """The tensors of an entry that is here. Raises Stop if its file has been damaged or removed since then."""
        if name in self.held:
            return self.held[name]
        try:
            return self._read(name)
        except _Damaged as error:
            reason = f"{error}; it was whole when the run began. With --resume_from_checkpoint latest the run goes on and encodes it anew"
            raise Stop(reason) from None

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _read(self, name: str) -> Tensors:
        path = self._path(name)
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # a pipe is not waited for
            header = safetensors_files.read(path, _LIMITS)
            if header.shapes != self.shapes[name]:
                raise _Damaged(f"{shown(path)} has tensors of other shapes")
            tensors = load(path.read_bytes())
        except UserError as error:
            raise _Damaged(str(error)) from None
        except FileNotFoundError:
            raise _Missing(f"{shown(path)} is not there") from None
        except PermissionError:
            raise _Forbidden(f"{shown(path)} cannot be read (Permission denied)") from None
        except OSError as error:
            raise _Damaged(f"{shown(path)} cannot be read ({error.strerror or error})") from None
        except SafetensorError as error:  # it is being written to
            raise _Damaged(f"{shown(path)} is damaged ({reason_of(error)})") from None
        if header.metadata.get("sha256") != _digest(name, tensors):
            raise _Damaged(f"{shown(path)} is not as it was written (its SHA-256 differs)")
        return tensors


def _digest(name: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f" {key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]  # bfloat16 has no other way to numpy
    return digest.hexdigest()
