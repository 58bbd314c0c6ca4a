"""Files are opened, read and written, and lines printed, in dreambooth/io/ only.

The test walks the syntax trees of the product. EXCEPTIONS lists every other place, with its reason; one that
is gone must be removed from the list.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.project.architecture import ROOT

# Of any object: `path.open`, `Image.open`, `torch.load`, `json.loads`.
METHODS = {"open", "fdopen", "memmap", "fromfile", "tofile"} | {
    *("read_text", "read_bytes", "write_text", "write_bytes"),
    *("load_file", "save_file", "safe_open", "metadata_load", "NamedTemporaryFile", "copyfileobj"),
}
NAMES = METHODS | {"print", "input"}
OF_MODULES = {
    "json": {"load", "loads", "dump"},
    "yaml": {
        "load",
        "load_all",
        "safe_load",
        "safe_load_all",
        "full_load",
        "unsafe_load",
        "SafeLoader",
        "Loader",
    },
    "torch": {"load", "save"},
    "np": {"load", "loadtxt", "save", "savez", "genfromtxt"},
    "sys": {"stdout", "stderr", "__stdout__", "__stderr__"},
    "tqdm": {"write"},
    "pickle": {"load", "loads", "dump", "dumps"},
    "shutil": {"copyfile", "copy", "copy2", "copytree"},
}
# The functions of io/ have names of this list; they are called on the module.
DOORS = {"reader", "writer", "console"}

# File of dreambooth/ or script, function, what it uses: why it does so itself.
EXCEPTIONS = {
    "adapter_files/bake.py _write_weights save_file": "Gigabytes go to a new folder without a copy.",
    "data/photos.py decode Image.open": "Pillow decodes bytes that the reader has read.",
    "data/photos.py opacity Image.open": "Pillow decodes bytes that the reader has read.",
    "infer.py collect Image.open": "Pillow decodes a file that the reader has opened.",
    "files/pictures.py read Image.open": "Pillow decodes bytes that the reader has read.",
    "files/locks.py _directory os.open": "The locked folder stays open, to be compared before each write.",
    "files/locks.py _make os.open": "A lock that is missing is made, and stays open.",
    "files/locks.py _open os.open": "A lock stays open for as long as it is held.",
    "files/safetensors_files.py opened safe_open": "The library reads tensors after the header was checked.",
}


def doors_in(source: str) -> Iterator[tuple[str, str]]:
    """(name of the function, what it uses) for each use in the source of what belongs to io/."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.ClassDef)
            if isinstance(child, ast.Name) and child.id in NAMES:
                yield function, child.id
            elif isinstance(child, ast.Attribute):
                owner = child.value.id if isinstance(child.value, ast.Name) else ""
                is_method = child.attr in METHODS and owner not in DOORS
                if is_method or child.attr in OF_MODULES.get(owner, ()):
                    yield function, f"{owner}.{child.attr}"
            elif isinstance(child, ast.ImportFrom):
                renamed = {name.name for name in child.names if name.asname} & NAMES
                taken = {name.name for name in child.names} & OF_MODULES.get(child.module or "", set())
                yield from ((function, f"{child.module}.{name}") for name in sorted(renamed | taken))
            yield from walk(child, child.name if is_function else function)  # type: ignore[attr-defined]

    yield from walk(ast.parse(source), "")


def uses() -> set[str]:
    """File, function and what it uses, for all of the product but io/."""
    files = [path for path in (ROOT / "dreambooth").rglob("*.py") if path.parent.name != "io"]
    return {
        " ".join([str(path.relative_to(ROOT)).removeprefix("dreambooth/"), *use])
        for path in (*files, *ROOT.glob("*.py"))
        for use in doors_in(path.read_text(encoding="utf-8"))
    }


def test_files_are_opened_and_lines_printed_in_one_package_only():
    assert sorted(uses() - EXCEPTIONS.keys()) == []


def test_no_exception_of_the_list_is_gone():
    assert sorted(EXCEPTIONS.keys() - uses()) == []
    assert all(reason.endswith(".") for reason in EXCEPTIONS.values())


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("open(path)", "open"),
        ("handle = open", "open"),
        ("os.open(path, flags)", "os.open"),
        ("(folder / name).open('rb')", ".open"),
        ("Image.open(path)", "Image.open"),
        ("os.fdopen(1)", "os.fdopen"),
        ("(folder / name).read_text()", ".read_text"),
        ("path.write_bytes(data)", "path.write_bytes"),
        ("list(map(json.loads, lines))", "json.loads"),
        ("from json import loads", "json.loads"),
        ("from safetensors import safe_open as tensors_of", "safetensors.safe_open"),
        ("yaml.safe_load(text)", "yaml.safe_load"),
        ("yaml.load(text, yaml.SafeLoader)", "yaml.load"),
        ("with safe_open(path) as file: pass", "safe_open"),
        ("torch.load(path)", "torch.load"),
        ("print(1)", "print"),
        ("tqdm.write('')", "tqdm.write"),
        ("sys.stderr.write('')", "sys.stderr"),
        ("x = [line for line in sys.stdout]", "sys.stdout"),
    ],
)
def test_a_use_is_seen(line, use):
    assert ("", use) in set(doors_in(line))
    assert ("inner", use) in set(doors_in(f"def outer():\n  def inner():\n    {line}"))


@pytest.mark.parametrize(
    "line", ["reader.read_text(path, where)", "reader.opened(path)", "console.say(text)", "json.dumps(table)"]
)
def test_the_functions_of_the_package_itself_are_no_such_use(line):
    assert set(doors_in(line)) == set()
