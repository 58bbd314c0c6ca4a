"""The schedulers of bases whose noise levels are known, and the check of a base's scheduler.

Training adds noise by DDPM's formula with the levels of scheduler_config.json, whichever solver the file
names. This is right only for solvers that share these levels. Flow matching, distilled and cascaded bases
have others.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler

from dreambooth.bases import configs, folders
from dreambooth.bases.folders import BASE_FLAG
from dreambooth.io.errors import UserError, raise_all, shortened, shown, type_and_reason

# Solvers on the levels of DDPM: each computes the same alphas_cumprod from the same fields.
DISCRETE = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
)
# Solvers on the levels of EDM (arXiv 2206.00364).
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# The settings of the multistep DPM solver that draws.
DPM_SOLVER = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that every class above computes
_PREDICTIONS = ("epsilon", "v_prediction")
_MOST_TIMESTEPS = 100_000
# What is known of other classes, by a part of their name.
_OTHER_KINDS = {
    "FlowMatch": "a scheduler of flow matching",
    "LCM": "a scheduler of distilled bases",
    "TCD": "a scheduler of distilled bases",
    "Consistency": "a scheduler of distilled bases",
    "Wuerstchen": "a scheduler of cascaded bases",
    "UnCLIP": "a scheduler of cascaded bases",
    "Inverse": "a scheduler that adds noise",
}


def is_edm(index: Mapping[str, Any]) -> bool:
    """Whether the scheduler that model_index.json names has the levels of EDM."""
    return _index_class(index) in EDM


def check_class(index: Mapping[str, Any], name: str) -> None:
    """Raise UserError if model_index.json names a scheduler whose noise levels are not known.

    `name` is how the user named the base.
    """
    _check_kind(_index_class(index), f"model_index.json of {shown(name)}")


def check(folder: Path, name: str, index: Mapping[str, Any]) -> None:
    """Raise UserError, with one line per fault, if the noise levels of the base in `folder` are not known.

    `name` is how the user named the base, `index` the content of its model_index.json.
    """
    check_class(index, name)
    path = folder / "scheduler" / "scheduler_config.json"
    config, place = folders.read_json(path), shown(path)
    kind = config.get("_class_name")
    _check_kind(kind, place)
    if (kind in EDM) != is_edm(index):
        raise UserError(
            f"{BASE_FLAG}: {place} is of a {kind} and model_index.json names {_index_class(index)}: "
            "they have different noise levels"
        )
    problems = _edm_faults(config) if kind in EDM else _discrete_faults(config)
    problems += _shared_faults(config)
    problems = problems or configs.faults(getattr(diffusers, str(kind)), config)
    raise_all(f"{BASE_FLAG}: {place}: {problem}" for problem in problems)
    _try(config, str(_index_class(index)), place)


def _index_class(index: Mapping[str, Any]) -> object:
    entry = index.get("scheduler")
    return entry[-1] if isinstance(entry, list | tuple) and len(entry) == 2 else entry


def _check_kind(kind: object, place: str) -> None:
    """Raise UserError unless the class of scheduler that the file `place` names is known."""
    if kind in (*DISCRETE, *EDM):
        return
    named = "no class of the scheduler"
    if isinstance(kind, str) and kind:
        other = next((text for part, text in _OTHER_KINDS.items() if part in kind), "another scheduler")
        named = f"{shortened(kind)}, {other}, whose noise levels are not known here"
    known = f"known are {', '.join(DISCRETE)}, and for EDM {', '.join(EDM)}"
    raise UserError(f"{BASE_FLAG}: {place} names {named}; {known}")


def _shared_faults(config: Mapping[str, Any]) -> list[str]:
    """Faults of the fields that both kinds have."""
    problems = []
    steps = config.get("num_train_timesteps")
    if type(steps) is not int or not 10 <= steps <= _MOST_TIMESTEPS:
        rule = f"it must be a whole number from 10 to {_MOST_TIMESTEPS}"
        problems.append(_fault(config, "num_train_timesteps", rule))
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in _PREDICTIONS:
        problems.append(
            f"Unknown prediction type {shortened(prediction_type)}; it must be epsilon or v_prediction"
        )
    for field in ("use_flow_sigmas", "rescale_betas_zero_snr"):
        if not isinstance(config.get(field, False), bool):
            problems.append(_fault(config, field, "it must be true or false"))
    if config.get("use_flow_sigmas") is True:
        problems.append("use_flow_sigmas is true: the noise levels are those of flow matching")
    if config.get("timestep_type", "discrete") != "discrete":
        problems.append(_fault(config, "timestep_type", "it must be discrete"))
    return problems


def _discrete_faults(config: Mapping[str, Any]) -> list[str]:
    """Faults of the fields that DDPM's levels are computed from."""
    trained = config.get("trained_betas")
    if trained is not None:
        is_list = isinstance(trained, list) and len(trained) == config.get("num_train_timesteps")
        if not is_list or not all(_is_number(beta) and 0 < beta < 1 for beta in trained):
            return ["trained_betas must be a list of num_train_timesteps numbers over 0 and under 1"]
        return []
    problems = []
    schedule = config.get("beta_schedule")
    if schedule not in _BETA_SCHEDULES:
        problems.append(_fault(config, "beta_schedule", f"it must be {', '.join(_BETA_SCHEDULES)}"))
    if schedule == "squaredcos_cap_v2":
        return problems  # a formula without beta_start and beta_end
    first, last = (config.get(field, math.nan) for field in ("beta_start", "beta_end"))
    for field, value in (("beta_start", first), ("beta_end", last)):
        if not _is_number(value) or not 0 < value < 1:
            problems.append(_fault(config, field, "it must be a number over 0 and under 1"))
    if not problems and first > last:
        problems.append(f"beta_start {first} is over beta_end {last}")
    return problems


