"""The options of generate_class_images.py and infer.py, and what infer.py and evaluate.py share. Imports no
torch."""

import dataclasses
import math
from typing import ClassVar, Literal

from dreambooth.options.adapter_sets import LARGEST_WEIGHT
from dreambooth.options.paths import FilePath, PathOrId
from dreambooth.options.photos import GenerationOptions
from dreambooth.options.rules import (
    Amount,
    BatchSize,
    CountOrZero,
    Group,
    Seed,
    Side,
    Steps,
    Threads,
    require,
    require_package,
)
from dreambooth.options.speed import GraphOptions
from dreambooth.options.training import BaseOptions


@dataclasses.dataclass
class ClassImageOptions(Group):
    """All flags of generate_class_images.py."""

    COMMON_FLAGS: ClassVar = (
        *("pretrained_model_name_or_path", "class_data_dir", "class_prompt", "num_class_images"),
        *("sample_batch_size", "prior_generation_precision", "class_inference_steps", "class_scheduler"),
        *("seed", "resolution"),
    )

    base: BaseOptions
    class_data_dir: FilePath
    """Folder for the class images."""
    class_prompt: str
    """Prompt of the class images."""
    generation: GenerationOptions = dataclasses.field(default_factory=GenerationOptions)
    seed: Seed = 0
    """Picture k depends on this seed and k alone."""
    resolution: Side | None = None
    """Side of the pictures, in pixels. Default: the base's resolution."""
    num_threads: Threads | None = None
    """CPU threads. Default: torch's choice."""
    speed: GraphOptions = dataclasses.field(default_factory=GraphOptions)

    def _check(self) -> None:
        require(
            self.class_prompt.strip() != "", '--class_prompt must not be empty; for example "a photo of dog"'
        )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn, with the defaults filled in."""

    num_inference_steps: int
    guidance_scale: float
    size: tuple[int, int] | None
    """(width, height) in pixels; None is the base's resolution."""


# Names of --scheduler. The last three are for adapters that were distilled to few steps.
SchedulerName = Literal[
    "ddim",
    "ddpm",
    "euler",
    "euler_a",
    "heun",
    "dpm++",
    "dpm++_karras",
    "dpm++_sde",
    "unipc",
    "lcm",
    "tcd",
    "lightning",
]
DISTILLED = ("lcm", "tcd", "lightning")


@dataclasses.dataclass
class DrawingOptions(Group):
    """Drawing: sampler, size and precision."""

    negative_prompt: str = ""
    """Negative prompt."""
    num_inference_steps: Steps | None = None
    """Sampling steps. Default: 25; with a scheduler for distilled adapters 4."""
    guidance_scale: Amount | None = None
    """Classifier-free guidance scale; 1 is no guidance. Default: 7.5; with a scheduler for distilled adapters
    1."""
    clip_skip: CountOrZero | None = None
    """Number of final layers of the text encoder to skip. Default: the number that the adapter was trained
    with, else 0. It is in the metadata of the adapter. kohya's ss_clip_skip counts one more (2 is 1 here),
    and is not read for Stable Diffusion XL."""
    resolution: Side | None = None
    """Side of the pictures, in pixels. Default: the base's resolution."""
    batch_size: BatchSize = 4
    """Pictures drawn at once. On a CPU, another number changes the last bits of pictures."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the pipeline."""
    fuse: Literal["auto", "yes", "no"] = "auto"
    """Add the adapters to the weights before drawing. "auto" fuses every kind but plain LoRA, whose layers
    cost about 5 % (DoRA, LoHa and LoKr on all layers cost 60 to 150 %), and never in bf16, which rounds small
    changes away. The last bits of pictures differ. OFT, BOFT and HRA are always fused."""

    def sampling(self, *, is_distilled: bool = False, size: tuple[int, int] | None = None) -> Sampling:
        """How pictures are drawn. `is_distilled` says whether the scheduler is for distilled adapters."""
        steps, guidance_scale = self.num_inference_steps, self.guidance_scale
        side = self.resolution
        return Sampling(
            (4 if is_distilled else 25) if steps is None else steps,
            (1.0 if is_distilled else 7.5) if guidance_scale is None else guidance_scale,
            size or (None if side is None else (side, side)),
        )


