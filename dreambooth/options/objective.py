"""The flags of the training objective: loss, noise levels, noise. Imports no torch."""

import dataclasses
from typing import Annotated

from dreambooth.options.rules import Amount, AmountOverZero, Group, Range, is_default, require

TIMESTEPS = 1000  # --min_timestep and --max_timestep are in thousandths of a base's schedule


@dataclasses.dataclass
class NoiseLevelOptions(Group):
    """Noise levels that are trained."""

    min_timestep: Annotated[int, Range(0, TIMESTEPS)] = 0
    """Lowest timestep that is trained, of 1000: a higher one leaves out the lowest noise levels, which decide
    the texture."""
    max_timestep: Annotated[int, Range(0, TIMESTEPS)] = TIMESTEPS
    """End of the timesteps that are trained, of 1000, itself left out: a lower one leaves out the highest
    noise levels, which decide the layout."""
    timestep_bias: Annotated[float, Range(-10, 10)] = 0.0
    """Train high noise levels more often (over 0) or low ones (under 0): at 1 the frequency of a level rises
    from 0 in proportion to the timestep, at -1 it falls to 0. 0: all equally often."""

    @property
    def is_uniform(self) -> bool:
        """Whether all timesteps are trained equally often."""
        return all(is_default(self, field.name) for field in dataclasses.fields(self))

    def _check(self) -> None:
        require(
            self.min_timestep < self.max_timestep,
            f"--min_timestep must be under --max_timestep, got {self.min_timestep} and {self.max_timestep}",
        )


@dataclasses.dataclass
class ObjectiveOptions(Group):
    """Training objective."""

    snr_gamma: AmountOverZero | None = None
    """Min-SNR weighting (arXiv 2303.09556): errors at low noise levels get smaller weights; 5 is usual.
    Default: no weighting."""
    debiased_estimation: bool = False
    """Debiased weighting (arXiv 2310.08442): errors of the noise are divided by the root of the
    signal-to-noise ratio, and those of the velocity are weighted as the same errors of the noise."""
    huber_c: AmountOverZero | None = None
    """Pseudo-Huber loss (as in arXiv 2403.16728) in place of the squared error: errors far over this value
    count in proportion, not squared, so that odd photos weigh less. 0.1 is usual."""
    noise_offset: Amount = 0.0
    """Standard deviation of an offset that is added to the noise, one value per channel: the model then
    reaches darker and brighter pictures."""
    input_perturbation: Amount = 0.0
    """Standard deviation of further noise in the UNet's input, which is no part of the target (arXiv
    2301.11706); 0.1 is usual."""
    do_edm_style_training: bool = False
    """EDM-style training on continuous noise levels (arXiv 2206.00364). Always on for a base with an EDM
    scheduler."""
    noise_levels: NoiseLevelOptions = dataclasses.field(default_factory=NoiseLevelOptions)

    @property
    def snr_weighting(self) -> str | None:
        """The beginning of a message about the flag that weights noise levels; None without one."""
        if self.snr_gamma is not None:
            return "--snr_gamma: Min-SNR formulation"
        return "--debiased_estimation: debiased weighting" if self.debiased_estimation else None

    def _check(self) -> None:
        require(
            not (self.do_edm_style_training and self.snr_weighting),
            f"{self.snr_weighting} is not supported when conducting EDM-style training.",
        )
        require(
            not (self.debiased_estimation and self.snr_gamma is not None),
            "--debiased_estimation and --snr_gamma both weight noise levels: give one of them",
        )
