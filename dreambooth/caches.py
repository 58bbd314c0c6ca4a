"""Latents computed once: the VAE's posterior of every photo whose crop never changes.

Kept are mean and standard deviation, not a sample: each visit still draws from the posterior, as training without a cache would. A base
without a VAE works on the pixels themselves: a posterior without spread.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dreambooth import photos


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Mean and standard deviation of the latents, float32 [..., channels, height, width] before scaling."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        return self.mean + self.std * noise


def normalized(vae: torch.nn.Module | None, latents: torch.Tensor) -> torch.Tensor:
    """The VAE's latents as the UNet knows them: times the scaling factor, or by mean and deviation of each channel where the VAE states them."""
    if vae is None:
        return latents
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return latents * config.scaling_factor  # type: ignore[operator,union-attr]
    shape = (1, -1, 1, 1)
    center, spread = (torch.tensor(value).view(shape).to(latents) for value in (mean, std))
    return (latents - center) * config.scaling_factor / spread  # type: ignore[operator,union-attr]


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
    """The posterior of [B, 3, H, W] pixels in [-1, 1], one picture at a time: the same numbers whatever else is in the batch."""
    if vae is None:
        return Posterior(pixel_values, torch.zeros_like(pixel_values))
    dists = [vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist for pixels in pixel_values]  # type: ignore[operator,union-attr]
    return Posterior(torch.cat([d.mean for d in dists]).float(), torch.cat([d.std for d in dists]).float())


def encode_photos(
    vae: torch.nn.Module | None,
    pictures: Sequence[tuple[Path, bool]],
    resolution: int,
    interpolation: str,
    *,
    show_progress: bool,
    check: Callable[[], None],
) -> list[Posterior]:
    """The posterior, on the CPU, of every (photo, whether mirrored) in its middle crop: each [1, channels, height, width]. `check` is called
    before each."""
    found = []
    for path, is_mirrored in tqdm(pictures, desc="encoding photos", unit="image", disable=not show_progress):
        check()
        posterior = encode(vae, photos.pixel_values(path, resolution, interpolation, is_mirrored=is_mirrored)[None])
        found.append(Posterior(posterior.mean.cpu(), posterior.std.cpu()))
    return found
