"""Latents: the VAE's posterior of pictures, and its scale.

What is kept of a picture is mean and standard deviation, not a sample: each visit still draws from the
posterior, as training without a cache would. A base without a VAE works on the pixels themselves: a posterior
without spread.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Mean and standard deviation of the latents, float32 [..., channels, height, width] before scaling."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        return self.mean + self.std * noise


def normalized(config: Mapping[str, Any] | None, latents: torch.Tensor) -> torch.Tensor:
    """The VAE's latents as the UNet knows them: times the scaling factor, or by mean and deviation of each
    channel where the VAE states them. `config` is the VAE's; None for a base without one."""
    if config is None:
        return latents
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents * config["scaling_factor"]
    shape = (1, -1, 1, 1)
    center, spread = (torch.tensor(value).view(shape).to(latents) for value in (mean, std))
    return (latents - center) * config["scaling_factor"] / spread


def denormalized(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalized`."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return latents / config.scaling_factor  # type: ignore[operator,union-attr]
    shape = (1, -1, 1, 1)
    center, spread = (torch.tensor(value).view(shape).to(latents) for value in (mean, std))
    return latents * spread / config.scaling_factor + center  # type: ignore[operator,union-attr]


@torch.no_grad()
def encode(vae: torch.nn.Module | None, pixel_values: torch.Tensor) -> Posterior:
    """The posterior of [B, 3, H, W] pixels in [-1, 1], one picture at a time: the same numbers whatever else
    is in the batch."""
    if vae is None:
        return Posterior(pixel_values, torch.zeros_like(pixel_values))
    # strides choose among a convolution's ways to compute, which differ in their last bits
    dists = [
        vae.encode(pixels.contiguous()[None].to(vae.device, vae.dtype)).latent_dist  # type: ignore[operator,union-attr]
        for pixels in pixel_values
    ]
    return Posterior(torch.cat([d.mean for d in dists]).float(), torch.cat([d.std for d in dists]).float())
