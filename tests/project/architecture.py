"""Packages of the source and their imports, and the limits of its code. To print them:

    .venv/bin/python -m tests.project.architecture

As packages count those of `dreambooth/`, a script, `benchmarks` and `picturebook`. A
package's layer is the number of packages in its longest chain of imports, itself included.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the bottom up. A package imports packages of lower levels only.
LEVELS = (
    ("io", "picturebook"),
    ("options", "files"),
    ("runtime",),
    ("bases",),
    ("adapter_files",),
    ("adapters", "data", "evaluation"),
    ("training",),
    (
        "train_dreambooth_lora",
        "generate_class_images",
        "infer",
        "evaluate",
        "check_photos",
        "convert_adapter",
    ),
    ("benchmarks",),
)
LONGEST_FUNCTION, LONGEST_LINE = 60, 110


def sources() -> list[Path]:
    """The product's Python files: no tests."""
    folders = ("dreambooth", "picturebook", "benchmarks")
    return sorted([*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))])


def package_of(module: str) -> str | None:
    """The package of a module by its dotted name; None for a module of another program."""
    first, *rest = module.split(".")
    if first == "dreambooth":
        return rest[0] if rest else None
    return first if any(first in level for level in LEVELS) else None


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imports() -> set[tuple[str, str]]:
    """(importing package, imported package)."""
    pairs = set()
    for path in sources():
        importing = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for imported in map(package_of, imported_names(path)):
            if importing and imported and importing != imported:
                pairs.add((importing, imported))
    return pairs


def layers(pairs: set[tuple[str, str]]) -> dict[str, int]:
    """Layer of each package, 1 if it imports none. Raises RecursionError if imports go in a circle."""
    below: dict[str, set[str]] = {name: set() for level in LEVELS for name in level}
    for importing, imported in pairs:
        below[importing].add(imported)

    @cache
    def layer(name: str) -> int:
        return 1 + max(map(layer, below[name]), default=0)

    return {name: layer(name) for name in below}


def upward(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that are not of a lower level."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    return {(importing, imported) for importing, imported in pairs if level[imported] >= level[importing]}


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
    """Print which package imports which, and the counts."""
    pairs = imports()
    layer_of = layers(pairs)
    print("layer, package, and the packages that it imports:")
    for name in sorted(layer_of, key=lambda name: (-layer_of[name], name)):
        print(f"{layer_of[name]}  {name:24}", *sorted(end for start, end in pairs if start == name))
    print(f"{len(layer_of)} packages, {max(layer_of.values())} layers, {len(pairs)} imports")
    print(f"imports that do not go down: {sorted(upward(pairs))}")
    print(f"lines of train_dreambooth_lora.py: {train_script_lines()}")
    print(f"functions of more than {LONGEST_FUNCTION} lines: {long_functions()}")
    print(f"lines of more than {LONGEST_LINE} columns: {len(long_lines())}")


if __name__ == "__main__":
    main()
