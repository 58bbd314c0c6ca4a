"""The page that --help prints: the flags of an options class, group by group.

The docstring of a group is its heading, and the docstring under a field is the help text of its flag. An
options class may name the flags that most people use in `COMMON_FLAGS`: --help shows those, --help_all shows
every flag. Imports no torch.
"""

import ast
import dataclasses
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dreambooth.options.rules import BooleanWord, group_of

_WIDEST = 100  # columns; longer lines are hard to read
_NARROWEST = 40


def page(kind: type, program: str, description: str, *, is_full: bool) -> str:
    """The help page for the terminal's width: `description`, then flags and help texts."""
    common = None if is_full else getattr(kind, "COMMON_FLAGS", None)
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
    lines = [f"usage: {program} --FLAG VALUE ...", ""]
    for paragraph in description.split("\n\n"):
        lines += [*_wrapped(paragraph, width), ""]
    lines += _wrapped(
        "--config FILE.yaml reads flags from a file; a flag on the command line overrides the file. "
        "--no_NAME switches the flag --NAME off again.",
        width,
    )
    flags = list(_flags_of(kind, "Flags"))
    shown = [flag for flag in flags if common is None or flag[1].name in common]
    for heading, entries in itertools.groupby(shown, key=lambda flag: flag[0]):
        lines += ["", *_wrapped(heading, width)]
        for _, field, text in entries:
            lines += _wrapped(f"  --{field.name} {_metavar(field.type)}", width, indent=10)
            lines += _wrapped(f"      {text}{_default(field)}", width, indent=6)
    if len(shown) < len(flags):
        lines += ["", *_wrapped(f"{len(flags) - len(shown)} more flags are listed by --help_all.", width)]
    return "\n".join(lines)


def _flags_of(kind: type, heading: str) -> Iterator[tuple[str, dataclasses.Field, str]]:
    """(heading, field, help text) of every flag, in groups. The flags of the class itself are one group."""
    texts = _field_docstrings(kind)
    flags: list[dataclasses.Field] = []
    later: list[type] = []
    for field in dataclasses.fields(kind):
        group = group_of(field)
        if group is None:
            flags.append(field)
        elif flags:
            later.append(group)
        else:
            yield from _flags_of(group, _heading(group))
    yield from ((heading, field, texts[field.name]) for field in flags)
    for group in later:
        yield from _flags_of(group, _heading(group))


def _heading(group: type) -> str:
    return " ".join((group.__doc__ or "").split()).rstrip(".")


def _field_docstrings(kind: type) -> dict[str, str]:
    """The string under each field in the source of the class or of a class that it inherits from, on one
    line."""
    texts = {}
    for ancestor in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(ancestor)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    texts[name] = " ".join(words.split())
    return texts


def _metavar(kind: Any) -> str:
    """What a value of this type looks like: "INT". Empty for a switch."""
    if kind is BooleanWord:
        return "{True, False}"
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _metavar(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_metavar(one) for one in arguments if one is not NoneType)
    if origin is tuple:
        return f"{_metavar(arguments[0])} ..."
    if origin is Literal:
        return f"{{{', '.join(map(str, arguments))}}}"
    return {bool: "", int: "INT", float: "FLOAT", str: "TEXT"}[kind]


def _default(field: dataclasses.Field) -> str:
    """The end of the help text: " (default: 4)". Empty for switches and None, which the text explains."""
    if field.default is dataclasses.MISSING:
        return " (required)"
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    words = [str(value) for value in values if value is not None and value is not False and value != ""]
    return f" (default: {' '.join(words)})" if words else ""


def _wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Lines of at most `width` columns; the first is indented as the text is, the others by `indent`. Line
    breaks in the text are ignored."""
    start = len(text) - len(text.lstrip())
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=" " * start,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
