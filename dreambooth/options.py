"""Every flag of every script: its meaning, its default and its checks.

Groups of flags are dataclasses; the docstring under a field is its help text, and a group is what functions take. Names and defaults of
the training flags are those of Hugging Face diffusers' `train_dreambooth_lora.py`, so its command lines work here unchanged.
This module imports no torch: `--help` and every message about a wrong flag come at once.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

from dreambooth.printable import shown

EXIT_USAGE = 2  # wrong flags or bad input, found before any slow work


# The rules broken so far while a command line is read; None outside of that.
_broken: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("broken", default=None)


@contextlib.contextmanager
def broken_rules() -> Iterator[list[str]]:
    """Within the block, a group that breaks a rule adds a line to this list and goes on: all wrong flags come in one message."""
    broken: list[str] = []
    token = _broken.set(broken)
    try:
        yield broken
    finally:
        _broken.reset(token)


def _require(condition: bool, message: str) -> None:
    """Raise ValueError unless `condition`; within `broken_rules` note it down."""
    if condition:
        return
    broken = _broken.get()
    if broken is None:
        raise ValueError(message)
    broken.append(message)


def _named(flag: str, value: str | None) -> None:
    """A file, folder or hub id. "" would be the folder that the script is started in."""
    _require(value is None or (value.strip() != "" and "\0" not in value), f"--{flag} must be the name of a file or folder, got {value!r}")


def _at_least(group: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None:
            _require(math.isfinite(value) and value >= minimum, f"--{name} must be at least {minimum}, got {value}")


@dataclasses.dataclass
class BaseModel:
    """The frozen base model."""

    pretrained_model_name_or_path: str
    """Folder or hub id of the base: Stable Diffusion 1.x or 2.x. `picturebook/model` is the embedded one."""
    revision: str | None = None
    """Hub revision (branch, tag or commit), for every part of the base."""
    variant: str | None = None
    """Weight files to prefer, e.g. fp16 for `*.fp16.safetensors`."""
    tokenizer_name: str | None = None
    """Folder or hub id of a tokenizer to use instead of the base's."""

    def __post_init__(self) -> None:
        _named("pretrained_model_name_or_path", self.pretrained_model_name_or_path)
        _named("tokenizer_name", self.tokenizer_name)
        fits = self.variant is None or re.fullmatch(r"[A-Za-z0-9_-]+", self.variant) is not None  # it becomes part of a file name
        _require(fits, f"--variant must be letters and digits, as in fp16, got {self.variant!r}")


