"""The flags about pictures: the photos of the subject, and class images for prior preservation. Imports no torch."""

import dataclasses
from typing import Literal

from dreambooth.options.rules import at_least, named, require


@dataclasses.dataclass
class InstanceOptions:
    """The photos of the subject."""

    instance_prompt: str
    """Prompt of every instance photo that has no caption, with a rare word for the subject: "a photo of sks dog"."""
    instance_data_dir: str | None = None
    """Folder with the photos of the subject; this or --dataset_name."""
    dataset_name: str | None = None
    """A data set of photos instead: a folder (photos there or in its `train`), or a hub id, which needs the datasets package."""
    dataset_config_name: str | None = None
    """Configuration of the hub's data set."""
    cache_dir: str | None = None
    """Where the hub's data set is kept; None is the place that the datasets package has for it."""
    image_column: str = "image"
    """Column of the data set with the photos. In a folder's metadata.jsonl `image` is called `file_name`."""
    caption_column: str | None = None
    """Column of the data set, or of metadata.jsonl (or .csv) beside the photos, with a caption for each; a folder that has no such file is
    searched for a .txt file beside each photo. A photo with an empty caption gets --instance_prompt. None takes no captions."""
    caption_dropout: float = 0.0
    """Share of the visits of instance photos that are trained with the empty prompt."""
    repeats: int = 1
    """How many times a pass goes over every photo: it makes passes (see --num_train_epochs) longer."""
    resolution: int | None = None
    """Side of the square crop that is trained on, in pixels; a multiple of 8. None is 512, for Stable Diffusion XL 1024, for DeepFloyd IF 64."""
    center_crop: bool = False
    """Crop the middle; without it every visit of a photo that is not square draws a crop of its own."""
    random_flip: bool = False
    """Mirror half of the visits of instance photos. Not for faces and writing, whose sides differ."""
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = "lanczos"
    """How photos are resized to the resolution."""
    dataloader_num_workers: int = 0
    """Processes that load photos ahead, with --cache_latents off; 0 loads in the training process. The samples are the same either way."""
    max_image_pixels: int = 64_000_000
    """Largest picture taken, in pixels: a small file can unpack to gigabytes."""
    allow_odd_photos: bool = False
    """Take pictures with a side under 64 pixels."""
    follow_symlinks: bool = False
    """Take links to pictures outside the folder."""

    def __post_init__(self) -> None:
        side = self.resolution
        require(
            side is None or (side > 0 and side % 8 == 0),
            f"--resolution must be a positive multiple of 8, got {side}",
        )
        require(side is None or side <= 8192, f"--resolution must be at most 8192, got {side}")
        at_least(self, 0, "dataloader_num_workers")
        at_least(self, 1, "repeats")
        require(
            0 <= self.caption_dropout <= 1,
            f"--caption_dropout must be from 0 to 1, got {self.caption_dropout}",
        )
        one = (self.instance_data_dir is None) != (self.dataset_name is None)
        require(one, "Specify either --instance_data_dir or --dataset_name, and only one of them")
        for name in ("dataset_name", "dataset_config_name", "cache_dir", "caption_column", "image_column"):
            named(name, getattr(self, name))
        fits = 4096 <= self.max_image_pixels <= 178_000_000
        require(
            fits, f"--max_image_pixels must be from 4096 to 178000000, got {self.max_image_pixels}"
        )  # where Pillow itself gives up
        named("instance_data_dir", self.instance_data_dir)
        require(
            self.instance_prompt.strip() != "",
            '--instance_prompt must not be empty; for example "a photo of sks dog"',
        )


@dataclasses.dataclass
class GenerationOptions:
    """How class images are generated."""

    num_class_images: int = 100
    """Number of class images that the folder must hold; missing ones are generated."""
    sample_batch_size: int = 4
    """Class images generated at once, per process. Another number gives other pixels."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision of generating class images; "no" is fp32. Default: the precision of the class images already in the folder, else bf16 where
    the hardware computes in it (GPUs from Ampere on, CPUs with AVX-512 BF16 or AMX), else fp16 on a GPU and fp32 elsewhere."""
    class_guidance_scale: float = 7.5
    """Classifier-free guidance of class images."""
    class_inference_steps: int | None = None
    """Sampling steps of class images. Default: the number used for the class images already in the folder, else 25 for --class_scheduler dpm
    and 50 for base."""
    class_scheduler: Literal["dpm", "base"] | None = None
    """Sampler of class images: the multistep DPM solver (arXiv 2211.01095), or the base's own. Default: the sampler of the class images already
    in the folder, else dpm; for a base in pixels, or with an EDM scheduler, the base's own."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_class_images", "sample_batch_size", "class_inference_steps")
        at_least(self, 0, "class_guidance_scale")


@dataclasses.dataclass
class PriorOptions:
    """Prior preservation: pictures of the class, drawn by the base itself, keep it from forgetting the class (arXiv 2208.12242, eq. 2)."""

    with_prior_preservation: bool = False
    """Train on class images beside the instance images."""
    prior_loss_weight: float = 1.0
    """Weight of the class images' loss."""
    class_data_dir: str | None = None
    """Folder of class images; the missing ones are generated into it."""
    class_prompt: str | None = None
    """Prompt of the class images: the instance prompt without the rare word, "a photo of dog"."""
    generation: GenerationOptions = dataclasses.field(default_factory=GenerationOptions)
    class_seed: int | None = None
    """Seed of the class images; None takes that of the class images already there, else --seed, else 0."""

    def __post_init__(self) -> None:
        at_least(self, 0, "prior_loss_weight")
        if self.with_prior_preservation:
            require(
                self.class_data_dir is not None,
                "You must specify a data directory for class images: --class_data_dir",
            )
            require(
                bool(self.class_prompt and self.class_prompt.strip()),
                "You must specify prompt for class images: --class_prompt",
            )
