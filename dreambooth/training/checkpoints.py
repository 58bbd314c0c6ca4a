"""The content of a checkpoint: the adapter, the optimizer's tensors, and a JSON file with step and numbers.

With some optimizers and adapters the trained parameters differ from the values in the adapter file: they are
then stored beside the optimizer's tensors. All files are safetensors or JSON, which carry no code.
files/checkpoint_folders.py writes and checks the bytes.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from dreambooth.adapter_files import native
from dreambooth.adapters.inject import Component
from dreambooth.files import checkpoint_folders, safetensors_files
from dreambooth.files.checkpoint_folders import Content
from dreambooth.io import reader
from dreambooth.io.errors import UserError, reason_of, shown
from dreambooth.training import optimizers

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_FLAG = "--resume_from_checkpoint"
_RAW = "|param"


def raw_parameters(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Copies of trained parameters on the CPU, by `<parameter>|param`, to save with the optimizer's tensors.

    They are needed where the adapter file has other values. A checkpoint has those of all parameters of a
    component, or of none.
    """
    return {
        f"{name}{_RAW}": parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in named_parameters
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
    """Write `checkpoint-<step>`, then remove the oldest whole ones beyond `limit`. Returns its folder.

    `adapter` is the adapter file. `moments` are `optimizers.state_tensors` and `raw_parameters`.
    `state["optimizer"]` is `optimizers.state_numbers`. `identity`, the record of the run, goes into the
    manifest. Raises SaveFailed if the checkpoint cannot be written: older ones are then unchanged, and
    training can go on.
    """
    files = {
        native.ADAPTER_NAME: adapter,
        OPTIMIZER: safetensors_files.stable_bytes(moments, {"format": "pt"}),
        STATE: (json.dumps({**state, "step": step}, indent=1) + "\n").encode(),
    }
    return checkpoint_folders.publish(output_dir, step, files, identity or {}, limit=limit)


def read_state(content: Content) -> dict[str, Any]:
    """The `state` that `save` wrote, with the step. Raises UserError if it is damaged."""
    where = content.folder / STATE
    state = reader.parsed_json_table(_file(content, STATE), f"{_FLAG}: {where} is damaged")
    if state.get("step") != content.step:
        raise UserError(f"{_FLAG}: {where} is damaged (it is not of step {content.step})")
    return state


def restore(content: Content, components: list[Component], optimizer: torch.optim.Optimizer) -> None:
    """Fill adapters and optimizer from a checkpoint. The optimizer holds only the parameters that are still
    trained. Raises UserError, before anything is changed, if the checkpoint does not fit."""
    # Read and check everything.
    state = native.by_component(_tensors(content, native.ADAPTER_NAME))
    trained, saved = (" and ".join(sorted(names)) for names in ((c.name for c in components), state))
    if trained != saved:
        raise UserError(f"{_FLAG}: {content.folder} holds an adapter of {saved}; this run trains {trained}")
    for component in components:
        try:
            component.check_state_dict(state[component.name])
        except UserError as error:
            raise UserError(f"{_FLAG}: {content.folder}: {error}") from None
    names = {
        id(parameter): name for component in components for name, parameter in component.named_parameters()
    }
    run_state, tensors = read_state(content), _tensors(content, OPTIMIZER)
    raw_tensors = {key.removesuffix(_RAW): value for key, value in tensors.items() if key.endswith(_RAW)}
    tensors = {key: value for key, value in tensors.items() if not key.endswith(_RAW)}
    # with fp16 the first steps may be skipped until the loss scale fits: the optimizer has not stepped then
    has_stepped = bool(tensors) or "grad_scaler" not in run_state
    path, numbers = content.folder / STATE, run_state.get("optimizer")
    try:
        checked_numbers = optimizers.read_numbers(optimizer, names, numbers, has_stepped=has_stepped)
        path = content.folder / OPTIMIZER
        if has_stepped:
            optimizers.check_tensors(optimizer, names, tensors)
    except UserError as error:
        raise UserError(f"{_FLAG}: {path} {error}") from None
    raw = _raw_parameters(content.folder, raw_tensors, components, optimizer)
    # Fill.
    for component in components:
        component.load_state_dict(state[component.name])
    for parameter, value in raw.items():
        parameter.data.copy_(value)
    optimizers.fill(optimizer, names, tensors, checked_numbers)


def _file(content: Content, name: str) -> bytes:
    if name not in content.files:
        raise UserError(f"{_FLAG}: {content.folder} has no {name}")
    return content.files[name]


def _tensors(content: Content, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file. Raises UserError if it is damaged or has values that are not finite."""
    where = content.folder / name
    try:
        tensors = load(_file(content, name))
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise UserError(f"{_FLAG}: {where} is damaged ({reason_of(error)})") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{_FLAG}: {where} has values in {key} that are not finite")
    return tensors


def _raw_parameters(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    components: list[Component],
    optimizer: torch.optim.Optimizer,
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The trained values of parameters for which the adapter file has other values.

    `tensors` are these values by name of the parameter. Raises UserError if a component has some of its
    parameters in `tensors` but not all, or none of them where they are needed.
    """
    where = f"{_FLAG}: {folder / OPTIMIZER}"
    needs_raw = optimizers.needs_raw_parameters(optimizer)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    raw, remaining = {}, dict(tensors)
    for component in components:
        parameters = dict(component.named_parameters())
        is_needed = needs_raw and any(id(parameter) in optimized for parameter in parameters.values())
        if not is_needed and parameters.keys().isdisjoint(remaining):
            continue
        for name, parameter in parameters.items():
            value = remaining.pop(name, None)
            if value is None:
                raise UserError(f"{where} is damaged: {name} lacks param")
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                saved, needed = (f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (value, parameter))
                raise UserError(f"{where} has {name}{_RAW} of shape {saved}; the parameter has {needed}")
            raw[parameter] = value
    if remaining:
        raise UserError(f"{where} has a parameter {shown(min(remaining))}, which this run does not train")
    return raw
