"""The options of the training script: every flag's default, help text and checks.

A group of flags is a dataclass. Its docstring is the heading in --help, and the docstring under a field is
the flag's help text. Names and defaults are those of Hugging Face diffusers' `train_dreambooth_lora.py` and
`train_dreambooth_lora_sdxl.py`, so their command lines work here unchanged. Where the two scripts have
different defaults, the default here is None, and `resolved.resolve` fills in that of the base's family.

Imports no torch: --help and messages about wrong flags are printed at once.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from dreambooth.io.errors import shown
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.evaluation import JudgeOptions, MeterOptions
from dreambooth.options.objective import ObjectiveOptions
from dreambooth.options.optimizer import OptimizerOptions
from dreambooth.options.paths import FilePath, PathInOutput, PathOrId
from dreambooth.options.photos import InstanceOptions, PriorOptions
from dreambooth.options.reports import ReportOptions, ValidationOptions
from dreambooth.options.rules import (
    Amount,
    BatchSize,
    Count,
    CountOrZero,
    Group,
    Name,
    Range,
    Seed,
    Threads,
    is_default,
    require,
    require_package,
)
from dreambooth.options.speed import SpeedOptions

# Flags that have no effect without another flag.
_OF_VALIDATION = (
    *("num_validation_images", "validation_epochs", "validation_steps", "validation_scheduler"),
    "skip_final_inference",
)
_OF_PRIOR = ("class_data_dir", "prior_loss_weight", "prior_source")
_OF_GENERATION = ("num_class_images", "class_guidance_scale", "class_inference_steps", "class_scheduler")
_OF_TEXT_ADAPTER = ("text_encoder_rank", "text_encoder_alpha", "text_encoder_dropout", "text_encoder_layers")
_DROPOUTS = ("lora_dropout", "text_encoder_dropout", "rank_dropout", "module_dropout")
_OF_PRODIGY = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")


@dataclasses.dataclass
class BaseOptions(Group):
    """Base model: its weights stay frozen."""

    pretrained_model_name_or_path: PathOrId
    """Folder or hub id of the base: Stable Diffusion 1.x, 2.x or XL (also a .safetensors file), or the first
    stage of DeepFloyd IF. `picturebook/model` is the embedded one."""
    pretrained_vae_model_name_or_path: PathOrId | None = None
    """Folder, single .safetensors file or hub id of a VAE that replaces the base's VAE."""
    revision: Name | None = None
    """Hub revision (branch, tag or commit) of every part of the base."""
    variant: str | None = None
    """Preferred weight files: fp16 prefers `*.fp16.safetensors`, for each part of the base that has them. Of
    a single file with two UNets, ema takes the averaged one."""
    tokenizer_name: PathOrId | None = None
    """Folder or hub id of a tokenizer that replaces the base's (first) tokenizer."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """Prediction type of the base, if its scheduler's configuration is wrong."""

    def _check(self) -> None:
        # the variant becomes part of a file name
        is_valid = self.variant is None or re.fullmatch(r"[A-Za-z0-9_-]+", self.variant) is not None
        require(is_valid, f"--variant must be letters and digits, as in fp16, got {self.variant!r}")

    def name(self) -> str:
        """The hub id, or the name of the folder without its path, which is no concern of others."""
        path = self.pretrained_model_name_or_path
        return os.path.basename(os.path.abspath(path)) if os.path.exists(path) else path

    def sources(self) -> dict[str, str | None]:
        """By flag, the folders or hub ids that the base is read from; None for a flag that is not given."""
        names = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "tokenizer_name")
        return {f"--{name}": getattr(self, name) for name in names}


@dataclasses.dataclass
class TextOptions(Group):
    """Text encoder."""

    train_text_encoder: bool = False
    """Train an adapter on the text encoder too (on both, if the base has two)."""
    train_text_encoder_frac: Annotated[float, Range(0, 1, over=True)] = 1.0
    """Fraction of the run in which the text encoder is trained, over 0. Afterwards the prompts are encoded
    once more, and the text encoder is freed."""
    clip_skip: CountOrZero | None = None
    """Number of final layers of the text encoder to skip. Stable Diffusion XL always skips one; this number
    is added."""
    pre_compute_text_embeddings: bool = False
    """Encode the prompts once and free the text encoder. This is always done if the text encoder is not
    trained; the flag is kept for old command lines."""
    tokenizer_max_length: Annotated[int, Range(3, 4096)] | None = None
    """Length in tokens to which prompts are padded. Default: the maximum length of the text encoder."""
    text_encoder_use_attention_mask: bool = False
    """Mask the padding tokens in the text encoder. For DeepFloyd IF they are always masked. Stable Diffusion
    was trained without the mask, and its pipelines draw without it."""

    def _check(self) -> None:
        both = self.train_text_encoder and self.pre_compute_text_embeddings
        require(not both, "--train_text_encoder cannot be used with --pre_compute_text_embeddings")


