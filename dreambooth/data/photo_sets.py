"""Finds the photos of the subject: in a folder of the user, or in a data set of the hub.

Training reads folders only. The photos of a data set are written to a folder in the cache once, with
unchanged bytes, and with a metadata.jsonl for their captions. From then on that folder is treated as any
other.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth.data import captions, picture_files
from dreambooth.files import locks
from dreambooth.io import reader, writer
from dreambooth.io.errors import UserError, few, raise_all, shortened, shown, type_and_reason
from dreambooth.options.photos import InstanceOptions

_FLAG = "--dataset_name"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_MOST_PROBLEMS = 20
_LAYOUT = 1  # version of the folders in the cache: another version is written anew


@dataclasses.dataclass(frozen=True)
class PhotoSet:
    """A folder of photos, the flag that named it, and notes for the user."""

    folder: Path
    flag: str
    notes: tuple[str, ...] = ()


def find(instance: InstanceOptions) -> PhotoSet:
    """The folder of the subject's photos. A data set's `train` split is downloaded, or taken from the cache.

    Raises UserError if the data set cannot be read or lacks a column. The photos themselves are not checked.
    """
    if instance.dataset_name is None:
        assert instance.instance_data_dir is not None
        photo_set = PhotoSet(Path(instance.instance_data_dir), "--instance_data_dir")
    else:
        folder = _local_folder(instance.dataset_name)
        if folder is None:
            return _of_hub(instance.dataset_name, instance)
        photo_set = PhotoSet(folder, _FLAG)
    if instance.dataset_config_name is not None:
        raise UserError(
            f"--dataset_config_name is for a data set of the hub; {shown(photo_set.folder)} is a folder of "
            "yours: leave it out"
        )
    return photo_set


def _local_folder(name: str) -> Path | None:
    """The folder `name`, or its `train` if `name` itself holds no photos; None if there is no such folder."""
    folder = Path(name)
    try:
        if not folder.is_dir():
            if os.path.lexists(folder):
                raise UserError(
                    f"{_FLAG}: {shown(name)} is not a folder; name the folder that holds the pictures"
                )
            return None
        has_captions = any(os.path.lexists(folder / name) for name in picture_files.METADATA)
        if has_captions or not (folder / "train").is_dir():
            return folder
        return folder if picture_files.list_folder(folder, _FLAG).pictures else folder / "train"
    except OSError as error:  # no permission
        raise UserError(f"{_FLAG}: {shown(name)} cannot be read: {error.strerror or error}") from None


def _of_hub(name: str, instance: InstanceOptions) -> PhotoSet:
    """The photos of a data set of the hub, in a folder of the cache. Raises UserError as `find` does."""
    no_folder = f"{_FLAG}: there is no folder {shown(name)}, and"
    # a name like "imagefolder" would make the package read all pictures of the working directory
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{no_folder} a hub id is of the form OWNER/NAME")
    try:
        from datasets import Image, config, load_dataset
    except ImportError as error:
        why = "" if error.name == "datasets" else f" ({type_and_reason(error)})"
        install = f"for a hub id the datasets package is needed: pip install '.[datasets]'{why}"
        raise UserError(f"{no_folder} {install}") from None
    captions.check_columns(instance)
    try:
        dataset = load_dataset(
            name, instance.dataset_config_name, split="train", cache_dir=instance.cache_dir
        )
    # errors of the package, of files, the network, Parquet and archives: all have a useful message
    except Exception as error:
        raise UserError(f"{no_folder} as a hub id it cannot be read: {type_and_reason(error)}") from None
    notes = _check_columns(dataset, Image, instance)
    columns = [instance.image_column, instance.caption_column]
    rows = dataset.select_columns([column for column in columns if column])
    rows = rows.cast_column(instance.image_column, Image(decode=False))
    content = [_LAYOUT, name, instance.dataset_config_name, dataset._fingerprint, *columns]
    root = Path(instance.cache_dir or config.HF_DATASETS_CACHE) / "dreambooth-photos"
    folder = root / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    try:
        if not folder.is_dir():
            _write_once(folder, rows, instance)
    except OSError as error:
        reason = f"cannot be written to {shown(root)}: {error.strerror or error}"
        raise UserError(f"--cache_dir: the pictures of {name} {reason}") from None
    return PhotoSet(folder, _FLAG, notes)


def _check_columns(dataset: Any, image_kind: type, instance: InstanceOptions) -> tuple[str, ...]:
    """Notes for the user. Raises UserError if the columns of photos or captions are missing."""
    kinds = dict(dataset.features)
    pictures = [column for column, kind in kinds.items() if isinstance(kind, image_kind)]
    texts = [
        column for column, kind in kinds.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    problems = [
        f"{flag}: {shown(instance.dataset_name)} has no column {shortened(column)} with {kind}; those with "
        f"{kind}: {few(suitable, 20) or 'none'}; all its columns: {few(list(kinds), 20) or 'none'}"
        for flag, column, suitable, kind in (
            ("--image_column", instance.image_column, pictures, "pictures"),
            ("--caption_column", instance.caption_column, texts, "text"),
        )
        if column is not None and column not in suitable
    ]
    raise_all(problems)
    if instance.caption_column or not texts:
        return ()
    advice = f"--caption_column {shortened(texts[0])} takes it as captions"
    return (f"{shown(instance.dataset_name)} has text beside its pictures; {advice}",)


def _write_once(folder: Path, rows: Any, instance: InstanceOptions) -> None:
    """Write photos and captions to `folder`, completely or not at all. Concurrent processes take turns."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.hold(folder.parent, "--cache_dir", wait=lambda owner: None) as unlocked:
        if folder.is_dir():
            return
        if not unlocked:
            for path in folder.parent.iterdir():
                # a dead process left it: a living one would hold the lock
                if writer.target_of(path.name):
                    writer.remove(path)
        try:
            with writer.new_folder(folder) as temporary:
                _write(temporary, rows, instance)
        except OSError:
            # where locks do not work, another process may have written the same photos first
            if not folder.is_dir():
                raise


