"""Embeddings of a set of pictures as a file, so that no picture is embedded twice."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dreambooth.evaluation.judges import Judge
from dreambooth.evaluation.picture_scores import Embedded
from dreambooth.evaluation.plan import Picture, PictureSet
from dreambooth.files import safetensors_files
from dreambooth.io import reader

_ROWS = ("dino", "clip", "texts", "texts_with_word")


def name_of(pictures: PictureSet) -> str:
    """The name of the file, relative to the output folder."""
    return f"embeddings/{pictures.folder.removeprefix('pictures/')}.safetensors"


def key_of(pictures: Sequence[Picture], hashes: Sequence[str], judges: Sequence[Judge | None]) -> str:
    """What embeddings depend on, as a SHA-256: `hashes` of the pictures' files, prompts, and the judges."""
    texts = [[picture.text, picture.prompt] for picture in pictures]
    settings = [judge and judge.settings for judge in judges]
    return hashlib.sha256(json.dumps([list(hashes), texts, settings]).encode()).hexdigest()


def content(embedded: Embedded, key: str) -> bytes:
    """The bytes of the file."""
    rows = {name: getattr(embedded, name) for name in _ROWS}
    tensors = {name: torch.from_numpy(row) for name, row in rows.items() if row is not None}
    metadata = {"key": key, "failures": json.dumps({"failures": embedded.failures})}
    return safetensors_files.stable_bytes(tensors, metadata)


def read(path: Path, key: str) -> Embedded | None:
    """The embeddings in a file of this program; None if they are of other pictures or judges."""
    with safetensors_files.opened(path) as file:
        metadata = file.metadata()
        if metadata["key"] != key:
            return None
        names = file.keys()
        rows: dict[str, np.ndarray | None] = {
            name: file.get_tensor(name).numpy() if name in names else None for name in _ROWS
        }
    return Embedded(reader.parsed_json_table(metadata["failures"], path.name)["failures"], **rows)