@dataclasses.dataclass
class RunOptions(Group):
    """Run: length, output folder, precision."""

    output_dir: FilePath = "lora-dreambooth-model"
    """Folder for the adapter, checkpoints, logs and validation pictures."""
    estimate: bool = False
    """Take three steps, one validation and one checkpoint in a temporary folder, print what the whole run
    will take (time, memory, disk, how often each photo is seen), and stop."""
    runs: FilePath | None = None
    """YAML file of many runs: for each a name and a table of its flags, which override those of the command
    line. Each run is trained in the folder of its name in --output_dir, one after another; the base is loaded
    once. Started again, the command goes on with what is not finished. `runs.html` compares the runs."""
    run_number: Count | None = None
    """Train only this run of --runs, counted from 1: for the tasks of a job array."""
    seed: Seed | None = None
    """Seed of every random choice. Default: a seed is drawn, printed and stored in run.yaml."""
    train_batch_size: BatchSize = 4
    """Instance photos in one forward pass, per process. Prior preservation adds as many class images."""
    num_train_epochs: Count = 1
    """Passes over the photos (over the class images, if they are more); used without --max_train_steps."""
    max_train_steps: Count | None = None
    """Number of optimizer steps; overrides --num_train_epochs."""
    gradient_accumulation_steps: Annotated[int, Range(1, 10**6)] = 1
    """Forward and backward passes per optimizer step, per process."""
    auto_batch: bool = False
    """Give each forward and backward pass as many rows as memory has room for: at first all rows of an
    optimizer step (--train_batch_size x --gradient_accumulation_steps), then half as many each time memory
    runs out, and at last one with --gradient_checkpointing. The gradients are the same up to rounding. Does
    not work with dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same result."""
    checkpointing_steps: Count = 500
    """Steps between checkpoints."""
    checkpoints_total_limit: Count | None = None
    """Number of checkpoints to keep; the oldest is removed once a newer one is complete. Default: keep
    all."""
    resume_from_checkpoint: PathInOutput | None = None
    """Checkpoint to resume from: `latest` (or `auto`), `checkpoint-N` or a path."""
    overwrite: bool = False
    """Remove an earlier run from the output folder (checkpoints, adapter, metrics, validation pictures) and
    start again."""
    allow_data_change: bool = False
    """Resume even if photos or class images differ from those that the checkpoint was trained on."""
    max_train_minutes: Amount | None = None
    """Stop after this many minutes, with a checkpoint and exit status 75. --resume_from_checkpoint latest
    continues the run."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen weights and of the arithmetic. The adapter's weights are always float32.
    Default: the setting of `accelerate`."""
    num_threads: Threads | None = None
    """CPU threads. Default: torch's choice. On a CPU, another number changes the last bits of results."""
    gradient_sync: Literal["exact", "ddp"] = "exact"
    """How gradients of processes are summed. `exact` adds them in a fixed order: every number of processes
    gives the same bits. `ddp` adds them once a step in the backend's order: it moves less data, and the
    result is the same up to rounding."""
    peer_timeout: Annotated[float, Range(1, 10**6)] = 600.0
    """Seconds that a process waits for the other processes within a step before it fails."""
    allow_tf32: bool = False
    """TF32 matrix products on Ampere and later GPUs."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use the attention of the xformers package instead of torch's."""
    local_rank: Annotated[int, Range(-1, 2**16)] = -1
    """Set by old distributed launchers. Used as LOCAL_RANK if that is not set."""

    def _check(self) -> None:
        require(self.run_number is None or self.runs is not None, "--run_number needs --runs")
        require(
            not (self.overwrite and self.resume_from_checkpoint),
            "--overwrite starts anew and --resume_from_checkpoint goes on: give one of them",
        )
        wanted = self.enable_xformers_memory_efficient_attention
        require_package(
            wanted,
            "--enable_xformers_memory_efficient_attention",
            "xformers",
            "install the build for your torch",
        )

    def steps(self, pictures: int, world: int) -> tuple[int, int]:
        """(steps of one pass, steps of the run) with `pictures` in a pass, on `world` processes."""
        batches = math.ceil(pictures / (self.train_batch_size * world))
        per_pass = math.ceil(batches / self.gradient_accumulation_steps)
        return per_pass, self.max_train_steps or self.num_train_epochs * per_pass


def pictures_of_pass(counts: Sequence[int], repeats: int) -> int:
    """Pictures in one pass: every photo `repeats` times, or every class image once if that is more.

    `counts` are of photos and, with prior preservation, of class images.
    """
    return max(counts[0] * repeats, *counts[1:], 1)


