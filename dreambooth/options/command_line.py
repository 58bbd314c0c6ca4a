"""Words -> options: the command line, --config files, and the one message for what is wrong with them.

Imports no torch: `--help` and every message about a wrong flag come at once.
"""

import contextlib
import dataclasses
import difflib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

import tyro

from dreambooth.errors import UserError, printable, reason_of, shown
from dreambooth.options import help_page, shipped_files
from dreambooth.options.rules import EXIT_USAGE, BooleanWord, broken_rules, group_of

Options = TypeVar("Options")
_FLAT = (tyro.conf.OmitArgPrefixes,)
# tyro takes dashes and underscores in the names of flags as the same
_HELP = {"-h": False, "--help": False, "--help_all": True, "--help-all": True}


def parse(kind: type[Options], description: str, words: Sequence[str] | None = None) -> Options:
    """The options on the command line, or in `words`. The words in a --config file come before those on the command line.

    Exits with status 2 and one message if a flag is unknown, missing or wrong, and with 0 after --help.
    """
    typed = list(sys.argv[1:] if words is None else words)
    for word in typed:
        if word in _HELP:
            print(help_page.page(kind, Path(sys.argv[0]).name, description, is_full=_HELP[word]))
            raise SystemExit(0)
    try:
        saved, rest = _take_config(kind, shipped_files.located(typed))
    except UserError as error:
        fail(error)
    saved = shipped_files.located(saved)
    rest = _joined(kind, rest)
    with broken_rules() as broken, _escaped_errors([*saved, *rest]):
        options = tyro.cli(kind, args=[*saved, *rest], config=_FLAT, use_underscores=True)
    if broken:
        fail("\n".join(broken))
    return options


@contextlib.contextmanager
def _escaped_errors(words: Sequence[str]) -> Iterator[None]:
    """tyro's messages repeat what was typed: where that has escapes in it, they are spelled out."""
    if all(word.isprintable() for word in words):
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    finally:
        sys.stderr.write(printable(said.getvalue()))


def fail(error: Exception | str) -> NoReturn:
    """Print one message, of a line for each problem, and leave with status 2."""
    print(f"error: {printable(str(error))}", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    """Every flag of an options class, those of its groups included, by name."""
    table: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(kind):
        group = group_of(field)
        table |= {field.name: field} if group is None else fields_of(group)
    return table


def _take_config(kind: type, words: list[str]) -> tuple[list[str], list[str]]:
    """(words saved in the files named by --config, the other words)."""
    saved: list[str] = []
    rest: list[str] = []
    pending = iter(words)
    for word in pending:
        if word == "--config":
            path = next(pending, None)
            if path is None:
                raise UserError("--config needs the name of a YAML file")
            saved += config_words(kind, Path(path))
        elif word.startswith("--config="):
            saved += config_words(kind, Path(word.removeprefix("--config=")))
        else:
            rest.append(word)
    return saved, rest


def _joined(kind: type, words: list[str]) -> list[str]:
    """The words, flags that take several values and stand there more than once brought together: `--adapter A --adapter B` is `--adapter A B`."""
    several = {f"--{name}" for name, field in fields_of(kind).items() if get_origin(field.type) is tuple}
    values: dict[str, list[str]] = {}
    others: list[str] = []
    current: list[str] = others
    for word in words:
        flag, is_joined, value = word.partition("=")
        if flag in several:
            current = values.setdefault(flag, [])
            current += [value] if is_joined else []
        elif word.startswith("--"):
            current = others
            current.append(word)
        else:
            current.append(word)
    return [*others, *(word for flag, found in values.items() for word in (flag, *found))]


_LARGEST_CONFIG = 2**20


def _word(key: object) -> str:
    """A key of a file, as it may stand in a message."""
    return shown(str(key)[:80])


def config_words(kind: type, path: Path) -> list[str]:
    """The command line that a YAML file of `flag: value` lines stands for; `null` leaves the default."""
    import yaml

    where = f"--config {shown(path)}"
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{where}: not a regular file")  # reading a pipe would wait for ever
        if path.is_file() and path.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{where}: {path.stat().st_size:,} bytes are no table of flags")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # ValueError: a date that cannot be; TypeError: a list as a key
        raise UserError(f"{where}: not a YAML file: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a table of `flag: value` lines, got {type(content).__name__}")
    known = fields_of(kind)
    words: list[str] = []
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key)[:80], known, n=1)
            raise UserError(
                f"{where}: no flag '{_word(key)}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )
        if value is None:
            continue
        if isinstance(value, bool) and known[key].type is bool:
            words.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, bool) and known[key].type is BooleanWord:
            words.append(f"--{key}={value}")
        elif isinstance(
            value, bool
        ):  # YAML reads a bare `no` as false; for a flag with choices it is the word that was written
            words.append(f"--{key}={'yes' if value else 'no'}")
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            raise UserError(f"{where}: '{key}' must be a value or a list of values")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            raise UserError(f"{where}: '{key}' must be a value or a list, got a table")
        else:
            words.append(f"--{key}={value}")  # one word, so that a value may begin with a minus
    return words


def as_table(options: Any) -> dict[str, Any]:
    """All flags and their values, flat, without those that are None: what --config reads back."""
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
    """Flags and their values in the form that --config reads."""
    import yaml

    return yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
