"""Options from a command line and --config files. Every broken rule is reported in one message.

Imports no torch: --help and messages about wrong flags are printed at once.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

import tyro

from dreambooth.io import console, reader
from dreambooth.io.errors import UserError, shortened, shown
from dreambooth.options import help_page, paths, shipped_files
from dreambooth.options.rules import EXIT_USAGE, BooleanWord, broken_rules, group_of

Options = TypeVar("Options")
_LONGEST = 2**16  # characters of a word
_FLAT = (tyro.conf.OmitArgPrefixes,)
# For tyro, dashes and underscores in the names of flags are the same.
_HELP = {"-h": False, "--help": False, "--help_all": True, "--help-all": True}


def parse(
    kind: type[Options], description: str, words: Sequence[str] | None = None, *, command: str = ""
) -> Options:
    """The options of class `kind`, from the command line or from `words`. A flag overrides --config files.

    --help prints `description`, and `command` after the name of the script.
    Exits with status 2 and one message if a flag is unknown, missing or wrong, and with 0 after --help.
    """
    typed = list(sys.argv[1:] if words is None else words)
    for word in typed:
        if word in _HELP:
            program = f"{Path(sys.argv[0]).name} {command}".rstrip()
            console.say(help_page.page(kind, program, description, is_full=_HELP[word]))
            raise SystemExit(0)
    try:
        _hide_token(kind, typed)
        _check_texts(typed)
        saved, rest = _take_config(kind, paths.expand_words(shipped_files.located(typed), fields_of(kind)))
    except UserError as error:
        fail(error)
    words = [*saved, *_with_repeated_flags_joined(kind, rest)]
    with broken_rules() as broken, _escaped_errors():
        options = tyro.cli(kind, args=words, config=_FLAT, use_underscores=True)
    if broken:
        fail("\n".join(dict.fromkeys(broken)))
    return options


@contextlib.contextmanager
def _escaped_errors() -> Iterator[None]:
    """Print tyro's messages, which quote the words, as all others are printed."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            yield
    finally:
        if messages.getvalue():
            console.error(messages.getvalue().rstrip("\n"), "")


def _hide_token(kind: type, words: Sequence[str]) -> None:
    """Hide the value of --hub_token in all messages. Raises UserError if the flag is misspelt."""
    known = [*fields_of(kind), "hub_token"]
    for word, value in itertools.pairwise([*words, ""]):
        flag, is_joined, joined = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if flag.startswith("-") and difflib.get_close_matches(name[:80], known, n=1) == ["hub_token"]:
            console.hide(joined if is_joined else value if not value.startswith("-") else None)
            if name not in known:
                raise UserError(f"no flag {shown(flag[:80])}; did you mean --hub_token?")


def fail(error: Exception | str) -> NoReturn:
    """Print a message, with a line for each problem, and exit with status 2."""
    console.error(str(error))
    raise SystemExit(EXIT_USAGE)


def _check_texts(words: Iterable[str]) -> None:
    """Raise UserError if a word is over 65,536 characters, has a NUL character, or is not UTF-8: such a text
    fits into no file that a run writes."""
    where = "the command line"
    for word in words:
        if word.startswith("--"):
            where, is_joined, value = word.partition("=")
            where, word = shortened(where), value if is_joined else word
        if len(word) > _LONGEST:
            raise UserError(f"{where}: a text of {len(word):,} characters; the most are {_LONGEST:,}")
        # bytes of the command line that are not UTF-8 come as surrogates
        if odd := next((n for n, c in enumerate(word, 1) if c == "\0" or "\ud800" <= c <= "\udfff"), 0):
            raise UserError(f"{where}: character {odd} is NUL or not UTF-8; give another text or name")


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    """Every flag of an options class and of its groups, by name."""
    table: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(kind):
        group = group_of(field)
        table |= {field.name: field} if group is None else fields_of(group)
    return table


def _take_config(kind: type, words: list[str]) -> tuple[list[str], list[str]]:
    """(the words of the --config files, the other words)."""
    saved: list[str] = []
    rest: list[str] = []
    pending = iter(words)
    for word in pending:
        if word == "--config":
            path = next(pending, None)
            if path is None:
                raise UserError("--config needs the name of a YAML file")
            saved += config_words(kind, _config_file(path))
        elif word.startswith("--config="):
            saved += config_words(kind, _config_file(word.removeprefix("--config=")))
        else:
            rest.append(word)
    return saved, rest


