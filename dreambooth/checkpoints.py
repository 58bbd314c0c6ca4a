"""What is in a checkpoint: the adapter, the optimizer's moments by parameter name, and a small JSON with the step and the run's settings.

Nothing in it can carry code: safetensors and JSON only. How it comes to lie on the disk whole is checkpoint_files.py's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from dreambooth import adapter_files, checkpoint_files
from dreambooth.adapters import Component
from dreambooth.checkpoint_files import Choice, Content, PruneFailed, SaveFailed, choose, list_checkpoints, read, room_note, size, sweep, verify
from dreambooth.errors import UserError

__all__ = [
    "Choice",
    "Content",
    "PruneFailed",
    "SaveFailed",
    "choose",
    "list_checkpoints",
    "optimizer_tensors",
    "read",
    "read_state",
    "restore",
    "room_note",
    "save",
    "size",
    "sweep",
    "verify",
]

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_FLAG = "--resume_from_checkpoint"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The optimizer's state, `<parameter>|<field>`; `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}|{field}": value.detach().cpu().contiguous()
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
        if isinstance(value, torch.Tensor)
    }


def save(
    output_dir: Path,
    step: int,
    adapter: bytes,
    moments: dict[str, torch.Tensor],
    state: dict[str, Any],
    *,
    limit: int | None,
    identity: dict[str, Any] | None = None,
) -> Path:
    """Publish `checkpoint-<step>`, then remove the oldest whole ones beyond `limit`. `identity`, what run this is, goes into the manifest.

    Raises SaveFailed if the disk does not take it; what was there is then as it was, and training can go on.
    """
    files = {
        adapter_files.ADAPTER_NAME: adapter,
        OPTIMIZER: adapter_files.stable_bytes(moments, {"format": "pt"}),
        STATE: (json.dumps({**state, "step": step}, indent=1) + "\n").encode(),
    }
    return checkpoint_files.publish(output_dir, step, files, identity or {}, limit=limit)


def read_state(content: Content) -> dict[str, Any]:
    """What `save` was given as `state`, with the step. Raises UserError if it is none."""
    where = content.folder / STATE
    try:
        state = json.loads(_file(content, STATE))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{_FLAG}: {where} is damaged ({error})") from None
    if not isinstance(state, dict) or state.get("step") != content.step:
        raise UserError(f"{_FLAG}: {where} is damaged (it is not of step {content.step})")
    return state


def restore(content: Content, components: list[Component], optimizer: torch.optim.Optimizer) -> None:
    """Fill adapters and optimizer from a checkpoint. Raises UserError, before anything is changed, if it does not fit."""
    state = _adapter_state(content)
    expected, found = sorted(c.name for c in components), sorted(state)
    if expected != found:
        raise UserError(f"{_FLAG}: {content.folder} holds an adapter of {' and '.join(found)}; this run trains {' and '.join(expected)}")
    for component in components:
        try:
            component.check_state_dict(state[component.name])
        except UserError as error:
            raise UserError(f"{_FLAG}: {content.folder}: {error}") from None
    moments = _moments(content, dict(item for component in components for item in component.named_parameters()))
    for component in components:
        component.load_state_dict(state[component.name])
    optimizer.state.update(moments)


def _file(content: Content, name: str) -> bytes:
    if name not in content.files:
        raise UserError(f"{_FLAG}: {content.folder} has no {name}")
    return content.files[name]


def _tensors(content: Content, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file. Raises UserError if it is not whole or has values that are not finite."""
    where = content.folder / name
    try:
        tensors = load(_file(content, name))
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise UserError(f"{_FLAG}: {where} is damaged ({' '.join(str(error).split())})") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{_FLAG}: {where} has values in {key} that are not finite")
    return tensors


def _adapter_state(content: Content) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter's tensors by component and by peft's key."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(content, adapter_files.ADAPTER_NAME).items():
        component, _, key = name.partition(".")
        # which adapter_files.pack puts in front
        state.setdefault(component, {})[key.removeprefix("text_model.") if component.startswith("text_encoder") else key] = tensor
    return state


def _moments(content: Content, parameters: dict[str, torch.nn.Parameter]) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """The optimizer's state by parameter. Raises UserError unless every parameter has all fields, in its own shape."""
    path, tensors = content.folder / OPTIMIZER, _tensors(content, OPTIMIZER)
    if not tensors and "grad_scaler" in read_state(content):
        return {}  # fp16 skips its first steps while the scale is found: the optimizer has not stepped yet
    fields = {key.rpartition("|")[2] for key in tensors}
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("|")
        if name not in parameters:
            raise UserError(f"{_FLAG}: {path} has optimizer state for {name}, which this run does not train")
        if field.startswith("exp_avg") and tensor.shape != parameters[name].shape:
            shapes = f"{tuple(tensor.shape)}; the parameter has {tuple(parameters[name].shape)}"
            raise UserError(f"{_FLAG}: {path} has {key} of shape {shapes}")
        moments.setdefault(parameters[name], {})[field] = tensor if field == "step" else tensor.to(parameters[name].device)
    for name, parameter in parameters.items():
        if lacking := fields - moments.get(parameter, {}).keys() or ({"everything"} if not fields else set()):
            raise UserError(f"{_FLAG}: {path} is damaged: {name} lacks {', '.join(sorted(lacking))}")
    return moments
