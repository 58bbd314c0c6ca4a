"""What decoding found of pictures, kept between starts: a file with the same bytes is hashed again, not decoded again.

One file in the folder of encodings. It says nothing of where a picture lies, and it lifts no limit: whoever asks compares sizes with the limits
of now. What was found by another version of Pillow, or by other code here, does not count.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import PIL

from dreambooth.errors import shown
from dreambooth.files import atomic

NAME = "photos.json"
_LAYOUT = 1  # of the file, and of what decoding a picture means
_LARGEST = 256 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Seen:
    """What decoding a file found: (width, height) upright, SHA-256 of the pixels, remarks for the user."""

    size: tuple[int, int]
    pixels_sha256: str
    remarks: tuple[str, ...]


class SeenPhotos:
    """`of` and `add` go by the SHA-256 of a picture's file. A folder without such a file, or with a damaged one, has seen nothing."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.pictures = _read(self.path)
        self.has_more = False

    def of(self, sha256: str) -> Seen | None:
        return self.pictures.get(sha256)

    def add(self, sha256: str, seen: Seen) -> None:
        self.pictures[sha256] = seen
        self.has_more = True

    def save(self) -> list[str]:
        """Write the file, if there is anything new; what to tell the user if that fails."""
        if not self.has_more:
            return []
        table = {
            sha256: [list(seen.size), seen.pixels_sha256, list(seen.remarks)]
            for sha256, seen in (_read(self.path) | self.pictures).items()
        }
        content = {"layout": _LAYOUT, "pillow": PIL.__version__, "sha256": _digest(table), "pictures": table}
        try:
            atomic.write(self.path, json.dumps(content, separators=(",", ":")).encode())
        except OSError as error:
            return [
                f"{shown(self.path)} cannot be written ({error.strerror or error}): the next start decodes these pictures again"
            ]
        self.has_more = False
        return []


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Seen]:
    """What the file holds; nothing if it is missing, damaged, or of another version: then every picture is decoded."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return {}
        content = json.loads(path.read_bytes())
        if (content["layout"], content["pillow"], content["sha256"]) != (
            _LAYOUT,
            PIL.__version__,
            _digest(content["pictures"]),
        ):
            return {}
        return {
            sha256: Seen((size[0], size[1]), pixels, tuple(remarks))
            for sha256, (size, pixels, remarks) in content["pictures"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return {}
