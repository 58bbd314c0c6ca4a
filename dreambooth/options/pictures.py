"""Every flag of the scripts that make pictures: generate_class_images.py and infer.py.

Imports no torch: `--help` and every message about a wrong flag come at once.
"""

import dataclasses
import math
from typing import Literal

from dreambooth.options.adapter_sets import LARGEST_WEIGHT
from dreambooth.options.photos import GenerationOptions
from dreambooth.options.rules import at_least, named, require, require_side
from dreambooth.options.training import BaseOptions


@dataclasses.dataclass
class ClassImageOptions:
    """All flags of generate_class_images.py."""

    base: BaseOptions
    class_data_dir: str
    """Folder to fill."""
    class_prompt: str
    """Prompt of the class images."""
    generation: GenerationOptions = dataclasses.field(default_factory=GenerationOptions)
    seed: int = 0
    """Picture k depends on (seed, k) only."""
    resolution: int | None = None
    """Side of the pictures in pixels; None is the base's own."""
    num_threads: int | None = None
    """CPU threads; None leaves them to torch."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_threads")
        at_least(self, 0, "seed")
        require(
            self.class_prompt.strip() != "", '--class_prompt must not be empty; for example "a photo of dog"'
        )
        require_side("resolution", self.resolution)


@dataclasses.dataclass
class InferOptions:
    """All flags of infer.py."""

    base: BaseOptions
    prompt: tuple[str, ...] = ()
    """One prompt or several."""
    prompts_file: str | None = None
    """Text file with a prompt on each line; empty lines and lines that start with # are left out."""
    adapter: tuple[str, ...] = ()
    """AdapterOptions files, or output folders of training runs, each with a weight if one is added: my_dog style.safetensors:0.6. One is drawn with, or
    all together: each adds its weight times what it alone changes. Of any kind and layout; none draws with the base alone. OFT, BOFT and HRA
    have no weights but 0 and 1."""
    adapter_weights: tuple[str, ...] = ()
    """Factors on the weights for parts of the models: unet=0.8,text_encoder=0.5,unet.up_blocks=1.2 for all adapters; with a name in front,
    my_dog:unet=0.8, for one. The longest part that fits a layer holds. Adapters have the names of their files, or of a run's folder."""
    adapters_file: str | None = None
    """YAML file with named sets of adapters, each drawn in its turn, without loading the base again. "dog: [my_dog, style.safetensors:0.6]", or
    a table with adapters, and if wanted weights (as --adapter_weights) and prompts of its own; a set without prompts is drawn with all of
    --prompt. "plain: []" is the base alone."""
    sweep: str | None = None
    """Draw with all weights times each of these numbers, side by side: 0,0.25,0.5,1. 0 is the base."""
    compare: bool = False
    """Draw every picture with the base alone too, from the same noise, and show both side by side."""
    fuse: Literal["auto", "yes", "no"] = "auto"
    """Work the adapters into the weights before drawing. "auto" does so where it is faster: for all kinds but plain LoRA, whose thin layers cost
    about 5 % (DoRA, LoHa, LoKr on all layers 60 to 150 %), and not in bf16, which rounds small changes away. Last bits differ. OFT, BOFT and
    HRA are always worked in."""
    output_dir: str = "pictures"
    """Folder of the pictures, their list (images.json) and the contact sheet."""
    seeds: tuple[int, ...] = (0,)
    """One picture per prompt and seed."""
    negative_prompt: str = ""
    """What to steer away from."""
    num_inference_steps: int = 25
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 is none."""
    clip_skip: int | None = None
    """Layers of the text encoder to leave out at its end; None is what the adapter was trained with, else 0."""
    resolution: int | None = None
    """Side of the pictures in pixels; None is the base's own."""
    batch_size: int = 4
    """Pictures drawn at once. On a CPU another number gives other last bits."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Arithmetic of the pipeline."""
    num_threads: int | None = None
    """CPU threads; None leaves them to torch."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_inference_steps", "batch_size", "num_threads")
        at_least(self, 0, "guidance_scale", "clip_skip")
        one = bool(self.prompt) != bool(self.prompts_file)  # sets in a file may have prompts of their own
        require(
            one or (self.adapters_file is not None and not self.prompt and not self.prompts_file),
            "give either --prompt or --prompts_file",
        )
        require(all(p.strip() for p in self.prompt), "--prompt must not be empty")
        require(
            bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds),
            f"--seeds must be numbers from 0 on, got {self.seeds}",
        )
        for adapter in self.adapter:
            named("adapter", adapter)
        named("prompts_file", self.prompts_file)
        named("adapters_file", self.adapters_file)
        require(not (self.adapter and self.adapters_file), "give either --adapter or --adapters_file")
        has_adapters = bool(self.adapter or self.adapters_file)
        require(has_adapters or not self.compare, "--compare needs an --adapter to compare with the base")
        require(has_adapters or self.sweep is None, "--sweep needs an --adapter whose weight it changes")
        require(
            has_adapters or self.fuse == "auto",
            "--fuse needs an --adapter to work into the weights, or to leave beside them",
        )
        weights = "--adapter_weights needs --adapter; in --adapters_file a set has `weights` of its own"
        require(bool(self.adapter) or not self.adapter_weights, weights)
        self.factors()
        require_side("resolution", self.resolution)

    def factors(self) -> tuple[float, ...]:
        """The numbers of --sweep; 1 alone without it."""
        if self.sweep is None:
            return (1.0,)
        found = []
        for word in self.sweep.split(","):
            try:
                found.append(float(word))
            except ValueError:
                found.append(math.nan)
        good = all(abs(number) <= LARGEST_WEIGHT for number in found) and len(set(found)) == len(found)
        require(
            good,
            f"--sweep must be different numbers from -{LARGEST_WEIGHT} to {LARGEST_WEIGHT} with commas between, got {self.sweep!r}",
        )
        return tuple(found)
