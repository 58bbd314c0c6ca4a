"""infer.py's samplers, and pictures that are no squares."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

import infer
from dreambooth.bases import families, schedulers
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions


def options_of(base: Path, out: Path, *more: str) -> InferOptions:
    words = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(out), "--num_threads", "1"]
    return parse(InferOptions, "", [*words, "--prompt", "a dog", *more])


def run(base: Path, out: Path, *more: str) -> list[np.ndarray]:
    """The pictures that infer.py draws."""
    infer.main(options_of(base, out, *more))
    records = json.loads((out / "images.json").read_text())
    return [np.asarray(Image.open(out / record["file"])).astype(int) for record in records]


BY_HAND: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}, {}),
    "dpm++_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {}),
    "unipc": (UniPCMultistepScheduler, {}, {}),
    "lcm": (LCMScheduler, {}, {"guidance_scale": 1.0}),
    "tcd": (TCDScheduler, {}, {"guidance_scale": 1.0, "eta": 0.3}),
    "lightning": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, {"guidance_scale": 1.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_HAND)
def test_a_sampler_draws_what_the_pipeline_draws_with_it(name, tiny_base, pipeline, tmp_path):
    """Here with the weights of plain diffusers, width and height; the second seed alone."""
    kind, settings, arguments = BY_HAND[name]
    words = ["--scheduler", name, "--width", "96", "--height", "64", "--num_inference_steps", "3"]
    found = run(tiny_base, tmp_path, *words, "--seeds", "3", "4")
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    size = {"width": 96, "height": 64, "num_inference_steps": 3}
    for seed, picture in zip((3, 4), found, strict=True):
        noise = torch.Generator().manual_seed(seed)
        expected = pipeline("a dog", generator=noise, **size, **arguments).images[0]
        assert picture.shape == (64, 96, 3)
        assert np.abs(picture - np.asarray(expected).astype(int)).max() <= 1
    record = json.loads((tmp_path / "images.json").read_text())[0]
    assert (record["scheduler"], record["size"]) == (name, [96, 64])


def test_defaults_are_those_of_the_sampler(tiny_base, tmp_path):
    def sampling(*words: str) -> tuple[int, float, Any]:
        found = options_of(tiny_base, tmp_path, *words).sampling(512)
        return found.num_inference_steps, found.guidance_scale, found.size

    assert sampling() == (25, 7.5, None)
    assert sampling("--scheduler", "euler", "--resolution", "64") == (25, 7.5, (64, 64))
    for name in ("lcm", "tcd", "lightning"):
        assert sampling("--scheduler", name, "--width", "768") == (4, 1.0, (768, 512))
    assert sampling("--scheduler", "lcm", "--guidance_scale", "1.5")[1] == 1.5
    assert sampling("--resolution", "64", "--height", "96")[2] == (64, 96)


def test_every_name_makes_a_scheduler_on_the_levels_of_the_base(tiny_v_base):
    base = families.find(BaseOptions(str(tiny_v_base)))
    levels = schedulers.load_scheduler(base).alphas_cumprod
    for name in schedulers._NAMED:
        schedulers.check_named(name, 4, base)
        scheduler = schedulers.named(base, name)
        assert scheduler.config.prediction_type == "v_prediction"
        assert torch.equal(scheduler.alphas_cumprod, levels), name


@pytest.mark.parametrize(
    ("base", "words", "said"),
    [
        (
            "tiny_base",
            ("lcm", "--num_inference_steps", "60"),
            "--scheduler lcm: not with --num_inference_steps 60",
        ),
        ("tiny_edm", ("euler",), "--scheduler euler: a base with an EDM scheduler is drawn with that"),
        ("tiny_if", ("ddim",), "--scheduler ddim: DeepFloyd IF, first stage is drawn with its own scheduler"),
        ("tiny_xl", ("heun", "zero snr"), "--scheduler heun: it cannot begin at zero terminal SNR"),
    ],
)
def test_what_a_base_cannot_be_drawn_with_is_refused(base, words, said, request, tmp_path, no_models, copied):
    folder = request.getfixturevalue(base)
    if "zero snr" in words:
        words, folder = words[:1], copied(folder, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(UserError) as error:
        infer.main(options_of(folder, tmp_path / "out", "--scheduler", *words))
    assert str(error.value).startswith(said)


@pytest.fixture
def copied(tmp_path):
    """A function that copies a base with other settings of its scheduler."""

    def copy(folder: Path, **settings: Any) -> Path:
        target = Path(shutil.copytree(folder, tmp_path / "base"))
        path = target / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return target

    return copy
