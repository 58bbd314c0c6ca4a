"""Compiles the UNet's blocks one by one with torch.compile: fewer and larger kernels on a GPU, the same
weights and names."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from dreambooth.io.errors import UserError, reason_of

# Blocks of one class share compiled code if their shapes agree. By default torch silently stops compiling
# after 8 shapes.
_MOST_SHAPES = 128


def check(device: torch.device) -> None:
    """Raise UserError if nothing can be compiled for this device. A small function is compiled and run to
    find out."""
    try:
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda x: (x * 2).sin())(x).sum().backward()
    except Exception as error:  # the compiler's many parts raise anything
        reason = reason_of(error)
        raise UserError(
            f"--compile does not work here: {reason}; install a C++ compiler, or leave it out"
        ) from None


def compile_blocks(unet: torch.nn.Module) -> int:
    """Compile every residual and transformer block in place, for fixed shapes. Returns how many.

    Compilation itself happens in the first step, once for all blocks with the same code and shapes. Layers
    between the blocks are not compiled.
    """
    import torch._dynamo  # imported late, because it takes seconds

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
    """Within the block nothing compiled is run, if `wanted`. Drawing needs this: its shapes differ, and its
    adapters change."""
    if not wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
