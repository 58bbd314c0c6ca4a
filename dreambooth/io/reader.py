"""The reader of files that another program or the user may have written: bytes, text, JSON and YAML.

No other module opens such a file. Only regular files are read, never more bytes than a limit, and no open
waits: a pipe, a device, a folder or a loop of links in place of a file is an error at once. Imports no torch.
"""

import codecs
import contextlib
import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dreambooth.io.errors import UserError, reason_of, shortened

LARGEST = 16 * 2**20  # bytes, of a file whose caller sets no other limit
LARGEST_RECORD = 64 * 2**20  # bytes, of this program's records that list every picture
LARGEST_LOG = 2**28  # bytes, of a file that grows with a run's steps
_LARGEST_YAML = 2**18  # bytes; reading more takes seconds
_MOST_LEVELS = 64  # of lists and tables within each other
_LONGEST_NUMBER = 32  # characters
_MOST_VALUES = 100_000  # of a YAML file
_LINE_END = re.compile(r"\r\n|\n|\r")
# A byte-order mark at the start of the file, or of a line where one file was appended to another.
_MARKS = re.compile(r"(?:\A|(?<=[\r\n]))\ufeff+")
# The marks of UTF-32 come first: that of its little-endian form begins with the mark of UTF-16.
_ENCODING_OF = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# YAML 1.1 ends lines at these characters. For YAML 1.2 and for every editor they are a part of the line.
_WITHIN_LINES = "\x85\u2028\u2029"


class NotRegular(OSError):
    """A pipe, a device or a socket lies in place of a file, or a link where links are not followed."""


# --- bytes


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, follow_links: bool = True) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading. With `follow_links=False` a link in its place is an error.

    Raises NotRegular, IsADirectoryError for a folder, and OSError if it cannot be opened or `path` is not a
    valid name.
    """
    # without O_NONBLOCK, opening a pipe would wait until another program writes to it
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL, or a character that the file system's encoding lacks
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise NotRegular(error.errno, "a symbolic link", os.fspath(path)) from None
        if error.errno == errno.ENXIO:  # a socket
            raise NotRegular(error.errno, "not a regular file", os.fspath(path)) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise NotRegular(errno.EINVAL, "not a regular file", os.fspath(path))
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bytes(path: Path, where: str, largest: int = LARGEST, *, follow_links: bool = True) -> bytes:
    """The content of a regular file of at most `largest` bytes. Messages begin with `where`.

    Raises UserError if there is no such file, it is not regular, is larger, or cannot be read.
    """
    try:
        with opened(path, follow_links=follow_links) as file:
            # the first size is 0 for files of /proc; the second one counts what was added meanwhile
            is_small = os.fstat(file.fileno()).st_size <= largest
            if is_small and len(data := file.read(largest + 1)) <= largest:
                return data
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or reason_of(error)}") from None
    raise UserError(f"{where}: over {largest:,} bytes, which is too much for such a file")


# --- text


def read_text(path: Path, where: str, largest: int = LARGEST) -> str:
    """The text of a file, without byte-order marks. Line ends are those of the file.

    The file is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. Raises UserError as `read_bytes` and
    `decoded` do.
    """
    return decoded(read_bytes(path, where, largest), where)


def decoded(data: bytes, where: str) -> str:
    """The text that the bytes of a file encode; see `read_text`. Raises UserError with the place of the first
    byte that is not text."""
    mark = next((mark for mark in _ENCODING_OF if data.startswith(mark)), None)
    encoding = _ENCODING_OF[mark] if mark else "utf-8"
    name = encoding.upper()
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(data[: error.start].decode(encoding, errors="replace"))) + 1
        values = " ".join(f"{byte:02x}" for byte in data[error.start : error.start + 4])
        raise UserError(
            f"{where}: not {name} text (byte {error.start}, in line {line}: {values}); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = len(_LINE_END.findall(text[: text.index("\0")])) + 1
        raise UserError(f"{where}: not a text file, line {line} has a NUL character; save it as UTF-8")
    return _MARKS.sub("", text)


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end with \n, \r\n or \r.

    `str.splitlines` would also split at form feeds, U+0085, U+2028 and others, which a line may hold.
    """
    parts = _LINE_END.split(text)
    return parts if parts[-1] else parts[:-1]


# --- JSON


def read_json_table(path: Path, where: str, largest: int = LARGEST) -> dict[str, Any]:
    """The table in a JSON file. Raises UserError as `read_text` and `parsed_json_table` do."""
    return parsed_json_table(read_text(path, where, largest), where, largest)


