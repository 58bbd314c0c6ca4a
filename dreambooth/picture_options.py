"""Every flag of the scripts that make pictures: generate_class_images.py and infer.py.

Imports no torch: `--help` and every message about a wrong flag come at once.
"""

import dataclasses
from typing import Literal

from dreambooth.options import BaseModel
from dreambooth.rules import at_least, named, require, require_side


@dataclasses.dataclass
class ClassImageOptions:
    """All flags of generate_class_images.py."""

    base: BaseModel
    class_data_dir: str
    """Folder to fill."""
    class_prompt: str
    """Prompt of the class images."""
    num_class_images: int = 100
    """How many pictures there must be in the end."""
    sample_batch_size: int = 4
    """Pictures generated at once, per process. Part of what a set is: another number gives other pixels."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision; None is fp16 on a GPU and fp32 elsewhere, "no" is fp32."""
    class_guidance_scale: float = 7.5
    """Classifier-free guidance."""
    class_inference_steps: int = 50
    """Sampling steps."""
    seed: int = 0
    """Picture k depends on (seed, k) only."""
    resolution: int | None = None
    """Side of the pictures in pixels; None is the base's own."""
    num_threads: int | None = None
    """CPU threads; None leaves them to torch."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_class_images", "sample_batch_size", "class_inference_steps", "num_threads")
        at_least(self, 0, "class_guidance_scale", "seed")
        require(self.class_prompt.strip() != "", '--class_prompt must not be empty; for example "a photo of dog"')
        require_side("resolution", self.resolution)


@dataclasses.dataclass
class InferOptions:
    """All flags of infer.py."""

    base: BaseModel
    prompt: tuple[str, ...] = ()
    """One prompt or several."""
    prompts_file: str | None = None
    """Text file with a prompt on each line; empty lines and lines that start with # are left out."""
    adapter: str | None = None
    """Adapter file, or the output folder of a training run; None draws with the base alone."""
    compare: bool = False
    """Draw every picture with the base alone too, from the same noise, and show both side by side."""
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
        require(bool(self.prompt) != bool(self.prompts_file), "give either --prompt or --prompts_file")
        require(all(p.strip() for p in self.prompt), "--prompt must not be empty")
        require(bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds), f"--seeds must be numbers from 0 on, got {self.seeds}")
        named("adapter", self.adapter)
        named("prompts_file", self.prompts_file)
        require(not (self.compare and self.adapter is None), "--compare needs an --adapter to compare with the base")
        require_side("resolution", self.resolution)
