"""Photos to encode, and a count of what is encoded."""

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train_dreambooth_lora as train
from dreambooth.bases import families
from dreambooth.data import encodings, photos
from dreambooth.data.crops import Crops
from dreambooth.data.decode_cache import DecodeCache
from dreambooth.data.encoding_cache import EncodingCache
from tests import tiny

FLAG = "--instance_data_dir"


CPU = torch.device("cpu")


ALONE: Any = types.SimpleNamespace(rank=0, world=1, is_main=True)


ON_DISK = ["--cache_latents", "disk", "--encoded_dir"]


@dataclasses.dataclass
class Work:
    """What was done: sizes of the pictures encoded, prompts encoded, parts loaded, files of pictures
    decoded."""

    pictures: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    prompts: list[str] = dataclasses.field(default_factory=list)
    loaded: list[str] = dataclasses.field(default_factory=list)
    decoded: list[bytes] = dataclasses.field(default_factory=list)


def spy(monkeypatch, owner: Any, name: str, see: Callable[..., Any]) -> None:
    real = getattr(owner, name)

    def watched(*args, **others):
        see(*args, **others)
        return real(*args, **others)

    monkeypatch.setattr(owner, name, watched)


def train_nothing(training: train.Training) -> None:
    """No step."""


CAPTIONED = ["--caption_column", "text"]


def entries_in(folder: Path, kind: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{kind}*.safetensors"))}


def words(*given: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, base: list(given)


def photo_of(folder: Path, size: tuple[int, int]) -> photos.Photo:
    return photos.check_folder(tiny.make_photos(folder, 1, size), FLAG).photos[0]


def encoded_photo(
    base: families.Base, photo: photos.Photo, *, resolution: int = 64, mirrored: bool = False
) -> encodings.EncodedPhotos:
    crops = Crops(resolution, "lanczos", False, base.vae_stride)
    cache = EncodingCache(None, print)
    return encodings.encode_photos(cache, base, [(photo, mirrored, crops)], CPU, ALONE, lambda: None)


# --- pictures that were decoded before


def check(folder: Path, kept: Path, **limits: Any) -> photos.Folder:
    known = DecodeCache(kept)
    found = photos.check_folder(folder, FLAG, cache=known, **limits)
    assert known.save() == []
    return found
