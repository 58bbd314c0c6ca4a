"""Captions of photos: in metadata.jsonl or metadata.csv, in a .txt or .caption file for each photo, or in a
metadata file of kohya's scripts.

The first two are the layout of the datasets package's imagefolder, the others are those of kohya's scripts.
All faults of these files are reported at once, each with its line, before anything slow.
"""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

from dreambooth.data import picture_files, tags
from dreambooth.io import reader
from dreambooth.io.errors import UserError, few, shortened, shown
from dreambooth.options.photos import InstanceOptions

LONGEST = 10_000  # characters of a caption: text encoders take the first few hundred at most
_LARGEST_TEXT = (
    4 * LONGEST + 4
)  # bytes of a photo's caption file: a character has up to four, and a mark may come first
_MOST_LINES = 200_000  # of a metadata file
_MOST_PROBLEMS = 20
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclasses.dataclass(frozen=True)
class _Table:
    """The content of a metadata file."""

    columns: list[str]
    rows: list[tuple[int, Mapping[str, Any]]]
    """(line number, cells by column) of every valid line."""
    problems: list[str]
    """Faults of the other lines."""


def name_column(instance: InstanceOptions) -> str:
    """The column of a metadata file that holds the file names of the photos.

    The datasets package calls it `file_name` in the file, and `image` in the loaded data set.
    """
    return "file_name" if instance.image_column == "image" else instance.image_column


def check_columns(instance: InstanceOptions) -> None:
    """Raise UserError if --caption_column is the column of file names."""
    if instance.caption_column == name_column(instance):
        raise UserError(
            f"--caption_column: {shown(instance.caption_column)} is the column that names the pictures; give "
            "the one with their captions"
        )


def read(
    folder: Path, flag: str, names: Sequence[str], instance: InstanceOptions
) -> tuple[dict[str, str], list[str]]:
    """(captions by name of photo, notes for the user). Without a flag of captions there are none.

    `names` are the photos in `folder`, which `flag` named. A photo that the result lacks has no caption, or
    one of nothing but commas; it is trained with --instance_prompt. Captions have no line breaks or other
    control characters, and --trigger_word in front. Raises UserError, with one line per fault, if captions
    cannot be read, are not text, or belong to other photos.
    """
    files = _Files.of(folder, names)
    if not instance.reads_captions:
        return {}, _unread_note(folder, files, instance)
    check_columns(instance)
    if instance.captions.in_json is not None:
        captions, problems, notes = _from_kohya(instance.captions.in_json, names)
    elif instance.caption_column is not None and files.metadata:
        captions, problems = _from_metadata(folder, files.metadata[0], names, instance)
        others = [*files.metadata[1:], *(f"{ending} files" for ending, texts in files.texts.items() if texts)]
        unread = f"captions are read from {files.metadata[0]}; not from the {' and '.join(others)} beside it"
        notes = [unread] if others else []
    else:
        captions, problems, notes = _from_files(folder, files, names, instance)
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        tail = [f"{flag}: and {more} more problems of the captions"] if more > 0 else []
        raise UserError("\n".join([f"{flag}: {problem}" for problem in problems[:_MOST_PROBLEMS]] + tail))
    captions = {name: caption if tags.tags_of(caption) else "" for name, caption in captions.items()}
    if empty := [name for name in names if captions.get(name) == ""]:
        notes.append(
            f"{len(empty)} of {len(names)} photos have an empty caption and are trained with "
            f"--instance_prompt: {few(empty)}"
        )
    trigger = instance.captions.trigger_word
    texts = {name: tags.with_trigger(captions[name], trigger) for name in names if captions.get(name)}
    return texts, notes


@dataclasses.dataclass(frozen=True)
class _Files:
    """The files of captions in a folder of photos."""

    metadata: list[str]
    texts: Mapping[str, Mapping[str, str]]
    """By ending: file by name of photo."""

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> Self:
        """Those that lie in `folder` beside the photos `names`."""
        metadata = [name for name in picture_files.METADATA if os.path.lexists(folder / name)]
        texts = {}
        for ending in picture_files.CAPTION_ENDINGS:
            beside = {name: Path(name).stem + ending for name in names}
            texts[ending] = {name: file for name, file in beside.items() if os.path.lexists(folder / file)}
        return cls(metadata, texts)


def _from_files(
    folder: Path, files: _Files, names: Sequence[str], instance: InstanceOptions
) -> tuple[dict[str, str], list[str], list[str]]:
    """({photo: caption or ""}, problems, notes) from the file beside each photo. Raises UserError if there is
    none."""
    wanted: str | None = instance.captions.caption_extension
    endings: list[str] = [wanted] if wanted else [ending for ending, texts in files.texts.items() if texts]
    if not endings or not files.texts[endings[0]]:
        example = shown(Path(names[0]).stem if names else "photo")
        flag, ending = ("--caption_extension", wanted) if wanted else ("--caption_column", ".txt")
        metadata = "" if wanted else f"{' or '.join(picture_files.METADATA)} or "
        raise UserError(
            f"{flag}: there are no captions in {shown(folder)}; looked for {metadata}"
            f"a {ending} file beside each photo, as in {example}{ending}"
        )
    ending = endings[0]
    texts = files.texts[ending]
    captions, problems = _from_texts(folder, texts, instance)
    without = [name for name in names if name not in texts]
    lacking = f"no {ending} file lies beside {few(without)}: trained with --instance_prompt"
    unread = f"captions are read from the {ending} files; not from the {' and '.join(endings[1:])} files"
    return captions, problems, [*([lacking] if without else []), *([unread] if endings[1:] else [])]