def _write(folder: Path, rows: Any, instance: InstanceOptions) -> None:
    """Write photos and captions into `folder`. Raises UserError, with one line per faulty row."""
    problems, lines = [], []
    for number, row in enumerate(_each(rows)):
        try:
            caption = row[instance.caption_column] if instance.caption_column else None
            if caption is not None and (fault := captions.fault_of(caption)):
                raise UserError(f"the caption {fault}")
            data = _bytes(row[instance.image_column])
            name = f"{number:05}{_suffix(data)}"
        except UserError as error:
            problems.append(f"{_FLAG}: {shown(instance.dataset_name)}, row {number}: {error}")
            continue
        writer.write_new(folder / name, data)
        cells = {captions.name_column(instance): name}
        if instance.caption_column:
            cells[instance.caption_column] = caption or ""
        lines.append(json.dumps(cells))
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        tail = [f"{_FLAG}: and {more} more rows"] if more > 0 else []
        raise UserError("\n".join([*problems[:_MOST_PROBLEMS], *tail]))
    if not lines:
        raise UserError(f"{_FLAG}: {shown(instance.dataset_name)} has no rows in its train split")
    writer.write_new(folder / picture_files.METADATA[0], "".join(f"{line}\n" for line in lines).encode())


def _each(rows: Any) -> Iterator[Mapping[str, Any]]:
    """The rows. Raises UserError if the cached data set is damaged."""
    try:
        yield from rows
    except Exception as error:  # for damaged files Arrow raises anything
        raise UserError(
            f"{_FLAG}: the cached data set cannot be read ({type_and_reason(error)}); remove it, or name "
            "another --cache_dir"
        ) from None


def _bytes(cell: Any) -> bytes:
    """A photo's file from a cell of the form {"bytes": the file or None, "path": its path}."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (None, None)
    if data is not None:
        return bytes(data)
    if not isinstance(path, str):
        raise UserError("there is no picture")
    # a data set may name any path, even that of a device
    return reader.read_bytes(
        Path(path), f"the picture {shortened(path)} cannot be read", picture_files.LARGEST
    )


def _suffix(data: bytes) -> str:
    """The ending of a photo's format, from its first bytes."""
    kind = picture_files.identify(data)
    if kind.format is None:
        advice = f"; {kind.advice}" if kind.advice else ""
        raise UserError(f"by its content {kind.name}, which is not read{advice}")
    return picture_files.READ[kind.format][0]