@dataclasses.dataclass
class InstanceData:
    """The photos of the subject."""

    instance_data_dir: str
    """Folder with the photos of the subject."""
    instance_prompt: str
    """Prompt of every instance photo, with a rare word for the subject: "a photo of sks dog"."""
    resolution: int = 512
    """Side of the square crop that is trained on, in pixels; a multiple of 8."""
    center_crop: bool = False
    """Crop the middle; without it every visit of a photo that is not square draws a crop of its own."""
    image_interpolation_mode: Literal["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "lanczos"
    """How photos are resized to the resolution."""
    dataloader_num_workers: int = 0
    """Processes that load photos ahead; 0 loads in the training process. The samples are the same either way."""
    max_image_pixels: int = 64_000_000
    """Largest picture taken, in pixels: a small file can unpack to gigabytes."""
    allow_odd_photos: bool = False
    """Take pictures with a side under 64 pixels, or more than 3 times as long as wide."""
    follow_symlinks: bool = False
    """Take links to pictures outside the folder."""

    def __post_init__(self) -> None:
        _require(self.resolution > 0 and self.resolution % 8 == 0, f"--resolution must be a positive multiple of 8, got {self.resolution}")
        _at_least(self, 0, "dataloader_num_workers")
        _require(self.resolution <= 8192, f"--resolution must be at most 8192, got {self.resolution}")
        fits = 4096 <= self.max_image_pixels <= 178_000_000
        _require(fits, f"--max_image_pixels must be from 4096 to 178000000, got {self.max_image_pixels}")  # where Pillow itself gives up
        _named("instance_data_dir", self.instance_data_dir)
        _require(self.instance_prompt.strip() != "", '--instance_prompt must not be empty; for example "a photo of sks dog"')


@dataclasses.dataclass
class PriorPreservation:
    """Prior preservation: pictures of the class, drawn by the base itself, keep it from forgetting the class (arXiv 2208.12242, eq. 2)."""

    with_prior_preservation: bool = False
    """Train on class images beside the instance images."""
    prior_loss_weight: float = 1.0
    """Weight of the class images' loss."""
    class_data_dir: str | None = None
    """Folder of class images; the missing ones are generated into it."""
    class_prompt: str | None = None
    """Prompt of the class images: the instance prompt without the rare word, "a photo of dog"."""
    num_class_images: int = 100
    """How many class images there must be."""
    sample_batch_size: int = 4
    """Class images generated at once, per process. Part of what a set of class images is: another number gives other pixels."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision of generating class images; None is that of the ones already there, else fp16 on a GPU and fp32 elsewhere; "no" is fp32."""
    class_guidance_scale: float = 7.5
    """Classifier-free guidance of class images."""
    class_inference_steps: int = 50
    """Sampling steps of class images."""
    class_seed: int | None = None
    """Seed of the class images; None takes that of the class images already there, else --seed, else 0."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "prior_loss_weight", "class_guidance_scale")
        _at_least(self, 1, "num_class_images", "sample_batch_size", "class_inference_steps")
        if self.with_prior_preservation:
            _require(self.class_data_dir is not None, "You must specify a data directory for class images: --class_data_dir")
            _require(bool(self.class_prompt and self.class_prompt.strip()), "You must specify prompt for class images: --class_prompt")


@dataclasses.dataclass
class TextEncoding:
    """The text encoder."""

    train_text_encoder: bool = False
    """Train LoRA on the text encoder too."""
    pre_compute_text_embeddings: bool = False
    """Encode the prompts once and free the text encoder. Always so when it is not trained; kept for old command lines."""
    tokenizer_max_length: int | None = None
    """Tokens that prompts are padded to; None takes what the text encoder has room for."""
    text_encoder_use_attention_mask: bool = False
    """Hide the padding from the text encoder. Not how Stable Diffusion's was trained, nor how pipelines call it."""

    def __post_init__(self) -> None:
        _at_least(self, 3, "tokenizer_max_length")
        both = self.train_text_encoder and self.pre_compute_text_embeddings
        _require(not both, "--train_text_encoder cannot be used with --pre_compute_text_embeddings")


@dataclasses.dataclass
class Adapter:
    """The LoRA that is trained."""

    rank: int = 4
    """Rank of the update matrices; alpha is the same, so the scale is 1."""
    lora_dropout: float = 0.0
    """Dropout on the input of the update matrices, in training."""
    init_adapter: str | None = None
    """Adapter file, or a folder with one, to start from: a finished run, or a checkpoint of the reference script."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")
        _require(self.rank <= 1024, f"--rank must be at most 1024, got {self.rank}")
        _named("init_adapter", self.init_adapter)
        _require(0 <= self.lora_dropout < 1, f"--lora_dropout must be in [0, 1), got {self.lora_dropout}")


@dataclasses.dataclass
class Optimization:
    """The optimizer and its learning rate."""

    learning_rate: float = 5e-4
    """Learning rate, of UNet and text encoder alike."""
    scale_lr: bool = False
    """Multiply the learning rate by gradient accumulation x batch size x processes."""
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = "constant"
    """Course of the learning rate."""
    lr_warmup_steps: int = 500
    """Steps over which the learning rate rises from 0 (not for `constant`)."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of polynomial."""
    use_8bit_adam: bool = False
    """AdamW with 8-bit moments, from the bitsandbytes package."""
    adam_beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of Adam's mean of squared gradients."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Added to Adam's denominator."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, over UNet and text encoder together; 0 leaves them as they are."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "learning_rate", "lr_warmup_steps", "lr_power", "adam_weight_decay", "adam_epsilon", "max_grad_norm")
        _at_least(self, 1, "lr_num_cycles")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"--{name} must be in [0, 1), got {getattr(self, name)}")
        _require_package(self.use_8bit_adam, "--use_8bit_adam", "bitsandbytes", "pip install '.[bitsandbytes]'")


