"""The cache of decoded photos: a photo with the same bytes is hashed at the next start, but not decoded.

It is one file in the folder of the encoding cache, without paths and pixels. Size limits are checked by the
caller. Results of another version of Pillow, of its plugins or of this code are not used.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dreambooth.data import picture_files
from dreambooth.io import reader, writer
from dreambooth.io.errors import UserError, shown

NAME = "photos.json"
_LAYOUT = 1  # version of the file and of the decoding in photos.py
_START = b'{"layout":'  # of the file, in every version
_LARGEST = 256 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What decoding a photo yields, apart from its pixels."""

    size: tuple[int, int]
    """(width, height) of the upright photo, in pixels."""
    pixels_sha256: str
    remarks: tuple[str, ...]
    """Templates of notes for the user."""


class DecodeCache:
    """`Decoded` by the SHA-256 of a photo's file. Without a usable file in `folder` the cache is empty."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.decoded = _read(self.path)
        self.is_changed = False

    def add(self, sha256: str, decoded: Decoded) -> None:
        """Add an entry, in memory; `save` writes it."""
        self.decoded[sha256] = decoded
        self.is_changed = True

    def save(self) -> list[str]:
        """Write the file if there are new photos, merged with what other runs have added to it. Returns
        warnings for the user."""
        if not self.is_changed:
            return []
        table = {
            sha256: [list(photo.size), photo.pixels_sha256, list(photo.remarks)]
            for sha256, photo in (_read(self.path) | self.decoded).items()
        }
        content = {
            "layout": _LAYOUT,
            "pillow": picture_files.decoders(),
            "sha256": _digest(table),
            "pictures": table,
        }
        try:
            if not _is_replaceable(self.path):
                raise OSError("another program wrote it")
            writer.write(self.path, json.dumps(content, separators=(",", ":")).encode())
        except OSError as error:
            return [
                f"{shown(self.path)} cannot be written ({error.strerror or error}): the next start decodes "
                "these pictures again"
            ]
        self.is_changed = False
        return []


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _is_replaceable(path: Path) -> bool:
    """Whether nothing has the file's name, or a file that this program wrote, by its first bytes."""
    if not os.path.lexists(path):
        return True
    with reader.opened(path, follow_links=False) as file:
        return file.read(len(_START)) == _START


def _read(path: Path) -> dict[str, Decoded]:
    """The content of the file; {} if it is missing, damaged or of another version."""
    try:
        content = reader.read_json_table(path, NAME, _LARGEST)
        expected = (_LAYOUT, picture_files.decoders(), _digest(content["pictures"]))
        if (content["layout"], content["pillow"], content["sha256"]) != expected:
            return {}
        return {
            sha256: Decoded((size[0], size[1]), pixels, tuple(remarks))
            for sha256, (size, pixels, remarks) in content["pictures"].items()
        }
    except (UserError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return {}
