"""The VAE: encodes photos to the posterior of their latents, and scales latents for the UNet.

The cache holds mean and standard deviation of a photo's latents, not a sample. So every use of the photo
draws another sample, as in training without a cache. A base without a VAE works on pixels: the posterior's
mean is the pixels, its standard deviation 0.
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
        """Latents before scaling. `noise` is standard normal, in the shape of `mean`."""
        return self.mean + self.std * noise


def normalized(config: Mapping[str, Any] | None, latents: torch.Tensor) -> torch.Tensor:
    """Latents of the VAE in the scale of the UNet: times the scaling factor, or by mean and standard
    deviation of each channel where the VAE's config has them.

    `config` is the VAE's; None for a base without one.
    """
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
    """The posterior of [B, 3, H, W] pixels in [-1, 1].

    Pictures are encoded one at a time, so that the result does not depend on the others in the batch.
    """
    if vae is None:
        return Posterior(pixel_values, torch.zeros_like(pixel_values))
    # contiguous: a convolution's algorithm, and so the last bits, depend on the strides
    posteriors = [
        vae.encode(pixels.contiguous()[None].to(vae.device, vae.dtype)).latent_dist  # type: ignore[operator,union-attr]
        for pixels in pixel_values
    ]
    mean = torch.cat([posterior.mean for posterior in posteriors]).float()
    std = torch.cat([posterior.std for posterior in posteriors]).float()
    return Posterior(mean, std)
