"""The flags of instance photos, and of class images for prior preservation. Imports no torch."""

import dataclasses
import os
from typing import Annotated, Literal

from dreambooth.io.errors import shortened, shown
from dreambooth.options.captions import CaptionOptions, kohya_folder
from dreambooth.options.masks import MaskOptions
from dreambooth.options.paths import FilePath, PathOrId
from dreambooth.options.rules import (
    Amount,
    BatchSize,
    Group,
    Name,
    Probability,
    Range,
    Seed,
    Sides,
    Steps,
    is_default,
    require,
    sides_of,
)

MOST_PIXELS = 1_000_000_000  # of a picture: unpacked, they are 3 GB


@dataclasses.dataclass
class InstanceOptions(Group):
    """Instance photos: the pictures of the subject."""

    instance_prompt: str = ""
    """Prompt of every instance photo without a caption; it holds a rare word for the subject: "a photo of sks
    dog". Needed, unless --instance_data_dir is a folder named as in kohya's scripts: "10_sks dog" is the
    prompt "sks dog" and --repeats 10."""
    instance_data_dir: FilePath | None = None
    """Folder with the photos of the subject. Either this or --dataset_name is needed."""
    subjects: FilePath | None = None
    """YAML file with several subjects of one adapter, in place of --instance_data_dir, --instance_prompt and
    --class_prompt. Each row has photos, prompt and class_prompt and, optionally, weight (factor of its loss),
    repeats (its share of the rows), captions (as --caption_column), masks (as --mask_dir) and
    validation_prompts. Prior preservation needs --prior_source base."""
    dataset_name: PathOrId | None = None
    """Data set with the photos: a folder (photos in it or in its `train`), or a hub id, which needs the
    datasets package."""
    dataset_config_name: Name | None = None
    """Configuration of the hub's data set."""
    cache_dir: FilePath | None = None
    """Folder in which the hub's data set is stored. Default: the folder of the datasets package."""
    image_column: Name = "image"
    """Column of the data set with the photos. In a folder's metadata.jsonl, `image` is the column
    `file_name`."""
    caption_column: Name | None = None
    """Column with a caption for each photo, in the data set or in metadata.jsonl (or .csv) beside the photos.
    Without such a file, the caption of a photo is read from the .txt or .caption file beside it. A photo with
    an empty caption gets --instance_prompt. Default: no captions."""
    caption_dropout: Probability = 0.0
    """Probability of replacing an instance caption with the empty prompt."""
    captions: CaptionOptions = dataclasses.field(default_factory=CaptionOptions)
    repeats: Annotated[int, Range(1, 10**6)] = 1
    """Number of times that one pass (see --num_train_epochs) visits every photo."""
    resolution: Sides | None = None
    """Side of the square training crop, in pixels; a multiple of 8. Several (512,768) need --buckets.
    Default: 512; 1024 for Stable Diffusion XL; 64 for DeepFloyd IF."""
    buckets: bool = False
    """Cut each photo to a shape near its own, of at most the area of the square. A batch has one shape, and
    class images are cut to it. With several values of --resolution photos take turns in all of them, and
    validation pictures have the first. A photo that is small for a resolution gets a smaller shape."""
    masks: MaskOptions = dataclasses.field(default_factory=MaskOptions)
    center_crop: bool = False
    """Crop the center. Without this flag, every visit of a photo that is not square draws a random crop."""
    random_flip: bool = False
    """Mirror the photo in half of the visits. Unsuitable for faces and text, which are not symmetric."""
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = "lanczos"
    """Interpolation that resizes photos to the resolution."""
    dataloader_num_workers: Annotated[int, Range(0, 128)] = 0
    """Processes that load photos ahead with --cache_latents off; 0 loads in the training process. The samples
    are the same."""
    max_image_pixels: Annotated[int, Range(4096, MOST_PIXELS)] = 64_000_000
    """Largest accepted picture, in pixels: a small file can decompress to gigabytes."""
    allow_odd_photos: bool = False
    """Accept pictures with a side under 64 pixels."""
    follow_symlinks: bool = False
    """Accept links to pictures outside the folder."""

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides in --resolution; () without the flag."""
        return () if self.resolution is None else sides_of(self.resolution)

    def _check(self) -> None:
        require(
            self.buckets or "," not in str(self.resolution),
            f"--resolution {shortened(str(self.resolution))}: several resolutions need --buckets; "
            "add it, or give one resolution",
        )
        if self.subjects is not None:
            self._check_subjects()
            return
        is_one = (self.instance_data_dir is None) != (self.dataset_name is None)
        require(is_one, "Specify either --instance_data_dir or --dataset_name, and only one of them")
        self._check_masks()
        self._adopt_folder_name()
        require(
            self.instance_prompt.strip() != "",
            '--instance_prompt must not be empty, it is required; for example "a photo of sks dog"',
        )
        sources = [
            f"--{name}"
            for group, name in (
                (self, "caption_column"),
                (self.captions, "caption_extension"),
                (self.captions, "in_json"),
            )
            if getattr(group, name) is not None
        ]
        require(len(sources) < 2, f"{' and '.join(sources)} both name captions: give one of them")
        require(
            self.captions.trigger_word is None or self.reads_captions,
            "--trigger_word is put before captions: give --caption_column, --caption_extension or --in_json; "
            "without captions, put the word into --instance_prompt",
        )
        require(
            "," not in (self.captions.trigger_word or ""),
            f"--trigger_word must have no comma, which parts tags; write its words without it, got "
            f"{shown(self.captions.trigger_word)!r}",
        )

    def _check_masks(self) -> None:
        given = self.masks.given_for_masks()
        require(
            self.masks.is_given or not given,
            f"{', '.join(given)}: for photos with masks; give --mask_dir or --alpha_mask, or leave it out",
        )
        folders = [folder for folder in (self.instance_data_dir, self.masks.mask_dir) if folder]
        places = {os.path.realpath(folder) for folder in folders if "\0" not in folder}
        require(
            len(folders) < 2 or len(places) > 1,
            f"--mask_dir and --instance_data_dir must be two folders, got {shown(self.masks.mask_dir)} for "
            "both",
        )

    def _check_subjects(self) -> None:
        """Require that the flags of one subject are left out."""
        in_rows: list[tuple[Group, str, str]] = [
            (self, "instance_data_dir", "photos"),
            (self, "instance_prompt", "prompt"),
            (self, "caption_column", "captions"),
            (self, "repeats", "repeats"),
            (self.masks, "mask_dir", "masks"),
        ]
        for group, name, key in in_rows:
            require(
                is_default(group, name),
                f"--{name} is for one subject, and --subjects names several: leave it out, and give each "
                f"row of that file its {key}",
            )
        of_one: list[tuple[Group, str]] = [(self, "dataset_name")]
        of_one += [(self.captions, name) for name in ("caption_extension", "in_json", "trigger_word")]
        given = [f"--{name}" for group, name in of_one if not is_default(group, name)]
        require(
            not given,
            f"{', '.join(given)}: for one subject, and --subjects names several: leave it out",
        )

    @property
    def reads_captions(self) -> bool:
        """Whether photos have captions of their own."""
        wanted = self.captions
        return bool(self.caption_column or wanted.caption_extension or wanted.in_json)

    @property
    def is_named_by_folder(self) -> bool:
        """Whether prompt and repeats are those in the name of --instance_data_dir."""
        return kohya_folder(self.instance_data_dir) == (self.repeats, self.instance_prompt)

    def _adopt_folder_name(self) -> None:
        """Take the prompt, and the repeats if they are not given, from the name of --instance_data_dir."""
        named = None if self.instance_prompt else kohya_folder(self.instance_data_dir)
        if named is not None:
            repeats, self.instance_prompt = named
            if is_default(self, "repeats"):
                self.repeats = repeats


@dataclasses.dataclass
class GenerationOptions(Group):
    """Generation of class images."""

    num_class_images: Annotated[int, Range(1, 10**6)] = 100
    """Number of class images in the folder; missing ones are generated."""
    sample_batch_size: BatchSize = 4
    """Class images generated at once, per process. Another number gives other pixels."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision of the generation; "no" is fp32. Default: the precision of the class images in the folder;
    without any, bf16 where the hardware computes in it (GPUs from Ampere on, CPUs with AVX-512 BF16 or AMX),
    else fp16 on a GPU and fp32 elsewhere."""
    class_guidance_scale: Amount = 7.5
    """Classifier-free guidance scale."""
    class_inference_steps: Steps | None = None
    """Sampling steps. Default: the steps of the class images in the folder; without any, 25 for
    --class_scheduler dpm and 50 for base."""
    class_scheduler: Literal["dpm", "base"] | None = None
    """Sampler: the multistep DPM solver (arXiv 2211.01095), or the base's sampler. Default: the sampler of
    the class images in the folder; without any, dpm, but base for a base in pixels or with an EDM
    scheduler."""


@dataclasses.dataclass
class PriorOptions(Group):
    """Prior preservation: class images keep the base from forgetting the class (arXiv 2208.12242, eq. 2)."""

    with_prior_preservation: bool = False
    """Train on class images beside the instance photos; see also --prior_source."""
    prior_source: Literal["images", "base"] = "images"
    """What keeps the class. `images`: class images, which the base draws before training. `base`: the target
    of the class prompt is the base's own prediction on noised photos of the subject; no class images are
    needed. If --class_data_dir is given, its pictures are noised instead; missing ones are not generated."""
    prior_loss_weight: Amount = 1.0
    """Weight of the class images' loss."""
    class_data_dir: FilePath | None = None
    """Folder of class images; missing ones are generated."""
    class_prompt: str | None = None
    """Prompt of the class images: the instance prompt without the rare word, "a photo of dog"."""
    generation: GenerationOptions = dataclasses.field(default_factory=GenerationOptions)
    class_seed: Seed | None = None
    """Seed of the class images. Default: the seed of the class images in the folder, else --seed, else 0."""

    @property
    def draws_class_images(self) -> bool:
        """Whether missing class images are drawn before training."""
        return self.with_prior_preservation and self.prior_source == "images"

    @property
    def has_base_targets(self) -> bool:
        """Whether the base's own predictions are the targets of the class prompt."""
        return self.with_prior_preservation and self.prior_source == "base"

    def _check(self) -> None:
        if self.with_prior_preservation:
            require(
                self.class_data_dir is not None or self.prior_source == "base",
                "You must specify a data directory for class images: --class_data_dir "
                "(--prior_source base needs none)",
            )