@dataclasses.dataclass
class TrainOptions(Group):
    """All flags of train_dreambooth_lora.py."""

    COMMON_FLAGS: ClassVar = (
        *("pretrained_model_name_or_path", "instance_prompt", "instance_data_dir", "resolution"),
        *("buckets", "mask_dir", "subjects", "auto_batch"),
        *("with_prior_preservation", "prior_source", "class_data_dir", "class_prompt", "num_class_images"),
        *("train_text_encoder", "rank", "learning_rate", "lr_scheduler"),
        *("output_dir", "seed", "train_batch_size", "max_train_steps", "gradient_accumulation_steps"),
        *("gradient_checkpointing", "checkpointing_steps", "resume_from_checkpoint", "mixed_precision"),
        *("validation_prompt", "validation_prompts_file", "meter_steps", "holdout"),
        *("report_to", "push_to_hub"),
    )

    base: BaseOptions
    instance: InstanceOptions
    prior: PriorOptions = dataclasses.field(default_factory=PriorOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)
    adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    optimization: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    objective: ObjectiveOptions = dataclasses.field(default_factory=ObjectiveOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    speed: SpeedOptions = dataclasses.field(default_factory=SpeedOptions)
    validation: ValidationOptions = dataclasses.field(default_factory=ValidationOptions)
    meter: MeterOptions = dataclasses.field(default_factory=MeterOptions)
    judges: JudgeOptions = dataclasses.field(default_factory=JudgeOptions)
    reports: ReportOptions = dataclasses.field(default_factory=ReportOptions)

    def _check(self) -> None:
        require(
            self.optimization.optimizer != "prodigy" or not any(self.adapter.learning_rates.values()),
            "--lr_pattern: --optimizer prodigy has one step size for all parts; "
            "the only learning rate that a part may have is 0",
        )
        require(
            self.optimization.lora_plus_ratio is None
            or (self.adapter.adapter == "lora" and self.optimization.optimizer != "prodigy"),
            "--lora_plus_ratio is for the two factors of --adapter lora; --optimizer prodigy has one step "
            "size for all parts",
        )
        for name in _OF_TEXT_ADAPTER:
            is_given = getattr(self.adapter, name) is not None
            require(not is_given or self.text.train_text_encoder, f"--{name} needs --train_text_encoder")
        require(
            not self.judges.is_given or self.validation.has_prompts,
            "--judge_dino, --judge_clip and --judge_reader need validation pictures: give --validation_prompt"
            " or --validation_prompts_file",
        )
        self._check_subjects()
        is_table = self.instance.subjects is not None
        has_class_prompt = is_table or bool(self.prior.class_prompt and self.prior.class_prompt.strip())
        require(
            not self.judges.is_given or has_class_prompt,
            "judges compare pictures of the subject with those of its class: give --class_prompt, for example"
            ' "a photo of dog"',
        )
        require(
            not self.meter.meter_steps or has_class_prompt,
            "--meter_steps compares the prompt of the subject with that of its class: give --class_prompt, "
            'for example "a photo of dog"',
        )
        require(
            not (self.adapter.dry_run and self.run.estimate),
            "--dry_run prints without loading weights and --estimate measures: give one of them",
        )
        dropouts = [name for name in _DROPOUTS if getattr(self.adapter, name)]
        require(
            not self.run.auto_batch or not dropouts,
            f"--auto_batch does not work with --{' and --'.join(dropouts)}: what is dropped depends on the "
            "rows of a pass; leave out one of them",
        )
        self._check_folders()

    @property
    def uses_class_prompt(self) -> bool:
        """Whether --class_prompt has an effect."""
        is_measured = self.meter.meter_steps > 0 or self.judges.is_given
        return self.prior.with_prior_preservation or is_measured

    def _check_subjects(self) -> None:
        """Check the flags that do not go with --subjects."""
        if self.instance.subjects is None:
            require(
                not self.prior.with_prior_preservation
                or bool(self.prior.class_prompt and self.prior.class_prompt.strip()),
                "You must specify prompt for class images: --class_prompt",
            )
            return
        given = [
            f"--{name}" for name in ("class_prompt", "class_data_dir") if not is_default(self.prior, name)
        ]
        given += ["--holdout_data_dir"] if self.meter.holdout_data_dir else []
        require(
            not given,
            f"{', '.join(given)}: for one subject, and --subjects names several: leave it out"
            + (" (--holdout N holds out N photos of each)" if self.meter.holdout_data_dir else ""),
        )
        require(
            not self.prior.with_prior_preservation or self.prior.prior_source == "base",
            "--with_prior_preservation with --subjects needs --prior_source base: there are no class images",
        )
        require(
            not self.judges.is_given,
            "--judge_dino, --judge_clip and --judge_reader compare pictures with the photos of one subject: "
            "leave them out with --subjects, and give --meter_steps, which measures each subject",
        )

    def _check_folders(self) -> None:
        if not self.prior.with_prior_preservation:
            return
        folders = [
            os.path.realpath(folder)
            for folder in (self.instance.instance_data_dir, self.prior.class_data_dir)
            if folder and "\0" not in folder
        ]
        require(
            len(folders) < 2 or folders[0] != folders[1],
            "--class_data_dir and --instance_data_dir must be two folders, "
            f"got {shown(self.prior.class_data_dir)} for both",
        )

    def notes(self) -> list[str]:
        """Notes on flags that are allowed but probably a mistake."""
        notes = []
        prior, instance = self.prior, self.instance
        if instance.is_named_by_folder:
            notes.append(
                f"by the folder's name --instance_prompt is {shown(instance.instance_prompt)} and --repeats "
                f"{instance.repeats}"
            )
        if (
            prior.with_prior_preservation
            and prior.class_prompt
            and prior.class_prompt.strip() == instance.instance_prompt.strip()
        ):
            notes.append(
                "--class_prompt equals --instance_prompt: no rare word stands for the subject, "
                "and instance photos and class images train the same prompt."
            )
        is_same = (prior.class_prompt or "").strip() == instance.instance_prompt.strip()
        if self.meter.meter_steps and instance.subjects is None and is_same:
            notes.append(
                "--class_prompt equals --instance_prompt: binding, which compares them, is always 0."
            )
        is_held_out = self.meter.holdout or self.meter.holdout_data_dir
        if self.meter.meter_steps and not is_held_out:
            notes.append(
                "no photo is held out (--holdout, --holdout_data_dir): --meter_steps measures binding on "
                "photos that are trained on, where it also grows by copying, and does not measure copying"
            )
        return [*notes, *self._flags_without_effect(), *self._optimizer_notes()]

    def _flags_without_effect(self) -> list[str]:
        """A note for every flag that was given without the flag that it needs."""
        trains_text = self.text.train_text_encoder, "--train_text_encoder"
        draws = self.validation.has_prompts, "--validation_prompt"
        uses_prior = self.prior.with_prior_preservation, "--with_prior_preservation"
        is_base = self.prior.has_base_targets
        draws_classes = self.prior.draws_class_images, "--prior_source images" if is_base else uses_prior[1]
        uses_class_prompt = self.uses_class_prompt, "--with_prior_preservation, --meter_steps or a judge"
        is_prodigy = self.optimization.optimizer == "prodigy", "--optimizer prodigy"
        is_data_set = self.instance.dataset_name is not None, "--dataset_name"
        return [
            f"You need not use --{name} without {needed}."
            for group, names, (is_given, needed) in (
                (self.optimization, ("text_encoder_lr", "adam_weight_decay_text_encoder"), trains_text),
                (self.text, ("train_text_encoder_frac",), trains_text),
                (self.validation, _OF_VALIDATION, draws),
                (self.prior, _OF_PRIOR, uses_prior),
                (self.prior, ("class_prompt",), uses_class_prompt),
                (self.prior, ("class_seed",), draws_classes),
                (self.prior.generation, _OF_GENERATION, draws_classes),
                (self.optimization, _OF_PRODIGY, is_prodigy),
                (self.instance, ("cache_dir", "dataset_config_name"), is_data_set),
            )
            for name in names
            if not is_given and not is_default(group, name)
        ]

    def _optimizer_notes(self) -> list[str]:
        notes, optimizer = [], self.optimization
        rate = optimizer.learning_rate or 1.0
        is_prodigy = optimizer.optimizer == "prodigy"
        if is_prodigy and self.text.train_text_encoder and optimizer.text_encoder_lr not in (None, rate):
            notes.append(
                "Prodigy has one step size for all parameters: "
                "the text encoder is trained with --learning_rate, not --text_encoder_lr."
            )
        if optimizer.optimizer == "adafactor":
            notes.append("Adafactor does not use --adam_beta1, --adam_beta2 and --adam_epsilon.")
        if is_prodigy and rate <= 0.1:
            notes.append(
                f"--learning_rate {optimizer.learning_rate} is small for Prodigy, "
                "which multiplies its own step size by it; 1 is usual"
            )
        return notes

    def text_steps(self, max_steps: int) -> int:
        """Steps in which the text encoder is trained, of a run of `max_steps`."""
        return max(1, round(self.text.train_text_encoder_frac * max_steps))

    def without_start_flags(self) -> Self:
        """The options, with the flags that apply to one start of the run at their defaults."""
        run = dataclasses.replace(
            self.run, overwrite=False, allow_data_change=False, resume_from_checkpoint=None, local_rank=-1
        )
        return dataclasses.replace(self, run=run)
