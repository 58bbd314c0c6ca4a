"""Class images: the precision and the sampler that a set is drawn with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import generate_class_images
from dreambooth.bases import families, pipelines
from dreambooth.data import class_images
from dreambooth.data.class_images import ClassImageSettings, file_name
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.photos import GenerationOptions, PriorOptions
from dreambooth.options.pictures import ClassImageOptions
from dreambooth.options.resolved import resolve_prior
from dreambooth.options.speed import GraphOptions
from dreambooth.options.training import BaseOptions
from dreambooth.runtime import processes
from dreambooth.runtime.stops import Watch
from tests.data.class_sets import contents, fill, manifest

# --- precision


@pytest.mark.parametrize(
    ("flag", "device", "expected"),
    [
        (None, "cpu", "bf16"),
        (None, "cuda", "bf16"),
        (None, "mps", "fp32"),
        ("no", "cuda", "fp32"),
        ("no", "cpu", "fp32"),
        ("fp32", "cuda", "fp32"),
        ("fp16", "cuda", "fp16"),
        ("bf16", "cpu", "bf16"),
    ],
)
def test_precision_is_bf16_where_the_hardware_computes_in_it(flag, device, expected, monkeypatch):
    """The reference script takes `no` and draws in half precision all the same."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert class_images.precision_of(flag, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("flag", "device", "expected"), [(None, "cpu", "fp32"), (None, "cuda", "fp16"), ("bf16", "cpu", "bf16")]
)
def test_precision_on_older_hardware_is_what_it_is_fast_in(flag, device, expected, monkeypatch):
    """A GPU that only pretends to know bf16 is slower with it than with fp16."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True, "avx512_f": True}
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert class_images.precision_of(flag, torch.device(device)) == expected


def test_half_precision_on_a_cpu_is_refused_where_pictures_are_missing(tiny_base, tmp_path, no_models):
    """A whole set of it, from a machine with a GPU, is taken."""
    words = [
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--class_prompt",
        "a dog",
        "--prior_generation_precision",
        "fp16",
    ]
    words += ["--class_data_dir", str(tmp_path / "set"), "--num_class_images", "2"]
    with pytest.raises(UserError, match="--prior_generation_precision fp16 does not work on a CPU"):
        generate_class_images.main(parse(ClassImageOptions, "", words))
    base = families.find(BaseOptions(str(tiny_base)))
    settings = ClassImageSettings(
        base.fingerprint(), "a dog", 0, 25, 7.5, 4, base.default_resolution, "fp16", "dpm"
    )
    fill(tmp_path / "set", 2, settings=settings)
    generate_class_images.main(parse(ClassImageOptions, "", words))


def test_training_takes_the_size_of_the_set_that_is_there(tiny_base, tmp_path):
    base = families.find(BaseOptions(str(tiny_base)))
    prior = resolve_prior(prior_of(tmp_path / "set"), class_seed=0)
    device = torch.device("cpu")
    wanted = class_images.settings_of(prior, base, device)
    assert wanted.side == base.default_resolution
    fill(tmp_path / "set", 2, settings=dataclasses.replace(wanted, side=128))
    assert class_images.settings_of(prior, base, device) == dataclasses.replace(wanted, side=128)


# --- sampler


def class_words(base: Path, folder: Path, *more: str) -> ClassImageOptions:
    words = (
        f"--pretrained_model_name_or_path {base} --class_data_dir {folder} --num_class_images 2 "
        "--sample_batch_size 2 --resolution 16"
    )
    return parse(ClassImageOptions, "", [*words.split(), "--class_prompt", "a dog", *more])


def prior_of(folder: Path, *, class_seed: int | None = None, **flags: Any) -> PriorOptions:
    return PriorOptions(
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=str(folder),
        generation=GenerationOptions(**flags),
        class_seed=class_seed,
    )


def wanted(base: families.Base, folder: Path, **flags: Any) -> ClassImageSettings:
    """The set that a training run with these flags wants."""
    prior = class_images.adopt(prior_of(folder, **flags), 3)
    assert prior is not None
    return class_images.settings_of(prior, base, torch.device("cpu"))


def make_old(folder: Path) -> None:
    """What was kept of a set before there was a choice of samplers."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["settings"]["scheduler"]
    path.write_text(json.dumps(content))


BASES = ["tiny_base", "tiny_v_base", "tiny_xl", "tiny_edm", "tiny_if"]


