"""Compiles the UNet's blocks one by one with torch.compile: fewer and larger kernels on a GPU, the same
weights and names."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from dreambooth.io.errors import UserError, reason_of, shown

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


def note(device: torch.device, *, is_recorded: bool) -> str:
    """What compiling costs and when it pays, for the user. `is_recorded` says whether steps are replayed from
    a CUDA graph. The figures were measured on an H200, see docs/speed.md."""
    if device.type == "cpu":
        return "--compile is for GPUs: on a CPU it compiles for minutes, and steps are hardly faster"
    if not is_recorded:
        return (
            "--compile hardly pays where steps are not replayed from a CUDA graph: launched blocks were"
            " slower compiled than plain on an H200"
        )
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return (
        "--compile takes a minute or more in the first step, less where the compiler's cache holds blocks of"
        f" an earlier run ({shown(cache_dir())}; TORCHINDUCTOR_CACHE_DIR names another folder). With Stable"
        " Diffusion 1.5 on an H200 it took some 60 s, and a bare step 19 ms in place of 26: it pays from"
        " 8,600 steps"
    )


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
