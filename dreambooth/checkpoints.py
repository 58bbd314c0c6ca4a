"""Checkpoints: `checkpoint-<step>/` with the adapter, the optimizer's moments by parameter name, and a small JSON. No pickle anywhere.

A checkpoint is written into a temporary folder, flushed and renamed, and only then are older ones removed: whenever the process dies,
the newest folder called checkpoint-* is whole.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dreambooth import adapter_files
from dreambooth.adapters import Component
from dreambooth.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)")
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint that has been completed, oldest first."""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and (path / _STATE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def find(resume_from: str, output_dir: Path) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None for `latest` where there is none yet.

    Raises UserError, listing what there is, if a named checkpoint does not exist or is not one of ours.
    """
    there = list_checkpoints(output_dir)
    if resume_from == "latest":
        return there[-1][1] if there else None
    path = Path(resume_from)
    if not path.is_absolute() and not path.is_dir():
        path = output_dir / resume_from
    if not path.is_dir():
        shown = ", ".join(p.name for _, p in there) or "none"
        raise UserError(f"--resume_from_checkpoint: no checkpoint {resume_from!r}; {output_dir} has: {shown}")
    if not (path / _STATE).is_file():
        hint = "it was written by another program" if (path / "optimizer.bin").exists() else f"it has no {_STATE}"
        raise UserError(f"--resume_from_checkpoint: {path} is not a checkpoint of this program: {hint}")
    return path


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The optimizer's state, `<parameter>|<field>`; `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}|{field}": value.detach().cpu().contiguous()
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
        if isinstance(value, torch.Tensor)
    }


def save(output_dir: Path, step: int, adapter: bytes, moments: dict[str, torch.Tensor], state: dict[str, Any], *, limit: int | None) -> Path:
    """Publish `checkpoint-<step>`, then remove the oldest ones beyond `limit`."""
    target = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".tmp-step-{step}-{os.getpid()}"  # must not contain "checkpoint": a name with it is a finished one
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        adapter_files.write_atomically(temporary / adapter_files.ADAPTER_NAME, adapter)
        adapter_files.write_atomically(temporary / _OPTIMIZER, adapter_files.stable_bytes(moments, {"format": "pt"}))
        adapter_files.write_atomically(temporary / _STATE, (json.dumps({**state, "step": step}, indent=1) + "\n").encode())
        _flush_folder(temporary)
        if target.exists():  # of an earlier run that got further: what is written now is at least as good
            shutil.rmtree(target)
        os.rename(temporary, target)
        _flush_folder(output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if limit is not None:
        for _, old in [c for c in list_checkpoints(output_dir) if c[1] != target][: -(limit - 1) or None]:
            shutil.rmtree(old)
    return target


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--resume_from_checkpoint: {folder / _STATE} is damaged ({error})") from None


def restore(folder: Path, components: list[Component], optimizer: torch.optim.Optimizer) -> None:
    """Fill adapters and optimizer from a checkpoint. Raises UserError, before anything is changed, if it does not fit."""
    state, _ = adapter_files.read(folder / adapter_files.ADAPTER_NAME)
    expected, found = sorted(c.name for c in components), sorted(state)
    if expected != found:
        raise UserError(f"--resume_from_checkpoint: {folder} holds an adapter of {' and '.join(found)}; this run trains {' and '.join(expected)}")
    try:
        moments = load_file(folder / _OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--resume_from_checkpoint: {folder / _OPTIMIZER} is damaged ({error})") from None
    parameters = {name: parameter for component in components for name, parameter in component.named_parameters()}
    restored: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for key, tensor in moments.items():
        name, _, field = key.rpartition("|")
        if name not in parameters:
            raise UserError(f"--resume_from_checkpoint: {folder} has optimizer state for {name}, which this run does not train")
        on_device = tensor if field == "step" else tensor.to(parameters[name].device)
        restored.setdefault(parameters[name], {})[field] = on_device
    for component in components:
        component.load_state_dict(state[component.name])
    optimizer.state.update(restored)
