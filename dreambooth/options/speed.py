"""The flags on speed and memory: what is kept, where, and in how many bits. Imports no torch."""

import dataclasses
from typing import Literal

from dreambooth.options.rules import named, require_package


@dataclasses.dataclass
class SpeedOptions:
    """Speed and memory."""

    cache_latents: Literal["auto", "memory", "disk", "off"] = "auto"
    """Encode every photo once, and where to keep that: `memory`, `disk` (see --encoded_dir), `auto` is memory for up to 64 pictures, disk for
    more or where --encoded_dir is given. A crop that varies is then cut from the latents of the whole photo, in steps of the VAE's 8 pixels;
    `off` encodes each visit anew, in a crop that may begin at any pixel."""
    encoded_dir: str | None = None
    """Folder of what is kept on disk: latents and prompts, found again by their content. Runs may share one. None is `encoded` in the output
    folder."""
    compile: bool = False
    """Compile the UNet's blocks (torch.compile): a minute or more at the start, faster steps after. Other last bits. For GPUs: on a CPU the
    layers that it takes the place of are faster."""
    quantize_base: Literal["int8", "nf4"] | None = None
    """Keep the UNet's frozen layers in 8 bits (torchao package) or 4 (bitsandbytes package): less memory, slower steps, another result."""
    offload: bool = False
    """Keep what the backward pass needs in the computer's memory, not the GPU's: slower steps, the same result. GPUs only."""

    def __post_init__(self) -> None:
        named("encoded_dir", self.encoded_dir)
        for kind, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
            require_package(
                self.quantize_base == kind, f"--quantize_base {kind}", package, f"pip install '.[{package}]'"
            )