@dataclasses.dataclass
class Run:
    """How long, where and with what arithmetic."""

    output_dir: str = "lora-dreambooth-model"
    """Folder of the adapter, checkpoints, logs and validation pictures."""
    seed: int | None = None
    """Every random choice follows from it; None draws one, prints it and stores it in run.yaml."""
    train_batch_size: int = 4
    """Instance photos in one forward pass, per process (as many class images on top with prior preservation)."""
    num_train_epochs: int = 1
    """Passes over the photos, or the class images if they are more, when --max_train_steps is not given."""
    max_train_steps: int | None = None
    """Optimizer steps; overrides --num_train_epochs."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimizer step, per process."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same result."""
    checkpointing_steps: int = 500
    """Steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; the oldest go once a newer one is safe. None keeps all."""
    resume_from_checkpoint: str | None = None
    """`latest` (or `auto`), `checkpoint-N` or a path: go on from there. Not with --use_8bit_adam, whose moments are not stored."""
    overwrite: bool = False
    """Remove what an earlier run left in the output folder (checkpoints, adapter, metrics, validation pictures) and start anew."""
    allow_data_change: bool = False
    """Resume although photos or class images are not those that the checkpoint was trained on."""
    max_train_minutes: float | None = None
    """Stop after so many minutes, with a checkpoint and exit status 75; start again with --resume_from_checkpoint latest to go on."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Arithmetic of the frozen weights; None takes `accelerate`'s setting. The adapter is float32 always."""
    num_threads: int | None = None
    """CPU threads; None leaves them to torch. On a CPU another number gives other last bits."""
    gradient_sync: Literal["exact", "ddp"] = "exact"
    """Sum of the processes' gradients: `exact` adds them in a fixed order, so that any process count gives the same bits; `ddp` adds them
    once a step in an order of the backend's own, which moves less data and gives the same up to rounding."""
    peer_timeout: float = 600.0
    """Seconds that a process waits for the others within a step before it gives up."""
    allow_tf32: bool = False
    """TF32 matrix products on Ampere and later GPUs."""
    enable_xformers_memory_efficient_attention: bool = False
    """Attention by the xformers package instead of torch's own."""
    local_rank: int = -1
    """Set by old distributed launchers; taken over as LOCAL_RANK where that is not set."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "train_batch_size", "num_train_epochs", "max_train_steps", "gradient_accumulation_steps")
        _at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit", "num_threads", "peer_timeout")
        _at_least(self, 0, "seed", "max_train_minutes")
        _require(
            not (self.overwrite and self.resume_from_checkpoint),
            "--overwrite starts anew and --resume_from_checkpoint goes on: give one of them",
        )
        wanted = self.enable_xformers_memory_efficient_attention
        _require_package(wanted, "--enable_xformers_memory_efficient_attention", "xformers", "install the build for your torch")


@dataclasses.dataclass
class Validation:
    """Pictures along the way."""

    validation_prompt: str | None = None
    """Prompt of the validation pictures; None makes none."""
    num_validation_images: int = 4
    """Pictures at each validation."""
    validation_epochs: int = 50
    """Passes (as in --num_train_epochs) between validations; the first comes after the first pass."""
    validation_images: tuple[str, ...] | None = None
    """First-stage pictures to validate a second-stage model with. No base of this version takes them: refused."""
    class_labels_conditioning: str | None = None
    """`timesteps` for second-stage models. No base of this version takes it: refused."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_validation_images", "validation_epochs")
        _require(self.validation_prompt is None or self.validation_prompt.strip() != "", "--validation_prompt must not be empty")
        why = "is for second-stage (super-resolution) bases, which this version does not train: leave it out"
        _require(self.validation_images is None, f"--validation_images {why}")
        _require(self.class_labels_conditioning is None, f"--class_labels_conditioning {why}")