@dataclasses.dataclass
class InferOptions(Group):
    """All flags of infer.py."""

    COMMON_FLAGS: ClassVar = (
        *("pretrained_model_name_or_path", "prompt", "prompts_file", "adapter", "adapter_weights"),
        *("adapters_file", "sweep", "compare", "output_dir", "seeds", "negative_prompt"),
        *("num_inference_steps", "guidance_scale", "resolution", "batch_size", "mixed_precision"),
    )

    base: BaseOptions
    prompt: tuple[str, ...] = ()
    """One prompt or several."""
    prompts_file: FilePath | None = None
    """Text file with a prompt on each line. Empty lines and lines that start with # are skipped. Without
    --prompt_weights, prompts are plain words: weights, as in (word:1.4), are read as words, with a note."""
    adapter: tuple[PathOrId, ...] = ()
    """Adapter files, output folders of training runs or hub ids, each with an optional weight: my_dog
    style.safetensors:0.6. Several adapters are used together: the update of each is scaled by its weight, and
    the updates are added. Every kind and layout is accepted; OFT, BOFT and HRA have only the weights 0 and 1.
    Default: the base alone."""
    adapter_weights: tuple[str, ...] = ()
    """Factors on the weights for parts of the models: unet=0.8,text_encoder=0.5,unet.up_blocks=1.2 for all
    adapters; my_dog:unet=0.8 for the adapter my_dog. The longest part that matches a layer counts. An adapter
    is named after its file, or after the folder of its run."""
    adapters_file: FilePath | None = None
    """YAML file with named sets of adapters; the pictures are drawn with each set in turn, and the base is
    loaded once. "dog: [my_dog, style.safetensors:0.6]" is a set, and so is a table with `adapters` and,
    optionally, `weights` (as in --adapter_weights) and `prompts`. A set without prompts is drawn with every
    --prompt. "plain: []" is the base alone."""
    sweep: str | None = None
    """Draw with all weights multiplied by each of these numbers, side by side: 0,0.25,0.5,1. 0 is the
    base."""
    compare: bool = False
    """Draw every picture with the base alone too, from the same noise, side by side."""
    output_dir: FilePath = "pictures"
    """Folder for the pictures, their list (images.json) and the contact sheet."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds; every prompt is drawn once with each."""
    width: Side | None = None
    """Width of the pictures, in pixels. Default: --resolution."""
    height: Side | None = None
    """Height of the pictures, in pixels. Default: --resolution."""
    scheduler: SchedulerName | None = None
    """Sampler. lcm (LCM-LoRA), tcd (TCD, Hyper-SD) and lightning (SDXL-Lightning: Euler at trailing
    timesteps) are for distilled adapters, given as --adapter; with them the defaults are 4 steps and no
    guidance. Default: the base's own."""
    prompt_weights: bool = False
    """Read weights in prompts, (word:1.2), and take prompts of any length; needs the compel package."""
    num_threads: Threads | None = None
    """CPU threads. Default: torch's choice."""
    drawing: DrawingOptions = dataclasses.field(default_factory=DrawingOptions)
    speed: GraphOptions = dataclasses.field(default_factory=GraphOptions)

    def sampling(self, default_side: int) -> Sampling:
        """How pictures are drawn. `default_side` is the base's, in pixels."""
        side = self.drawing.resolution or default_side
        size = (self.width or side, self.height or side) if self.width or self.height else None
        return self.drawing.sampling(is_distilled=self.scheduler in DISTILLED, size=size)

    def _check(self) -> None:
        require_package(self.prompt_weights, "--prompt_weights", "compel", "pip install '.[weights]'")
        # the sets of --adapters_file may have all prompts
        is_optional = self.adapters_file is not None
        sources = bool(self.prompt) + bool(self.prompts_file)
        require(
            sources == 1 or (sources == 0 and is_optional),
            "give either --prompt or --prompts_file",
        )
        require(all(prompt.strip() for prompt in self.prompt), "--prompt must not be empty")
        require(bool(self.seeds), "--seeds must be numbers from 0 on, got none")
        require(not (self.adapter and self.adapters_file), "give either --adapter or --adapters_file")
        has_adapters = bool(self.adapter or self.adapters_file)
        require(has_adapters or not self.compare, "--compare needs an --adapter to compare with the base")
        require(has_adapters or self.sweep is None, "--sweep needs an --adapter whose weight it changes")
        require(
            has_adapters or self.drawing.fuse == "auto",
            "--fuse needs an --adapter that is fused, or not fused, with the weights",
        )
        require(
            bool(self.adapter) or not self.adapter_weights,
            "--adapter_weights needs --adapter; a set in --adapters_file has its own `weights`",
        )
        self.factors()

    def factors(self) -> tuple[float, ...]:
        """The numbers of --sweep; (1.0,) without it."""
        if self.sweep is None:
            return (1.0,)
        factors = []
        for word in self.sweep.split(","):
            try:
                factors.append(float(word))
            except ValueError:
                factors.append(math.nan)
        require(
            all(abs(factor) <= LARGEST_WEIGHT for factor in factors) and len(set(factors)) == len(factors),
            f"--sweep must be different numbers from -{LARGEST_WEIGHT} to {LARGEST_WEIGHT} "
            f"separated by commas, got {self.sweep!r}",
        )
        return tuple(factors)