def parsed_json_table(
    text: str | bytes, where: str, largest: int = LARGEST, *, unique_keys: bool = False
) -> dict[str, Any]:
    """The table that a JSON text of at most `largest` characters holds. Messages begin with `where`.

    Raises UserError if it is longer, not JSON, not a table, has over 64 levels of lists and tables, a number
    of over 32 digits, or, with `unique_keys`, a key twice in a table.
    """
    if len(text) > largest:
        raise UserError(f"{where}: over {largest:,} characters, which is too much for such a text")
    try:
        table = json.loads(text, parse_int=_integer, object_pairs_hook=_unique if unique_keys else None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {reason_of(error)}") from None
    if not isinstance(table, dict):
        raise UserError(f"{where}: must be a JSON object, got {type(table).__name__}")
    _check_levels(table.values(), where, 1)
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of `pairs`. Raises ValueError if a key appears twice."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{shortened(key)} appears twice")
        table[key] = value
    return table


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_levels(values: Iterable[Any], where: str, level: int) -> None:
    """Raise UserError if lists and tables lie more than 64 levels deep: functions that go through them call
    themselves."""
    for value in values:
        if isinstance(value, list | dict):
            if level >= _MOST_LEVELS:
                raise UserError(f"{where}: over {_MOST_LEVELS} levels of lists and tables")
            _check_levels(value.values() if isinstance(value, dict) else value, where, level + 1)


# --- YAML


def read_yaml(path: Path, where: str) -> Any:
    """The content of a YAML file of at most 256 KiB; None if it is empty. Messages begin with `where`.

    Raises UserError as `read_text` and `parsed_yaml` do.
    """
    return parsed_yaml(read_text(path, where, _LARGEST_YAML), where)


def parsed_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds; None if it is empty. Messages begin with `where`.

    Raises UserError if it is not YAML, gives a key twice, merges tables (`<<`), has a number of over 32
    characters, or more than 100,000 values, those behind aliases counted each time.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, token_class: Any) -> None:
            if self.flow_level >= _MOST_LEVELS:  # each token takes time for each level
                raise yaml.YAMLError(f"over {_MOST_LEVELS} levels")
            super().fetch_flow_collection_start(token_class)

    if len(text) > _LARGEST_YAML:
        raise UserError(f"{where}: over {_LARGEST_YAML:,} characters, which is too much for such a text")
    # Stand-ins for the characters that YAML 1.1 would take for line ends: three that the text does not have.
    unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    stand_ins = "".join(next(unused, "\ufffd") for _ in _WITHIN_LINES)
    forth, back = str.maketrans(_WITHIN_LINES, stand_ins), str.maketrans(stand_ins, _WITHIN_LINES)
    try:
        loader = Loader(text.translate(forth))
        root = loader.get_single_node()
        if root is None:
            return None
        _check_node(root, where, back, {})
        return loader.construct_document(root)
    except UserError:
        raise
    except Exception as error:  # constructors raise anything: for a date such as 2026-02-31, a list as a key
        raise UserError(f"{where}: not a YAML file: {reason_of(error)}") from None


def _check_node(node: Any, where: str, table: dict[int, int], sizes: dict[int, int]) -> int:
    """The number of values of a tree of YAML nodes, which may hold a node several times; `sizes` are those of
    the nodes that were counted. Replaces characters in all texts, by `table`.

    Raises UserError as `read_yaml` does.
    """
    line = f"{where}: line {node.start_mark.line + 1}"
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise UserError(f"{line}: the value holds itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    size = 1
    if isinstance(node.value, str):
        node.value = node.value.translate(table)
        if node.tag.endswith((":int", ":float")) and len(node.value) > _LONGEST_NUMBER:
            raise UserError(f"{line}: a number of {len(node.value)} characters")
    else:
        keys = set()
        for entry in node.value:
            for child in entry if isinstance(entry, tuple) else [entry]:
                size += _check_node(child, where, table, sizes)
            if isinstance(entry, tuple) and isinstance(key := entry[0].value, str):
                line = f"{where}: line {entry[0].start_mark.line + 1}"
                if entry[0].tag.endswith(":merge"):
                    raise UserError(f"{line}: tables are not merged (<<); write the values out")
                if key in keys:
                    raise UserError(f"{line}: {shortened(key)} is given twice")
                keys.add(key)
    if size > _MOST_VALUES:
        raise UserError(f"{line}: over {_MOST_VALUES:,} values")
    sizes[id(node)] = size
    return size
