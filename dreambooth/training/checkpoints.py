"""What is in a checkpoint: the adapter, the optimizer's tensors by parameter name, and a small JSON with the step and other numbers.

Where the parameters that are trained are others than the adapter's, they lie beside the optimizer's tensors. Nothing in it can carry code:
safetensors and JSON only. How it comes to lie on the disk whole is checkpoint_files.py's.
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
from dreambooth.errors import UserError, reason_of, shown
from dreambooth.files import checkpoint_folders, safetensors_files
from dreambooth.files.checkpoint_folders import Content
from dreambooth.training import optimizers

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_FLAG = "--resume_from_checkpoint"
_RAW = "|param"


def raw_parameters(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Copies of the parameters as they are trained, `<parameter>|param`, to be saved with the optimizer's tensors: for runs in which the
    adapter has other values. All parameters of a component, or none."""
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
    """Publish `checkpoint-<step>`, then remove the oldest whole ones beyond `limit`. `identity`, what run this is, goes into the manifest.
    `moments` are `optimizers.state_tensors` and `raw_parameters`; `state` has `optimizers.state_numbers` as "optimizer".

    Raises SaveFailed if the disk does not take it; what was there is then as it was, and training can go on.
    """
    files = {
        native.ADAPTER_NAME: adapter,
        OPTIMIZER: safetensors_files.stable_bytes(moments, {"format": "pt"}),
        STATE: (json.dumps({**state, "step": step}, indent=1) + "\n").encode(),
    }
    return checkpoint_folders.publish(output_dir, step, files, identity or {}, limit=limit)


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
    """Fill adapters and optimizer from a checkpoint. The optimizer's groups may have some of the components' parameters only: those still
    trained. Raises UserError, before anything is changed, if it does not fit."""
    state = _adapter_state(content)
    expected, found = sorted(c.name for c in components), sorted(state)
    if expected != found:
        raise UserError(
            f"{_FLAG}: {content.folder} holds an adapter of {' and '.join(found)}; this run trains {' and '.join(expected)}"
        )
    for component in components:
        try:
            component.check_state_dict(state[component.name])
        except UserError as error:
            raise UserError(f"{_FLAG}: {content.folder}: {error}") from None
    names = {
        id(parameter): name for component in components for name, parameter in component.named_parameters()
    }
    tensors, numbers = _optimizer_state(content, names, optimizer)
    raw = _raw_parameters(content, components, optimizer)
    for component in components:
        component.load_state_dict(state[component.name])
    for parameter, value in raw.items():
        parameter.data.copy_(value)
    optimizers.fill(optimizer, names, tensors, numbers)


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
        raise UserError(f"{_FLAG}: {where} is damaged ({reason_of(error)})") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{_FLAG}: {where} has values in {key} that are not finite")
    return tensors


def _adapter_state(content: Content) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter's tensors by component and by peft's key."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(content, native.ADAPTER_NAME).items():
        component, _, key = name.partition(".")
        # which adapter_files.pack puts in front
        state.setdefault(component, {})[
            key.removeprefix("text_model.") if component.startswith("text_encoder") else key
        ] = tensor
    return state


def _optimizer_state(
    content: Content, names: dict[int, str], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], optimizers.Numbers]:
    """The optimizer's tensors and numbers. Raises UserError if they are not exactly what this optimizer has."""
    state, tensors = read_state(content), _tensors(content, OPTIMIZER)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(_RAW)}
    # fp16 skips its first steps while the scale is found: the optimizer may not have stepped yet
    has_stepped = bool(tensors) or "grad_scaler" not in state
    path = content.folder / STATE
    try:
        numbers = optimizers.read_numbers(optimizer, names, state.get("optimizer"), has_stepped=has_stepped)
        path = content.folder / OPTIMIZER
        if has_stepped:
            optimizers.check_tensors(optimizer, names, tensors)
    except UserError as error:
        raise UserError(f"{_FLAG}: {path} {error}") from None
    return tensors, numbers


def _raw_parameters(
    content: Content, components: list[Component], optimizer: torch.optim.Optimizer
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The trained values of parameters whose adapter has others. Raises UserError unless a component has all or, where it may, none."""
    where = f"{_FLAG}: {content.folder / OPTIMIZER}"
    tensors = {
        key.removesuffix(_RAW): tensor
        for key, tensor in _tensors(content, OPTIMIZER).items()
        if key.endswith(_RAW)
    }
    needed = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        if optimizers.needs_raw_parameters(optimizer)
        else set()
    )
    raw = {}
    for component in components:
        parameters = dict(component.named_parameters())
        if not (
            parameters.keys() & tensors.keys()
            or needed & {id(parameter) for parameter in parameters.values()}
        ):
            continue
        for name, parameter in parameters.items():
            value = tensors.pop(name, None)
            if value is None:
                raise UserError(f"{where} is damaged: {name} lacks param")
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                found, own = (f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (value, parameter))
                raise UserError(f"{where} has {name}{_RAW} of shape {found}; the parameter has {own}")
            raw[parameter] = value
    if tensors:
        raise UserError(f"{where} has a parameter {shown(min(tensors))}, which this run does not train")
    return raw
