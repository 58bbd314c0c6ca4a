"""Text that a terminal takes as text: names of files and words of users may hold escapes that clear the screen or forge a line."""


def shown(name: object) -> str:
    """A name as it may stand within a line: as it is, or quoted with every control character spelled out."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def printable(message: str) -> str:
    """A message of one or several lines, in which everything but letters, signs and line breaks is spelled out."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in message)
