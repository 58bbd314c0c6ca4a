"""Flags that take paths, by the type of their field: home folders, variables, and the paths of run.yaml.

Imports no torch: --help and messages about wrong flags are printed at once.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from dreambooth.io import reader
from dreambooth.io.errors import UserError, shown
from dreambooth.options.rules import Rule, rules_of

_LONGEST = 3500  # bytes; Linux takes 4096, and files in the folder have names of their own


@dataclasses.dataclass(frozen=True)
class PathMark(Rule):
    """Marks the type of a field whose value is a path.

    `file` is a path, alone or as FILE:WEIGHT. `file or id` may be the id of a repository on the hub instead.
    `file in output` is relative to the output folder, or absolute.
    """

    kind: Literal["file", "file or id", "file in output"]

    def broken_by(self, value: str) -> str | None:
        """A path must not be empty: "" is the working folder. It must fit into run.yaml, which is UTF-8."""
        if not value.strip() or "\0" in value:
            return "must be the name of a file or folder"
        path = os.path.abspath(value).encode(errors="surrogatepass")
        if len(path) > _LONGEST or max(map(len, path.split(b"/"))) > 255:
            return f"must be a path of at most {_LONGEST} bytes, and of names of at most 255 bytes"
        return None if path.decode(errors="replace").encode() == path else "must be a path in UTF-8"


FilePath = Annotated[str, PathMark("file")]
PathOrId = Annotated[str, PathMark("file or id")]
PathInOutput = Annotated[str, PathMark("file in output")]

PIN = "@sha256:"  # between a folder or id and the hash of its weights
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\}|[({])")
_RUN_YAML, _RUN_JSON = "run.yaml", "run.json"  # as training/run_folder.py names them


def mark_of(kind: Any) -> PathMark | None:
    """The mark in a field's type (also in `PATH | None` and `tuple[PATH, ...]`); None if it is no path."""
    return next((rule for rule in rules_of(kind) if isinstance(rule, PathMark)), None)


# ---- home folders and variables


def expanded(text: str, where: str) -> str:
    """The path with ~, ~user, $NAME and ${NAME} replaced, as a shell does.

    The name of a file that exists is returned unchanged where it has a $. `where` begins the message. Raises
    UserError if a variable is not set or there is no such user.
    """
    path = os.path.expanduser(text)
    if path.startswith("~") and not os.path.lexists(path):
        name = shown(path.partition("/")[0])
        raise UserError(f"{where}: {name} names no home folder; spell the path out, or begin it with ./")
    without_weight = path.rpartition(":")[0]
    if "$" not in path or os.path.lexists(path) or (without_weight and os.path.lexists(without_weight)):
        return path

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            raise UserError(f"{where}: of {shown(text)} only ~, $NAME and ${{NAME}} are replaced")
        if not os.environ.get(name):
            raise UserError(f"{where}: the variable {name} of {shown(text)} is not set; spell the path out")
        return os.environ[name]

    return _VARIABLE.sub(value, path)


def expand_words(words: Sequence[str], fields: Mapping[str, dataclasses.Field]) -> list[str]:
    """The words of a command line, with the values of flags that take paths expanded.

    `fields` are those of all flags, by name. Raises UserError as `expanded`.
    """
    result, name = [], ""
    for word in words:
        if word.startswith("--"):
            flag, is_joined, value = word.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            if is_joined and _is_path(fields, name):
                word = f"{flag}={expanded(value, f'--{name}')}"
        elif _is_path(fields, name):
            word = expanded(word, f"--{name}")
        result.append(word)
    return result


def _is_path(fields: Mapping[str, dataclasses.Field], name: str) -> bool:
    return name in fields and mark_of(fields[name].type) is not None


# ---- paths in run.yaml


def absolute(table: Mapping[str, Any], fields: Mapping[str, dataclasses.Field]) -> dict[str, Any]:
    """The flags of a run with absolute paths, for run.yaml. Ids on the hub do not change."""

    def stored(value: Any, mark: PathMark | None) -> Any:
        if isinstance(value, list):
            return [stored(item, mark) for item in value]
        if mark is not None and mark.kind == "file or id":
            name, pin, digest = value.partition(PIN)
            return os.path.abspath(name) + pin + digest if os.path.exists(name) else value
        return os.path.abspath(value) if mark is not None and mark.kind == "file" else value

    return {name: stored(value, mark_of(fields[name].type)) for name, value in table.items()}


def folder_of_run(config: Path) -> Path | None:
    """The absolute path of the folder whose run.yaml is `config`; None if it is no file of a run."""
    for path in (config, config.resolve()):
        if path.name == _RUN_YAML and _is_record(path.parent / _RUN_JSON):
            return Path(os.path.abspath(path.parent))
    return None


def _is_record(path: Path) -> bool:
    """Whether the file is a run.json of this program."""
    try:
        record = reader.read_json_table(path, _RUN_JSON, reader.LARGEST_RECORD)
    except UserError:
        return False
    return isinstance(record.get("flags"), dict) and "pictures" in record


def restored(
    table: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """(the flags in the run.yaml of `folder` with the paths that hold now, notes).

    --output_dir is `folder`, whatever path was stored. A stored path in the former folder is the same one in
    `folder`. Another one that is gone is looked for where it is relative to the folder.
    """
    given = table.get("output_dir")
    stored_dir = given if isinstance(given, str) else str(folder)
    root = _working_folder(stored_dir, folder)
    before = os.path.normpath(root / stored_dir)
    is_moved = not _is_same(before, folder)
    notes = (
        [f"the run of {shown(before)} is now in {shown(folder)}, which is --output_dir"] if is_moved else []
    )
    result = {**table, "output_dir": str(folder)}
    for name, value in table.items():
        mark = mark_of(fields[name].type) if name in fields else None
        if name == "output_dir" or mark is None or not isinstance(value, str):
            continue
        if mark.kind == "file in output" and not os.path.isabs(value):
            continue
        path = os.path.normpath(root / value)
        if is_moved and Path(path).is_relative_to(before):
            result[name] = str(folder / Path(path).relative_to(before))
        elif os.path.exists(path):
            result[name] = path
        elif is_moved and os.path.exists(moved := os.path.normpath(folder / os.path.relpath(path, before))):
            result[name] = moved
            notes.append(f"--{name}: {shown(value)} does not exist; {shown(moved)} is used")
    return result, notes


def _working_folder(stored_dir: str, folder: Path) -> Path:
    """The folder in which a run was started whose --output_dir was `stored_dir`, and which is now `folder`.

    Older versions stored paths as they were given. The present working folder if it cannot be told.
    """
    parts = Path(os.path.normpath(stored_dir)).parts
    is_known = not os.path.isabs(stored_dir) and ".." not in parts and folder.parts[-len(parts) :] == parts
    return Path(*folder.parts[: -len(parts)]) if is_known and parts else Path.cwd()


def _is_same(path: str, folder: Path) -> bool:
    try:
        return os.path.samefile(path, folder)
    except OSError:
        return False
