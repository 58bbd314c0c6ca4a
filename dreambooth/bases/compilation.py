"""The UNet's blocks compiled, one by one, by torch.compile: fewer and larger kernels for a GPU, the same
weights and names."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from dreambooth.errors import UserError, reason_of

# Blocks of one class share compiled code as far as their shapes agree; torch gives up, without a word, after
# 8 different ones.
_MOST_SHAPES = 128


def check(device: torch.device) -> None:
    """Raise UserError if nothing can be compiled for this device: a small function is tried."""
    try:
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda x: (x * 2).sin())(x).sum().backward()
    except Exception as error:  # of the compiler's many parts, any
        reason = reason_of(error)
        raise UserError(
            f"--compile does not work here: {reason}; install a C++ compiler, or leave it out"
        ) from None


def compile_blocks(unet: torch.nn.Module) -> int:
    """Compile every residual and transformer block in place, for fixed shapes; how many. The work is done in
    the first step.

    Blocks alike but for their place are compiled once for each shape; what is between blocks stays as it
    is."""
    import torch._dynamo  # seconds, and nothing else needs it

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 8 * _MOST_SHAPES
    )
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock | ResnetBlock2D)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


@contextlib.contextmanager
def eager(*, wanted: bool) -> Iterator[None]:
    """Within the block nothing is compiled, if `wanted`: pictures have other shapes, and adapters put on and
    off."""
    if not wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