@pytest.mark.parametrize(
    ("kind", "scheduler", "steps"),
    [(kind, *(("base", 50) if kind in ("tiny_edm", "tiny_if") else ("dpm", 25))) for kind in BASES],
)
def test_the_solver_takes_25_steps_and_bases_that_it_is_not_made_for_their_own_50(
    kind, scheduler, steps, tmp_path, request
):
    base = families.find(BaseOptions(str(request.getfixturevalue(kind))))
    found = wanted(base, tmp_path / "set")
    assert (found.scheduler, found.steps) == (scheduler, steps)
    assert wanted(base, tmp_path / "set", class_scheduler="base").steps == 50
    assert wanted(base, tmp_path / "set", class_inference_steps=7) == dataclasses.replace(found, steps=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("tiny_base", ["DPMSolverMultistepScheduler", "DDIMScheduler"]),
        ("tiny_v_base", ["DPMSolverMultistepScheduler", "DDIMScheduler"]),
        ("tiny_xl", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]),
        ("tiny_edm", ["EDMEulerScheduler"]),
        ("tiny_if", ["DPMSolverMultistepScheduler", "DDPMScheduler"]),
    ],
)
def test_each_family_draws_with_the_solver_and_with_its_own_sampler(
    kind, kinds, tmp_path, request, monkeypatch
):
    """What the sampler is told of the base stays: what it predicts, and its noise levels. The text encoders
    are gone by then."""
    real, seen = pipelines.draw, []

    def draw(pipeline: Any, *conditions: Any, **flags: Any) -> list[Image.Image]:
        seen.append(pipeline.scheduler)
        assert all(
            getattr(pipeline, encoder) is None
            for encoder in families.find(BaseOptions(str(base))).family.text
        )
        return real(pipeline, *conditions, **flags)

    monkeypatch.setattr(pipelines, "draw", draw)
    base, pictures = request.getfixturevalue(kind), []
    for scheduler in ["dpm", "base"][-len(kinds) :]:
        folder = tmp_path / scheduler
        generate_class_images.main(
            class_words(base, folder, "--class_scheduler", scheduler, "--class_inference_steps", "2")
        )
        assert manifest(folder)["settings"]["scheduler"] == scheduler
        pictures += [np.asarray(Image.open(folder / file_name(number))) for number in range(2)]
    assert [type(sampler).__name__ for sampler in seen] == kinds
    assert {sampler.config.prediction_type for sampler in seen} == {
        "v_prediction" if kind == "tiny_v_base" else "epsilon"
    }
    assert all(
        (a != b).any() for number, a in enumerate(pictures) for b in pictures[:number]
    )  # no two alike: not of one sampler, nor of two
    if len(kinds) == 2:
        assert torch.equal(seen[0].alphas_cumprod, seen[1].alphas_cumprod)


def test_the_solver_is_refused_for_an_edm_base_before_a_model_is_loaded(tiny_edm, tmp_path, no_models):
    """Its noise levels are others than the solver's."""
    with pytest.raises(
        UserError,
        match=(
            r"^--class_scheduler dpm: a base with an EDM scheduler is drawn with its own scheduler; "
            r"leave the flag out, or give base$"
        ),
    ):
        generate_class_images.main(class_words(tiny_edm, tmp_path / "set", "--class_scheduler", "dpm"))
    with pytest.raises(UserError, match=r"^--class_scheduler dpm: "):
        wanted(families.find(BaseOptions(str(tiny_edm))), tmp_path / "set", class_scheduler="dpm")
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True], ids=["said", "from before there was a choice"])
def test_a_set_begun_with_the_base_s_own_sampler_is_continued_with_it_unasked(is_old, tiny_base, tmp_path):
    """And in its steps and precision: by training and by the script."""
    how = [
        "--class_scheduler",
        "base",
        "--class_inference_steps",
        "2",
        "--prior_generation_precision",
        "fp32",
    ]
    generate_class_images.main(class_words(tiny_base, tmp_path / "at_once", *how, "--num_class_images", "4"))
    generate_class_images.main(class_words(tiny_base, tmp_path / "grown", *how))
    if is_old:
        make_old(tmp_path / "grown")
    found = wanted(families.find(BaseOptions(str(tiny_base))), tmp_path / "grown")
    assert (found.scheduler, found.steps, found.precision) == ("base", 2, "fp32")
    generate_class_images.main(class_words(tiny_base, tmp_path / "grown", "--num_class_images", "4"))
    grown, at_once = (
        {name: data for name, data in contents(tmp_path / folder).items() if name != ".lock"}
        for folder in ("grown", "at_once")
    )
    assert grown == at_once


@pytest.mark.parametrize("is_old", [False, True], ids=["said", "from before there was a choice"])
def test_a_set_begun_with_one_sampler_is_refused_when_the_flag_says_the_other(
    is_old, tiny_base, tmp_path, no_models
):
    base = families.find(BaseOptions(str(tiny_base)))
    fill(tmp_path, 2, settings=wanted(base, tmp_path / "none", class_scheduler="base"))
    if is_old:
        make_old(tmp_path)
    before = contents(tmp_path)
    assert class_images.is_complete(tmp_path, wanted(base, tmp_path), 2)
    with pytest.raises(UserError) as refused:
        class_images.is_complete(tmp_path, wanted(base, tmp_path, class_scheduler="dpm"), 2)
    assert (
        "other settings: scheduler is 'base' there and 'dpm' now (--class_scheduler). Name another folder"
        in str(refused.value)
    )
    assert contents(tmp_path) == before


def test_processes_on_different_hardware_draw_in_the_precision_of_the_first(tiny_base, tmp_path, monkeypatch):
    base = families.find(BaseOptions(str(tiny_base)))
    settings, loaded = wanted(base, tmp_path, prior_generation_precision="fp32", class_inference_steps=1), []
    peers = processes.join(Watch(), peer_timeout=10)
    monkeypatch.setattr(peers, "broadcast", lambda value: "bf16" if value == "fp32" else value)
    real = pipelines.load_pipeline

    def load(base: families.Base, dtype: torch.dtype, device: torch.device) -> Any:
        loaded.append(dtype)
        return real(base, dtype, device)

    monkeypatch.setattr(pipelines, "load_pipeline", load)
    class_images.make(tmp_path / "set", settings, 1, base, peers, Watch(), GraphOptions())
    assert loaded == [torch.bfloat16]
    assert manifest(tmp_path / "set")["settings"]["precision"] == "bf16"
