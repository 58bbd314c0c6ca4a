"""The meter: its numbers are those of plain diffusers, and it changes nothing of the run that it measures."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from dreambooth.adapters import inject
from dreambooth.data import sampling_order
from dreambooth.io.errors import UserError
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.evaluation import MeterOptions
from dreambooth.options.photos import InstanceOptions
from dreambooth.runtime import processes
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch
from dreambooth.training import meter, subjects
from tests import conftest, tiny
from tests.live_adapters import load_models
from tests.running import digest, meter_records, prior_words, run_train

SUBJECT, CLASS = "a photo of sks dog", "a photo of dog"
MEASURED = ["--meter_steps", "2", "--class_prompt", CLASS]


def one_process() -> Peers:
    return processes.join(Watch(), peer_timeout=4)


def test_a_measurement_has_ten_bands_of_four_draws():
    """docs/training.md says how many forward passes that is."""
    assert (meter.BANDS, conftest.DRAWS_OF_USERS) == (10, 4)


# --- the numbers


def flat(measures: dict) -> dict[str, list[float]]:
    """All numbers by name."""
    numbers: dict[str, Any] = {}
    for name, value in measures.items():
        parts = {name: value, f"{name} since base": value.get("since_base", {})}
        for title, part in parts.items():
            numbers |= {
                f"{title}: {key}": np.ravel(part[key]) for key in part if key not in ("since_base", "seconds")
            }
    return numbers


def assert_close(one: dict, other: dict) -> None:
    numbers, others = flat(one), flat(other)
    assert numbers.keys() == others.keys()
    for name, values in numbers.items():
        assert np.allclose(values, others[name], rtol=1e-3, atol=1e-6), name


class ByHand:
    """Losses by plain diffusers, on photos that are as large as the resolution."""

    def __init__(self, base: Path, folder: Path):
        self.pipe = DiffusionPipeline.from_pretrained(base, safety_checker=None)
        self.folder, self.scheduler = folder, DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.is_xl = hasattr(self.pipe, "text_encoder_2")
        count = meter.BANDS * meter.DRAWS
        indices = meter.timestep_indices(self.scheduler)
        self.timesteps = indices
        self.noise = sampling_order.noise_of_rows(0, "meter-noise", range(count), (4, 8, 8))

    def latents(self, name: str) -> torch.Tensor:
        pixels = np.asarray(Image.open(self.folder / name), dtype=np.float32) / 127.5 - 1
        encoded = self.pipe.vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        return encoded.latent_dist.mean * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def predict(self, names: list[str], prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(prediction, target) of every draw, the photos in turns."""
        latents = torch.cat([self.latents(names[n % len(names)]) for n in range(len(self.noise))])
        noisy = self.scheduler.add_noise(latents, self.noise, self.timesteps)
        settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        embeds, extra = self.pipe.encode_prompt(prompt, **settings), {}
        if self.is_xl:
            ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(len(noisy), 1)
            pooled = embeds[2].repeat(len(noisy), 1)
            extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        states = embeds[0].repeat(len(noisy), 1, 1)
        prediction = self.pipe.unet(noisy, self.timesteps, states, **extra).sample
        is_velocity = self.scheduler.config.prediction_type == "v_prediction"
        velocity = self.scheduler.get_velocity(latents, self.noise, self.timesteps)
        return prediction, velocity if is_velocity else self.noise

    def losses(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(losses, predictions, targets) by what is measured."""
        trained, held_out = ["photo-0.png", "photo-1.png"], ["photo-2.png"]
        cases = {"trained": (trained, SUBJECT), "held": (held_out, SUBJECT), "class": (held_out, CLASS)}
        results = {}
        for name, case in cases.items():
            prediction, target = self.predict(*case)
            losses = (prediction - target).square().mean(dim=(1, 2, 3))
            results[name] = losses.double(), prediction, target
        return results


def summed_up(values: torch.Tensor) -> dict:
    bands = values.double().view(meter.BANDS, meter.DRAWS)
    errors = [torch.std(band).item() / math.sqrt(meter.DRAWS) for band in bands]
    return {
        "bands": [band.mean().item() for band in bands],
        "noise_bands": errors,
        "mean": values.mean().item(),
        "noise": math.sqrt(sum(error**2 for error in errors)) / meter.BANDS,
    }


def measures_by_hand(base: Path, folder: Path, adapter: Path, *, noise_is_measured: bool) -> dict:
    """With `noise_is_measured` drift is in units of the noise, whose variance is 1."""
    by_hand = ByHand(base, folder)
    before = by_hand.losses()
    by_hand.pipe.load_lora_weights(str(adapter))
    now = by_hand.losses()
    binding, gap = (
        [results[of][0] - results[minus][0] for results in (now, before)]
        for of, minus in (("class", "held"), ("held", "trained"))
    )
    _, predictions, targets = now["class"]
    distances = (predictions - before["class"][1]).square().mean(dim=(1, 2, 3))
    variances = targets.flatten(1).var(dim=1).view(meter.BANDS, meter.DRAWS).mean(dim=1)
    scales = torch.ones(1) if noise_is_measured else variances.repeat_interleave(meter.DRAWS)
    return {
        "binding": {**summed_up(binding[0]), "since_base": summed_up(binding[0] - binding[1])},
        "gap": {**summed_up(gap[0]), "since_base": summed_up(gap[0] - gap[1])},
        "drift": summed_up(distances / scales),
        "loss_trained": summed_up(now["trained"][0]),
        "loss_held_out": summed_up(now["held"][0]),
    }


WORDS = ["--max_train_steps", "2", "--train_text_encoder", "--learning_rate", "1e-2", "--holdout", "1"]


@pytest.mark.trains
def test_measures_are_those_of_plain_diffusers(tiny_v_base, photos_dir, tmp_path):
    adapter = run_train(tiny_v_base, photos_dir, tmp_path, *WORDS, *MEASURED)
    expected = measures_by_hand(tiny_v_base, photos_dir, adapter, noise_is_measured=False)
    assert_close(meter_records(tmp_path)[-1]["meter"], expected)


@pytest.mark.trains
def test_measures_in_edm_style_are_those_of_the_noise(tiny_xl, photos_dir, tmp_path):
    """Euler's noise levels are DDPM's, and its weighted error is that of the noise. Sizes and pooled
    embeddings are Stable Diffusion XL's."""
    adapter = run_train(tiny_xl, photos_dir, tmp_path, *WORDS, *MEASURED, "--do_edm_style_training")
    expected = measures_by_hand(tiny_xl, photos_dir, adapter, noise_is_measured=True)
    assert_close(meter_records(tmp_path)[-1]["meter"], expected)


@pytest.mark.trains
@pytest.mark.parametrize(("base", "resolution"), [("tiny_edm", "64"), ("tiny_if", "16")])
def test_other_families_are_measured(request, photos_dir, tmp_path, base, resolution):
    """EDM's noise levels; pixels, and a predicted variance. The new adapter has not drifted at all."""
    words = ["--max_train_steps", "1", "--holdout", "1", "--resolution", resolution]
    run_train(request.getfixturevalue(base), photos_dir, tmp_path, *words, *MEASURED)
    first, last = (record["meter"] for record in meter_records(tmp_path))
    assert first["drift"] == {"bands": [0.0] * 10, "noise_bands": [0.0] * 10, "mean": 0.0, "noise": 0.0}
    assert first["gap"]["since_base"]["mean"] == first["binding"]["since_base"]["mean"] == 0
    assert all(np.isfinite(numbers).all() for numbers in flat(last).values())
    assert last["drift"]["mean"] > 0


# --- the base without its adapter

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "loha": {"adapter": "loha"},
    "lokr": {"adapter": "lokr"},
    "oft": {"adapter": "oft"},
    "boft": {"adapter": "boft", "boft_block_size": 4},
    "hra": {"adapter": "hra"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_measured_as_if_there_were_no_adapter(tiny_base, kind):
    """Whatever the adapter has learned; afterwards it is as it was."""
    unet = load_models(tiny_base)["unet"]
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    with torch.no_grad():
        of_base = unet(*inputs).sample
        options = AdapterOptions(**KINDS[kind])
        component = inject.inject("unet", unet, options, inject.UNET_TARGETS, seed=0)
        trained = dict(component.named_parameters())
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        of_adapter = unet(*inputs).sample
        assert not torch.equal(of_adapter, of_base)
        with inject.without_adapters([component]):
            assert torch.equal(unet(*inputs).sample, of_base)
        assert torch.equal(unet(*inputs).sample, of_adapter)
    names = {f"unet.{name}" for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert names == trained.keys()


# --- the run that is measured


@pytest.mark.trains
def test_a_measured_run_is_the_same_run_and_its_records_survive_kills(tiny_base, photos_dir, tmp_path):
    """With class images, dropout and a text encoder that is freed half way. A kill may come between a
    checkpoint and its measurement, or after both."""
    words = [*prior_words(tmp_path / "class"), "--holdout", "1", "--train_text_encoder"]
    words += ["--train_text_encoder_frac", "0.5", "--lora_dropout", "0.2", "--learning_rate", "1e-2"]
    words += ["--max_train_steps", "4", "--checkpointing_steps", "1"]
    plain = run_train(tiny_base, photos_dir, tmp_path / "plain", *words)
    measured = run_train(tiny_base, photos_dir, tmp_path / "whole", *words, "--meter_steps", "2")
    assert digest(measured) == digest(plain)
    records = meter_records(tmp_path / "whole")
    assert [record["step"] for record in records] == [0, 2, 4]
    assert records[0]["meter"]["drift"]["mean"] == 0 < records[1]["meter"]["drift"]["mean"]
    resume = ["--resume_from_checkpoint", "latest"]
    for step, has_record in ((3, True), (2, False)):
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(tmp_path / "whole", cut)
        for later in range(step + 1, 5):
            shutil.rmtree(cut / f"checkpoint-{later}")
        if not has_record:
            lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
            last = next(n for n, line in enumerate(lines) if '"step": 2, "meter"' in line)
            (cut / "metrics.jsonl").write_text("".join(lines[:last]))
        resumed = run_train(tiny_base, photos_dir, cut, *words, "--meter_steps", "2", *resume)
        assert digest(resumed) == digest(plain)
        assert meter_records(cut) == records


@pytest.mark.trains
def test_a_run_may_be_measured_from_a_resume_on_and_then_on_the_same_photos(tiny_base, photos_dir, tmp_path):
    """Photos that are held out of another folder are no data of the training. With nothing left to train,
    nothing is measured again."""
    out, more = tmp_path / "out", tiny.make_photos(tmp_path / "more", 2, seed=5)
    every = ["--checkpointing_steps", "1"]
    run_train(tiny_base, photos_dir, out, "--max_train_steps", "1", *every)
    resume = [*every, "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=r"1 instance pictures removed \(photo-2.png\)"):
        run_train(tiny_base, photos_dir, out, "--max_train_steps", "2", *resume, "--holdout", "1")
    words = [*resume, "--holdout_data_dir", str(more), *MEASURED]
    for _ in range(2):
        run_train(tiny_base, photos_dir, out, "--max_train_steps", "2", *words)
        assert [record["step"] for record in meter_records(out)] == [2]
    (more / "photo-1.png").unlink()
    with pytest.raises(UserError, match=r"1 held_out pictures removed \(photo-1.png\)"):
        run_train(tiny_base, photos_dir, out, "--max_train_steps", "3", *words)


@pytest.mark.trains
def test_without_held_out_photos_binding_is_measured_on_trained_ones_and_a_note_says_so(
    tiny_base, photos_dir, tmp_path, capsys
):
    """Photos that are encoded anew at each use are encoded once for the meter."""
    words = ["--max_train_steps", "1", "--cache_latents", "off"]
    run_train(tiny_base, photos_dir, tmp_path, *words, *MEASURED)
    assert "--meter_steps measures binding on photos that are trained on" in capsys.readouterr().out
    measured = [set(record["meter"]) for record in meter_records(tmp_path)]
    assert measured == [{"binding", "drift", "loss_trained"}] * 2


# --- held-out photos


@pytest.mark.usefixtures("no_models")
def test_photos_that_cannot_be_held_out_are_refused(tiny_base, photos_dir, tmp_path):
    with pytest.raises(UserError, match="--holdout 3 leaves no photo to train on: --instance_data_dir has 3"):
        run_train(tiny_base, photos_dir, tmp_path / "none", "--holdout", "3")
    others = tmp_path / "others"
    others.mkdir()
    words = ["--holdout_data_dir", str(others)]
    with pytest.raises(UserError, match="--holdout_data_dir: no picture in"):
        run_train(tiny_base, photos_dir, tmp_path / "empty", *words)
    with pytest.raises(UserError, match=r"--output_dir: .*others/out lies in .*--holdout_data_dir"):
        run_train(tiny_base, photos_dir, others / "out", *words)
    Image.open(photos_dir / "photo-1.png").save(others / "again.bmp")
    with pytest.raises(
        UserError, match=r"--holdout_data_dir: photos that are trained on.*again.bmp is photo-1"
    ):
        run_train(tiny_base, photos_dir, tmp_path / "same", *words)
    twice = tmp_path / "twice"
    shutil.copytree(photos_dir, twice)
    shutil.copy(photos_dir / "photo-0.png", twice / "photo-9.png")
    with pytest.raises(UserError, match=r"--holdout: photos that are trained on.*photo-9.png is photo-0.png"):
        run_train(tiny_base, twice, tmp_path / "pair", "--holdout", "1")


@pytest.mark.usefixtures("no_models")
def test_a_held_out_photo_among_the_class_images_is_refused(tiny_base, photos_dir, tmp_path):
    classes = tiny.make_photos(tmp_path / "class", 3, seed=5)
    shutil.copy(photos_dir / "photo-2.png", classes / "photo-0.png")
    with pytest.raises(UserError, match="--class_data_dir: 1 of the class images are photos of the subject"):
        run_train(tiny_base, photos_dir, tmp_path / "out", "--holdout", "1", *prior_words(classes))


@pytest.mark.usefixtures("no_models")
def test_captions_of_held_out_photos_are_their_prompts_and_no_data_of_the_run(photos_dir, tmp_path):
    """In the folder of the instance photos, and in a folder of their own."""
    folder, others = tmp_path / "photos", tiny.make_photos(tmp_path / "others", 2, seed=5)
    shutil.copytree(photos_dir, folder)
    for path in (folder / "photo-0.txt", folder / "photo-2.txt", others / "photo-1.txt"):
        path.write_text(f"sks dog in {path.parent.name}")
    options = InstanceOptions(SUBJECT, str(folder), caption_column="text")
    subject = subjects.check(options, MeterOptions(holdout=1), None, one_process())
    assert subject.source(seed=0).prompts == ["sks dog in photos", SUBJECT]
    assert subject.held_out_source().prompts == ["sks dog in photos"]
    assert subject.captions == {"photo-0.png": "sks dog in photos"}
    elsewhere = MeterOptions(holdout_data_dir=str(others))
    subject = subjects.check(options, elsewhere, None, one_process())
    assert len(subject.photos) == 3
    assert subject.held_out_source().prompts == [SUBJECT, "sks dog in others"]
