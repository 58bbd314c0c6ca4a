"""The rules that flags must keep: checked where a group of flags is made, all that are broken told in one message.

Imports no torch: `--help` and every message about a wrong flag come at once.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

EXIT_USAGE = 2  # wrong flags or bad input, found before any slow work

# A boolean flag that takes the word True or False, as the reference script's Prodigy flags do.
BooleanWord = Annotated[bool, tyro.conf.FlagConversionOff]

# The rules broken so far while a command line is read; None outside of that.
_broken: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("broken", default=None)


@contextlib.contextmanager
def broken_rules() -> Iterator[list[str]]:
    """Within the block, a group that breaks a rule adds a line to this list and goes on: all wrong flags come in one message."""
    broken: list[str] = []
    token = _broken.set(broken)
    try:
        yield broken
    finally:
        _broken.reset(token)


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless `condition`; within `broken_rules` note it down."""
    if condition:
        return
    broken = _broken.get()
    if broken is None:
        raise ValueError(message)
    broken.append(message)


def named(flag: str, value: str | None) -> None:
    """A file, folder or hub id. "" would be the folder that the script is started in."""
    require(
        value is None or (value.strip() != "" and "\0" not in value),
        f"--{flag} must be the name of a file or folder, got {value!r}",
    )


def at_least(group: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None:
            require(
                math.isfinite(value) and value >= minimum, f"--{name} must be at least {minimum}, got {value}"
            )


def group_of(field: dataclasses.Field) -> type | None:
    """The dataclass of a field that is a group of flags; None if the field is a flag."""
    return field.type if isinstance(field.type, type) and dataclasses.is_dataclass(field.type) else None


def is_default(group: Any, name: str) -> bool:
    """Whether the flag `name` of a group has its default value, given or not."""
    return getattr(group, name) == type(group).__dataclass_fields__[name].default


def require_package(wanted: bool, flag: str, package: str, install: str) -> None:
    if wanted:
        found = importlib.util.find_spec(package) is not None
        require(found, f"{flag} needs the {package} package, which is not installed: {install}")


def require_side(name: str, value: int | None) -> None:
    require(
        value is None or (value > 0 and value % 8 == 0),
        f"--{name} must be a positive multiple of 8, got {value}",
    )