@dataclasses.dataclass
class Reports:
    """Logs and uploads. metrics.jsonl is always written."""

    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = "tensorboard"
    """Tracker: left out with a note when tensorboard, the default, is not installed."""
    logging_dir: str = "logs"
    """Folder of the tracker's logs, under the output folder."""
    push_to_hub: bool = False
    """Upload the result to the hub. Not in this version: refused."""
    hub_token: str | None = None
    """Token for --push_to_hub. Not in this version: refused."""
    hub_model_id: str | None = None
    """Repository for --push_to_hub. Not in this version: refused."""

    def __post_init__(self) -> None:
        for name in ("push_to_hub", "hub_token", "hub_model_id"):
            why = "uploading is not in this version; `hf upload` sends a finished output folder"
            _require(not getattr(self, name), f"--{name} cannot work: {why}")
        for tracker, extra in (("wandb", "wandb"), ("comet_ml", "comet")):
            _require_package(self.report_to == tracker, f"--report_to {tracker}", tracker, f"pip install '.[{extra}]'")


def _require_package(wanted: bool, flag: str, package: str, install: str) -> None:
    if wanted:
        found = importlib.util.find_spec(package) is not None
        _require(found, f"{flag} needs the {package} package, which is not installed: {install}")


@dataclasses.dataclass
class TrainOptions:
    """All flags of train_dreambooth_lora.py."""

    base: BaseModel
    instance: InstanceData
    prior: PriorPreservation = dataclasses.field(default_factory=PriorPreservation)
    text: TextEncoding = dataclasses.field(default_factory=TextEncoding)
    adapter: Adapter = dataclasses.field(default_factory=Adapter)
    optimization: Optimization = dataclasses.field(default_factory=Optimization)
    run: Run = dataclasses.field(default_factory=Run)
    validation: Validation = dataclasses.field(default_factory=Validation)
    reports: Reports = dataclasses.field(default_factory=Reports)

    def __post_init__(self) -> None:
        both = self.optimization.use_8bit_adam and self.run.resume_from_checkpoint is not None
        _require(not both, "--use_8bit_adam cannot be used with --resume_from_checkpoint: its moments are not stored in a form that can be read back")
        prior = self.prior
        folders = [os.path.realpath(folder) for folder in (self.instance.instance_data_dir, prior.class_data_dir) if folder and "\0" not in folder]
        same = prior.with_prior_preservation and len(folders) == 2 and folders[0] == folders[1]
        _require(not same, f"--class_data_dir and --instance_data_dir must be two folders, got {shown(prior.class_data_dir)} for both")

    def notes(self) -> list[str]:
        """What is odd about the flags but no error."""
        notes = []
        prior = self.prior
        if not prior.with_prior_preservation:
            for name in ("class_data_dir", "class_prompt"):
                if getattr(prior, name):
                    notes.append(f"You need not use --{name} without --with_prior_preservation.")
        elif prior.class_prompt and prior.class_prompt.strip() == self.instance.instance_prompt.strip():
            notes.append("--class_prompt equals --instance_prompt: the subject has no word of its own, and the class is pulled both ways.")
        return notes


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
        _at_least(self, 1, "num_class_images", "sample_batch_size", "class_inference_steps", "num_threads")
        _at_least(self, 0, "class_guidance_scale", "seed")
        _require(self.class_prompt.strip() != "", '--class_prompt must not be empty; for example "a photo of dog"')
        _require_side("resolution", self.resolution)


def _require_side(name: str, value: int | None) -> None:
    _require(value is None or (value > 0 and value % 8 == 0), f"--{name} must be a positive multiple of 8, got {value}")


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
    resolution: int | None = None
    """Side of the pictures in pixels; None is the base's own."""
    batch_size: int = 4
    """Pictures drawn at once. On a CPU another number gives other last bits."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Arithmetic of the pipeline."""
    num_threads: int | None = None
    """CPU threads; None leaves them to torch."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_inference_steps", "batch_size", "num_threads")
        _at_least(self, 0, "guidance_scale")
        _require(bool(self.prompt) != bool(self.prompts_file), "give either --prompt or --prompts_file")
        _require(all(p.strip() for p in self.prompt), "--prompt must not be empty")
        _require(bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds), f"--seeds must be numbers from 0 on, got {self.seeds}")
        _named("adapter", self.adapter)
        _named("prompts_file", self.prompts_file)
        _require(not (self.compare and self.adapter is None), "--compare needs an --adapter to compare with the base")
        _require_side("resolution", self.resolution)
