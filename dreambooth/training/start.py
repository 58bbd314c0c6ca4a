"""The record that `prepare` returns: everything that training starts from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dreambooth.bases import families
from dreambooth.data.batches import PhotoRows, Share, Source
from dreambooth.data.buckets import Buckets
from dreambooth.data.crops import Crops
from dreambooth.data.masks import Mask
from dreambooth.files import checkpoint_folders
from dreambooth.io.errors import shown
from dreambooth.options import paths
from dreambooth.options.command_line import as_table, fields_of, without_token, yaml_text
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.options.training import TrainOptions, pictures_of_pass
from dreambooth.runtime import memory
from dreambooth.runtime.processes import Peers
from dreambooth.training import judging, run_folder, trackers
from dreambooth.training.checks import AdapterState, Cache

_ROWS_SHOWN = 4  # rows whose prompts are printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A checked run before its models are loaded. Every default in `options` is filled in."""

    options: ResolvedTrainOptions
    peers: Peers
    base: families.Base
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    sources: list[Source]
    """Instance photos; then, with prior preservation, what is trained with the class prompt: class images, or
    the photos again."""
    validation_prompts: list[str]
    """Prompts of the validation pictures; [] if none are drawn."""
    judge_plan: judging.Plan | None
    """What is judged, and with which prompts; None without judges."""
    judging: judging.Judging | None
    """The judges, on the main process; None on the others."""
    held_out: Source
    """Photos of the subject that are not trained on; there may be none."""
    masks: Mapping[str, Mask]
    """The masks of the instance photos by `Source.names`; photos without masks are left out."""
    crops: Crops
    buckets: Buckets | None
    """With --buckets, how the shapes of photos are chosen."""
    cache: Cache
    """Where latents and prompt embeddings are stored."""
    init_adapter: AdapterState
    """Tensors of --init_adapter; empty without the flag."""
    checkpoint: checkpoint_folders.Content | None
    """The checkpoint to resume from; None for a new run."""
    continues_folder: bool
    """Whether the checkpoint is one of --output_dir."""
    identity: dict[str, Any]
    """The record that identifies the run in run.json and in every checkpoint."""
    status: run_folder.Status
    environment: dict[str, Any]
    """Device, library versions, threads: they change the last bits of the result."""
    phases: dict[str, memory.Reading]
    """Time and memory at the end of each phase so far. Loading adds its own."""
    repository: str | None
    """OWNER/NAME of the hub's repository for the result; None for no upload."""

    def steps(self) -> tuple[int, int]:
        """(steps of one pass, steps of the run)."""
        counts = [source.rows_of_pass for source in self.sources]
        pictures = pictures_of_pass(counts, repeats=self.options.instance.repeats)
        return self.options.run.steps(pictures, self.peers.world)

    @property
    def base_prompts(self) -> list[str]:
        """The prompts for which the base's own predictions are targets, once each; [] without --prior_source
        base and --unmasked_target base."""
        instance, *others = self.sources
        sources = others if self.options.prior.has_base_targets else []
        sources = [instance, *sources] if self.options.instance.masks.has_base_targets else sources
        return list(dict.fromkeys(prompt for source in sources for prompt in source.distinct_prompts()))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the frozen models."""
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        return dtypes.get(self.options.run.mixed_precision, torch.float32)

    def photo_rows(self) -> PhotoRows:
        """The rows that the run trains on."""
        run = self.options.run
        return PhotoRows(self.sources, run.seed, self.crops, self.buckets, run.train_batch_size)

    @property
    def measured_prompts(self) -> list[str]:
        """The prompts, beside those of `sources`, that --meter_steps measures with; [] without the flag."""
        if not self.options.meter.meter_steps:
            return []
        of_subjects = [prompt for share in self.shares for prompt in (share.prompt, share.class_prompt)]
        class_prompt = self.options.prior.class_prompt
        return [*self.held_out.prompts, *of_subjects, *([class_prompt] if class_prompt else [])]

    @property
    def shares(self) -> tuple[Share, ...]:
        """The subjects of --subjects; () without the flag."""
        return self.sources[0].shares

    @property
    def output_dir(self) -> Path:
        return Path(self.options.run.output_dir)

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of the run by name, without the hub token and without flags of one start (--overwrite)."""
        return without_token(as_table(self.options.without_start_flags()))

    @property
    def named_flags(self) -> dict[str, Any]:
        """`flags`, with the prompts of all subjects of --subjects as instance_prompt and class_prompt."""
        if not self.shares:
            return self.flags
        prompts, classes = ([getattr(s, name) for s in self.shares] for name in ("prompt", "class_prompt"))
        return {
            **self.flags,
            "instance_prompt": "; ".join(prompts),
            "class_prompt": "; ".join(dict.fromkeys(classes)),
        }

    def first_prompts(self, rows: int) -> list[tuple[str, str]]:
        """(name of the photo, prompt) of the first rows of instance photos; [] if all have
        --instance_prompt."""
        instance = self.options.instance
        if not (instance.reads_captions or instance.captions.varies or instance.subjects):
            return []
        dataset = self.photo_rows()
        return [dataset.named_prompt(self.sources[0], row) for row in range(rows)]

    def say_prompts(self) -> None:
        """Print how many prompts there are if tags vary, and the prompts of the first rows if not all are
        --instance_prompt."""
        source = self.sources[0]
        if self.options.instance.captions.varies:
            varying = sum(prompt in source.variants for prompt in source.prompts)
            encoded = f"{len(source.distinct_prompts())} different prompts are encoded"
            self.peers.say_notes([f"the tags of {varying} of {len(source.prompts)} prompts vary: {encoded}"])
        if rows := self.first_prompts(_ROWS_SHOWN):
            lines = [
                f"  row {row}: {shown(name)}: {shown(prompt)!r}" for row, (name, prompt) in enumerate(rows)
            ]
            self.peers.say("\n".join(["prompts of the first rows:", *lines]))

    def begin_folder(self) -> None:
        """Write run.json and run.yaml on the main process, and start the trackers with the run's options."""
        accelerator = self.peers.accelerator
        if self.peers.is_main:
            run_folder.begin(
                self.output_dir,
                self.identity,
                yaml_text(paths.absolute(self.flags, fields_of(TrainOptions))),
                is_resumed=self.continues_folder,
                overwrite=self.options.run.overwrite,
            )
        self.peers.barrier()
        if accelerator.log_with:
            accelerator.init_trackers(trackers.PROJECT, config=without_token(as_table(self.options)))
