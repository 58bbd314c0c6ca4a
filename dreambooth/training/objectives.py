"""What the UNet is asked, and what it should have answered: noise prediction, velocity, and EDM's denoising; Min-SNR weights.

`levels` are the noise levels of a batch, int64 [B] in 0..num_train_timesteps-1. All tensors are [B, C, h, w] and float32 where nothing else
is said.
"""

import dataclasses
from typing import TypeAlias

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

NoiseScheduler: TypeAlias = DDPMScheduler | EDMEulerScheduler | EulerDiscreteScheduler


@dataclasses.dataclass(frozen=True)
class Task:
    """One batch's question to the UNet: `model_input` and `timesteps` [B] go in; `prediction` of what comes out is to equal `target`, and its
    error counts `weights` [B] times (None: once)."""

    model_input: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    """EDM: prediction = skip * noisy latents + out * what comes out, [B, 1, 1, 1] both."""
    out: torch.Tensor | None = None
    noisy_latents: torch.Tensor | None = None

    def prediction(self, model_output: torch.Tensor) -> torch.Tensor:
        if self.out is None or self.skip is None or self.noisy_latents is None:
            return model_output
        return self.skip * self.noisy_latents + self.out * model_output.float()


def make_task(
    scheduler: NoiseScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
    *,
    snr_gamma: float | None = None,
) -> Task:
    """The task of denoising `latents` with `noise` added at `levels`, in the way of `scheduler`."""
    if isinstance(scheduler, DDPMScheduler):
        return _discrete(scheduler, latents, noise, levels, snr_gamma)
    return _continuous(scheduler, latents, noise, levels)


def _discrete(
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None,
) -> Task:
    """Noise (DDPM, arXiv 2006.11239, eq. 14) or velocity (arXiv 2202.00512, appendix D) is predicted from the noisy latents."""
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    weights = None if snr_gamma is None else min_snr_weights(scheduler, timesteps, snr_gamma)
    return Task(scheduler.add_noise(latents, noise, timesteps), timesteps, target, weights)


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """[B] (Min-SNR, arXiv 2303.09556, section 3.4): min(SNR, gamma) over SNR where noise is predicted, over SNR + 1 where velocity is."""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, and 1 where SNR is 0


def _continuous(
    scheduler: EDMEulerScheduler | EulerDiscreteScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
) -> Task:
    """The clean latents are predicted, at noise levels sigma (EDM, arXiv 2206.00364, section 5).

    An EDM scheduler has its own preconditioning and counts all errors alike, since its weights are unsteady in low precision; another one's
    model is read as a denoiser, its error counted 1 / sigma^2 times, which makes it that of the noise.
    """
    sigmas = scheduler.sigmas[levels.cpu()].to(latents.device, torch.float32)
    timesteps = scheduler.timesteps[levels.cpu()].to(latents.device)
    sigma = sigmas.view(-1, 1, 1, 1)
    noisy = latents + sigma * noise
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    if isinstance(scheduler, EDMEulerScheduler):
        data = scheduler.config.sigma_data
        out = (-1 if is_velocity else 1) * sigma * data / (sigma**2 + data**2) ** 0.5
        skip = data**2 / (sigma**2 + data**2)
        return Task(scheduler.precondition_inputs(noisy, sigma), timesteps, latents, None, skip, out, noisy)
    if is_velocity:
        skip, out = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    else:
        skip, out = torch.ones_like(sigma), -sigma
    return Task(noisy / (sigma**2 + 1) ** 0.5, timesteps, latents, sigmas**-2, skip, out, noisy)
