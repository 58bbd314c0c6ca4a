"""Checkpoints as folders: written whole or not at all, and checked by hash. An old one is removed only after
a newer one was checked.

A checkpoint is written into `.tmp-step-<step>-*`, `manifest.json` last; every file is flushed, and the folder
is renamed to `checkpoint-<step>`. The manifest lists each file with its size and SHA-256, and has a hash of
itself. No file names the newest checkpoint: it is the one with the highest step whose hashes are right.

This module does not use `writer.new_folder`, because it guarantees more: renames are flushed too, a
checkpoint is read back before an older one is removed, and an older checkpoint of the same name is moved
aside and moved back after an error.

A manifest is also the record of what may be removed: a checkpoint of which every byte is as listed. A folder
that holds anything else is a user's, and is neither moved nor removed.

The meaning of the files is in training/checkpoints.py. This module imports no torch.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.io import reader, writer
from dreambooth.io.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_FLAG = "--resume_from_checkpoint"
# Only finished checkpoints have "checkpoint" in their names, since other programs look for this word. The
# second form is a good checkpoint that was moved aside while the same step was written again: it counts as a
# checkpoint until the new one is finished.
_NAME = re.compile(r"(?:checkpoint|\.replaced-step)-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"\.(?:tmp|trash)-step-[0-9]+-[0-9]+-[0-9a-f]{8}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_MANIFEST = 2**22  # bytes


class SaveFailed(Exception):
    """A checkpoint could not be written; older ones are unchanged. The message has the reason, the bytes
    needed and the bytes free."""


class PruneFailed(SaveFailed):
    """The checkpoint is written, but an older one could not be removed."""


class _DamagedCheckpoint(Exception):
    """A fault of a checkpoint. The message describes the fault."""


class ChosenCheckpoint(NamedTuple):
    """The checkpoint to resume from, and the damaged ones that are newer."""

    folder: Path | None  # None for a new run
    skipped: list[str]  # a line for each damaged checkpoint


@dataclasses.dataclass(frozen=True)
class Content:
    """A checkpoint in memory. `files` holds the bytes whose hashes were compared, by name."""

    folder: Path
    step: int
    identity: dict[str, Any]
    fingerprint: str  # SHA-256 of the manifest: two checkpoints with the same one are equal in every byte
    files: dict[str, bytes]


# --- reading


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything with a checkpoint's name, oldest first, damaged ones included. Raises
    UserError if the folder cannot be read."""
    try:
        paths = list(output_dir.iterdir()) if output_dir.is_dir() else []
    except OSError as error:
        raise UserError(f"--output_dir: {output_dir} cannot be read ({error.strerror})") from None
    checkpoints = [(int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return sorted(checkpoints, key=lambda item: (item[0], item[1].name.startswith("checkpoint"), item[1]))


def verify(folder: Path) -> list[str]:
    """The problems of a checkpoint: [] if every byte is as it was written and no file is missing or added."""
    return _examine(folder, keep=False)[1]


def read(folder: Path) -> Content:
    """A checkpoint with its bytes; each file is read once. Raises UserError if it has a problem."""
    content, problems = _examine(folder, keep=True)
    if content is None or problems:
        raise UserError(f"{_FLAG}: {folder} cannot be used: {'; '.join(problems)}")
    return content


def choose(resume_from: str, output_dir: Path) -> ChosenCheckpoint:
    """The checkpoint that --resume_from_checkpoint names: the newest whole one for `latest` and `auto`, else
    a name in `output_dir` or a path.

    Raises UserError if there are checkpoints and all are damaged, or if the named one does not exist or is
    damaged.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from in ("latest", "auto"):
        skipped: list[str] = []
        for _, folder in reversed(checkpoints):
            problems = verify(folder)
            if not problems:
                return ChosenCheckpoint(folder, skipped)
            skipped.append(f"{folder.name}: {'; '.join(problems)}")
        if skipped:
            reasons = "".join(f"\n  {line}" for line in skipped)
            advice = "Name another checkpoint, or move these away to start a new run"
            raise UserError(
                f"{_FLAG} {resume_from}: {output_dir} has {len(checkpoints)} checkpoint(s) and none is whole:"
                f"{reasons}\n{advice}"
            )
        return ChosenCheckpoint(None, [])
    folder = output_dir / resume_from
    if not os.path.lexists(folder):
        folder = Path(resume_from)
    if not os.path.lexists(folder):
        names = ", ".join(path.name for _, path in checkpoints) or "none"
        raise UserError(f"{_FLAG}: no checkpoint {resume_from!r}; {output_dir} has: {names}")
    if problems := verify(folder):
        raise UserError(f"{_FLAG}: {folder} cannot be used: {'; '.join(problems)}")
    return ChosenCheckpoint(folder, [])


def size(folder: Path) -> int:
    """The size of a checkpoint in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _examine(folder: Path, *, keep: bool) -> tuple[Content | None, list[str]]:
    """(the checkpoint, with its bytes if `keep`; its problems)."""
    try:
        names = _names(folder)
        data, _ = _read_plain(folder / MANIFEST, _LARGEST_MANIFEST)
        manifest = _parse_manifest(data)
    except _DamagedCheckpoint as damage:
        return None, [str(damage)]
    problems = []
    match = _NAME.fullmatch(folder.absolute().name)
    if match is None or int(match[1]) != manifest["step"]:
        problems.append(f"its manifest is that of checkpoint-{manifest['step']}")
    listed: dict[str, dict[str, Any]] = manifest["files"]
    problems += [f"{name!r} is not in its manifest" for name in sorted(names - listed.keys() - {MANIFEST})]
    files: dict[str, bytes] = {}
    for name, expected in sorted(listed.items()):
        try:
            if name not in names:
                raise _DamagedCheckpoint(f"{name} is missing")
            files[name], sha256 = _read_plain(folder / name, expected["size"], exactly=True, keep=keep)
            if sha256 != expected["sha256"]:
                raise _DamagedCheckpoint(f"{name} is not as it was written (its SHA-256 differs)")
        except _DamagedCheckpoint as damage:
            problems.append(str(damage))
    content = Content(
        folder,
        manifest["step"],
        manifest["identity"],
        hashlib.sha256(data).hexdigest(),
        files if keep else {},
    )
    return content, problems


def _names(folder: Path) -> set[str]:
    """The names of the files in a checkpoint's folder. Raises _DamagedCheckpoint if it is no folder or has no
    manifest."""
    if folder.is_symlink():
        raise _DamagedCheckpoint(f"it is a symbolic link; name the folder itself, {os.path.realpath(folder)}")
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise _DamagedCheckpoint(f"it cannot be read as a folder ({error.strerror})") from None
    if MANIFEST in names:
        return names
    if "optimizer.bin" in names or any(re.fullmatch(r"random_states_[0-9]+\.pkl", name) for name in names):
        reason = (
            "it was written by accelerate, as in diffusers' script of this name; its optimizer is in a form "
            "that can carry code and is not read"
        )
        if "pytorch_lora_weights.safetensors" in names:
            reason += f"; --init_adapter {folder} starts a new run from its LoRA"
        raise _DamagedCheckpoint(reason)
    raise _DamagedCheckpoint(
        f"it has no {MANIFEST}, so it is not a checkpoint of this program or was never finished"
    )


def _read_plain(path: Path, most: int, *, exactly: bool = False, keep: bool = True) -> tuple[bytes, str]:
    """(the bytes of the file if `keep`, else b""; their SHA-256). Raises _DamagedCheckpoint if it is not a
    regular file, has more than `most` bytes, or, with `exactly`, has fewer."""
    name = path.name
    try:
        with reader.opened(path, follow_links=False) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most or (exactly and size < most):
                raise _DamagedCheckpoint(
                    f"{name} has {size:,} bytes instead of {'' if exactly else 'at most '}{most:,}"
                )
            if not keep:
                return b"", hashlib.file_digest(file, "sha256").hexdigest()
            data = file.read(most + 1)
    except reader.NotRegular as error:
        raise _DamagedCheckpoint(f"{name} is {error.strerror}") from None
    except OSError as error:
        raise _DamagedCheckpoint(f"{name} cannot be read ({error.strerror})") from None
    return data, hashlib.sha256(data).hexdigest()


def _sealed(body: dict[str, Any]) -> bytes:
    """The bytes of a manifest with a hash of its content. The hash shows damage that leaves valid JSON."""
    return _json({**body, "sha256_of_the_rest": hashlib.sha256(_json(body)).hexdigest()})


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _parse_manifest(data: bytes) -> dict[str, Any]:
    """The manifest without its hash. Raises _DamagedCheckpoint unless `_sealed` gives `data` again."""
    try:
        body = reader.parsed_json_table(data, MANIFEST)
        version = body.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise _DamagedCheckpoint(
                f"{MANIFEST} is of format {version}; this program reads up to {FORMAT_VERSION}"
            )
        body.pop("sha256_of_the_rest", None)
        is_whole = version == FORMAT_VERSION and _sealed(body) == data
    except (UserError, ValueError):  # ValueError: a number that is not finite
        is_whole = False
    if not is_whole:
        raise _DamagedCheckpoint(f"{MANIFEST} is damaged")
    step, identity, files = body.get("step"), body.get("identity"), body.get("files")
    has_step = type(step) is int and step >= 0
    if not (has_step and isinstance(identity, dict) and isinstance(files, dict) and files):
        raise _DamagedCheckpoint(f"{MANIFEST} lacks step, identity or files")
    for name, entry in files.items():
        plain = (
            isinstance(entry, dict)
            and type(entry.get("size")) is int
            and entry["size"] >= 0
            and isinstance(entry.get("sha256"), str)
            and _SHA256.fullmatch(entry["sha256"])
        )
        if not plain or not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise _DamagedCheckpoint(f"{MANIFEST} has an invalid entry {name!r}")
    return body


def is_foreign(folder: Path, names: Collection[str] = ()) -> bool:
    """Whether something that this program did not write has the name of a checkpoint, or lies in one.

    A damaged checkpoint is not foreign: all that it holds are files of its manifest, or of `names` if the
    manifest is damaged.
    """
    if not os.path.lexists(folder):
        return False
    try:
        entries = [] if folder.is_symlink() else list(os.scandir(folder))
    except OSError:
        return True
    known = {MANIFEST, *names}
    with contextlib.suppress(_DamagedCheckpoint):
        known |= _parse_manifest(_read_plain(folder / MANIFEST, _LARGEST_MANIFEST)[0])["files"].keys()
    return MANIFEST not in {entry.name for entry in entries} or any(
        entry.name not in known or not entry.is_file(follow_symlinks=False) for entry in entries
    )


# --- writing


def publish(
    output_dir: Path, step: int, files: dict[str, bytes], identity: dict[str, Any], *, limit: int | None
) -> Path:
    """Write `checkpoint-<step>`, then remove whole checkpoints beyond the newest `limit` (None: no limit).
    Returns the path of the new one.

    A checkpoint of the same step with the same bytes is left as it is. Raises SaveFailed if the checkpoint
    cannot be written: older ones, and one of the same step, are then unchanged. Raises PruneFailed if only
    the removal failed.
    """
    target = output_dir / f"checkpoint-{step}"
    table = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    # through JSON first: it turns keys into strings and tuples into lists, as in a manifest that was read
    body = {"format_version": FORMAT_VERSION, "step": step, "identity": identity, "files": table}
    manifest = _sealed(reader.parsed_json_table(json.dumps(body), MANIFEST))
    try:
        content, problems = _examine(target, keep=False)
        if problems or content is None or content.fingerprint != hashlib.sha256(manifest).hexdigest():
            _put(target, step, {**files, MANIFEST: manifest}, keep_old=not problems)
    except OSError as error:
        needed = sum(map(len, files.values())) + len(manifest)
        room = f"it needs {needed:,} bytes, {output_dir} has {_free_bytes(output_dir)} free"
        raise SaveFailed(
            f"{target.name} could not be saved: {error.strerror or error}; {room}. "
            "Older checkpoints are as they were"
        ) from error
    try:
        _prune(target, step, limit)
    except OSError as error:
        raise PruneFailed(
            f"{target.name} is saved, but an older checkpoint in {output_dir} could not be removed:"
            f" {error.strerror or error}"
        ) from error
    return target


def _put(target: Path, step: int, files: dict[str, bytes], *, keep_old: bool) -> None:
    """Write, flush, rename and verify a checkpoint. Raises OSError if that fails; everything is then as it
    was.

    An older checkpoint with the name is moved aside. With `keep_old` it is whole, and its new name still
    counts as a checkpoint; otherwise it is damaged, and its new name does not count. Raises FileExistsError
    if what has the name `is_foreign`.
    """
    output_dir = target.parent
    temporary = output_dir / f".tmp-step-{step}-{os.getpid()}-{secrets.token_hex(4)}"
    replaced = output_dir / f".replaced-step-{step}"
    moved: Path | None = None
    placed = False
    if is_foreign(target, files):
        raise FileExistsError(errno.EEXIST, "what has its name is not this program's; move it away")
    try:
        # the files, under a name that is no checkpoint's
        writer.make_folder(temporary)
        for name, data in files.items():
            writer.write_new(temporary / name, data)
        writer.flush(temporary)
        # the name
        if os.path.lexists(target):
            if keep_old and not verify(replaced):
                _remove(replaced, step)  # of a run that died after it had finished its new checkpoint
            keep_old = keep_old and not os.path.lexists(replaced)
            aside = replaced if keep_old else writer.unused(output_dir / f".bad-step-{step}")
            writer.move(target, aside)
            moved = aside
        writer.move(temporary, target)
        placed = True
        writer.flush(output_dir)
        # read back
        if problems := verify(target):
            raise OSError(errno.EIO, f"the checkpoint reads back damaged: {'; '.join(problems)}")
    except BaseException:
        # undo the renames, the last one first
        if placed:
            writer.move(target, temporary)
        if moved is not None:
            writer.move(moved, target)
        # the first error is reported; the next run sweeps what cannot be removed now
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prune(target: Path, step: int, limit: int | None) -> None:
    """Remove the checkpoints that `target`, which is whole, replaces. Damaged ones do not count and are not
    removed."""
    replaced = target.with_name(f".replaced-step-{step}")
    if not verify(replaced):
        _remove(replaced, step)
    if limit is None:
        return
    kept_steps = {step}
    for other_step, folder in reversed(list_checkpoints(target.parent)):
        # later steps stay: an earlier start of this run saved them, and this start resumed from an older one
        if folder == target or other_step > step or verify(folder):
            continue
        if other_step in kept_steps or len(kept_steps) >= limit:
            _remove(folder, other_step)
        else:
            kept_steps.add(other_step)


def remove(output_dir: Path) -> None:
    """Remove every whole checkpoint. Raises OSError."""
    for step, folder in list_checkpoints(output_dir):
        if not verify(folder):
            _remove(folder, step)


def _remove(folder: Path, step: int) -> None:
    """Remove a whole checkpoint. It is renamed first: no half-removed folder has a checkpoint's name."""
    trash = folder.with_name(f".trash-step-{step}-{os.getpid()}-{secrets.token_hex(4)}")
    writer.move(folder, trash)
    writer.remove(trash)


def sweep(output_dir: Path) -> list[str]:
    """Remove half-written and half-removed checkpoints of processes that died. Returns their names. The
    caller must hold the folder's lock. Raises UserError if something cannot be removed."""
    swept = []
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        match = re.fullmatch(r"\.replaced-step-([0-9]+)", path.name)
        is_replaced = match is not None and not (
            verify(path) or verify(output_dir / f"checkpoint-{match[1]}")
        )
        if is_replaced or (_TEMPORARY.fullmatch(path.name) and _holds_only_files(path)):
            try:
                if match is not None:
                    _remove(path, int(match[1]))
                else:
                    writer.remove(path)
            except OSError as error:
                raise UserError(
                    f"--output_dir: {path}, left by a run that died, cannot be removed ({error.strerror})"
                ) from None
            swept.append(path.name)
    return swept


def _holds_only_files(folder: Path) -> bool:
    """Whether all that a folder holds are files with names as in a checkpoint."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        entry.is_file(follow_symlinks=False) and re.fullmatch(r"\w+\.(json|safetensors)", entry.name)
        for entry in os.scandir(folder)
    )


# --- room on the disk


def room_note(last: Path) -> str | None:
    """A warning if less than 1.5 times the size of the checkpoint `last` is free on the disk; None
    otherwise."""
    with contextlib.suppress(OSError):  # moved away already; else it comes again with the next checkpoint
        last_size, free = size(last), shutil.disk_usage(last).free
        if free < 1.5 * last_size:
            return (
                f"{last.parent} has {free:,} bytes free; the last checkpoint took {last_size:,}, the next "
                "may not fit. Make room"
            )
    return None


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"
