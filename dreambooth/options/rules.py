"""Rules for the values of flags. A group of flags checks its rules when it is made.

Imports no torch: --help and messages about wrong flags are printed at once.
"""

import abc
import contextlib
import contextvars
import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import tyro

from dreambooth.io.errors import shortened

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


class Rule(abc.ABC):
    """Marks the type of a field. Each value of the field has to follow the rule; None is not checked."""

    @abc.abstractmethod
    def broken_by(self, value: Any) -> str | None:
        """What the value must be: the end of a message after the name of the flag. None if it is that."""


@dataclasses.dataclass(frozen=True)
class Range(Rule):
    """A number from `least` to `most`; neither of them with `over` and `under`."""

    least: float
    most: float
    over: bool = False
    under: bool = False
    multiple: int = 1

    def broken_by(self, value: float) -> str | None:
        if self.multiple > 1 and (value % self.multiple or value < self.least):
            return f"must be a positive multiple of {self.multiple}"
        if not (value > self.least if self.over else value >= self.least):  # also if it is not a number
            return f"must be {'over' if self.over else 'at least'} {self.least}"
        if not (value < self.most if self.under else value <= self.most):
            return f"must be {'under' if self.under else 'at most'} {self.most}"
        return None


class SidesRule(Rule):
    """A side in pixels, or several with commas between them."""

    def broken_by(self, value: int | str) -> str | None:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})+", value) is None:
            return "must be a side in pixels, or several with commas between them, as in 512,768"
        sides = sides_of(value)
        if broken := next(filter(None, map(_SIDE.broken_by, sides)), None):
            return broken
        return "must name each side once" if len(set(sides)) < len(sides) else None


def sides_of(resolution: int | str) -> tuple[int, ...]:
    """The sides in a value of --resolution, in pixels: 512 or "512,768"."""
    return tuple(int(side) for side in str(resolution).split(","))


class NotEmpty(Rule):
    """A text with a character that is no space."""

    def broken_by(self, value: str) -> str | None:
        return None if value.strip() else "must not be empty"


# Types of fields. The largest values are past all use; larger ones would overflow or fill the memory.
Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Steps = Annotated[int, Range(1, 100_000)]  # of a sampler, as many as a base may have timesteps
Threads = Annotated[int, Range(1, 1024)]
BatchSize = Annotated[int, Range(1, 4096)]
Rank = Annotated[int, Range(1, 1024)]
_SIDE = Range(8, 8192, multiple=8)
Side = Annotated[int, _SIDE]  # in pixels
Sides = Annotated[int | str, SidesRule()]  # "512,768" is a text
Seed = Annotated[int, Range(0, 2**64 - 1)]
Amount = Annotated[float, Range(0, 10**9)]
AmountOverZero = Annotated[float, Range(0, 10**9, over=True)]
Probability = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, under=True)]  # also the probability of a dropout
Name = Annotated[str, NotEmpty()]


def rules_of(kind: Any) -> Iterator[Rule]:
    """The rules in a field's type, also in `RULED | None` and `tuple[RULED, ...]`."""
    if isinstance(kind, Rule):
        yield kind
    for part in get_args(kind):
        yield from rules_of(part)


@dataclasses.dataclass
class Group:
    """A group of flags. It checks the rule of each field's type, then the group's own rules."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for rule in rules_of(field.type):
                for one in value if isinstance(value, tuple) else [] if value is None else [value]:
                    if phrase := rule.broken_by(one):
                        require(False, f"--{field.name} {phrase}, got {shortened(repr(one))}")
        self._check()

    def _check(self) -> None:
        """Check the rules that are not in a type: those of several fields, and of texts."""


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
