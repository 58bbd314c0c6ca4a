"""Factors of 1 that cost no kernel.

diffusers divides the output of every attention and residual block by a factor, and peft multiplies every
update by a scale. Mostly both are 1: each then costs a kernel in the forward pass and one in the backward
pass, which change no bit.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D


class _Unit:
    """The number 1 as a factor or divisor of a tensor. The result is the tensor itself, not a copy."""

    def __rmul__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def __rtruediv__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


UNIT: Any = _Unit()


def skip_divisions(unet: torch.nn.Module) -> None:
    """Divide no output of a block by 1. torch.compile cannot trace the divisor that is put in its place."""
    for block in unet.modules():
        if isinstance(block, Attention) and block.rescale_output_factor == 1:
            block.rescale_output_factor = UNIT
        elif isinstance(block, ResnetBlock2D) and block.output_scale_factor == 1:
            block.output_scale_factor = UNIT
