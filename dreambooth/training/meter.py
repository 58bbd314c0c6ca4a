"""Measures an adapter by its denoising losses on fixed pictures, noise and timesteps. It needs no second
model and draws no picture.

Every measurement uses the same draws of noise and timestep, the base's included. So the
differences that are reported are paired: the noise itself cancels. The draws depend on nothing but the number
of timesteps and the size of the latents, so runs on the same base can be compared with each other.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler

from dreambooth.bases import prediction
from dreambooth.bases.loading import FrozenParts
from dreambooth.bases.prompts import PromptEmbeds, stack
from dreambooth.data import sampling_order
from dreambooth.runtime import environment, memory
from dreambooth.training import objectives

BANDS = 10  # of equal width over the timesteps
DRAWS = 4  # of noise and timestep in each band, for each kind of picture
_SEED = 0  # the same for every run

Context = contextlib.AbstractContextManager[Any]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that is measured on."""

    latents: torch.Tensor
    """Float32 [C, h, w] on the CPU, in the scale of the UNet."""
    prompt: str
    """The prompt that names the subject; for a class image the class prompt."""
    time_ids: tuple[int, ...]
    """Stable Diffusion XL's sizes: original height and width, crop top and left, target height and width."""
    class_prompt: str
    """The class prompt of the subject that the picture shows."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """One of several subjects: its prompts, and photos of it, at least one."""

    prompt: str
    class_prompt: str
    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of one run. Of each kind the first `draws()` are used."""

    trained: Sequence[Picture]
    """Photos that are trained on; at least one."""
    held_out: Sequence[Picture]
    """Photos of the subject that are not trained on; there may be none."""
    classes: Sequence[Picture]
    """Class images; there may be none."""
    subjects: Sequence[Subject] = ()
    """The subjects, if there are several."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The base with the adapter that is measured, in evaluation mode."""

    parts: FrozenParts
    device: torch.device
    encode: Callable[[str], PromptEmbeds]
    """The embeddings of one prompt, by the text encoders with their adapters."""
    without_adapter: Callable[[], Context]
    """Within the block the base is alone: its UNet, and its text encoders in `encode`."""
    autocast: Callable[[], Context] = contextlib.nullcontext
    rows: int = 4
    """Rows of one forward pass. Another number gives other last bits."""
    check: Callable[[], None] = lambda: None
    """Called before each forward pass; what it raises ends the measurement."""


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The rows of one kind of picture: row n is draw number n. `latents` and `noise` have a tensor [C, h, w]
    for each row, whose shapes may differ."""

    latents: Sequence[torch.Tensor]
    noise: Sequence[torch.Tensor]
    timestep_indices: torch.Tensor
    time_ids: torch.Tensor
    prompts: list[str]

    def rows(self, numbers: Sequence[int]) -> "_Pass":
        """These rows alone."""
        return _Pass(
            [self.latents[number] for number in numbers],
            [self.noise[number] for number in numbers],
            self.timestep_indices[list(numbers)],
            self.time_ids[list(numbers)],
            [self.prompts[number] for number in numbers],
        )

    def by_shape(self) -> list[list[int]]:
        """The numbers of the rows with latents of one shape, for each shape."""
        groups: dict[torch.Size, list[int]] = {}
        for number, latents in enumerate(self.latents):
            groups.setdefault(latents.shape, []).append(number)
        return list(groups.values())


@dataclasses.dataclass(frozen=True)
class _Result:
    """What the model gives for a pass."""

    losses: torch.Tensor
    """Float64 [rows]."""
    predictions: Sequence[torch.Tensor] | None
    """[rows, C, h, w] on the CPU, in the model's dtype, for each group of `_Pass.by_shape`, of the pass that
    drift is measured on; else None."""
    weights: torch.Tensor
    """Of the squared errors, float64 [rows]."""
    scales: torch.Tensor
    """Variance of the target in units of the weighted error, float64 [rows]."""


class Meter:
    """Measures the adapter of one model, again and again, on fixed draws.

    With B bands and D draws in each, a measurement takes 3 B D rows of forward passes, with class images 4 B
    D, without held-out photos B D less. The base's own losses are measured once, when the meter is made; its
    predictions of B D rows are kept in main memory.
    """

    def __init__(self, model: Model, pictures: Pictures):
        self.model, self.has_held_out = model, bool(pictures.held_out)
        subject = pictures.held_out or pictures.trained
        indices = timestep_indices(model.parts.noise_scheduler)
        self.passes = {
            "trained": _pass(pictures.trained, indices),
            "class": _pass(subject, indices, [picture.class_prompt for picture in subject]),
        }
        if pictures.held_out:
            self.passes["held_out"] = _pass(pictures.held_out, indices)
        if pictures.classes:
            self.passes["prior"] = _pass(pictures.classes, indices)
        self.drift_pass = "prior" if pictures.classes else "class"
        self.subjects = range(len(pictures.subjects))
        for i, j in itertools.product(self.subjects, self.subjects):
            named, shown = pictures.subjects[i], pictures.subjects[j].pictures
            for kind, prompt in (("subject", named.prompt), ("class", named.class_prompt)):
                prompts = [prompt] * len(shown)
                self.passes[f"{kind} {i} on {j}"] = _pass(shown, indices, prompts)
        with model.without_adapter():
            self.base = self._results()

    def measure(self) -> dict[str, Any]:
        """The measures of the adapter as it is now, by name. Each has its `mean` with the standard error
        `noise`, and both for each band of timesteps, from low noise to high: `bands` and `noise_bands`.

        `loss_trained` and `loss_held_out` are losses with the prompt of the subject. `binding` is the loss
        with the class prompt minus that with the subject's prompt, on held-out photos; where there are none,
        on trained ones. `gap` is `loss_held_out` minus `loss_trained`. `since_base` of `binding` and `gap` is
        the difference from the base's. `drift` is the mean squared distance of predictions with the class
        prompt from the base's, divided by the variance of the target; on class images, where there are none
        on the photos of `binding`. Without held-out photos there are no `loss_held_out` and no `gap`.

        With several subjects, counted from 1, `binding_I` is the binding of subject I, and `bleed_I_J` the
        same of the prompts of subject I on photos of subject J: over 0, the prompt of I shows J.
        """
        now, base = self._results(), self.base
        subject = "held_out" if self.has_held_out else "trained"

        def difference(results: dict[str, _Result], of: str, minus: str) -> torch.Tensor:
            return results[of].losses - results[minus].losses

        def with_change(of: str, minus: str) -> dict[str, Any]:
            value, before = (difference(results, of, minus) for results in (now, base))
            return {**_by_band(value), "since_base": _by_band(value - before)}

        measures = {
            "binding": with_change("class", subject),
            "drift": _by_band(self._drift(now[self.drift_pass])),
            "loss_trained": _by_band(now["trained"].losses),
        }
        if self.has_held_out:
            measures["gap"] = with_change("held_out", "trained")
            measures["loss_held_out"] = _by_band(now["held_out"].losses)
        for i, j in itertools.product(self.subjects, self.subjects):
            name = f"binding_{i + 1}" if i == j else f"bleed_{i + 1}_{j + 1}"
            measures[name] = with_change(f"class {i} on {j}", f"subject {i} on {j}")
        return measures

    def _drift(self, now: _Result) -> torch.Tensor:
        """The squared distance of each row's prediction from the base's, in units of the variance of the
        target in the row's band; float64 [rows]."""
        before = self.base[self.drift_pass].predictions
        assert now.predictions is not None
        assert before is not None
        distances = torch.empty_like(now.losses)
        groups = self.passes[self.drift_pass].by_shape()
        for numbers, after, of_base in zip(groups, now.predictions, before, strict=True):
            distances[numbers] = _mean_squares(after.float() - of_base.float()) * now.weights[numbers]
        scales = now.scales.view(BANDS, DRAWS).mean(dim=1, keepdim=True).expand(BANDS, DRAWS).flatten()
        return distances / scales

    @torch.no_grad()
    def _results(self) -> dict[str, _Result]:
        """The results of all passes, by name."""
        prompts = dict.fromkeys(prompt for rows in self.passes.values() for prompt in rows.prompts)
        embeds = {prompt: self.model.encode(prompt) for prompt in prompts}
        return {name: self._result(name, embeds) for name in self.passes}

    def _result(self, name: str, embeds: dict[str, PromptEmbeds]) -> _Result:
        rows = self.passes[name]
        size = self.model.rows
        losses, weights, scales = torch.zeros(3, len(rows.prompts), dtype=torch.float64)
        predictions = []
        for numbers in rows.by_shape():
            parts = [numbers[at : at + size] for at in range(0, len(numbers), size)]
            chunks = [self._chunk(rows.rows(part), embeds) for part in parts]
            of_group = [torch.cat(tensors) for tensors in zip(*chunks, strict=True)]
            losses[numbers], weights[numbers], scales[numbers] = of_group[:3]
            predictions.append(of_group[3])
        return _Result(losses, predictions if name == self.drift_pass else None, weights, scales)

    def _chunk(
        self, rows: _Pass, embeds: dict[str, PromptEmbeds]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(losses, weights, scales, predictions) as in `_Result`, of rows of one shape that fit into one
        forward pass."""
        self.model.check()
        parts, device = self.model.parts, self.model.device
        latents, noise = torch.stack(list(rows.latents)), torch.stack(list(rows.noise))
        task = objectives.make_task(parts.noise_scheduler, latents, noise, rows.timestep_indices)
        inputs = {name: memory.to_device(tensor, device) for name, tensor in task.tensors().items()}
        on_device = objectives.Task.of(inputs)
        time_ids = rows.time_ids.to(device) if parts.base.takes_time_ids else None
        prompt_embeds = stack([embeds[prompt] for prompt in rows.prompts])
        with environment.deterministic(device), self.model.autocast():
            output = prediction.predict(
                parts.unet, on_device.model_input, on_device.timesteps, prompt_embeds, time_ids
            )
        predicted = on_device.prediction(output).cpu()
        weights = torch.ones(len(rows.prompts)) if task.weights is None else task.weights.cpu()
        # a weighted error is one of the noise, whose variance is 1
        variances = task.target.flatten(1).var(dim=1)
        scales = torch.ones_like(variances) if task.weights is not None else variances
        losses = _mean_squares(predicted.float() - task.target) * weights.double()
        return losses, weights.double(), scales.double(), predicted


def draws() -> int:
    """The number of draws, and the most pictures of one kind that are used."""
    return BANDS * DRAWS


def timestep_indices(scheduler: objectives.NoiseScheduler) -> torch.Tensor:
    """The timestep of each draw as an index of the scheduler, int64 [draws], from low noise to high.
    The draws of a band are spread over it: each is uniform in its part of the band."""
    count = scheduler.config.num_train_timesteps
    indices = []
    for band in range(BANDS):
        low = band * count // BANDS
        width = max(1, (band + 1) * count // BANDS - low)
        for draw in range(DRAWS):
            shift = sampling_order.chance(_SEED, "meter-timestep", band * DRAWS + draw)
            indices.append(low + int(width * (draw + shift) / DRAWS))
    timesteps = torch.tensor(indices)
    # index 0 of the other schedulers is the noisiest
    return timesteps if isinstance(scheduler, DDPMScheduler) else count - 1 - timesteps


def _pass(pictures: Sequence[Picture], indices: torch.Tensor, prompts: Sequence[str] | None = None) -> _Pass:
    """All draws of one kind of picture, which take turns. `prompts` replace the pictures' own, one each."""
    if prompts is None:
        prompts = [picture.prompt for picture in pictures]
    turns = [pictures[row % len(pictures)] for row in range(draws())]
    shapes = [tuple(picture.latents.shape) for picture in turns]
    noise = [
        sampling_order.noise_of_rows(_SEED, "meter-noise", range(row, row + 1), shape)[0]
        for row, shape in enumerate(shapes)
    ]
    return _Pass(
        [picture.latents for picture in turns],
        noise,
        indices,
        torch.tensor([picture.time_ids for picture in turns], dtype=torch.float32),
        [prompts[row % len(pictures)] for row in range(draws())],
    )


def _mean_squares(difference: torch.Tensor) -> torch.Tensor:
    """The mean square of each row, float64 [rows], from float32 [rows, ...]."""
    return difference.double().square().flatten(1).mean(dim=1)


def _by_band(values: torch.Tensor) -> dict[str, Any]:
    """Mean and standard error of `values`, one for each draw, in all bands together and in each band."""
    by_band = values.view(BANDS, DRAWS)
    means, errors = by_band.mean(dim=1), by_band.std(dim=1) / DRAWS**0.5
    return {
        "bands": means.tolist(),
        "noise_bands": errors.tolist(),
        "mean": means.mean().item(),
        # the bands are sampled separately
        "noise": (errors.square().sum().sqrt() / BANDS).item(),
    }
