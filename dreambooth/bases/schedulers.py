"""Noise schedulers to train with, and the schedulers that draw pictures."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from dreambooth.bases import loading, noise_levels
from dreambooth.bases.families import Base
from dreambooth.io.errors import UserError, type_and_reason
from dreambooth.options.pictures import SchedulerName

# What --scheduler draws with: (class, settings). The other settings are the base's.
_DPM = (DPMSolverMultistepScheduler, noise_levels.DPM_SOLVER)
_NAMED: dict[SchedulerName, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm++": _DPM,
    "dpm++_karras": (_DPM[0], {**_DPM[1], "use_karras_sigmas": True}),
    "dpm++_sde": (_DPM[0], {**_DPM[1], "algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
    "lightning": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
}


def load_scheduler(base: Base, *, edm: bool = False) -> Any:
    """The noise scheduler to train with. With `edm` it has continuous noise levels, even if the base's has
    not."""
    kind = EDMEulerScheduler if base.is_edm else EulerDiscreteScheduler if edm else DDPMScheduler
    return loading.load_scheduler(base, kind)


def own(base: Base) -> Any:
    """The scheduler that the base itself is drawn with. A learned variance is ignored. Raises UserError if it
    cannot be made."""
    kind = getattr(diffusers, base.index["scheduler"][1])
    return loading.load_scheduler(base, kind, **fixed_variance(base.config("scheduler")))


def named(base: Base, name: SchedulerName) -> Any:
    """The scheduler that --scheduler `name` draws with, on the noise levels of the base."""
    kind, settings = _NAMED[name]
    return loading.load_scheduler(base, kind, **settings, **fixed_variance(base.config("scheduler")))


def check_named(name: SchedulerName, steps: int, base: Base) -> None:
    """Raise UserError if the base cannot be drawn with --scheduler `name` in this many steps."""
    where = f"--scheduler {name}"
    if base.is_edm:
        raise UserError(f"{where}: a base with an EDM scheduler is drawn with that; leave it out")
    if not base.family.has_vae:
        raise UserError(f"{where}: {base.family.name} is drawn with its own scheduler; leave it out")
    scheduler = named(base, name)
    levels = load_scheduler(base).alphas_cumprod
    if not torch.allclose(scheduler.alphas_cumprod, levels, atol=1e-6):
        raise UserError(f"{where}: it cannot begin at zero terminal SNR, which the base has; give another")
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:  # for example, LCM has at most 50 steps
        reason = type_and_reason(error)
        raise UserError(f"{where}: not with --num_inference_steps {steps} ({reason})") from None


def sampler(noise_scheduler: Any, *, has_vae: bool, wanted: str | None) -> Any:
    """The scheduler that draws validation pictures. `wanted` is --validation_scheduler.

    The default is DPM-Solver++, or DDPM for a base without VAE. An EDM base keeps its own scheduler.
    """
    config = noise_scheduler.config
    if isinstance(noise_scheduler, EDMEulerScheduler):
        return EDMEulerScheduler.from_config(config)
    if wanted == "DDPMScheduler" or (wanted is None and not has_vae):
        return DDPMScheduler.from_config(config, **fixed_variance(config))
    return _dpm_solver(config)


def sampler_of(flag: str | None, base: Base) -> str:
    """The value of --class_scheduler, "dpm" or "base", with the default filled in.

    Raises UserError if the base cannot be drawn with it.
    """
    if flag == "dpm" and base.is_edm:
        raise UserError(
            "--class_scheduler dpm: a base with an EDM scheduler is drawn with its own scheduler; "
            "leave the flag out, or give base"
        )
    return flag or ("dpm" if base.family.has_vae and not base.is_edm else "base")


def check_steps(flag: str, steps: int, base: Base) -> None:
    """Raise UserError if pictures cannot be drawn in this many steps: the base has fewer timesteps."""
    timesteps = base.config("scheduler")["num_train_timesteps"]
    if steps > timesteps:
        raise UserError(f"{flag} must be at most {timesteps}, the timesteps of the base; got {steps}")


def class_sampler(base_scheduler: Any, wanted: str) -> Any:
    """The scheduler that draws class images: DPM-Solver++ if `wanted` is "dpm", the base's own if "base"."""
    return _dpm_solver(base_scheduler.config) if wanted == "dpm" else base_scheduler


def _dpm_solver(config: Mapping[str, Any]) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (arXiv 2211.01095) on the noise levels of `config`, which may be of another solver."""
    settings = noise_levels.DPM_SOLVER
    return DPMSolverMultistepScheduler.from_config(config, **settings, **fixed_variance(config))


def fixed_variance(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings that make a sampler ignore a learned variance: training updates the noise prediction only."""
    return {"variance_type": "fixed_small"} if "learned" in str(config.get("variance_type", "")) else {}
