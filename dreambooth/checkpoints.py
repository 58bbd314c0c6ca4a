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
# Names of what is not, or no longer, a checkpoint must not contain the word.
_REPLACED = re.compile(r"\.replaced-step-(\d+)")
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint that has been completed, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        # one that was being replaced when the process died counts until its successor stands
        match = _NAME.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
        if match and path.is_dir() and (path / _STATE).is_file() and (_NAME.fullmatch(path.name) or int(match[1]) not in found):
            found[int(match[1])] = path
    return sorted(found.items())


def find(resume_from: str, output_dir: Path) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None for `latest` where there is none yet. A bare name is one of the run's own.

    Raises UserError, listing what there is, if a named checkpoint does not exist or is not one of ours.
    """
    there = list_checkpoints(output_dir)
    if resume_from == "latest":
        return there[-1][1] if there else None
    own, elsewhere = output_dir / resume_from, Path(resume_from)
    path = own if own.is_dir() else elsewhere
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
    temporary = output_dir / f".tmp-step-{step}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        adapter_files.write_atomically(temporary / adapter_files.ADAPTER_NAME, adapter)
        adapter_files.write_atomically(temporary / _OPTIMIZER, adapter_files.stable_bytes(moments, {"format": "pt"}))
        adapter_files.write_atomically(temporary / _STATE, (json.dumps({**state, "step": step}, indent=1) + "\n").encode())
        _flush_folder(temporary)
        replaced = output_dir / f".replaced-step-{step}"
        if target.exists():  # of an earlier run that got further
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(target, replaced)
        os.rename(temporary, target)
        _flush_folder(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if limit is not None:
        for _, old in [c for c in list_checkpoints(output_dir) if c[1] != target][: -(limit - 1) or None]:
            _remove(old)
    return target


def _remove(folder: Path) -> None:
    """Take the name away first: half a folder must not be called a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name.removeprefix('checkpoint-').lstrip('.')}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`, with the step. Raises UserError if it is damaged."""
    path = folder / _STATE
    try:
        state = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"--resume_from_checkpoint: {path} is damaged ({error})") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise UserError(f"--resume_from_checkpoint: {path} is damaged (it names no step)")
    return state


def restore(folder: Path, components: list[Component], optimizer: torch.optim.Optimizer) -> None:
    """Fill adapters and optimizer from a checkpoint. Raises UserError, before anything is changed, if it does not fit."""
    state, _ = adapter_files.read(folder / adapter_files.ADAPTER_NAME)
    expected, found = sorted(c.name for c in components), sorted(state)
    if expected != found:
        raise UserError(f"--resume_from_checkpoint: {folder} holds an adapter of {' and '.join(found)}; this run trains {' and '.join(expected)}")
    for component in components:
        try:
            component.check_state_dict(state[component.name])
        except UserError as error:
            raise UserError(f"--resume_from_checkpoint: {folder}: {error}") from None
    moments = _read_moments(folder, dict(item for component in components for item in component.named_parameters()))
    for component in components:
        component.load_state_dict(state[component.name])
    optimizer.state.update(moments)


def _read_moments(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """The optimizer's state by parameter. Raises UserError unless every parameter has all fields, in its own shape."""
    path = folder / _OPTIMIZER
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--resume_from_checkpoint: {path} is damaged ({' '.join(str(error).split())})") from None
    fields = {key.rpartition("|")[2] for key in tensors}
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("|")
        if name not in parameters:
            raise UserError(f"--resume_from_checkpoint: {path} has optimizer state for {name}, which this run does not train")
        if field.startswith("exp_avg") and tensor.shape != parameters[name].shape:
            shapes = f"{tuple(tensor.shape)}; the parameter has {tuple(parameters[name].shape)}"
            raise UserError(f"--resume_from_checkpoint: {path} has {key} of shape {shapes}")
        moments.setdefault(parameters[name], {})[field] = tensor if field == "step" else tensor.to(parameters[name].device)
    for name, parameter in parameters.items():
        if lacking := fields - moments.get(parameter, {}).keys() or ({"everything"} if not fields else set()):
            raise UserError(f"--resume_from_checkpoint: {path} is damaged: {name} lacks {', '.join(sorted(lacking))}")
    return moments
