"""Losses and gradients of a training step equal those of the papers' equations, for every family."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from PIL import Image

from dreambooth.bases import families, loading
from dreambooth.bases.prompts import TextParts
from dreambooth.data import sampling_order
from dreambooth.data.batches import micro_batches
from dreambooth.options.command_line import parse
from dreambooth.options.training import TextOptions, TrainOptions
from dreambooth.runtime.stops import Watch
from dreambooth.training import objectives, prepare
from tests import tiny
from train_dreambooth_lora import Training, assemble

CAPTIONS = {
    "photo-0.png": "a photo of sks dog",
    "photo-1.png": "a photo of sks dog in the snow",
    "photo-2.png": "a photo of sks dog on a Red mat",
}
CLASS_PROMPT = "a photo of dog"
PRIOR_WEIGHT = 0.7


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """`instance`: three photos of two sizes with a caption each. `class`: three others."""
    folder = tmp_path_factory.mktemp("pictures")
    tiny.make_photos(folder / "instance", 3, (96, 64))
    tiny.make_photos(folder / "instance", 1, (64, 80), seed=1)
    for name, caption in CAPTIONS.items():
        (folder / "instance" / name).with_suffix(".txt").write_text(caption)
    tiny.make_photos(folder / "class", 3, (72, 64), seed=2)
    return folder


@contextlib.contextmanager
def a_training(base: Path, pictures: Path, out: Path, words: str) -> Iterator[Training]:
    """A run before its first step. With B filled, both factors of every layer have a gradient.

    The first rows of this seed have high and low noise.
    """
    common = f"--pretrained_model_name_or_path {base} --output_dir {out} --seed 68 --report_to none"
    common += f" --instance_data_dir {pictures / 'instance'} --class_data_dir {pictures / 'class'}"
    common += f" --num_class_images 3 --prior_loss_weight {PRIOR_WEIGHT} --train_batch_size 2"
    common += " --cache_latents off"  # crops at any pixel, and the VAE stays
    named = ["--caption_column", "text", "--instance_prompt", "unused", "--class_prompt", CLASS_PROMPT]
    options = parse(TrainOptions, "", [*common.split(), *words.split(), *named])
    watch = Watch()
    try:
        with contextlib.ExitStack() as stack:
            start = prepare.prepare(options, watch, stack)
            assert start is not None
            training = assemble(start, watch)
            generator = torch.Generator().manual_seed(0)
            for component in training.trainables.components:
                for name, parameter in component.named_parameters():
                    if "lora_B" in name:
                        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            yield training
    finally:
        watch.close()


def text_of(base: families.Base, options: TextOptions) -> TextParts:
    """Frozen text encoders, which a run has freed before its first step."""
    text = loading.text_without_encoders(base, loading.load_tokenizers(base), options)
    text.encoders = loading.load_encoders(base, torch.float32, torch.device("cpu"))
    return text


@dataclasses.dataclass
class Given:
    """The inputs of a step, made without the code under test: an entry for each row, instance rows first."""

    latents: torch.Tensor
    noise: torch.Tensor
    timestep_indices: torch.Tensor
    prompts: list[str]
    sizes: list[list[int]]


@torch.no_grad()
def given(training: Training, rows: range, offset: float = 0.0) -> Given:
    """Pictures are opened, cropped and encoded here; the random numbers are those that belong to the rows."""
    side, vae = training.dataset.crops.resolution, training.frozen.parts.vae
    entries: list[tuple[Any, ...]] = []
    for source in training.sources:

        def noise_of(
            what: str, row: int, shape: tuple[int, ...], purpose: str = source.purpose
        ) -> torch.Tensor:
            return sampling_order.noise_of_rows(
                training.seed, f"{purpose}-{what}", range(row, row + 1), shape
            )

        for row in rows:
            path = source.photos[
                sampling_order.image_of_row(training.seed, f"{source.purpose}-order", row, 3)
            ].path
            image = Image.open(path)
            shorter = min(image.size)
            width, height = (int(side * length / shorter) for length in image.size)
            left, top = sampling_order.crop_of_row(
                training.seed, source.purpose, row, (width - side, height - side)
            )
            crop = np.asarray(
                image.resize((width, height), Image.Resampling.LANCZOS).crop(
                    (left, top, left + side, top + side)
                )
            )
            latents = torch.tensor(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
            if vae is not None:
                posterior = vae.encode(latents).latent_dist
                shape = tuple(posterior.mean.shape[1:])
                latents = posterior.mean + posterior.std * noise_of("posterior", row, shape)
                if training.frozen.parts.family.key == "sdxl" and isinstance(
                    training.frozen.parts.noise_scheduler, EDMEulerScheduler
                ):
                    mean, std = (
                        torch.tensor(v).view(1, 4, 1, 1)
                        for v in (vae.config.latents_mean, vae.config.latents_std)
                    )
                    latents = (latents - mean) / std
                latents = latents * vae.config.scaling_factor
            shape = tuple(latents.shape[1:])
            noise = noise_of("noise", row, shape)
            if offset:
                noise = noise + offset * noise_of("noise-offset", row, (shape[0], 1, 1))
            index = sampling_order.timesteps_of_rows(
                training.seed, f"{source.purpose}-timestep", range(row, row + 1), 1000
            )
            prompt = CAPTIONS[path.name] if source.purpose == "instance" else CLASS_PROMPT
            entries.append(
                (latents, noise, index, prompt, [image.height, image.width, top, left, side, side])
            )
    latents, noise, timestep_indices = (torch.cat([row[place] for row in entries]) for place in range(3))
    return Given(latents, noise, timestep_indices, [row[3] for row in entries], [row[4] for row in entries])


def plain_conditions(
    text: Any, family: str, question: Given
) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    """(prompt embeddings, Stable Diffusion XL's added conditions), by the encoders themselves.

    A frozen encoder gets each prompt alone and a trained one all distinct prompts, as in training: the same
    batches give the same last bits.
    """
    encoders, distinct = list(text.encoders.values()), list(dict.fromkeys(question.prompts))
    is_trained = any(parameter.requires_grad for encoder in encoders for parameter in encoder.parameters())
    outputs: list[tuple[torch.Tensor, ...]] = []
    for prompts in [distinct] if is_trained else [[prompt] for prompt in distinct]:
        words = [prompt.lower().strip() for prompt in prompts] if family == "if" else prompts
        tokens = [
            t(words, padding="max_length", max_length=min(77, t.model_max_length), return_tensors="pt")
            for t in text.tokenizers
        ]
        if family == "if":
            outputs.append(
                (encoders[0](tokens[0].input_ids, attention_mask=tokens[0].attention_mask).last_hidden_state,)
            )
        elif family == "sd":
            outputs.append((encoders[0](tokens[0].input_ids).last_hidden_state,))
        else:
            outs = [
                encoder(own.input_ids, output_hidden_states=True)
                for encoder, own in zip(encoders, tokens, strict=True)
            ]
            outputs.append((torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[1].text_embeds))
    embeds, *pooled = (
        torch.cat(parts)[[distinct.index(prompt) for prompt in question.prompts]]
        for parts in zip(*outputs, strict=True)
    )
    return embeds, {
        "text_embeds": pooled[0],
        "time_ids": torch.tensor(question.sizes, dtype=torch.float32),
    } if pooled else None


def plain_step(
    training: Training, text: Any, question: Given, *, objective: str, gamma: float | None, prior: bool
) -> torch.Tensor:
    """DreamBooth's loss for one batch (arXiv 2208.12242, eq. 2).

    `objective` is epsilon, v_prediction, edm (arXiv 2206.00364, table 1), or sigma: EDM's loss of an epsilon
    UNet.
    """
    unet, x0, noise = training.frozen.parts.unet, question.latents, question.noise
    config = dict(training.frozen.parts.noise_scheduler.config)
    column = (-1, 1, 1, 1)
    if objective == "edm":
        low, high = config["sigma_min"] ** (1 / 7), config["sigma_max"] ** (1 / 7)
        sigma = (high + question.timestep_indices.double() / 1000 * (low - high)).pow(7).float()
        c_skip, c_out, c_in = (
            0.25 / (sigma**2 + 0.25),
            sigma * 0.5 / (sigma**2 + 0.25).sqrt(),
            1 / (sigma**2 + 0.25).sqrt(),
        )
        noisy = x0 + sigma.view(column) * noise
        model_input, times, target, weights = (
            c_in.view(column) * noisy,
            sigma.log() / 4,
            x0,
            torch.ones_like(sigma),
        )
    else:
        fields = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
        times = 999 - question.timestep_indices if objective == "sigma" else question.timestep_indices
        abar = DDPMScheduler(**fields).alphas_cumprod[times]  # type: ignore[attr-defined]
        model_input = abar.sqrt().view(column) * x0 + (1 - abar).sqrt().view(column) * noise
        target = (
            noise
            if objective != "v_prediction"
            else abar.sqrt().view(column) * noise - (1 - abar).sqrt().view(column) * x0
        )
        snr = abar / (1 - abar)
        weights = (
            torch.ones_like(snr)
            if gamma is None
            else snr.clamp(max=gamma) / (snr + 1 if objective == "v_prediction" else snr)
        )
        if objective == "sigma":
            sigma = ((1 - abar) / abar).sqrt()
            noisy = x0 + sigma.view(column) * noise
            model_input, target, weights = noisy / (sigma**2 + 1).sqrt().view(column), x0, 1 / sigma**2
            c_skip, c_out = torch.ones_like(sigma), -sigma
    embeds, added = plain_conditions(text, training.frozen.parts.family.key, question)
    output = unet(
        model_input.contiguous(memory_format=torch.channels_last), times, embeds, added_cond_kwargs=added
    ).sample
    if training.frozen.parts.family.key == "if":
        output = output[:, :3]
    if objective in ("edm", "sigma"):
        output = c_skip.view(column) * noisy + c_out.view(column) * output
    losses = ((output - target) ** 2).mean(dim=(1, 2, 3)) * weights
    return losses[:2].mean() + PRIOR_WEIGHT * losses[2:].mean() if prior else losses.mean()


def gradients(training: Training) -> torch.Tensor:
    """All of them in one row; the parameters have none afterwards."""
    parts = []
    for component in training.trainables.components:
        for name, parameter in component.named_parameters():
            assert parameter.grad is not None, name
            parts.append(parameter.grad.flatten())
            parameter.grad = None
    return torch.cat(parts)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


# name: (base, objective, flags)
OBJECTIVES = {
    "sd": ("tiny_base", "epsilon", ""),
    "sd with text": ("tiny_base", "epsilon", "--train_text_encoder"),
    "v": ("tiny_v_base", "v_prediction", ""),
    "sd as v": ("tiny_base", "v_prediction", "--prediction_type v_prediction"),
    "xl": ("tiny_xl", "epsilon", ""),
    "xl with text": ("tiny_xl", "epsilon", "--train_text_encoder"),
    "xl as edm": ("tiny_xl", "sigma", "--do_edm_style_training"),
    "edm": ("tiny_edm", "edm", ""),
    "if": ("tiny_if", "epsilon", "--resolution 16"),
}
PRIOR = "--with_prior_preservation"
# Every objective has prior preservation, whose instance half is the loss without it. Flags that change loss
# or noise are tried on a few.
CASES = [*((name, PRIOR) for name in OBJECTIVES), ("sd", ""), ("xl with text", "")]
CASES += [("sd", "--snr_gamma 5"), ("v", f"--snr_gamma 5 {PRIOR}"), ("if", "--snr_gamma 5")]
CASES += [(name, f"--noise_offset 0.3 {PRIOR}") for name in ("sd", "xl as edm", "edm")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_step_is_the_papers_step(name, more, pictures, tmp_path, request):
    """Loss and gradients, over two micro-batches of two.

    The control: wrong weights, and prompts or sizes of other pictures, give other gradients.
    """
    base, objective, words = OBJECTIVES[name]
    gamma, offset, prior = 5.0 if "snr" in more else None, 0.3 if "offset" in more else 0.0, PRIOR in more
    size = "" if "--resolution" in words else "--resolution 64"
    with a_training(request.getfixturevalue(base), pictures, tmp_path, f"{words} {size} {more}") as training:
        text = training.frozen.parts.text or text_of(training.frozen.parts.base, training.options.text)
        batches = micro_batches(
            training.dataset,
            training.frozen.encoded,
            training.frozen.parts.vae,
            range(2),
            slots=1,
            batch_size=2,
            peers=training.peers,
        )
        for batch in batches:
            outputs = training.micro_step(batch)
            loss, actual_gradients = outputs["loss"], outputs["gradients"]
            question = given(training, batch.rows, offset)

            def plain(question: Given = question, **other: Any) -> tuple[torch.Tensor, torch.Tensor]:
                expected = plain_step(
                    training,
                    text,
                    question,
                    **{"objective": objective, "gamma": gamma, "prior": prior, **other},
                )
                expected.backward()
                return expected.detach(), gradients(training)

            expected, expected_gradients = plain()
            assert loss == pytest.approx(expected.item(), rel=1e-6)
            assert difference(actual_gradients, expected_gradients) < 1e-6
            if batch.step > 0:
                continue
            assert (
                difference(
                    actual_gradients, plain(dataclasses.replace(question, prompts=question.prompts[::-1]))[1]
                )
                > 0.01
            )
            if training.frozen.parts.family.key == "sdxl":
                assert (
                    difference(
                        actual_gradients,
                        plain(dataclasses.replace(question, sizes=question.sizes[1:] + question.sizes[:1]))[
                            1
                        ],
                    )
                    > 0.01
                )
            if objective in ("epsilon", "v_prediction"):
                assert difference(actual_gradients, plain(gamma=2.0 if gamma else 5.0)[1]) > 0.01
            if prior:
                assert difference(actual_gradients, plain(prior=False)[1]) > 0.01


ZERO_SNR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
}


@pytest.mark.parametrize(("prediction_type", "more"), [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr_weights_follow_the_paper_and_know_no_signal_at_all(prediction_type, more):
    """At the last timestep of a schedule with zero terminal SNR it is 1 for epsilon and 0 for velocity."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, **ZERO_SNR)
    timesteps = torch.tensor([0, 10, 250, 300, 700, 998, 999])
    *others, last = objectives.min_snr_weights(scheduler, timesteps, 5.0).tolist()
    squares = [scheduler.alphas_cumprod[t].item() for t in timesteps]
    assert squares[-1] == 0
    assert others == pytest.approx(
        [min(snr, 5) / (snr + more) for snr in (square / (1 - square) for square in squares[:-1])], rel=1e-5
    )
    assert last == (1 if prediction_type == "epsilon" else 0)
    latents, noise = torch.randn(2, 7, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    task = objectives.make_task(scheduler, latents, noise, timesteps, snr_gamma=5.0)
    assert torch.isfinite(torch.cat([task.model_input, task.target])).all()
    assert torch.equal(task.model_input[-1], noise[-1])
    assert torch.equal(task.target[-1], noise[-1] if prediction_type == "epsilon" else -latents[-1])


def test_edm_loss_of_a_noise_predictor_is_that_of_the_noise():
    """Its weight, 1 / sigma^2, undoes what reading the network as a denoiser multiplies the error by."""
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timestep_indices = torch.tensor([0, 400, 900])
    latents, noise, output = torch.randn(
        3, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    task = objectives.make_task(scheduler, latents, noise, timestep_indices)
    assert task.weights is not None
    assert task.c_skip is not None
    assert task.c_out is not None
    losses = ((task.c_skip * task.noisy_latents + task.c_out * output - latents) ** 2).mean(
        dim=(1, 2, 3)
    ) * task.weights
    assert torch.allclose(losses, ((output - noise) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4)
    assert task.timesteps.tolist() == [999, 599, 99]


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EulerDiscreteScheduler])
def test_a_perfect_velocity_gives_the_clean_picture(kind):
    """With --prediction_type v_prediction, EDM too: v = alpha * noise - sigma * picture, at unit variance."""
    scheduler = kind(prediction_type="v_prediction")
    timestep_indices = torch.tensor([3, 500, 990])
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    task = objectives.make_task(scheduler, latents, noise, timestep_indices)
    sigma = scheduler.sigmas[timestep_indices].view(-1, 1, 1, 1)
    data = scheduler.config.sigma_data if kind is EDMEulerScheduler else 1.0
    velocity = (data * noise - sigma * latents / data) / (sigma**2 + data**2).sqrt()
    assert torch.allclose(task.prediction(velocity), latents, atol=1e-3)
