"""The table of --subjects: several subjects of one run, a row for each, in a YAML file."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.data import captions
from dreambooth.io import reader
from dreambooth.io.errors import UserError, shortened, shown
from dreambooth.options import paths
from dreambooth.options.masks import MaskOptions
from dreambooth.options.photos import InstanceOptions

_NEEDED = ("photos", "prompt", "class_prompt")
_FIELDS = (*_NEEDED, "weight", "repeats", "captions", "masks", "validation_prompts")
_MOST = 100  # rows
_MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """One subject."""

    where: str
    """Names the row in messages."""
    photos: str
    prompt: str
    class_prompt: str
    weight: float
    """Factor of the loss of this subject's rows."""
    repeats: int
    """Its rows in a turn, in which each subject has as many rows as its repeats."""
    captions: str | None
    """As --caption_column."""
    masks: str | None
    """As --mask_dir."""
    validation_prompts: tuple[str, ...]

    def instance(self, options: InstanceOptions) -> InstanceOptions:
        """The options of this subject's photos: those of the run, with its folders, prompt and captions."""
        masks = dataclasses.replace(options.masks, mask_dir=self.masks)
        return dataclasses.replace(
            options,
            subjects=None,
            instance_data_dir=self.photos,
            instance_prompt=self.prompt,
            caption_column=self.captions,
            masks=masks if masks.is_given else MaskOptions(),
        )

    @property
    def record(self) -> list[Any]:
        """What makes the training of this subject, beside its photos and captions."""
        return [self.prompt, self.class_prompt, self.weight, self.repeats]


def read(file: str) -> list[Row]:
    """The rows of the table. Raises UserError, with file, row and key, if the file is no such table, or if
    two rows have the same prompt or folder."""
    where = f"--subjects {shown(file)}"
    content = reader.read_yaml(Path(file), where)
    if not isinstance(content, list) or not content:
        kind = "nothing" if content is None or content == [] else type(content).__name__
        raise UserError(f"{where}: must be a list of rows, `- photos: my_dog`, got {kind}")
    if len(content) > _MOST:
        raise UserError(f"{where}: at most {_MOST} rows, got {len(content)}")
    rows = [_row(row, f"{where}: row {number}") for number, row in enumerate(content, 1)]
    for number, row in enumerate(rows):
        for earlier in rows[:number]:
            if row.prompt.split() == earlier.prompt.split():
                raise UserError(
                    f"{row.where}: prompt is that of {earlier.where}: give each subject its own rare word"
                )
            if Path(row.photos).resolve() == Path(earlier.photos).resolve():
                raise UserError(f"{row.where}: photos is the folder of {earlier.where}: name another")
        if row.masks is not None and Path(row.masks).resolve() == Path(row.photos).resolve():
            raise UserError(f"{row.where}: masks and photos must be two folders")
    return rows


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a table with {', '.join(_NEEDED)}, got {type(row).__name__}")
    for key in row:
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key)[:80], _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(_FIELDS)}"
            raise UserError(f"{where} has {shortened(str(key))!r}; {hint}")
    for name in _NEEDED:
        if name not in row:
            raise UserError(f"{where} lacks {name}; a row needs {', '.join(_NEEDED)}")
    wanted = row.get("validation_prompts") or []
    if not isinstance(wanted, list):
        raise UserError(f"{where}: validation_prompts must be a list of texts, got {shortened(wanted)!r}")
    return Row(
        where,
        _folder(row, "photos", where),
        _text(row["prompt"], "prompt", where),
        _text(row["class_prompt"], "class_prompt", where),
        _weight(row, where),
        _repeats(row, where),
        _text(row["captions"], "captions", where) if row.get("captions") is not None else None,
        _folder(row, "masks", where) if row.get("masks") is not None else None,
        tuple(_text(prompt, "validation_prompts", where) for prompt in wanted),
    )


def _folder(row: Mapping[str, Any], name: str, where: str) -> str:
    return paths.expanded(_text(row[name], name, where), f"{where}: {name}")


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} must be a text, got {shortened(value)!r}")
    if fault := captions.fault_of(value):
        raise UserError(f"{where}: {name} {fault}")
    return value


def _weight(row: Mapping[str, Any], where: str) -> float:
    value = row.get("weight", 1.0)
    if type(value) not in (int, float) or not (math.isfinite(value) and 0 < value <= 1000):
        raise UserError(f"{where}: weight must be a number over 0 and at most 1000, got {shortened(value)!r}")
    return float(value)


def _repeats(row: Mapping[str, Any], where: str) -> int:
    value = row.get("repeats", 1)
    if type(value) is not int or not 1 <= value <= _MOST_REPEATS:
        raise UserError(
            f"{where}: repeats must be a whole number from 1 to {_MOST_REPEATS}, got {shortened(value)!r}"
        )
    return value
