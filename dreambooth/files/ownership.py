"""Which files in an output folder this program wrote. Only these are replaced or removed. Imports no torch.

`.written.jsonl` in the folder is the record; it goes along when the folder is moved or copied. A line has the
name of a file, its size and its SHA-256, and is on the disk before the file gets its name. A file is this
program's if a line has its name and the hash of its present bytes. A user's file of the same name, and a file
that was edited, have other hashes. A torn last line is ignored.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dreambooth.io import reader, writer
from dreambooth.io.errors import UserError, few, shown

_HEADER = b'{"record": "files that dreambooth wrote", "format": 1}\n'
# Process 0 writes the first, process N of the same job `.written.N.jsonl`.
_NAME = re.compile(r"\.written(\.[0-9]+)?\.jsonl")
_LINE_START = b'{"file": "'
_LONGEST_LINE = 1 << 16  # bytes
_ADVICE = "move these files away or rename them, or name another folder"


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the record."""

    size: int
    sha256: str
    grows: bool
    """Whether lines of JSON may follow these bytes in the file."""


class WrittenFiles:
    """The files that this program wrote into `folder`. Names are relative to it, with slashes."""

    def __init__(self, folder: Path, rank: int = 0):
        """`rank` is the number of this process in its job: each process has a record of its own."""
        self.folder = folder
        self.path = folder / (f".written.{rank}.jsonl" if rank else ".written.jsonl")
        self._lines: dict[str, list[_Line]] = {}
        self._temporaries: set[str] = set()
        self._read_to: dict[Path, int] = {}  # bytes of each record that were read

    # --- what is in the folder

    @property
    def has_record(self) -> bool:
        """Whether the folder has a record that this program wrote."""
        return any(True for _ in self._records())

    def is_written(self, name: str) -> bool:
        """Whether the file exists, and its bytes are those that this program wrote."""
        self._refresh()
        return self._is_recorded(name)

    def _is_recorded(self, name: str) -> bool:
        """As `is_written`, by the lines that were read."""
        path = self._plain_path(name)
        if path is None:
            return False
        lines = self._lines.get(name, [])
        try:
            size = path.stat().st_size
            # a line of a growing file counts until a line with its last bytes follows
            ends = max((number for number, line in enumerate(lines) if not line.grows), default=-1)
            is_log = size <= reader.LARGEST_LOG
            growing = [line for line in lines[ends + 1 :] if is_log and line.grows and line.size < size]
            exact = {line.sha256 for line in lines if line.size == size}
            with reader.opened(path, follow_links=False) as file:
                if exact and hashlib.file_digest(file, "sha256").hexdigest() in exact:
                    return True
                return any(_continues(file, line) for line in growing)
        except OSError:
            return False

    def begins_as_written(self, name: str) -> bool:
        """Whether the file exists, and begins with the bytes of a file that grows, as this program wrote it.
        What follows may be damaged, or a user's."""
        self._refresh()
        if (path := self._plain_path(name)) is None:
            return False
        lines = [line for line in self._lines.get(name, []) if line.grows]
        with contextlib.suppress(OSError), reader.opened(path, follow_links=False) as file:
            fits = os.fstat(file.fileno()).st_size <= reader.LARGEST_LOG
            return fits and any(_begins(file, line) for line in lines)
        return False

    def set_aside(self, name: str) -> Path:
        """Rename the file to `.bad-<name>`, with a number if need be. Returns the path. Raises OSError."""
        aside = writer.unused(self.folder / f".bad-{name}")
        writer.move(self.folder / name, aside)
        return aside

    def written(self) -> list[str]:
        """The names of the present files that this program wrote."""
        self._refresh()
        return [name for name in self._lines if self._is_recorded(name)]

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are taken by something that this program did not write, or that has changed
        since."""
        self._refresh()
        return [name for name in names if self._is_foreign(name)]

    def _is_foreign(self, name: str) -> bool:
        path = self.folder / name
        above = [self.folder / parent for parent in list(PurePosixPath(name).parents)[:-1]]
        if any(os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir()) for parent in above):
            return True
        return os.path.lexists(path) and not self._is_recorded(name)

    def check_free(self, names: Iterable[str], flag: str) -> None:
        """Raise UserError, naming `flag`, if one of `names`, which will be written, is `foreign`, or if
        another program has written a file with the record's name."""
        try:
            if os.path.lexists(self.path):
                self._is_torn()
            taken = self.foreign(names)
        except FileExistsError:
            taken = [self.path.name]
        except OSError as error:
            raise UserError(f"{flag}: {shown(self.path)} cannot be read: {error.strerror or error}") from None
        if taken:
            raise UserError(
                f"{flag}: {shown(self.folder)} holds {few(taken)}, to be written now; a file is replaced only"
                f" as this program wrote it, and {'these were' if len(taken) > 1 else 'this was'} not, or"
                f" {'were' if len(taken) > 1 else 'was'} changed since: {_ADVICE}"
            )

    # --- writing and removing

    def write(self, name: str, data: bytes, *, grows: bool = False) -> None:
        """Write the file whole or not at all, and record it first. With `grows` lines of JSON may be appended
        to it later. Raises OSError if it cannot be written, FileExistsError if its name is `foreign`."""
        path = self.folder / name
        if self.foreign([name]):
            reason = "this program did not write what has that name, or it was changed since; move it away"
            raise FileExistsError(errno.EEXIST, reason, str(path))
        temporary = writer.temporary(path)
        line = {"temporary": str(PurePosixPath(name).with_name(temporary.name))}
        self.record(name, len(data), hashlib.sha256(data).hexdigest(), grows=grows, **line)
        writer.make_folder(path.parent)
        writer.write(path, data, temporary)

    def record(self, name: str, size: int, sha256: str, *, grows: bool = False, **more: str) -> None:
        """Append a line to the record, and flush it. Raises OSError."""
        line = {"file": name, "size": size, "sha256": sha256, **({"grows": True} if grows else {}), **more}
        if not os.path.lexists(self.path):
            writer.write(self.path, _HEADER)
        writer.append(self.path, b"\n" * self._is_torn() + json.dumps(line).encode() + b"\n")

    def remove(self, name: str) -> None:
        """Remove the file if `is_written`. Raises OSError."""
        if self.is_written(name):
            writer.remove(self.folder / name)

    def sweep(self) -> list[str]:
        """Remove temporary files that processes of this program left when they died. Returns their names. The
        caller must hold the folder's lock."""
        self._refresh()
        swept = []
        with contextlib.suppress(OSError):  # they only take room
            headers = [
                path.name
                for path in self.folder.iterdir()
                if _NAME.fullmatch(writer.target_of(path.name) or "") and _is_header(path)
            ]
            for name in (*sorted(self._temporaries), *headers):
                path = self._plain_path(name)
                if path is not None:
                    writer.remove(path)
                    swept.append(name)
        return swept

    # --- the record

    def _plain_path(self, name: str) -> Path | None:
        """The path of a regular file in the folder; None if it is none, or lies behind a link."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/":
            return None  # a record from elsewhere may name any file
        path = self.folder
        try:
            for part in parts:
                path = path / part
                if path.is_symlink():
                    return None
            return path if stat.S_ISREG(path.lstat().st_mode) else None
        except (OSError, ValueError):  # ValueError: no name that a file can have
            return None

    def _is_torn(self) -> bool:
        """Whether the record's last line is half a line. Raises FileExistsError if this program did not write
        the record."""
        try:
            with reader.opened(self.path, follow_links=False) as file:
                is_record = _is_record(file)
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LONGEST_LINE))
                end = file.read().rpartition(b"\n")[2]
        except (reader.NotRegular, IsADirectoryError):
            is_record = False
        # A torn line is of a process that died, and after a power cut it may end in zeros. Anything else was
        # added by somebody.
        if is_record and _LINE_START.startswith(end.rstrip(b"\0")[: len(_LINE_START)]):
            return bool(end)
        reason = "it is no record of this program; move it away"
        raise FileExistsError(errno.EEXIST, reason, str(self.path))

    def _records(self) -> Iterator[Path]:
        """The records of all processes."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with reader.opened(entry.path, follow_links=False) as file:
                        is_record = _is_record(file)
                    if is_record:
                        yield Path(entry.path)

    def _refresh(self) -> None:
        """Read what was appended to the records since the last time."""
        for path in self._records():
            with reader.opened(path, follow_links=False) as file:
                file.seek(self._read_to.get(path, 0))
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._read_to[path] = self._read_to.get(path, 0) + len(data)
            for text in data.splitlines():
                self._add(text)

    def _add(self, text: bytes) -> None:
        """Add a line of a record. What is no such line is ignored."""
        try:
            line = reader.parsed_json_table(text, self.path.name)
        except UserError:
            return
        name, size, sha256, temporary = map(line.get, ("file", "size", "sha256", "temporary"))
        if not (isinstance(name, str) and type(size) is int and size >= 0 and isinstance(sha256, str)):
            return
        self._lines.setdefault(name, []).append(_Line(size, sha256, line.get("grows") is True))
        # the name of a temporary has a random number: no other program writes a file of that name
        if isinstance(temporary, str) and writer.target_of(PurePosixPath(temporary).name):
            self._temporaries.add(temporary)


