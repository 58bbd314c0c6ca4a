"""Training objectives: epsilon, v-prediction, EDM; Min-SNR weights. All tensors are [B, C, h, w] and float32
unless another shape is given."""

import dataclasses
from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

from dreambooth.runtime.graphs import Tensors

NoiseScheduler: TypeAlias = DDPMScheduler | EDMEulerScheduler | EulerDiscreteScheduler


@dataclasses.dataclass(frozen=True)
class Task:
    """Noisy latents of one batch, the UNet's input, and the target that its prediction is compared with."""

    noisy_latents: torch.Tensor
    model_input: torch.Tensor
    """The UNet's input: for DDPM the noisy latents; for EDM and Euler these, scaled to unit variance."""
    timesteps: torch.Tensor
    """The UNet's timesteps, [B]."""
    target: torch.Tensor
    """For DDPM the noise or the velocity; for EDM and Euler the clean latents."""
    weights: torch.Tensor | None = None
    """Weight of each row's squared error, [B], or of each latent's, [B, 1, h, w]; None weights all with 1."""
    c_skip: torch.Tensor | None = None
    """EDM's preconditioning (arXiv 2206.00364, eq. 7), [B, 1, 1, 1]; None for DDPM."""
    c_out: torch.Tensor | None = None
    """As `c_skip`."""

    def rows(self, part: slice) -> "Task":
        """These rows alone."""
        return Task(**{name: tensor[part] for name, tensor in self.tensors().items()})

    def tensors(self) -> Tensors:
        """The tensors by field."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, tensors: Tensors) -> "Task":
        """The task whose `tensors()` these are, among others."""
        return cls(**{f.name: tensors[f.name] for f in dataclasses.fields(cls) if f.name in tensors})

    def prediction(self, model_output: torch.Tensor) -> torch.Tensor:
        """The prediction to compare with `target`, [B, C, h, w]. It is the UNet's output; for EDM and Euler
        c_skip * noisy_latents + c_out * output."""
        if self.c_skip is None or self.c_out is None:
            return model_output
        return self.c_skip * self.noisy_latents + self.c_out * model_output.float()


_LEAST_AREA = 0.05  # of a crop: where a mask covers less of it, its errors are not weighted any higher


def errors(model_pred: torch.Tensor, target: torch.Tensor, huber_c: float | None) -> torch.Tensor:
    """The squared error of each value, float32; with `huber_c` the pseudo-Huber error 2 c (sqrt(e^2 + c^2) -
    c), which is e^2 for small e and 2 c |e| for large."""
    squares = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    return squares if huber_c is None else 2 * huber_c * ((squares + huber_c**2).sqrt() - huber_c)


def row_losses(errors: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The mean of each row's `errors`, float32 [B], times its weight; `weights` are as in `Task`."""
    if weights is not None and weights.dim() > 1:
        return (errors * weights).flatten(1).mean(dim=1)
    losses = errors.flatten(1).mean(dim=1)
    return losses if weights is None else losses * weights


def with_masks(task: Task, inside: torch.Tensor, outside_weight: float) -> Task:
    """The task with weights of latents: 1 inside the masks and `outside_weight` outside.

    `inside` is how much of each latent the subject covers, [M, 1, h, w], for the first M rows; the others are
    weighted as before. The weights of a row are divided by their mean, so that a small subject counts as much
    as a large one; a mean under _LEAST_AREA counts as that, and a crop without the subject as nothing.
    """
    rows, _, height, width = task.target.shape
    areas = inside + outside_weight * (1 - inside)
    areas = areas / areas.mean(dim=(1, 2, 3), keepdim=True).clamp(min=_LEAST_AREA)
    weights = torch.ones(rows, 1, height, width)
    weights[: len(areas)] = areas
    if task.weights is not None:
        weights = weights * task.weights.view(-1, 1, 1, 1)
    return dataclasses.replace(task, weights=weights)


