"""YAML files that a flag names: flags (--config) and sets of adapters (--adapters_file)."""

from pathlib import Path
from typing import Any

from dreambooth.errors import UserError, reason_of
from dreambooth.options import text_files

_LARGEST = 2**20  # bytes
# YAML 1.1 ends lines at these characters. For YAML 1.2 and for every editor they are a part of the line.
_WITHIN_LINES = "\x85\u2028\u2029"


def load(path: Path, where: str) -> tuple[Any, Any]:
    """(the file's content, its tree of YAML nodes; None for an empty file).

    Messages begin with `where`. Raises UserError as `text_files.read` does, and if the file is larger than a
    megabyte or is not YAML.
    """
    import yaml

    text = text_files.read(path, where, _LARGEST)
    # Stand-ins for the characters that YAML 1.1 would take for line ends: three that the text does not have.
    unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    stand_ins = "".join(next(unused, "\ufffd") for _ in _WITHIN_LINES)
    forth, back = str.maketrans(_WITHIN_LINES, stand_ins), str.maketrans(stand_ins, _WITHIN_LINES)
    try:
        loaders = [yaml.SafeLoader(text.translate(forth)) for _ in range(2)]
        # two trees: the content is made from one, which that changes
        roots = [loader.get_single_node() for loader in loaders]
        for root in roots:
            _translate(root, back, set())
        return None if roots[0] is None else loaders[0].construct_document(roots[0]), roots[1]
    # ValueError: a date such as 2026-02-31. TypeError: a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: not a YAML file: {reason_of(error)}") from None


def _translate(node: Any, table: dict[int, int], visited: set[int]) -> None:
    """Replace characters in all texts of a tree of nodes, which may hold a node twice."""
    if id(node) in visited:
        return
    visited.add(id(node))
    value = getattr(node, "value", None)
    if isinstance(value, str):
        node.value = value.translate(table)
    for entry in value if isinstance(value, list) else []:
        for child in entry if isinstance(entry, tuple) else [entry]:
            _translate(child, table, visited)
