"""Rules for the values of flags. A group of flags checks its rules when it is made.

Imports no torch: --help and messages about wrong flags are printed at once.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

EXIT_USAGE = 2  # wrong flags or bad input, reported before any slow work

# A boolean flag that takes the word True or False, as the reference script's Prodigy flags do.
BooleanWord = Annotated[bool, tyro.conf.FlagConversionOff]

# Messages of rules broken so far, while a command line is read; None at other times.
_broken: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("broken", default=None)


@contextlib.contextmanager
def broken_rules() -> Iterator[list[str]]:
    """Within the block, `require` adds its message to the yielded list instead of raising. One message can
    then report every wrong flag."""
    broken: list[str] = []
    token = _broken.set(broken)
    try:
        yield broken
    finally:
        _broken.reset(token)


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless `condition` holds. Within `broken_rules` the message is added to its list."""
    if condition:
        return
    broken = _broken.get()
    if broken is None:
        raise ValueError(message)
    broken.append(message)


def named(flag: str, value: str | None) -> None:
    """Require that `value` can be the name of a file or folder, or a hub id; None is allowed.

    It must not be empty: as a path, "" is the working folder.
    """
    require(
        value is None or (value.strip() != "" and "\0" not in value),
        f"--{flag} must be the name of a file or folder, got {value!r}",
    )


def at_least(group: Any, minimum: float, *names: str) -> None:
    """Require finite numbers of at least `minimum` in these fields of a group; None is allowed."""
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
    """Whether the flag `name` of a group has its default value, also if the user typed that value."""
    return getattr(group, name) == type(group).__dataclass_fields__[name].default


def require_package(is_needed: bool, flag: str, package: str, install: str) -> None:
    """Require that a package is installed if `is_needed`; `install` is the command that installs it."""
    if is_needed:
        is_installed = importlib.util.find_spec(package) is not None
        require(is_installed, f"{flag} needs the {package} package, which is not installed: {install}")


def require_side(name: str, value: int | None) -> None:
    """Require a side in pixels that is a multiple of 8; None is allowed."""
    require(
        value is None or (value > 0 and value % 8 == 0),
        f"--{name} must be a positive multiple of 8, got {value}",
    )
