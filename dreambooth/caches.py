"""Latents computed once: the VAE's posterior of every photo whose crop never changes.

Kept are mean and standard deviation, not a sample: each visit still draws from the posterior, as training without a cache would.
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

    def latents(self, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
        return (self.mean + self.std * noise) * scaling_factor


@torch.no_grad()
def encode(vae: torch.nn.Module, pixel_values: torch.Tensor) -> Posterior:
    """The posterior of [B, 3, H, W] pixels in [-1, 1], one picture at a time: the same numbers whatever else is in the batch."""
    dists = [vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist for pixels in pixel_values]  # type: ignore[operator,union-attr]
    return Posterior(torch.cat([d.mean for d in dists]).float(), torch.cat([d.std for d in dists]).float())


def encode_photos(
    vae: torch.nn.Module, paths: Sequence[Path], resolution: int, interpolation: str, *, show_progress: bool, check: Callable[[], None]
) -> list[Posterior]:
    """The posterior, on the CPU, of every photo in its middle crop: each [1, channels, height, width]. `check` is called before each."""
    found = []
    for path in tqdm(paths, desc="encoding photos", unit="image", disable=not show_progress):
        check()
        posterior = encode(vae, photos.pixel_values(path, resolution, interpolation, None)[None])
        found.append(Posterior(posterior.mean.cpu(), posterior.std.cpu()))
    return found
