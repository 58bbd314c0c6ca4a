"""The optimizers: how each is made, and what of it a checkpoint must hold so that a resumed run takes the same steps.

The state of a parameter is tensors and whole numbers, and some optimizers keep numbers for a group of parameters as well. Tensors go into
a safetensors file, numbers into JSON, whose floats come back as they were. Of Adam's flags Adafactor takes none: it has its own moments.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dreambooth.errors import UserError, shown
from dreambooth.options.training import OptimizerOptions


@dataclasses.dataclass(frozen=True)
class Group:
    """The parameters of one trained component, with the learning rate and weight decay that they get."""

    name: str
    parameters: list[torch.nn.Parameter]
    learning_rate: float
    weight_decay: float


def make(o: OptimizerOptions, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer of the flags, ready for steps; its groups have `name`, and `initial_lr` for `set_learning_rate`."""
    settings = [
        {
            "name": g.name,
            "params": list(g.parameters),
            "lr": g.learning_rate,
            "initial_lr": g.learning_rate,
            "weight_decay": g.weight_decay,
        }
        for g in groups
    ]
    return _KINDS[o.optimizer].make(o, settings)


def schedules_itself(o: OptimizerOptions) -> bool:
    """Whether the optimizer warms up by itself: the factor for `set_learning_rate` is then 1 at every step."""
    return o.optimizer == "schedule-free"


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to `factor` times its own learning rate. What comes out is the rate of the next step by group, warm-up included."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        warmup = group.get("warmup_steps", 0)  # which only the schedule-free optimizer has
        rates[group["name"]] = group["lr"] * (
            (group["k"] + 1) / warmup if warmup and group["k"] < warmup else 1.0
        )
    return rates


def drop(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Train the group of that name no more. Its parameters are left as the adapter is to have them, and their state is gone."""
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
    """If `flag`, a float on the device, is 1, all later steps change neither parameters nor state.

    The host does not wait for the flag: torch's fused kernels read it on the device, as they read GradScaler's.
    """
    fused: Any = optimizer
    fused.found_inf = flag


def needs_raw_parameters(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the parameters that are stepped are others than the adapter's, so that a checkpoint needs both."""
    return _name(optimizer) == "schedule-free"


@contextlib.contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the parameters are as the adapter is to have them; after it they are bit for bit what they were before.

    The schedule-free optimizer takes its gradients between its last point and the average of all (arXiv 2405.15682, eq. 3 to 5), and the
    average is the result. For the others nothing changes.
    """
    if not needs_raw_parameters(optimizer):
        yield
        return
    averaging: Any = optimizer
    parameters = _parameters(optimizer)
    training = [parameter.detach().clone() for parameter in parameters]  # its own way back, a lerp, rounds
    averaging.eval()
    try:
        yield
    finally:
        for parameter, value in zip(parameters, training, strict=True):
            parameter.data.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True


# --- what a checkpoint holds


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The part of an optimizer's state that is no tensors: by parameter name, and by group in the optimizer's order."""

    parameters: dict[str, dict[str, int]]
    groups: list[dict[str, float]]


def state_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The tensors of the optimizer's state, `<parameter>|<field>`; `names` maps id(parameter) to its name."""
    kind = _kind(optimizer)
    return {
        f"{names[id(parameter)]}|{field}": state[field].detach().cpu().contiguous()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter))
        for field in kind.tensors(optimizer, group, parameter)
    }


