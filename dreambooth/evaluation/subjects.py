"""The subjects that evaluate.py evaluates: from flags, or from a table in a YAML or CSV file. Imports no
torch, and opens no adapter and no photo.
"""

import csv
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth.evaluation import protocol
from dreambooth.io import reader
from dreambooth.io.errors import UserError, few, reason_of, shortened, shown
from dreambooth.options import adapter_sets, paths
from dreambooth.options.adapter_sets import AdapterSet, WeightedAdapter
from dreambooth.options.evaluate import SubjectOptions

BASE = "base"  # the method of pictures without an adapter
_FIELDS = (
    "subject",
    "adapter",
    "photos",
    "class_noun",
    "rare_word",
    "live",
    "method",
    "reader",
    "trained_photos",
)
_NEEDED = ("subject", "adapter", "photos", "rare_word")
_YES, _NO = ("yes", "true", "1"), ("no", "false", "0")
_NAME = re.compile(r"\w[\w.-]{0,59}")


@dataclasses.dataclass(frozen=True)
class Case:
    """A subject with one of its adapters: a row of the table."""

    where: str
    """Names the row, or the flags, in messages."""
    subject: str
    method: str
    """How the adapter was made. Means are over the subjects of a method."""
    adapter: WeightedAdapter
    photos: Path
    trained_photos: Path | None
    """The photos that the adapters were trained on; None if they are `photos`."""
    class_noun: str
    rare_word: str
    is_live: bool
    reader: Path | None
    """Folder with the subject.json of a subject of the embedded base's world; None without one."""

    @property
    def adapter_set(self) -> AdapterSet:
        return AdapterSet(self.method, self.where, (self.adapter,))

    @property
    def folders(self) -> dict[str, Path]:
        """The folders of photos, by the name that messages have for them."""
        start = "--" if self.where.startswith("--adapter") else f"{self.where}: "
        trained = {f"{start}trained_photos": self.trained_photos} if self.trained_photos else {}
        return {f"{start}photos": self.photos, **trained}

    @property
    def about_subject(self) -> tuple[Any, ...]:
        """What all rows of a subject must agree in."""
        return self.photos, self.trained_photos, self.class_noun, self.rare_word, self.is_live, self.reader


def of(options: SubjectOptions, judge_reader: str | None) -> list[Case]:
    """The cases that the flags give, in order. Raises UserError if the table is wrong, a name cannot be that
    of a folder, rows of a subject differ, or a subject has a method twice."""
    if options.subjects_file:
        cases = list(_read(Path(options.subjects_file), judge_reader))
        cases = _selected(cases, options)
    else:
        cases = list(_of_flags(options, judge_reader))
    subjects = {case.subject for case in cases}
    if judge_reader and len(subjects) > 1:
        raise UserError(
            f"--judge_reader is the folder of one subject, and the table has {len(subjects)}: give each row a"
            " reader"
        )
    methods: dict[tuple[str, str], Case] = {}
    for case in cases:
        first = next(other for other in cases if other.subject == case.subject)
        if case.about_subject != first.about_subject:
            raise UserError(
                f"{case.where}: all but adapter and method must be as in {first.where},"
                " which is the same subject"
            )
        twin = methods.setdefault((case.subject.lower(), case.method.lower()), case)
        if twin is not case:
            raise UserError(
                f"{case.where}: subject {case.subject} with method {case.method} is {twin.where} too;"
                " name another method"
            )
    return cases


def _of_flags(options: SubjectOptions, judge_reader: str | None) -> Iterator[Case]:
    """A case for each --adapter. Subject and methods have the names of the photos' folder and of the
    adapters."""
    names = [_folder_name(_weighted(word, "--adapter").path) for word in options.adapter]
    for number, word in enumerate(options.adapter):
        earlier = names[:number].count(names[number])
        method = names[number] + (f"-{earlier + 1}" if earlier else "")
        fields = {
            "subject": _folder_name(Path(options.photos or "")),
            "adapter": word,
            "photos": options.photos,
            "trained_photos": options.trained_photos,
            "class_noun": options.class_noun,
            "rare_word": options.rare_word,
            "live": options.live,
            "method": method if len(names) > 1 else "adapter",
            "reader": judge_reader,
        }
        yield _case(fields, "--adapter" + (f" {shown(word)}" if len(names) > 1 else ""))


def _folder_name(path: Path) -> str:
    """The name of a file or folder, as the name of a subject or method."""
    return adapter_sets.name_of(path).lstrip("-.")[:50] or "unnamed"


