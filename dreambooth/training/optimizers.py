"""The optimizers: how each is made, and how a checkpoint stores its state.

The state of a parameter is tensors and whole numbers. Some optimizers also have numbers for each parameter
group. A checkpoint holds the tensors as safetensors and the numbers as JSON, which keeps every bit of a
float. So a resumed run takes the same steps.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dreambooth.io.errors import UserError, shown
from dreambooth.options.optimizer import OptimizerOptions
from dreambooth.runtime import graphs


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters of one trained component with one learning rate and weight decay, by torch's names."""

    name: str
    params: list[torch.nn.Parameter]
    lr: float
    weight_decay: float


def make(options: OptimizerOptions, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer of --optimizer. Its groups also have `name`, and `initial_lr` for `set_learning_rate`.

    On a device that records graphs the rates of AdamW are tensors, float32 scalars on the device: a replayed
    step reads them anew.
    """
    param_groups = [{**vars(group), "initial_lr": group.lr} for group in groups]
    device = groups[0].params[0].device
    if graphs.can_record(device) and options.optimizer == "adamw":
        for group in param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return _KINDS[options.optimizer].make(options, param_groups)


def can_be_recorded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is kernels alone, with rates that are read on the device."""
    return isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def initial_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors of AdamW's state. They are made, as torch makes them, if there was no step yet."""
    for parameter in _parameters(optimizer):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return [tensor for parameter in _parameters(optimizer) for tensor in optimizer.state[parameter].values()]


def schedules_itself(options: OptimizerOptions) -> bool:
    """Whether the optimizer has its own warm-up; the factor for `set_learning_rate` is then always 1."""
    return options.optimizer == "schedule-free"


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set the learning rate of every group to `factor` times `initial_lr`. Returns the rate of the next step
    by group name, with the optimizer's own warm-up."""
    rates = {}
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        warmup = group.get("warmup_steps", 0)  # the schedule-free optimizer's own; others have none
        share = (group["k"] + 1) / warmup if warmup and group["k"] < warmup else 1.0
        rates[group["name"]] = rate * share
    return rates


def drop(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Remove the group `name` and its state. Its parameters get the values of the adapter file."""
    (group,) = [group for group in optimizer.param_groups if group["name"] == name]
    with evaluated(optimizer):
        final = [parameter.detach().clone() for parameter in group["params"]]
    optimizer.param_groups[:] = [other for other in optimizer.param_groups if other is not group]
    for parameter, value in zip(group["params"], final, strict=True):
        parameter.data.copy_(value)
        optimizer.state.pop(parameter, None)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `skip_if_nonfinite` works for this optimizer."""
    return _name(optimizer) == "adamw"


def skip_if_nonfinite(optimizer: torch.optim.Optimizer, flag: torch.Tensor) -> None:
    """Let steps change neither parameters nor state while `flag`, a float scalar on the device, is 1. The
    host does not wait: torch's fused kernel reads the flag on the device, like GradScaler's flag."""
    fused: Any = optimizer
    fused.found_inf = flag


def needs_raw_parameters(optimizer: torch.optim.Optimizer) -> bool:
    """Whether trained parameters differ from the values of the adapter file. A checkpoint then holds both."""
    return _name(optimizer) == "schedule-free"


@contextlib.contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the parameters have the values of the adapter file; then they get back every bit.

    The values differ only for the schedule-free optimizer. It takes gradients between its last point and the
    average of all points, and the average is the adapter (arXiv 2405.15682, eq. 3 to 5).
    """
    if not needs_raw_parameters(optimizer):
        yield
        return
    averaging: Any = optimizer
    parameters = _parameters(optimizer)
    # copies, since the optimizer's own train() restores the parameters by a lerp, which rounds
    training = [parameter.detach().clone() for parameter in parameters]
    averaging.eval()
    try:
        yield
    finally:
        for parameter, value in zip(parameters, training, strict=True):
            parameter.data.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True


# --- the state in a checkpoint


@dataclasses.dataclass(frozen=True)
class StateNumbers:
    """The numbers of an optimizer's state, by field."""

    parameters: dict[str, dict[str, int]]  # by parameter name
    groups: dict[str, dict[str, float]]  # by group name


def state_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The tensors of the optimizer's state by `<parameter>|<field>`; `names` maps id(parameter) to name."""
    kind = _kind(optimizer)
    return {
        f"{names[id(parameter)]}|{field}": state[field].detach().cpu().contiguous()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter))
        for field in kind.tensors(optimizer, group, parameter)
    }