def state_numbers(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """The numbers of the optimizer's state and its kind, as JSON has them."""
    kind = _kind(optimizer)
    stepped = {
        names[id(parameter)]: state
        for parameter in _parameters(optimizer)
        if (state := optimizer.state.get(parameter))
    }
    return {
        "kind": _name(optimizer),
        "groups": {
            group["name"]: {field: type_(group[field]) for field, type_ in kind.numbers.items()}
            for group in optimizer.param_groups
        }
        if kind.numbers
        else {},
        "parameters": {
            name: {field: int(state[field]) for field in kind.counts} for name, state in stepped.items()
        }
        if kind.counts
        else {},
    }


def read_numbers(
    optimizer: torch.optim.Optimizer, names: dict[int, str], numbers: object, *, has_stepped: bool
) -> Numbers:
    """What `state_numbers` gave, checked to fit the optimizer; None, as of a checkpoint without, fits AdamW.

    Raises UserError with what the place that they are from has or lacks.
    """
    kind, own = _kind(optimizer), _name(optimizer)
    if numbers is None:
        if own != "adamw":
            raise UserError(f"has no state of --optimizer {own}: it was written with another optimizer")
        return Numbers({}, [{} for _ in optimizer.param_groups])
    table = _table(numbers, ("kind", "groups", "parameters"), "optimizer")
    if table["kind"] != own:
        raise UserError(
            f"has the state of --optimizer {shown(table['kind'])[:80]}; this run has --optimizer {own}"
        )
    group_names = [group["name"] for group in optimizer.param_groups] if kind.numbers else []
    groups = _table(table["groups"], group_names, "groups of the optimizer")
    for name in group_names:
        for field, value in _table(groups[name], kind.numbers, f"group {name}").items():
            _check_number(value, kind.numbers[field], f"{field} of group {name}")
    trained = (
        [names[id(parameter)] for parameter in _parameters(optimizer)] if kind.counts and has_stepped else []
    )
    parameters = _table(table["parameters"], trained, "parameters of the optimizer")
    for name in trained:
        for field, value in _table(parameters[name], kind.counts, name).items():
            _check_number(value, int, f"{field} of {name}")
    return Numbers(
        parameters, [groups[group["name"]] if kind.numbers else {} for group in optimizer.param_groups]
    )


def check_tensors(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Raise UserError, with what the place that they are from has or lacks, unless `tensors` are all that this optimizer has after a step."""
    kind = _kind(optimizer)
    expected = {
        names[id(parameter)]: kind.tensors(optimizer, group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("|")
        if name not in expected:
            raise UserError(f"has optimizer state for {shown(name)}, which this run does not train")
        if field not in expected[name]:
            raise UserError(f"has {shown(key)}, which --optimizer {_name(optimizer)} does not have")
        expected[name][field].check(key, tensor)
        found.setdefault(name, set()).add(field)
    for name, fields in expected.items():
        if name not in found:
            raise UserError(f"is damaged: {name} lacks everything")
        if lacking := fields.keys() - found[name]:
            raise UserError(f"is damaged: {name} lacks {', '.join(sorted(lacking))}")


def fill(
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    tensors: dict[str, torch.Tensor],
    numbers: Numbers,
) -> None:
    """Put a state into the optimizer that `check_tensors` and `read_numbers` let pass; no tensors are those of one that has not stepped."""
    kind = _kind(optimizer)
    optimizer.state.clear()
    for group, values in zip(optimizer.param_groups, numbers.groups, strict=True):
        group.update(values)
        for parameter in group["params"] if tensors else ():
            name, state = names[id(parameter)], optimizer.state[parameter]
            for field in kind.tensors(optimizer, group, parameter):
                tensor = tensors[f"{name}|{field}"]
                state[field] = tensor.to(parameter.device)
            state.update(numbers.parameters.get(name, {}))
            state.update(kind.constants(optimizer, parameter))


def _table(value: object, fields: Iterable[str], what: str) -> dict[str, Any]:
    """`value`, which must be a table of exactly these fields."""
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
    if type_ is int:  # a count of steps; some optimizers pass it on as 32 bits
        fits, rule = type(value) is int and 0 <= value < 2**31, "a whole number, at least 0"
    else:
        fits, rule = type(value) is float and math.isfinite(value), "a finite number with a decimal point"
    if not fits:
        raise UserError(f"is damaged: {what} must be {rule}, got {ascii(value)[:80]}")


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# --- the kinds


class _Field:
    """A tensor that a parameter has in the optimizer's state: its dtype, and the shapes that it can have."""

    def __init__(self, dtype: torch.dtype, *shapes: Sequence[int]):
        self.dtype, self.shapes = dtype, [tuple(shape) for shape in shapes]

    def check(self, key: str, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) not in self.shapes:
            raise UserError(
                f"has {key} of shape {tuple(tensor.shape)}; this run needs {' or '.join(map(str, self.shapes))}"
            )
        if tensor.dtype != self.dtype:
            raise UserError(f"has {key} of {tensor.dtype}; this run needs {self.dtype}")


_Settings = list[dict[str, Any]]
_Fields = dict[str, _Field]


def _no_constants(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    return {}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One optimizer."""

    class_name: str
    make: Callable[[OptimizerOptions, _Settings], torch.optim.Optimizer]
    tensors: Callable[[Any, dict[str, Any], torch.nn.Parameter], _Fields]
    """(optimizer, group, parameter) -> the tensors of that parameter's state."""
    counts: tuple[str, ...] = ()
    """The whole numbers of a parameter's state."""
    numbers: dict[str, type] = dataclasses.field(default_factory=dict)
    """The numbers of a group that change with the steps and are read by the next; no settings."""
    constants: Callable[[Any, torch.nn.Parameter], dict[str, torch.Tensor]] = _no_constants
    """(optimizer, parameter) -> what the parameter's state has besides, the same in every run: not stored."""


def _make_adamw(o: OptimizerOptions, settings: _Settings) -> torch.optim.Optimizer:
    # one kernel for all parameters: an adapter is hundreds of small tensors
    return torch.optim.AdamW(settings, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_epsilon, fused=True)


def _adamw_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _Fields:
    moment = _Field(parameter.dtype, parameter.shape)
    return {"step": _Field(torch.float32, ()), "exp_avg": moment, "exp_avg_sq": moment}


def _make_adamw8bit(o: OptimizerOptions, settings: _Settings) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(settings, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_epsilon)


def _is_8bit(optimizer: Any, parameter: torch.nn.Parameter) -> bool:
    """bitsandbytes keeps the moments of small parameters, as most of a low rank are, in 32 bits."""
    return parameter.numel() >= optimizer.args.min_8bit_size


def _adamw8bit_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _Fields:
    if not _is_8bit(optimizer, parameter):
        moment = _Field(torch.float32, parameter.shape)
        return {"state1": moment, "state2": moment}
    moment, scales = (
        _Field(torch.uint8, parameter.shape),
        _Field(torch.float32, (-(-parameter.numel() // 256),)),
    )  # one for 256 values
    return {"state1": moment, "state2": moment, "absmax1": scales, "absmax2": scales}


def _adamw8bit_constants(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What the 8-bit codes stand for: two tables, [256] each, that all parameters share."""
    if not _is_8bit(optimizer, parameter):
        return {}
    tables = optimizer.name2qmap
    for name in ("dynamic", "udynamic"):
        tables[name] = tables[name].to(parameter.device)
    return {"qmap1": tables["dynamic"], "qmap2": tables["udynamic"]}


def _make_prodigy(o: OptimizerOptions, settings: _Settings) -> torch.optim.Optimizer:
    import prodigyopt

    return prodigyopt.Prodigy(
        settings,
        betas=(o.adam_beta1, o.adam_beta2),
        beta3=o.prodigy_beta3,
        eps=o.adam_epsilon,
        decouple=o.prodigy_decouple,
        use_bias_correction=o.prodigy_use_bias_correction,
        safeguard_warmup=o.prodigy_safeguard_warmup,
    )


def _prodigy_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _Fields:
    moment, size = _Field(parameter.dtype, parameter.shape), (parameter.numel(),)
    # p0 is where the parameter started; for one that was all zeros, as every lora_B is, a single 0
    fields = {
        "s": _Field(parameter.dtype, size),
        "p0": _Field(parameter.dtype, size, ()),
        "exp_avg_sq": moment,
    }
    return fields | ({"exp_avg": moment} if group["betas"][0] > 0 else {})


def _make_adafactor(o: OptimizerOptions, settings: _Settings) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(settings, scale_parameter=False, relative_step=False, warmup_init=False)


def _adafactor_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _Fields:
    shape, dtype = parameter.shape, parameter.dtype
    rms = {"RMS": _Field(dtype, ())}
    if len(shape) < 2:
        return rms | {"exp_avg_sq": _Field(dtype, shape)}
    return rms | {
        "exp_avg_sq_row": _Field(dtype, shape[:-1]),
        "exp_avg_sq_col": _Field(dtype, shape[:-2] + shape[-1:]),
    }


def _make_schedule_free(o: OptimizerOptions, settings: _Settings) -> torch.optim.Optimizer:
    import schedulefree

    warmup = o.lr_warmup_steps if o.lr_scheduler == "constant_with_warmup" else 0
    optimizer = schedulefree.AdamWScheduleFree(
        settings, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_epsilon, warmup_steps=warmup
    )
    optimizer.train()
    return optimizer


def _schedule_free_tensors(optimizer: Any, group: dict[str, Any], parameter: torch.nn.Parameter) -> _Fields:
    like = _Field(parameter.dtype, parameter.shape)
    return {"z": like, "exp_avg_sq": like}


# By --optimizer.
_KINDS = {
    "adamw": _Kind("AdamW", _make_adamw, _adamw_tensors),
    "adamw8bit": _Kind(
        "AdamW8bit", _make_adamw8bit, _adamw8bit_tensors, counts=("step",), constants=_adamw8bit_constants
    ),
    "prodigy": _Kind(
        "Prodigy",
        _make_prodigy,
        _prodigy_tensors,
        counts=("step",),
        numbers={"d": float, "d_max": float, "d_numerator": float, "k": int},
    ),
    "adafactor": _Kind("Adafactor", _make_adafactor, _adafactor_tensors, counts=("step",)),
    "schedule-free": _Kind(
        "AdamWScheduleFree",
        _make_schedule_free,
        _schedule_free_tensors,
        numbers={"k": int, "weight_sum": float, "lr_max": float, "scheduled_lr": float},
    ),
}
_NAMES = {kind.class_name: name for name, kind in _KINDS.items()}


def _name(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer as --optimizer calls it."""
    return _NAMES[type(optimizer).__name__]


def _kind(optimizer: torch.optim.Optimizer) -> _Kind:
    return _KINDS[_name(optimizer)]