def _selected(cases: list[Case], options: SubjectOptions) -> list[Case]:
    """The cases of --subjects; all without it."""
    names = list(dict.fromkeys(case.subject for case in cases))
    for name in options.subjects:
        if name not in names:
            near = difflib.get_close_matches(name[:80], names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {few(names)}"
            raise UserError(f"--subjects: the table has no subject {shortened(name)}; {hint}")
    return [case for case in cases if case.subject in (options.subjects or names)]


# --- the table


def _read(path: Path, judge_reader: str | None) -> Iterator[Case]:
    """The rows of --subjects_file. Raises UserError."""
    where = f"--subjects_file {shown(path)}"
    rows = _csv_rows(path, where) if path.suffix.lower() == ".csv" else _yaml_rows(path, where)
    if not rows:
        raise UserError(f"{where}: no subject in it")
    for number, row in enumerate(rows, 1):
        name = row.get("subject") if isinstance(row, dict) else None
        title = f" ({shortened(name)})" if isinstance(name, str) and name.strip() else ""
        place = f"{where}: row {number}{title}"
        if not isinstance(row, dict):
            raise UserError(f"{place} must be a table with {', '.join(_NEEDED)}, got {type(row).__name__}")
        yield _case({"reader": judge_reader, **row}, place)


def _yaml_rows(path: Path, where: str) -> list[Any]:
    content = reader.read_yaml(path, where)
    if content is not None and not isinstance(content, list):
        raise UserError(f"{where}: must be a list of rows, `- subject: dog`, got {type(content).__name__}")
    return content or []


def _csv_rows(path: Path, where: str) -> list[Any]:
    """The rows of a CSV file whose first line names the columns. A cell without text is not given."""
    lines = reader.lines(reader.read_text(path, where))
    try:
        table = [row for row in csv.reader(lines, strict=True) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{where}: not a CSV file: {reason_of(error)}") from None
    header = [cell.strip() for cell in table[0]] if table else []
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{where}: the column {shortened(twice[0])} is there twice")
    for number, row in enumerate(table[1:], 1):
        if len(row) != len(header):
            raise UserError(f"{where}: row {number} has {len(row)} cells and the first line {len(header)}")
    return [
        {name: cell.strip() for name, cell in zip(header, row, strict=True) if cell.strip()}
        for row in table[1:]
    ]


def _case(row: Mapping[str, Any], where: str) -> Case:
    """The case of a row. Class noun and live of the data set's own subjects may be left out. Raises UserError
    if a field is unknown, missing or wrong."""
    for key in row:
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key)[:80], _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(_FIELDS)}"
            raise UserError(f"{where} has {shortened(str(key))!r}; {hint}")
    texts = {name: _text(row, name, where) for name in _FIELDS if name != "live"}
    subject, method = texts["subject"] or "", texts["method"] or "adapter"
    class_noun = texts["class_noun"] or protocol.CLASSES.get(subject)
    for name in _NEEDED:
        if not texts[name]:
            raise UserError(f"{where} lacks {name}; a row needs {', '.join(_NEEDED)} and class_noun")
    if class_noun is None:
        raise UserError(
            f"{where} lacks class_noun: {shortened(subject)} is no subject of the DreamBooth data set"
        )
    for name, text in (("subject", subject), ("method", method)):
        if not _NAME.fullmatch(text) or (name == "method" and text.lower() == BASE):
            raise UserError(
                f"{where}: {name} must be letters, digits, dots, dashes and underscores, and not the word"
                f" {BASE}, got {shortened(text)!r}; folders have that name"
            )
    for name, text in (("class_noun", class_noun), ("rare_word", texts["rare_word"] or "")):
        if "{" in text or "}" in text:
            raise UserError(f"{where}: {name} must have no braces, got {shortened(text)!r}")
    trained, folder = texts["trained_photos"], texts["reader"]
    return Case(
        where,
        subject,
        method,
        _weighted(paths.expanded(texts["adapter"] or "", f"{where}: adapter"), where),
        Path(paths.expanded(texts["photos"] or "", f"{where}: photos")),
        Path(paths.expanded(trained, f"{where}: trained_photos")) if trained else None,
        class_noun,
        texts["rare_word"] or "",
        _is_live(row.get("live"), class_noun, where),
        Path(paths.expanded(folder, f"{where}: reader")) if folder else None,
    )


def _text(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and value.strip() and "\0" not in value):
        return value
    raise UserError(f"{where}: {name} must be a text, got {shortened(value)!r}")


def _is_live(value: Any, class_noun: str, where: str) -> bool:
    """Whether the subject has the prompts of live subjects; by its class noun where the row does not say."""
    if value is None:
        return class_noun in protocol.LIVE_CLASSES
    word = str(value).lower()
    if word not in (*_YES, *_NO):
        raise UserError(f"{where}: live must be yes or no, got {shortened(value)!r}")
    return word in _YES


def _weighted(word: str, where: str) -> WeightedAdapter:
    path, weight = adapter_sets.split(word, where)
    return WeightedAdapter(path, weight, adapter_sets.name_of(path))
