"""The one exception for what a user can put right. The scripts print its message and exit with status 2."""


class UserError(Exception):
    """The message names the flag or file, the rule, what was found, and what to do. Several problems come as several lines."""


def shown(name: object) -> str:
    """A name as it may stand within a line: as it is, or quoted with every control character spelled out."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def printable(message: str) -> str:
    """A message of one or several lines, in which everything but letters, signs and line breaks is spelled out."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in message)
