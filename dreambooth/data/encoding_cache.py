"""The cache of VAE latents and prompt embeddings: in memory, or in a folder with one safetensors file per
entry.

The name of an entry is a hash of everything that determines its numbers. If any of that changes, the name
changes, and the old entry is not used. Names contain no paths, so folders may be moved and shared between
runs. Each file holds a hash of its name and tensors, which is checked at every reading. A damaged file counts
as missing until training starts. If the disk is full, or a file may not be read, the entry is kept in memory
for this run.
"""

import dataclasses
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

from dreambooth.files import safetensors_files
from dreambooth.io import reader, writer
from dreambooth.io.errors import UserError, reason_of, shown
from dreambooth.runtime.stops import Stop

Tensors = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

# Version of the files and of how photos and prompts are encoded: entries of other versions are not used.
_LAYOUT = 1
_LIMITS = safetensors_files.Limits(tensors=8, file_bytes=2**34)
# the files of this cache and of the decode cache, which share a folder
_FILE = re.compile(r"(latents|prompt)-[0-9a-f]{64}\.safetensors|photos\.json")
# Seconds. A temporary file that is still written to is younger, even if the clocks of two machines differ.
_OLD = 24 * 60 * 60


@dataclasses.dataclass(frozen=True)
class Entry:
    """The name of a cache entry and the shapes of its tensors."""

    name: str
    shapes: Shapes = dataclasses.field(hash=False)


def name_of(kind: str, content: Mapping[str, Any]) -> str:
    """The name of the entry whose numbers are determined by `content`, which JSON must be able to hold."""
    text = json.dumps({"layout": _LAYOUT, "kind": kind, **content}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}"


def sweep(folder: Path) -> list[str]:
    """Remove unfinished files of dead runs and return their names. Recent ones stay: another run may be
    writing them."""
    removed = []
    for path in sorted(folder.iterdir()) if os.access(folder, os.R_OK) else ():
        try:
            is_ours = _FILE.fullmatch(writer.target_of(path.name) or "")
            if is_ours and path.lstat().st_mtime < time.time() - _OLD:
                writer.remove(path)
                removed.append(path.name)
        except OSError:  # the file is another user's, or another run has just removed it
            continue
    return removed


class EncodingCache:
    """Cached tensors by entry: in files of `folder`, or in memory if that is None.

    `warn` is called with a message if the folder cannot be written to, or if a file may not be read.
    """

    def __init__(self, folder: Path | None, warn: Callable[[str], None]):
        self.folder, self.warn = folder, warn
        self.in_memory: dict[str, Tensors] = {}  # by name of the entry
        self.damaged: list[str] = []  # names of files that must be written again
        self.is_full = False
        self.forbidden: set[str] = set()  # names of entries whose files may not be read

    def has(self, entry: Entry) -> bool:
        """Whether the entry is cached, undamaged and of the right shapes."""
        if entry.name in self.in_memory:
            return True
        if self.folder is None:
            return False
        try:
            self._read(entry)
        except FileNotFoundError:
            return False
        except PermissionError:
            if not self.forbidden:
                self.warn(
                    f"{shown(self._path(entry.name))} cannot be read (Permission denied): encodings in files "
                    "that may not be read are made again and kept in memory for this run only"
                )
            self.forbidden.add(entry.name)
            return False
        except (UserError, OSError):
            self.damaged.append(self._path(entry.name).name)
            return False
        return True

    def store(self, entry: Entry, tensors: Tensors) -> None:
        """Cache the tensors of an entry."""
        tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        assert shapes == dict(entry.shapes), f"{entry.name} has shapes {shapes}, not {entry.shapes}"
        if self.folder is not None and not self.is_full and entry.name not in self.forbidden:
            try:
                metadata = {"format": "pt", "sha256": _digest(entry.name, tensors)}
                writer.write(self._path(entry.name), safetensors_files.stable_bytes(tensors, metadata))
                return
            except OSError as error:
                self.is_full = True
                reason = error.strerror or error
                self.warn(
                    f"{shown(self.folder)} cannot be written to ({reason}): "
                    "further encodings are kept in memory for this run only"
                )
        self.in_memory[entry.name] = tensors

    def read(self, entry: Entry) -> Tensors:
        """The tensors of a cached entry. Raises Stop if its file was damaged or removed after `has` checked
        it."""
        if entry.name in self.in_memory:
            return self.in_memory[entry.name]
        try:
            return self._read(entry)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{shown(self._path(entry.name))} cannot be read ({error.strerror or error})"
        raise Stop(
            f"{fault}; it was intact when the run began. "
            "With --resume_from_checkpoint latest the run continues and encodes it again"
        )

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _read(self, entry: Entry) -> Tensors:
        """The tensors in an entry's file. Raises UserError if it is damaged, OSError if it cannot be read."""
        path = self._path(entry.name)
        try:
            with reader.opened(path) as file:
                header = safetensors_files.read(path, _LIMITS)
                if header.shapes != entry.shapes:
                    raise UserError(f"{shown(path)} has tensors of other shapes")
                tensors = load(file.read())
        except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
            raise UserError(f"{shown(path)} is damaged ({reason_of(error)})") from None
        if header.metadata.get("sha256") != _digest(entry.name, tensors):
            raise UserError(f"{shown(path)} is not as it was written (its SHA-256 differs)")
        return tensors


def _digest(name: str, tensors: Tensors) -> str:
    """A hash of an entry's name and tensors."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f" {key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # as bytes, because numpy has no bfloat16
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
