"""Rooms, arrows and floors of the source, and the limits of its code. To print them:

    python -m tests.project.architecture

A room is a package of `dreambooth/`, a script, `dreambooth/errors.py`, `benchmarks` or `picturebook`. An
arrow goes from a room to a room that it imports. A room's floor is the number of rooms in its longest
chain of arrows down.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the ground up. A room imports rooms of lower levels only.
LEVELS = (
    ("errors",),
    ("options", "files"),
    ("runtime",),
    ("bases",),
    ("adapter_files",),
    ("adapters", "data"),
    ("training",),
    ("train_dreambooth_lora", "generate_class_images", "infer", "convert_adapter", "picturebook"),
    ("benchmarks",),
)
LONGEST_FUNCTION, LONGEST_LINE = 60, 110


def sources() -> list[Path]:
    """The product's Python files: no tests."""
    folders = ("dreambooth", "picturebook", "benchmarks")
    return sorted([*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))])


def room(module: str) -> str | None:
    """The room of a module by its dotted name; None for a module of another program."""
    first, *rest = module.split(".")
    if first == "dreambooth":
        return rest[0] if rest else None
    return first if any(first in level for level in LEVELS) else None


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def arrows() -> set[tuple[str, str]]:
    """(importing room, imported room)."""
    pairs = set()
    for path in sources():
        start = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for end in map(room, imports(path)):
            if start and end and start != end:
                pairs.add((start, end))
    return pairs


def floors(pairs: set[tuple[str, str]]) -> dict[str, int]:
    """Floor of each room, the ground floor is 1. Raises RecursionError if there is a circle of arrows."""
    below: dict[str, set[str]] = {name: set() for level in LEVELS for name in level}
    for start, end in pairs:
        below[start].add(end)

    @cache
    def floor(name: str) -> int:
        return 1 + max(map(floor, below[name]), default=0)

    return {name: floor(name) for name in below}


def upward(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not go to a lower level."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    return {(start, end) for start, end in pairs if level[end] >= level[start]}


def long_functions(limit: int = LONGEST_FUNCTION) -> list[str]:
    """Functions of more than `limit` lines, decorators not counted."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= limit
    ]


def long_lines(limit: int = LONGEST_LINE) -> list[str]:
    """Lines of more than `limit` columns in the product and in the tests; `type: ignore` does not count."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (*sources(), *sorted((ROOT / "tests").rglob("*.py")))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line.partition("  # type: ignore")[0]) > limit
    ]


def train_script_lines() -> int:
    return len((ROOT / "train_dreambooth_lora.py").read_text(encoding="utf-8").splitlines())


def lines_with(word: str) -> int:
    """Lines of `dreambooth/` with the word: `grep -rw WORD dreambooth | wc -l`."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "dreambooth").rglob("*.py"))
    return sum(bool(re.search(rf"\b{word}\b", line)) for text in texts for line in text.splitlines())


def main() -> None:
    """Print which room imports which, and the counts."""
    pairs = arrows()
    floor_of = floors(pairs)
    for name in sorted(floor_of, key=lambda name: (-floor_of[name], name)):
        print(f"{floor_of[name]}  {name:24}", *sorted(end for start, end in pairs if start == name))
    print(f"{len(floor_of)} rooms, {max(floor_of.values())} floors, {len(pairs)} arrows")
    print(f"arrows that do not go down: {sorted(upward(pairs))}")
    print(f"lines of train_dreambooth_lora.py: {train_script_lines()}")
    print(f"functions of more than {LONGEST_FUNCTION} lines: {long_functions()}")
    print(f"lines of more than {LONGEST_LINE} columns: {len(long_lines())}")


if __name__ == "__main__":
    main()