def make_task(
    noise_scheduler: NoiseScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timestep_indices: torch.Tensor,
    *,
    snr_gamma: float | None = None,
    is_debiased: bool = False,
    perturbation: torch.Tensor | None = None,
) -> Task:
    """The task of denoising `latents` with `noise` added, and `perturbation`, which is no part of the target.

    `timestep_indices`, int64 [B] in 0..num_train_timesteps-1, are DDPM's timesteps themselves. Index 0 of an
    EDM or Euler scheduler is its noisiest timestep. `snr_gamma` and `is_debiased` are for DDPM only.
    """
    added = noise if perturbation is None else noise + perturbation
    if not isinstance(noise_scheduler, DDPMScheduler):
        return _edm_task(noise_scheduler, latents, added, timestep_indices)
    weights = None
    if snr_gamma is not None:
        weights = min_snr_weights(noise_scheduler, timestep_indices, snr_gamma)
    elif is_debiased:
        weights = debiased_weights(noise_scheduler, timestep_indices)
    return _ddpm_task(noise_scheduler, latents, noise, added, timestep_indices, weights)


def _ddpm_task(
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    added: torch.Tensor,
    timesteps: torch.Tensor,
    weights: torch.Tensor | None,
) -> Task:
    """`added` is the noise in the UNet's input. The target is noise (DDPM, arXiv 2006.11239, eq. 14) or
    velocity (arXiv 2202.00512, appendix D)."""
    is_velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    noisy_latents = noise_scheduler.add_noise(latents, added, timesteps)
    return Task(noisy_latents, noisy_latents, timesteps, target, weights)


def min_snr_weights(
    noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float
) -> torch.Tensor:
    """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for velocity, [B]. Source: Min-SNR,
    arXiv 2303.09556, section 3.4."""
    snr = _snr(noise_scheduler, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    return (snr_gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, without 0 / 0 where SNR is 0


_HIGHEST_SNR = 1000.0  # of `debiased_weights`: where there is next to no noise, weights would vanish


def debiased_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(SNR) for epsilon, [B] (arXiv 2310.08442, eq. 11); for velocity the same weight of the error of
    the noise, sqrt(SNR) / (SNR + 1)."""
    snr = _snr(noise_scheduler, timesteps).clamp(max=_HIGHEST_SNR)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.sqrt() / (snr + 1)
    return snr.clamp(min=1 / _HIGHEST_SNR).rsqrt()


def _snr(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """The signal-to-noise ratio at these timesteps, float32 [B]."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas_cumprod / (1 - alphas_cumprod)


def _edm_task(
    noise_scheduler: EDMEulerScheduler | EulerDiscreteScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timestep_indices: torch.Tensor,
) -> Task:
    """The target is the clean latents, at noise levels sigma (EDM, arXiv 2206.00364, section 5).

    With an EDM scheduler, c_skip and c_out are those of EDM, and all rows have weight 1: EDM's weights are
    unstable in low precision. With an Euler scheduler, c_skip and c_out turn epsilon or velocity into clean
    latents. The weight 1 / sigma^2 turns the error of the latents into the error of the noise.
    """
    sigmas = noise_scheduler.sigmas[timestep_indices.cpu()].to(latents.device, torch.float32)
    timesteps = noise_scheduler.timesteps[timestep_indices.cpu()].to(latents.device)
    sigma = sigmas.view(-1, 1, 1, 1)
    noisy_latents = latents + sigma * noise
    is_velocity = noise_scheduler.config.prediction_type == "v_prediction"
    if isinstance(noise_scheduler, EDMEulerScheduler):
        sigma_data = noise_scheduler.config.sigma_data
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = (-1 if is_velocity else 1) * sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        model_input = noise_scheduler.precondition_inputs(noisy_latents, sigma)
        return Task(noisy_latents, model_input, timesteps, latents, None, c_skip, c_out)
    if is_velocity:
        c_skip, c_out = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    else:
        c_skip, c_out = torch.ones_like(sigma), -sigma
    model_input = noisy_latents / (sigma**2 + 1) ** 0.5
    return Task(noisy_latents, model_input, timesteps, latents, sigmas**-2, c_skip, c_out)