def _config_file(name: str) -> Path:
    path = Path(paths.expanded(name, "--config"))
    shipped_files.check_recipe(path)
    return path


def _with_repeated_flags_joined(kind: type, words: list[str]) -> list[str]:
    """The words, with the values of a repeated flag joined: `--adapter A --adapter B` becomes
    `--adapter A B`. Only flags that take several values are joined."""
    flags = fields_of(kind).items()
    takes_several = {f"--{name}" for name, field in flags if get_origin(field.type) is tuple}
    values_of: dict[str, list[str]] = {}
    rest: list[str] = []
    current = rest
    for word in words:
        flag, is_joined, value = word.partition("=")
        if flag in takes_several:
            current = values_of.setdefault(flag, [])
            current += [value] if is_joined else []
        elif word.startswith("--"):
            current = rest
            current.append(word)
        else:
            current.append(word)
    return [*rest, *(word for flag, values in values_of.items() for word in (flag, *values))]


def config_words(kind: type, path: Path) -> list[str]:
    """The words of a command line with the flags of a YAML file of `flag: value` lines.

    A flag with the value `null` is left out. Paths are expanded; those of a run's own run.yaml are not, but
    hold also where the run has been moved. Raises UserError if the file has another form, or a flag is
    unknown.
    """
    where = f"--config {shown(path)}"
    content = reader.read_yaml(path, where)
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a table of `flag: value` lines, got {type(content).__name__}")
    known = fields_of(kind)
    run = paths.folder_of_run(path) if "resume_from_checkpoint" in known else None
    if run is not None:
        content, notes = paths.restored(content, known, run)
        _say_once(f"{where}: {note}" for note in notes)
    return words_of_table(kind, content, where, is_of_run=run is not None)


def words_of_table(
    kind: type, content: Mapping[str, Any], where: str, *, is_of_run: bool = False
) -> list[str]:
    """The words of a command line with the flags of a table from a YAML file, which `where` names. Paths are
    expanded, but not those of a run's own run.yaml. Raises UserError if a flag is unknown, or its value is a
    table."""
    known = fields_of(kind)
    words: list[str] = []
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key)[:80], known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{where}: no flag '{shown(str(key)[:80])}'{hint}")
        if key == "hub_token":
            console.hide(str(value))
        if value is not None:
            words += _words_of(key, value, known[key].type, where)
    _check_texts(words)
    return shipped_files.located(words if is_of_run else paths.expand_words(words, known))


def _say_once(notes: Iterable[str]) -> None:
    """Print notes on the first of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        console.notes(notes)


def _words_of(name: str, value: Any, kind: Any, where: str) -> list[str]:
    """The words for one flag of a file. `kind` is the flag's type, and `value` is the value from YAML."""
    if isinstance(value, bool):
        if kind is bool:
            return [f"--{name}" if value else f"--no_{name}"]
        # YAML reads a bare `no` as false; a flag with choices gets the word back.
        return [f"--{name}={value if kind is BooleanWord else 'yes' if value else 'no'}"]
    if isinstance(value, dict):
        raise UserError(f"{where}: '{name}' must be a value or a list, got a table")
    if not isinstance(value, list):
        return [f"--{name}={value}"]  # one word: a value may begin with a minus
    if any(isinstance(item, dict | list) for item in value):
        raise UserError(f"{where}: '{name}' must be a value or a list of values")
    return [f"--{name}", *map(str, value)]


def as_table(options: Any) -> dict[str, Any]:
    """All flags that are not None, with their values, in one flat table as in a --config file."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            table |= as_table(value)
        elif value is not None:
            table[field.name] = list(value) if isinstance(value, tuple) else value
    return table


def without_token(table: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that may be written to files and sent to trackers: all but --hub_token."""
    return {name: value for name, value in table.items() if name != "hub_token"}


def yaml_text(table: dict[str, Any]) -> str:
    """The text of a --config file with these flags and values."""
    import yaml

    return yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