def state_numbers(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """The numbers of the optimizer's state and its kind, as JSON types."""
    kind = _kind(optimizer)
    return {
        "kind": _name(optimizer),
        "groups": {
            group["name"]: {field: type_(group[field]) for field, type_ in kind.numbers.items()}
            for group in optimizer.param_groups
            if kind.numbers
        },
        "parameters": {
            names[id(parameter)]: {field: int(state[field]) for field in kind.counts}
            for parameter in _parameters(optimizer)
            if kind.counts and (state := optimizer.state.get(parameter))
        },
    }


def read_numbers(
    optimizer: torch.optim.Optimizer, names: dict[int, str], numbers: object, *, has_stepped: bool
) -> StateNumbers:
    """The checked `numbers` of a checkpoint, which `state_numbers` returned when it was written.

    None is from a checkpoint that records none, which is one of AdamW. `has_stepped` tells whether parameters
    have a state. Raises UserError if the numbers do not fit this optimizer. The message begins with the verb;
    the caller puts the file before it.
    """
    kind, name = _kind(optimizer), _name(optimizer)
    if numbers is None:
        if name != "adamw":
            raise UserError(f"has no state of --optimizer {name}: it was written with another optimizer")
        return StateNumbers({}, {})
    table = _checked_table(numbers, ("kind", "groups", "parameters"), "optimizer")
    if table["kind"] != name:
        raise UserError(
            f"has the state of --optimizer {shown(table['kind'])[:80]}; this run has --optimizer {name}"
        )
    group_names = [group["name"] for group in optimizer.param_groups] if kind.numbers else []
    groups = _checked_table(table["groups"], group_names, "groups of the optimizer")
    for name in group_names:
        for field, value in _checked_table(groups[name], kind.numbers, f"group {name}").items():
            _check_number(value, kind.numbers[field], f"{field} of group {name}")
    has_counts = bool(kind.counts) and has_stepped
    trained = [names[id(parameter)] for parameter in _parameters(optimizer) if has_counts]
    parameters = _checked_table(table["parameters"], trained, "parameters of the optimizer")
    for name in trained:
        for field, value in _checked_table(parameters[name], kind.counts, name).items():
            _check_number(value, int, f"{field} of {name}")
    return StateNumbers(parameters, groups)


def check_tensors(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Raise UserError unless `tensors` are exactly those of this optimizer after a step. The message begins
    with the verb; the caller puts the file before it."""
    kind = _kind(optimizer)
    expected = {
        names[id(parameter)]: kind.tensors(optimizer, group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    present: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("|")
        if name not in expected:
            raise UserError(f"has optimizer state for {shown(name)}, which this run does not train")
        if field not in expected[name]:
            raise UserError(f"has {shown(key)}, which --optimizer {_name(optimizer)} does not have")
        expected[name][field].check(key, tensor)
        present.setdefault(name, set()).add(field)
    for name, fields in expected.items():
        if name not in present:
            raise UserError(f"is damaged: it has no state of {name}")
        if lacking := fields.keys() - present[name]:
            raise UserError(f"is damaged: {name} lacks {', '.join(sorted(lacking))}")


def fill(
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    tensors: dict[str, torch.Tensor],
    numbers: StateNumbers,
) -> None:
    """Put a checked state into the optimizer. `tensors` are empty if it had not stepped yet."""
    kind = _kind(optimizer)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.update(numbers.groups[group["name"]] if numbers.groups else {})
        for parameter in group["params"] if tensors else ():
            name, state = names[id(parameter)], optimizer.state[parameter]
            for field in kind.tensors(optimizer, group, parameter):
                state[field] = tensors[f"{name}|{field}"].to(parameter.device)
            state.update(numbers.parameters.get(name, {}))
            state.update(kind.constants(optimizer, parameter))


def _checked_table(value: object, fields: Iterable[str], what: str) -> dict[str, Any]:
    """The value. Raises UserError unless it is a table of exactly these fields; `what` names it."""
    fields = set(fields)
    if not isinstance(value, dict):
        raise UserError(f"is damaged: its {what} must be a table, got {ascii(value)[:80]}")
    if lacking := fields - value.keys():
        raise UserError(f"is damaged: its {what} lacks {', '.join(sorted(lacking)[:3])}")
    if unknown := value.keys() - fields:
        raise UserError(
            f"is damaged: its {what} has {shown(min(unknown))[:200]}, which does not belong there"
        )
    return value


def _check_number(value: object, type_: type, what: str) -> None:
    """Raise UserError unless the value is such an int or float; `what` names it."""
    if type_ is int:  # a count of steps, which some optimizers convert to 32 bits
        fits, rule = type(value) is int and 0 <= value < 2**31, "a whole number, at least 0"
    else:
        fits, rule = type(value) is float and math.isfinite(value), "a finite number with a decimal point"
    if not fits:
        raise UserError(f"is damaged: {what} must be {rule}, got {ascii(value)[:80]}")


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# --- the kinds


class _StateTensor:
    """A tensor of a parameter's state: its dtype, and the shapes that it can have."""

    def __init__(self, dtype: torch.dtype, *shapes: Sequence[int]):
        self.dtype, self.shapes = dtype, [tuple(shape) for shape in shapes]

    def check(self, key: str, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) not in self.shapes:
            needed = " or ".join(map(str, self.shapes))
            raise UserError(f"has {key} of shape {tuple(tensor.shape)}; this run needs {needed}")
        if tensor.dtype != self.dtype:
            raise UserError(f"has {key} of {tensor.dtype}; this run needs {self.dtype}")


_ParamGroups = list[dict[str, Any]]
_StateTensors = dict[str, _StateTensor]


@dataclasses.dataclass(frozen=True)
class _OptimizerKind:
    """How one optimizer is made, and which fields its state has."""

    class_name: str
    make: Callable[[OptimizerOptions, _ParamGroups], torch.optim.Optimizer]
    tensors: Callable[[Any, dict[str, Any], torch.nn.Parameter], _StateTensors]
    """(optimizer, group, parameter) -> the tensors of the parameter's state by field."""
    counts: tuple[str, ...] = ()
    """Fields of a parameter's state that are whole numbers."""
    numbers: dict[str, type] = dataclasses.field(default_factory=dict)
    """Fields of a group that are numbers and change with the steps, with their types. No settings."""
    constants: Callable[[Any, torch.nn.Parameter], dict[str, torch.Tensor]] = lambda *_: {}
    """(optimizer, parameter) -> tensors of the parameter's state that never change and are not stored."""


def _make_adamw(options: OptimizerOptions, param_groups: _ParamGroups) -> torch.optim.Optimizer:
    # fused: one kernel for all parameters, since an adapter is hundreds of small tensors
    optimizer: Any = torch.optim.AdamW(
        param_groups,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
        capturable=any(group["params"][0].is_cuda for group in param_groups),
    )
    optimizer._warned_capturable_if_run_uncaptured = True  # launched steps are right, too
    return optimizer


def _adamw_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _StateTensors:
    moment = _StateTensor(parameter.dtype, parameter.shape)
    return {"step": _StateTensor(torch.float32, ()), "exp_avg": moment, "exp_avg_sq": moment}


def _make_adamw8bit(options: OptimizerOptions, param_groups: _ParamGroups) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        param_groups, betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon
    )


def _is_8bit(optimizer: Any, parameter: torch.nn.Parameter) -> bool:
    """Whether bitsandbytes stores the parameter's moments in 8 bits. For small parameters it uses 32."""
    return parameter.numel() >= optimizer.args.min_8bit_size


def _adamw8bit_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _StateTensors:
    if not _is_8bit(optimizer, parameter):
        moment = _StateTensor(torch.float32, parameter.shape)
        return {"state1": moment, "state2": moment}
    moment = _StateTensor(torch.uint8, parameter.shape)
    scales = _StateTensor(torch.float32, (-(-parameter.numel() // 256),))  # one for each block of 256 values
    return {"state1": moment, "state2": moment, "absmax1": scales, "absmax2": scales}


def _adamw8bit_constants(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The values of the 8-bit codes: two tables, [256] each, that all parameters share."""
    if not _is_8bit(optimizer, parameter):
        return {}
    tables = optimizer.name2qmap
    for name in ("dynamic", "udynamic"):
        tables[name] = tables[name].to(parameter.device)
    return {"qmap1": tables["dynamic"], "qmap2": tables["udynamic"]}


def _make_prodigy(options: OptimizerOptions, param_groups: _ParamGroups) -> torch.optim.Optimizer:
    import prodigyopt

    return prodigyopt.Prodigy(
        param_groups,
        betas=(options.adam_beta1, options.adam_beta2),
        beta3=options.prodigy_beta3,
        eps=options.adam_epsilon,
        decouple=options.prodigy_decouple,
        use_bias_correction=options.prodigy_use_bias_correction,
        safeguard_warmup=options.prodigy_safeguard_warmup,
    )


def _prodigy_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _StateTensors:
    moment, size = _StateTensor(parameter.dtype, parameter.shape), (parameter.numel(),)
    # p0 holds the parameter's initial values, or a single 0 if all were 0, as those of every lora_B are
    fields = {
        "s": _StateTensor(parameter.dtype, size),
        "p0": _StateTensor(parameter.dtype, size, ()),
        "exp_avg_sq": moment,
    }
    return fields | ({"exp_avg": moment} if group["betas"][0] > 0 else {})


def _make_adafactor(options: OptimizerOptions, param_groups: _ParamGroups) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(param_groups, scale_parameter=False, relative_step=False, warmup_init=False)


def _adafactor_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _StateTensors:
    shape, dtype = parameter.shape, parameter.dtype
    rms = {"RMS": _StateTensor(dtype, ())}
    if len(shape) < 2:
        return rms | {"exp_avg_sq": _StateTensor(dtype, shape)}
    return rms | {
        "exp_avg_sq_row": _StateTensor(dtype, shape[:-1]),
        "exp_avg_sq_col": _StateTensor(dtype, shape[:-2] + shape[-1:]),
    }


def _make_schedule_free(options: OptimizerOptions, param_groups: _ParamGroups) -> torch.optim.Optimizer:
    import schedulefree

    warmup = options.lr_warmup_steps if options.lr_scheduler == "constant_with_warmup" else 0
    optimizer = schedulefree.AdamWScheduleFree(
        param_groups,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        warmup_steps=warmup,
    )
    optimizer.train()
    return optimizer


def _schedule_free_tensors(
    optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter
) -> _StateTensors:
    tensor = _StateTensor(parameter.dtype, parameter.shape)
    return {"z": tensor, "exp_avg_sq": tensor}


# By the value of --optimizer.
_KINDS = {
    "adamw": _OptimizerKind("AdamW", _make_adamw, _adamw_tensors),
    "adamw8bit": _OptimizerKind(
        "AdamW8bit", _make_adamw8bit, _adamw8bit_tensors, counts=("step",), constants=_adamw8bit_constants
    ),
    "prodigy": _OptimizerKind(
        "Prodigy",
        _make_prodigy,
        _prodigy_tensors,
        counts=("step",),
        numbers={"d": float, "d_max": float, "d_numerator": float, "k": int},
    ),
    "adafactor": _OptimizerKind("Adafactor", _make_adafactor, _adafactor_tensors, counts=("step",)),
    "schedule-free": _OptimizerKind(
        "AdamWScheduleFree",
        _make_schedule_free,
        _schedule_free_tensors,
        numbers={"k": int, "weight_sum": float, "lr_max": float, "scheduled_lr": float},
    ),
}
_NAMES = {kind.class_name: name for name, kind in _KINDS.items()}


def _name(optimizer: torch.optim.Optimizer) -> str:
    """The value of --optimizer for this optimizer."""
    return _NAMES[type(optimizer).__name__]


def _kind(optimizer: torch.optim.Optimizer) -> _OptimizerKind:
    return _KINDS[_name(optimizer)]