def _from_kohya(file: str, names: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """({photo: caption or ""}, problems, notes) from a metadata file of kohya's scripts, whose keys are paths
    or names of photos, with or without ending. Raises UserError if it cannot be read or names none of the
    photos."""
    where = f"--in_json {shown(file)}"
    table = reader.parsed_json_table(reader.read_text(Path(file), where), where, unique_keys=True)
    keys_of: dict[str, list[str]] = {}
    for key in table:
        keys_of.setdefault(PurePosixPath(key.replace("\\", "/")).name, []).append(key)
    captions, problems, without = {}, [], []
    for name in names:
        keys = keys_of.get(name) or keys_of.get(Path(name).stem, [])
        if not keys:
            without.append(name)
            continue
        if len(keys) > 1:
            problems.append(f"{where} names {shown(name)} several times, {few(keys)}: keep one of them")
            continue
        entry = table[keys[0]]
        cells = [entry.get("caption"), entry.get("tags")] if isinstance(entry, dict) else [entry]
        given = [cell for cell in cells if cell not in (None, "")]
        if fault := next(filter(None, map(fault_of, given)), None):
            problems.append(f"{where}: the caption of {shown(name)} {fault}")
        else:
            captions[name] = _one_line(", ".join(given))
    if not captions and not problems:
        raise UserError(
            f"{where} names none of the photos; it names {few(list(table)) or 'nothing'}, and the photos are "
            f"{few(names)}"
        )
    lacking = f"{where} does not name {few(without)}: trained with --instance_prompt"
    return captions, problems, [lacking] if without else []


def _from_metadata(
    folder: Path, file: str, names: Sequence[str], instance: InstanceOptions
) -> tuple[dict[str, str], list[str]]:
    """({photo: caption or ""}, problems) from a metadata file."""
    caption_column = instance.caption_column
    assert caption_column is not None
    try:
        table = _table(folder, file, instance)
    except UserError as error:
        return {}, [str(error)]
    name_of = name_column(instance)
    problems = [f"{file} {problem}" for problem in table.problems]
    if not table.columns:
        return {}, problems or [f"{file} is empty"]
    columns = f"its columns are {few(table.columns, 20)}"
    if caption_column not in table.columns:
        problems.append(f"{file} has no column {shortened(caption_column)} (--caption_column); {columns}")
    if name_of not in table.columns:
        flag = " (--image_column)" if instance.image_column != "image" else ""
        lacking = f"no column {shortened(name_of)}{flag} with the names of the pictures"
        return {}, [*problems, f"{file} has {lacking}; {columns}"]
    wanted, elsewhere = set(names), []
    first: dict[str, int] = {}  # the line that names a picture
    captions: dict[str, str] = {}
    for line, cells in table.rows:
        name: Any = cells.get(name_of)
        caption: Any = "" if cells.get(caption_column) is None else cells[caption_column]
        where = f"{file} line {line}"
        if fault := _fault_of_name(name, wanted):
            problems.append(f"{where}: {shortened(name_of)} {fault}")
            continue
        if fault := fault_of(caption):
            problems.append(f"{where}: the caption {fault}")
            caption = ""
        if name in first:
            problems.append(f"{where} names {shortened(name)} again, after line {first[name]}")
            continue
        first[name] = line
        captions[name] = _one_line(caption)
        if name not in wanted:
            elsewhere.append(name)
    if elsewhere:
        problems.append(f"{file} names pictures that are not in {shown(folder)}: {few(elsewhere)}")
    if unnamed := [name for name in names if name not in first]:
        problems.append(
            f"{file} does not name {few(unnamed)}; give each a line, with an empty caption for "
            "--instance_prompt"
        )
    return captions, problems


def _fault_of_name(name: object, wanted: set[str]) -> str | None:
    """What is wrong with the name of a photo in a metadata file; `wanted` are the names in the folder."""
    if name is None or name == "":
        return "is missing"
    if not isinstance(name, str):
        return f"is {shortened(name)}, which is not text"
    if "/" in name or name in (".", "..") or ("\\" in name and name not in wanted):
        return (
            f"is {shortened(name)}; only pictures directly in the folder are taken: move it there, and give "
            "its bare name"
        )
    return None


def fault_of(caption: object) -> str | None:
    """What is wrong with a caption; None if nothing is."""
    if not isinstance(caption, str):
        return f"is {shortened(caption)}, which is not text"
    if len(caption) > LONGEST:
        return (
            f"has {len(caption):,} characters; the most are {LONGEST:,}, since text encoders take only the "
            "beginning"
        )
    # halves of surrogate pairs: JSON can spell them, and no tokenizer takes them
    if "\0" in caption or any("\ud800" <= c <= "\udfff" for c in caption):
        return f"holds a code that is no character: {shortened(caption)}"
    return None


def read_prompts(file: str, flag: str) -> list[str]:
    """The prompts in a text file, one a line, without empty lines and lines that start with #. Raises
    UserError, with the `flag` that named the file, if it cannot be read, is empty, or has a `fault_of` a
    prompt."""
    where = f"{flag} {shown(file)}"
    lines = reader.lines(reader.read_text(Path(file), where))
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{where}: no prompt in it")
    if fault := next(filter(None, map(fault_of, prompts)), None):
        raise UserError(f"{where}: a prompt {fault}")
    return prompts


def _from_texts(
    folder: Path, texts: Mapping[str, str], instance: InstanceOptions
) -> tuple[dict[str, str], list[str]]:
    """({photo: caption or ""}, problems) from the text file of each photo."""
    captions, problems = {}, []
    for name, file in texts.items():
        try:
            caption = _text(folder, file, instance, _LARGEST_TEXT)
            if fault := fault_of(caption):
                raise UserError(f"{shown(file)} {fault}")
            captions[name] = _one_line(caption)
        except UserError as error:
            problems.append(str(error))
    return captions, problems


def _unread_note(folder: Path, files: _Files, instance: InstanceOptions) -> list[str]:
    """A note on captions that exist but are not read without a flag."""
    metadata = files.metadata
    if not metadata:
        return [
            f"captions lie beside the photos ({ending} files); --caption_extension {ending} reads them"
            for ending, texts in files.texts.items()
            if texts
        ][:1]
    try:
        table = _table(folder, metadata[0], instance)
    except UserError as error:  # no reason to stop, since the file is not needed
        unread = "they are not read without --caption_column"
        return [f"captions may lie beside the photos ({error}); {unread}"]
    cells = [cell for _, row in table.rows for cell in row.items() if cell[1] is not None]
    others = {column for column, value in cells if not isinstance(value, str)} | {name_column(instance)}
    with_text = [shortened(column) for column in dict(cells) if column not in others]
    return [
        f"captions lie beside the photos ({metadata[0]}); --caption_column {column} reads them"
        for column in with_text[:1]
    ]


def _table(folder: Path, file: str, instance: InstanceOptions) -> _Table:
    """The content of a metadata file. Raises UserError as `_text` does, and if it has over 200,000 lines."""
    text = _text(folder, file, instance, reader.LARGEST)
    if max(text.count("\n"), text.count("\r")) > _MOST_LINES:
        raise UserError(f"{shown(file)}: over {_MOST_LINES:,} lines")
    return _json_lines(text) if file.endswith(".jsonl") else _comma_separated(text)


def _json_lines(text: str) -> _Table:
    columns: dict[str, None] = {}
    rows: list[tuple[int, Mapping[str, Any]]] = []
    problems = []
    for number, line in enumerate(reader.lines(text), 1):
        if not line.strip():
            continue
        try:
            cells = reader.parsed_json_table(line, "the line")
        except UserError:
            problems.append(
                f'line {number} is no JSON object, as in {{"file_name": "1.png", "text": "..."}}: '
                f"{shortened(line.strip())}"
            )
            continue
        columns |= dict.fromkeys(cells)
        rows.append((number, cells))
    return _Table(list(columns), rows, problems)


def _comma_separated(text: str) -> _Table:
    columns: list[str] = []
    rows: list[tuple[int, Mapping[str, Any]]] = []
    problems = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if not cells:
                continue
            if not columns:
                columns = cells
                if len(set(columns)) < len(columns):
                    problems.append(f"has several columns of one name: {few(columns, 20)}")
            elif len(cells) > len(columns):
                problems.append(
                    f"line {reader.line_num} has {len(cells)} cells for {len(columns)} columns; a caption "
                    "with a comma needs quotes"
                )
            else:
                rows.append((reader.line_num, dict(zip(columns, cells, strict=False))))
    except csv.Error as error:
        problems.append(f"line {reader.line_num} is no line of a CSV file: {error}")
    return _Table(columns, rows, problems)


def _text(folder: Path, file: str, instance: InstanceOptions, largest: int) -> str:
    """The text of a file in the folder. Raises UserError, which begins with the file's name, if it cannot be
    used."""
    where = shown(file)
    data = picture_files.read_within(folder, file, where, largest, follow_symlinks=instance.follow_symlinks)
    return reader.decoded(data, where)


def _one_line(caption: str) -> str:
    """The caption with line breaks and other control characters replaced by spaces."""
    return _CONTROL.sub(" ", caption).strip()