def _edm_faults(config: Mapping[str, Any]) -> list[str]:
    """Faults of the fields that EDM's levels are computed from."""
    most = {"sigma_min": 1e6, "sigma_max": 1e6, "sigma_data": 1e6, "rho": 100}
    filled = {"rho": 7.0, **config}  # diffusers' default
    problems = [
        _fault(filled, field, "it must be a number over 0")
        for field in most
        if not _is_number(filled.get(field)) or not 0 < filled[field] <= most[field]
    ]
    if not problems and config["sigma_min"] >= config["sigma_max"]:
        problems.append(f"sigma_min {config['sigma_min']} is not under sigma_max {config['sigma_max']}")
    if config.get("sigma_schedule", "karras") not in ("karras", "exponential"):
        problems.append(_fault(config, "sigma_schedule", "it must be karras or exponential"))
    return problems


def _is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _fault(config: Mapping[str, Any], field: str, rule: str) -> str:
    state = f"{field} is {ascii(config[field])[:80]}" if field in config else f"{field} is missing"
    return f"{state}; {rule}"


def _try(config: Mapping[str, Any], kind: str, place: str) -> None:
    """Make the schedulers that train and draw, and compare their noise levels.

    Raises UserError if diffusers cannot make one of them, or if the base's own class has other levels than
    DDPM's formula gives.
    """
    try:
        kinds: list[tuple[Any, Mapping[str, str]]] = [
            (DDPMScheduler, {}),
            (DPMSolverMultistepScheduler, DPM_SOLVER),
        ]
        if kind in EDM:
            kinds = [(EDMEulerScheduler, {})]
        made = []
        for scheduler_class, settings in [(getattr(diffusers, kind), {}), *kinds]:
            try:
                scheduler = scheduler_class.from_config(dict(config), **settings)
                scheduler.set_timesteps(10)
            except ImportError:  # of a package that only drawing with the base's own class needs
                continue
            made.append(scheduler)
        for scheduler in made:
            timesteps = torch.as_tensor(scheduler.timesteps)
            if not torch.isfinite(timesteps).all() or timesteps.abs().max() > config["num_train_timesteps"]:
                raise ValueError("its timesteps are not those of num_train_timesteps")
    except Exception as error:  # diffusers checks little: a wrong field raises any exception
        raise UserError(
            f"{BASE_FLAG}: {place}: diffusers cannot use these settings ({type_and_reason(error)})"
        ) from None
    levels = [scheduler.alphas_cumprod for scheduler in made if hasattr(scheduler, "alphas_cumprod")]
    if any(not torch.allclose(levels[0], other, atol=1e-6) for other in levels[1:]):
        raise UserError(
            f"{BASE_FLAG}: {place}: {kind} and DDPM compute different noise levels from its fields"
        )
