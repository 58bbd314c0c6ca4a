"""The exception for mistakes that the user can correct, and the functions that build messages.

The scripts print the message of a UserError and exit with status 2. Names and texts from files may hold line
breaks, terminal escapes or a megabyte of characters: messages take them through a function of this module.
"""

from collections.abc import Iterable, Sequence


class UserError(Exception):
    """The message names the flag or file, the rule, the value found, and what to do: one line for each
    problem."""


def raise_all(problems: Iterable[str]) -> None:
    """Raise UserError with one line for each problem; nothing without any."""
    if message := "\n".join(problems):
        raise UserError(message)


def shown(name: object) -> str:
    """A name for use within a line: unchanged, or quoted with escapes if it has characters that do not
    print."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def shortened(value: object, most: int = 80) -> str:
    """A value from a file for use within a line, cut after `most` characters.

    Text is returned as by `shown`; any other value as its repr in ASCII.
    """
    text = value if isinstance(value, str) else ascii(value)
    return shown(text if len(text) <= most else f"{text[:most]}...")


def few(names: Sequence[object], most: int = 5) -> str:
    """The first `most` names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shortened, names[:most])) + more


def reason_of(error: BaseException, most: int = 300) -> str:
    """An exception's message on one line, of at most `most` characters; its type if it has no message."""
    return shown(" ".join(str(error).split())[:most] or type(error).__name__)


def type_and_reason(error: BaseException) -> str:
    """An exception's type and message on one line. For exceptions like KeyError, whose message alone says
    little."""
    return shown(": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:300]))))


def is_memory_error(error: BaseException) -> bool:
    """Whether the error means that memory ran out. For GPUs torch raises OutOfMemoryError, a subclass of
    RuntimeError; for CPUs it raises a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def printable(message: str) -> str:
    """A message of several lines, in which characters that do not print become escapes."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in message)
