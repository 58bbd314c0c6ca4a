"""The flags of speed and memory. Imports no torch."""

import dataclasses
from typing import Literal

from dreambooth.options.paths import FilePath
from dreambooth.options.rules import Group, require_package


@dataclasses.dataclass
class GraphOptions(Group):
    """Speed."""

    cuda_graph: Literal["auto", "off"] = "auto"
    """Record the kernels of a step once, as CUDA graphs, and replay them: the same bits, and several times as
    fast where the GPU waits for the host. `auto` does so on CUDA GPUs; a note says where it is not possible.
    `off` launches each kernel."""


@dataclasses.dataclass
class SpeedOptions(GraphOptions):
    """Speed and memory."""

    cache_latents: Literal["auto", "memory", "disk", "off"] = "auto"
    """Encode every photo once, and keep the latents in `memory` or on `disk` (see --encoded_dir). `auto` is
    disk for more than 64 pictures or if --encoded_dir is given, else memory. Random crops are then cut from
    the latents of the whole photo, in steps of the VAE's 8 pixels. `off` encodes every visit of a photo; its
    crop may begin at any pixel."""
    encoded_dir: FilePath | None = None
    """Folder for latents and prompt embeddings on disk; its files are named by content. Runs may share it.
    Default: `encoded` in the output folder."""
    compile: bool = False
    """Compile the UNet's blocks (torch.compile): the first step takes a minute or more, later steps are
    faster. It pays in runs of thousands of steps that are replayed (see --cuda_graph). The last bits of
    results change."""
    quantize_base: Literal["int8", "nf4"] | None = None
    """Keep the UNet's frozen layers in 8 bits (torchao package) or 4 bits (bitsandbytes package): less
    memory, slower steps, another result."""
    offload: bool = False
    """Keep activations for the backward pass in the computer's memory instead of the GPU's: slower steps, the
    same result. Only works on GPUs."""

    def _check(self) -> None:
        for kind, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
            require_package(
                self.quantize_base == kind, f"--quantize_base {kind}", package, f"pip install '.[{package}]'"
            )
