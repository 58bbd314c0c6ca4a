"""Only bases whose noise levels are known are trained and drawn with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth.bases import families, noise_levels
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions

LEVELS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
EDM_LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "num_train_timesteps": 1000}
# As the published bases have them: neither has all fields of its class.
SD15 = {
    "_class_name": "PNDMScheduler",
    **LEVELS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
IF = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "thresholding": True,
    "variance_type": "learned_range",
}
PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler", **EDM_LEVELS, "rho": 7.0, "solver_order": 2}
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", **LEVELS, "timestep_spacing": "trailing"}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a folder with this scheduler and a model_index.json, and return it."""

    def write_scheduler(config: dict[str, Any], in_index: object = None) -> Path:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        entry = ["diffusers", in_index or config.get("_class_name")]
        (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": entry}))
        return tmp_path

    return write_scheduler


def check(folder: Path) -> None:
    noise_levels.check(folder, "base", json.loads((folder / "model_index.json").read_text()))


@pytest.mark.parametrize("config", [SD15, IF, PLAYGROUND, TURBO], ids=["sd15", "if", "playground", "turbo"])
def test_schedulers_of_published_bases_are_accepted(write: Write, config: dict[str, Any]):
    check(write(config))


@pytest.mark.parametrize("kind", noise_levels.DISCRETE)
def test_every_known_class_has_the_levels_that_training_uses(kind: str):
    config = {**LEVELS, "prediction_type": "v_prediction"}
    try:
        scheduler = getattr(diffusers, kind).from_config(config)
    except ImportError as error:
        pytest.skip(f"{kind} needs a package that is not installed: {error}"[:200])
    levels = DDPMScheduler.from_config(config).alphas_cumprod
    assert torch.equal(scheduler.alphas_cumprod, levels)


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "LCMScheduler",
            "TCDScheduler",
        ),
        *("DDPMWuerstchenScheduler", "CMStochasticIterativeScheduler", "UnCLIPScheduler", "NoSuchScheduler"),
        *("VQDiffusionScheduler", "ScoreSdeVeScheduler", "DDIMInverseScheduler", "CogVideoXDDIMScheduler"),
        *("IPNDMScheduler", "CosineDPMSolverMultistepScheduler", "../DDIMScheduler", "ddimscheduler", "", 7),
        *(None, ["DDIMScheduler"]),
    ],
)
@pytest.mark.parametrize("in_index", [None, "DDIMScheduler"], ids=["index too", "file alone"])
def test_another_class_is_refused_by_name(write: Write, kind: object, in_index: str | None):
    named = kind if isinstance(kind, str) and kind else "names no class"
    with pytest.raises(UserError) as raised:
        check(write({**LEVELS, "_class_name": kind}, in_index))
    assert named in str(raised.value)
    assert "DDPMScheduler" in str(raised.value)
    assert ("scheduler_config.json" if in_index else "model_index.json") in str(raised.value)


@pytest.mark.parametrize("config", [{}, {"_class_name": "DDIMScheduler"}], ids=["empty", "class alone"])
def test_a_file_without_noise_levels_is_refused(write: Write, config: dict[str, Any]):
    with pytest.raises(UserError, match=r"names no class|beta_start is missing"):
        check(write(config, "DDIMScheduler"))


@pytest.mark.parametrize("field", [*LEVELS, *EDM_LEVELS])
def test_a_missing_field_is_named(write: Write, field: str):
    kind, levels = ("DDIMScheduler", LEVELS) if field in LEVELS else ("EDMEulerScheduler", EDM_LEVELS)
    config = {name: value for name, value in {"_class_name": kind, **levels}.items() if name != field}
    with pytest.raises(UserError, match=f"{field} is missing"):
        check(write(config))


BAD_FIELDS: dict[str, list[Any]] = {
    "num_train_timesteps": [10**10, None, -1, 0, True, "1000", 1000.5, [1000], float("inf")],
    "beta_start": [0, -0.1, 1, None, "0.1", float("nan"), float("-inf"), 10**400, 0.5, [0.1]],
    "beta_end": [0, 2, True, {}, 0.0001],
    "beta_schedule": ["sigmoid", "exp", None, 3, ""],
    "trained_betas": [[], [0.1] * 999, ["a"] * 1000, [2] * 1000, 0.1, "abc"],
    "prediction_type": ["sample", "flow_prediction", None, 1],
    "use_flow_sigmas": [True, "yes", None],
    "rescale_betas_zero_snr": ["yes", 1],
    "timestep_type": ["continuous", 5],
    "timestep_spacing": ["odd", 7, None],
    "steps_offset": ["one", 10**12, None],
    "solver_order": ["x"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, v) for field, vs in BAD_FIELDS.items() for v in vs], ids=str
)
def test_a_field_that_cannot_be_used_is_refused_in_one_line(write: Write, field: str, value: object):
    with pytest.raises(UserError) as raised:
        check(write({"_class_name": "DDIMScheduler", **LEVELS, field: value}))
    message = str(raised.value)
    assert "scheduler_config.json" in message
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_min": 80.0},
        {"sigma_max": "80"},
        {"sigma_data": 0},
        {"rho": None},
        {"sigma_schedule": "linear"},
    ],
    ids=str,
)
def test_edm_levels_that_cannot_be_used_are_refused(write: Write, change: dict[str, Any]):
    with pytest.raises(UserError, match=next(iter(change))):
        check(write({**PLAYGROUND, **change}))


def test_two_files_with_different_levels_are_refused(write: Write):
    with pytest.raises(UserError, match="they have different noise levels"):
        check(write(SD15, "EDMEulerScheduler"))


def test_a_class_that_ignores_a_field_of_its_levels_is_refused(write: Write):
    with pytest.raises(UserError, match="PNDMScheduler and DDPM compute different noise levels"):
        check(write({**SD15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}))


def test_a_unet_distilled_on_the_guidance_scale_is_refused(tiny_base: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    path = base / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_cond_proj_dim": 256}))
    with pytest.raises(UserError, match="time_cond_proj_dim"):
        families.find(BaseOptions(str(base)))
