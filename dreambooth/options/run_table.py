"""A table of many runs, --runs FILE.yaml: the flags of each run, by its name. Imports no torch."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.io import reader
from dreambooth.io.errors import UserError, few, shortened, shown
from dreambooth.options import command_line, paths
from dreambooth.options.training import TrainOptions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NOT_WITH_TABLE = ("overwrite", "resume_from_checkpoint")
_OF_TABLE = ("runs", "run_number", "output_dir", *_NOT_WITH_TABLE)
# They hold for the process, in which all runs are trained.
_OF_PROCESS = ("mixed_precision", "num_threads", "allow_tf32", "local_rank", "max_train_minutes")
_NOT_IN_ROWS = (*_OF_TABLE, *_OF_PROCESS, "dry_run", "estimate")
PAGE = "runs.html"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a table, or the only run of a command line without --runs."""

    name: str
    options: TrainOptions


@dataclasses.dataclass(frozen=True)
class Runs:
    """What a command line trains."""

    rows: Sequence[Run]
    table: Path | None = None
    """The file of --runs; None for a single run."""
    folder: Path = Path()
    """--output_dir of a table: each run has a folder in it, with the run's name."""
    number: int | None = None
    """--run_number: the only run of the table to train, counted from 1."""

    @property
    def to_train(self) -> Sequence[Run]:
        """All runs, or the one of --run_number."""
        return self.rows if self.number is None else [self.rows[self.number - 1]]

    @property
    def options(self) -> TrainOptions:
        """The options of the first run to train."""
        return self.to_train[0].options


def parse(description: str, words: Sequence[str] | None = None) -> Runs:
    """The runs of a command line. Without --runs it is one.

    Prints help and messages, and exits, as `command_line.parse`. One message names every run of a table whose
    flags are wrong.
    """
    typed = list(sys.argv[1:] if words is None else words)
    given, rest = _taken(typed)
    if "runs" not in given or any(word in ("-h", "--help", "--help_all", "--help-all") for word in typed):
        options = command_line.parse(TrainOptions, description, typed)
        if options.run.runs is not None:
            command_line.fail("--runs is in a --config file: give it on the command line")
        return Runs([Run("", options)])
    try:
        return _parse_table(description, given, rest)
    except UserError as error:
        command_line.fail(error)


def _parse_table(description: str, given: Mapping[str, str], rest: Sequence[str]) -> Runs:
    """The runs of the table that --runs names. `given` are the values of _OF_TABLE, by flag, and `rest` are
    the other words of the command line."""
    path = Path(paths.expanded(given["runs"], "--runs"))
    where = f"--runs {shown(path)}"
    table = _read(path, where)
    if refused := [name for name in _NOT_WITH_TABLE if name in given]:
        raise UserError(
            f"--{refused[0]} does not work with --runs, which goes on with the runs that are not finished; "
            "leave it out"
        )
    if not given.get("output_dir", "").strip():
        raise UserError(f"{where}: give --output_dir, the folder in which each run gets a folder of its name")
    folder = Path(paths.expanded(given["output_dir"], "--output_dir"))
    number = _number(given.get("run_number"), len(table), where)
    rows, problems = [], []
    for name, flags in table.items():
        try:
            words = command_line.words_of_table(TrainOptions, flags, f"{where}: {name}")
            words += [f"--output_dir={folder / name}", "--resume_from_checkpoint=latest"]
            rows.append(Run(name, _options(description, [*rest, *words])))
        except UserError as error:
            problems.append(_named(str(error), f"{where}: {name}"))
    if problems:
        raise UserError("\n".join(problems))
    return Runs(rows, path, folder, number)


def _taken(typed: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(the values of _OF_TABLE by flag, "" for a flag without one; the other words)."""
    given: dict[str, str] = {}
    rest: list[str] = []
    pending = iter(typed)
    for word in pending:
        flag, is_joined, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in _OF_TABLE:
            has_value_after = not is_joined and name != "overwrite"
            given[name] = next(pending, "") if has_value_after else value
        else:
            rest.append(word)
    return given, rest


def _read(path: Path, where: str) -> dict[str, dict[str, Any]]:
    """The flags of each run, by its name."""
    content = reader.read_yaml(path, where)
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{where}: must be a table of runs, each a name with a table of its flags, got "
            f"{type(content).__name__}"
        )
    problems = []
    for name, flags in content.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)) or name.lower() == PAGE:
            problems.append(
                f"{where}: {shortened(repr(name))} cannot be the name of a run, which is that of its folder: "
                "letters, digits and . _ - are allowed, and not as the first character"
            )
        elif not isinstance(flags, dict):
            problems.append(
                f"{where}: {name}: must be a table of `flag: value` lines, got {type(flags).__name__}"
            )
        elif refused := [flag for flag in flags if flag in _NOT_IN_ROWS]:
            problems.append(
                f"{where}: {name}: {few(refused)} cannot differ between runs; give it on the command line, or"
                " leave it out"
            )
    names = [str(name).lower() for name in content]
    if twice := {name for name in names if names.count(name) > 1}:
        problems.append(f"{where}: {few(sorted(twice))} is the name of two runs on some file systems")
    if problems:
        raise UserError("\n".join(problems))
    return content


def _number(text: str | None, count: int, where: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= count):
        raise UserError(
            f"--run_number must be the number of a run of the table, from 1 to {count}, got {shortened(text)}"
        )
    return int(text)


def _options(description: str, words: Sequence[str]) -> TrainOptions:
    """The options of one run. Raises UserError with the messages that `command_line.parse` prints."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            options = command_line.parse(TrainOptions, description, words)
    except SystemExit:
        raise UserError(messages.getvalue().strip().removeprefix("error: ")) from None
    if options.run.runs is not None:
        raise UserError("--runs is in a --config file: a table names no other table")
    return options


def _named(message: str, where: str) -> str:
    """The message, each line with the run it is about."""
    lines = [line for line in message.splitlines() if line.strip()]
    return "\n".join(line if line.startswith(where) else f"{where}: {line}" for line in lines)