def _is_record(file: BinaryIO) -> bool:
    """Whether it is a record, of a size that one can have."""
    return file.read(len(_HEADER)) == _HEADER and os.fstat(file.fileno()).st_size <= reader.LARGEST_RECORD


def _begins(file: BinaryIO, line: _Line) -> bool:
    """Whether the file begins with the bytes of `line`."""
    file.seek(0)
    return hashlib.sha256(file.read(line.size)).hexdigest() == line.sha256


def _continues(file: BinaryIO, line: _Line) -> bool:
    """Whether the file begins with the bytes of `line`, and every whole line after them is a JSON object."""
    if not _begins(file, line):
        return False
    rest = file.read()
    try:
        return all(reader.parsed_json_table(text, "") is not None for text in rest.split(b"\n")[:-1])
    except UserError:
        return False


def _is_header(path: Path) -> bool:
    """Whether the file holds the beginning of a record, and nothing else."""
    try:
        return _HEADER.startswith(reader.read_bytes(path, path.name, len(_HEADER), follow_links=False))
    except UserError:
        return False


# --- folders


def check_apart(
    outputs: Mapping[str, str | None], inputs: Mapping[str, str | None], bases: Mapping[str, str | None]
) -> None:
    """Check that no folder that is written to is, holds or lies in a folder that is read, and that none is
    written to under two flags.

    The later of two `outputs` may lie in the earlier one, as logs do in the output folder. Keys are flags, in
    the order of the message; values are paths, or None for a flag that was not given. A name in `bases` that
    is not on this disk is the id of a repository, and passed over. Links and other spellings of a path do not
    matter. Raises UserError.
    """
    local = {flag: name for flag, name in bases.items() if name is not None and os.path.lexists(name)}
    sources = {**inputs, **local}
    pairs = [
        *itertools.product(outputs.items(), sources.items()),
        *itertools.combinations(outputs.items(), 2),
    ]
    for (out_flag, output), (in_flag, source) in pairs:
        if output is None or source is None or out_flag == in_flag or "\0" in output + source:
            continue
        out_chain, in_chain = _chain(output), _chain(source)
        if _same(out_chain[0], in_chain[0]):
            relation = "is"
        elif any(_same(folder, in_chain[0]) for folder in out_chain):
            relation = "lies in"
        elif in_flag in sources and any(_same(folder, out_chain[0]) for folder in in_chain):
            relation = "holds"
        else:
            continue
        raise UserError(
            f"{out_flag}: {shown(output)} {relation} {shown(source)}, which {in_flag} names: they must lie"
            " apart; name another folder"
        )


def _chain(path: str) -> list[str]:
    """The path without links, and every folder above it."""
    real = Path(os.path.realpath(path))
    return [str(real), *map(str, real.parents)]


def _same(first: str, second: str) -> bool:
    """Whether two paths name the same folder: on some file systems case does not matter."""
    if first == second:
        return True
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False
