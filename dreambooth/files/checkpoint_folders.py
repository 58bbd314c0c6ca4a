"""Checkpoints as folders: published whole or not at all, checked by hash, removed only once a newer one has been checked.

A checkpoint is written into `.tmp-step-<step>-*`, every file flushed, `manifest.json` last, and renamed to `checkpoint-<step>`. The manifest
names every file with size and SHA-256, and carries a hash of itself. There is no pointer to the newest: it is the highest step whose hashes
hold. This module knows bytes and names; what they mean is checkpoints.py's. It imports no torch.
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
import stat
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.errors import UserError
from dreambooth.files import atomic

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_FLAG = "--resume_from_checkpoint"
# Only the first kind may contain the word: other programs take every such name for a finished checkpoint. The second is one that was
# good when a run wrote the same step anew; until its successor stands it counts.
_NAME = re.compile(r"(?:checkpoint|\.replaced-step)-(0|[1-9][0-9]*)")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_MANIFEST = 2**22  # bytes


class SaveFailed(Exception):
    """A checkpoint could not be written; the older ones are as they were. The message names the reason, the bytes needed and those free."""


class PruneFailed(SaveFailed):
    """The checkpoint is safe, but one that it makes superfluous could not be removed."""


class _Damaged(Exception):
    """What is wrong with a checkpoint, in words."""


class Choice(NamedTuple):
    """The checkpoint to go on from, None for a new run, and a line for each newer one that was passed over."""

    folder: Path | None
    skipped: list[str]


@dataclasses.dataclass(frozen=True)
class Content:
    """A checkpoint in memory; `files` are the very bytes whose hashes were compared."""

    folder: Path
    step: int
    identity: dict[str, Any]
    fingerprint: str  # SHA-256 of the manifest: two checkpoints that share it are the same in every byte
    files: dict[str, bytes]


# --- reading


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that is called a checkpoint, oldest first; whether it is a whole one, `verify` tells."""
    try:
        paths = list(output_dir.iterdir()) if output_dir.is_dir() else []
    except OSError as error:
        raise UserError(f"--output_dir: {output_dir} cannot be read ({error.strerror})") from None
    found = [(int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return sorted(found, key=lambda item: (item[0], item[1].name.startswith("checkpoint"), item[1]))


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; empty if every byte is as it was written and nothing is missing or added."""
    return _examine(folder, keep=False)[1]


def read(folder: Path) -> Content:
    """A checkpoint's bytes, each file read once. Raises UserError if anything is wrong with it."""
    content, problems = _examine(folder, keep=True)
    if content is None or problems:
        raise UserError(f"{_FLAG}: {folder} cannot be used: {'; '.join(problems)}")
    return content


def choose(resume_from: str, output_dir: Path) -> Choice:
    """The checkpoint that `--resume_from_checkpoint` means: for `latest` and `auto` the newest whole one. A bare name is one of the run's own.

    Raises UserError, with the reasons, if there are checkpoints and none is whole, or if the one that is named does not exist or is damaged.
    """
    there = list_checkpoints(output_dir)
    if resume_from in ("latest", "auto"):
        skipped: list[str] = []
        for _, folder in reversed(there):
            problems = verify(folder)
            if not problems:
                return Choice(folder, skipped)
            skipped.append(f"{folder.name}: {'; '.join(problems)}")
        if skipped:
            reasons = "".join(f"\n  {line}" for line in skipped)
            advice = "Name another checkpoint, or move these away to start a new run"
            raise UserError(
                f"{_FLAG} {resume_from}: {output_dir} has {len(there)} checkpoint(s) and none is whole:{reasons}\n{advice}"
            )
        return Choice(None, [])
    own, elsewhere = output_dir / resume_from, Path(resume_from)
    folder = own if os.path.lexists(own) else elsewhere
    if not os.path.lexists(folder):
        shown = ", ".join(path.name for _, path in there) or "none"
        raise UserError(f"{_FLAG}: no checkpoint {resume_from!r}; {output_dir} has: {shown}")
    if problems := verify(folder):
        raise UserError(f"{_FLAG}: {folder} cannot be used: {'; '.join(problems)}")
    return Choice(folder, [])


def size(folder: Path) -> int:
    """Bytes that a checkpoint takes."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _examine(folder: Path, *, keep: bool) -> tuple[Content | None, list[str]]:
    """(the checkpoint, with its bytes if `keep`; everything that is wrong with it)."""
    try:
        names = _names(folder)
        data, _ = _read_plain(folder / MANIFEST, _LARGEST_MANIFEST)
        manifest = _parse_manifest(data)
    except _Damaged as damage:
        return None, [str(damage)]
    problems = []
    match = _NAME.fullmatch(folder.absolute().name)
    if match is None or int(match[1]) != manifest["step"]:
        problems.append(f"its manifest is that of checkpoint-{manifest['step']}")
    listed: dict[str, dict[str, Any]] = manifest["files"]
    problems += [f"{name!r} does not belong there" for name in sorted(names - listed.keys() - {MANIFEST})]
    files: dict[str, bytes] = {}
    for name, expected in sorted(listed.items()):
        try:
            if name not in names:
                raise _Damaged(f"{name} is missing")
            files[name], found = _read_plain(folder / name, expected["size"], exactly=True, keep=keep)
            if found != expected["sha256"]:
                raise _Damaged(f"{name} is not as it was written (its SHA-256 differs)")
        except _Damaged as damage:
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
    """The names in what should be a checkpoint's folder. Raises _Damaged if it is none, or has no manifest, with the likeliest reason."""
    if folder.is_symlink():
        raise _Damaged(f"it is a symbolic link; name the folder itself, {os.path.realpath(folder)}")
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise _Damaged(f"it cannot be read as a folder ({error.strerror})") from None
    if MANIFEST in names:
        return names
    if "optimizer.bin" in names or any(re.fullmatch(r"random_states_[0-9]+\.pkl", name) for name in names):
        reason = "it was written by accelerate, as in diffusers' script of this name; its optimizer is in a form that can carry code and is not read"
        if "pytorch_lora_weights.safetensors" in names:
            reason += f"; --init_adapter {folder} starts a new run from its LoRA"
        raise _Damaged(reason)
    raise _Damaged(f"it has no {MANIFEST}, so it is not a checkpoint of this program or was never finished")


def _read_plain(path: Path, most: int, *, exactly: bool = False, keep: bool = True) -> tuple[bytes, str]:
    """(the bytes of a regular file if `keep`, their SHA-256). Raises _Damaged if it is no such file, or not of the size that is expected."""
    name = path.name
    try:
        # a link is not followed, and a named pipe does not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise _Damaged(f"{name} is not a regular file")
            if found.st_size > most or (exactly and found.st_size < most):
                raise _Damaged(
                    f"{name} has {found.st_size:,} bytes instead of {'' if exactly else 'at most '}{most:,}"
                )
            with open(descriptor, "rb", closefd=False) as file:
                if not keep:
                    return b"", hashlib.file_digest(file, "sha256").hexdigest()
                data = file.read(most + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _Damaged(
            f"{name} is a symbolic link"
            if error.errno == errno.ELOOP
            else f"{name} cannot be read ({error.strerror})"
        ) from None
    return data, hashlib.sha256(data).hexdigest()


def _sealed(body: dict[str, Any]) -> bytes:
    """The manifest's bytes. Its hash of itself tells a damaged manifest from another one."""
    seal = hashlib.sha256(_json(body)).hexdigest()
    return _json({**body, "sha256_of_the_rest": seal})


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _parse_manifest(data: bytes) -> dict[str, Any]:
    """Raises _Damaged unless the bytes are those that `_sealed` gives for a manifest of this format."""
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or "format_version" not in body:
            raise _Damaged(f"{MANIFEST} is damaged")
        version = body["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise _Damaged(f"{MANIFEST} is of format {version}; this program reads up to {FORMAT_VERSION}")
        body.pop("sha256_of_the_rest", None)
        whole = version == FORMAT_VERSION and _sealed(body) == data
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise _Damaged(f"{MANIFEST} is damaged")
    step, identity, files = body.get("step"), body.get("identity"), body.get("files")
    if (
        type(step) is not int
        or step < 0
        or not isinstance(identity, dict)
        or not isinstance(files, dict)
        or not files
    ):
        raise _Damaged(f"{MANIFEST} lacks step, identity or files")
    for name, entry in files.items():
        plain = (
            isinstance(entry, dict)
            and type(entry.get("size")) is int
            and entry["size"] >= 0
            and _is_sha256(entry.get("sha256"))
        )
        if not plain or not _PLAIN.fullmatch(name) or name == MANIFEST:
            raise _Damaged(f"{MANIFEST} has an entry {name!r} that is none")
    return body


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


# --- writing


def publish(
    output_dir: Path, step: int, files: dict[str, bytes], identity: dict[str, Any], *, limit: int | None
) -> Path:
    """Make `checkpoint-<step>` of the files, then remove whole ones beyond the newest `limit`; None keeps all. Nothing is done twice: a
    checkpoint that is there already, the same in every byte, stays.

    Raises SaveFailed if the disk does not take it: the older ones, and one of the same step, are then as they were.
    """
    target = output_dir / f"checkpoint-{step}"
    table = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    # to JSON and back first: what is read later must give the same bytes, whatever kind of keys and sequences came in
    body = json.loads(
        json.dumps({"format_version": FORMAT_VERSION, "step": step, "identity": identity, "files": table})
    )
    manifest = _sealed(body)
    try:
        content, problems = _examine(target, keep=False)
        if problems or content is None or content.fingerprint != hashlib.sha256(manifest).hexdigest():
            _put(target, step, {**files, MANIFEST: manifest}, keep_old=not problems)
    except OSError as error:
        needed = sum(map(len, files.values())) + len(manifest)
        room = f"it needs {needed:,} bytes, {output_dir} has {_free_bytes(output_dir)} free"
        raise SaveFailed(
            f"{target.name} could not be saved: {error.strerror or error}; {room}. Older checkpoints are as they were"
        ) from error
    try:
        _prune(target, step, limit)
    except OSError as error:
        raise PruneFailed(
            f"{target.name} is saved, but an older checkpoint in {output_dir} could not be removed: {error}"
        ) from error
    return target


def _put(target: Path, step: int, files: dict[str, bytes], *, keep_old: bool) -> None:
    """Write, flush, rename, check. Raises OSError, with everything as before, if that fails.

    What has the name already is never written over: a whole checkpoint counts, under its other name, until this one stands; a damaged one
    is kept for inspection.
    """
    output_dir = target.parent
    temporary = output_dir / f".tmp-step-{step}-{os.getpid()}-{secrets.token_hex(4)}"
    replaced = output_dir / f".replaced-step-{step}"
    moved: Path | None = None
    placed = False
    try:
        os.mkdir(temporary)
        for name, data in files.items():
            atomic.write_new(temporary / name, data)
        atomic.flush(temporary)
        if os.path.lexists(target):
            if keep_old and os.path.lexists(replaced):
                _remove(replaced, step)  # its successor stands; it was left by a run that died
            aside = replaced if keep_old else _unused(output_dir / f".bad-step-{step}")
            os.rename(target, aside)
            moved = aside
        os.rename(temporary, target)
        placed = True
        atomic.flush(output_dir)
        if problems := verify(target):
            raise OSError(errno.EIO, f"what was written reads back damaged: {'; '.join(problems)}")
    except BaseException:
        if placed:
            os.rename(target, temporary)
        if moved is not None:
            os.rename(moved, target)
        shutil.rmtree(
            temporary, ignore_errors=True
        )  # the first error counts; what cannot be removed is swept by the next run
        raise


def _prune(target: Path, step: int, limit: int | None) -> None:
    """Remove what the whole checkpoint `target` makes superfluous. A damaged one neither counts nor is removed."""
    replaced = target.with_name(f".replaced-step-{step}")
    if os.path.lexists(replaced):
        _remove(replaced, step)
    if limit is None:
        return
    good = {step}
    for other_step, folder in reversed(list_checkpoints(target.parent)):
        # those of later steps are of a run that got further and was gone back on from: this one is no successor of theirs
        if folder == target or other_step > step or verify(folder):
            continue
        if other_step in good or len(good) >= limit:
            _remove(folder, other_step)
        else:
            good.add(other_step)


def _remove(folder: Path, step: int) -> None:
    """Take the name away first: half a folder must not be called a checkpoint."""
    trash = folder.with_name(f".trash-step-{step}-{os.getpid()}-{secrets.token_hex(4)}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def sweep(output_dir: Path) -> list[str]:
    """Remove what processes that died left half written or half removed, and return its names. Only for the run that holds the folder's lock.

    Raises UserError if something cannot be removed.
    """
    swept = []
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        match = re.fullmatch(r"\.replaced-step-([0-9]+)", path.name)
        succeeded = match is not None and not verify(output_dir / f"checkpoint-{match[1]}")
        if succeeded or atomic.target_of(path.name) or path.name.startswith((".tmp-step-", ".trash-")):
            try:
                if match is not None:
                    _remove(path, int(match[1]))
                elif path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                raise UserError(
                    f"--output_dir: {path}, left by a run that died, cannot be removed ({error.strerror})"
                ) from None
            swept.append(path.name)
    return swept


def _unused(path: Path) -> Path:
    """The path itself, else with the first number behind it under which there is nothing."""
    number, unused = 1, path
    while os.path.lexists(unused):
        number += 1
        unused = path.with_name(f"{path.name}-{number}")
    return unused


# --- room on the disk


def room_note(output_dir: Path, last_size: int) -> str | None:
    """A warning if the disk may not take the next checkpoint, for which half as much again as the last one's bytes should be free."""
    with contextlib.suppress(OSError):  # a disk that cannot be asked will tell when it is written to
        free = shutil.disk_usage(output_dir).free
        if free < 1.5 * last_size:
            return f"{output_dir} has {free:,} bytes free; the last checkpoint took {last_size:,}, the next may not fit. Make room"
    return None


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"
