"""Before training: check the input (run_input.py), lock the output folder, fill in all options, generate
class images.

No model that is trained is loaded here. Mistakes in flags, photos, base, prompts or output folder are
reported before any slow work, and before anything is written.
"""

import contextlib
import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dreambooth.bases import loading
from dreambooth.data import class_images
from dreambooth.data.batches import PhotoRows, Source
from dreambooth.data.buckets import Buckets
from dreambooth.data.crops import Crops
from dreambooth.data.decode_cache import DecodeCache
from dreambooth.files import checkpoint_folders
from dreambooth.io.errors import UserError, shown
from dreambooth.options.command_line import as_table
from dreambooth.options.resolved import ResolvedPriorOptions, ResolvedTrainOptions, resolve
from dreambooth.options.training import TrainOptions, pictures_of_pass
from dreambooth.runtime import memory
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch, memory_errors_explained, write_errors_explained
from dreambooth.training import (
    adapter_targets,
    checks,
    class_sources,
    judging,
    output_folder,
    rates,
    run_folder,
    run_identity,
)
from dreambooth.training.run_input import CheckedBase, Input, check_input
from dreambooth.training.start import Start
from dreambooth.training.subjects import Subjects


def prepare(options: TrainOptions, watch: Watch, stack: contextlib.ExitStack) -> Start | None:
    """Prepare all that a run needs before its models are loaded. --dry_run prints its table: then None.
    `stack` receives the lock of the output folder and the writer of status.json. Raises UserError for a
    mistake that the user can correct."""
    phases: dict[str, memory.Reading] = {"imports": memory.reading(torch.device("cpu"))}
    given = check_input(options, watch)
    peers, checked, cache, decoded = given.peers, given.checked, given.cache, given.decoded
    if options.adapter.dry_run:
        peers.say(adapter_targets.table(checked.base, options.adapter, options.text))
        return None
    peers.say_notes(cache.notes)

    # output folder
    claim = output_folder.claim(
        options.run, cache, peers, stack, output_folder.logs_dir(options, given.log_with)
    )
    run = name_run(given.joined(claim.checkpoint.identity if claim.checkpoint else None), given, claim)
    instance = given.subject.source(run.options.run.seed)
    run, judges = check_run(run, instance, peers)  # before the minutes that class images may take
    status = stack.enter_context(
        run_folder.recorded(given.output_dir, claim.first_step, is_main=peers.is_main)
    )
    stack.enter_context(write_errors_explained())
    stack.enter_context(memory_errors_explained())
    phases["checks"] = memory.reading(peers.accelerator.device)

    # class images
    sources = [instance, *(given.priors or make_class_images(run, decoded, peers, watch, phases))]
    save_decoded(decoded if cache.mode == "disk" else None, peers)
    record = run.record(sources)
    peers.say_notes(peers.on_main(lambda: run.check(record)))
    return Start(
        options=run.options,
        peers=peers,
        base=checked.base,
        tokenizers=checked.tokenizers,
        sources=sources,
        validation_prompts=checked.validation_prompts,
        judge_plan=run.judge_plan,
        judging=judges,
        held_out=given.subject.held_out_source(),
        masks=given.subject.masks,
        crops=run.crops,
        buckets=run.buckets,
        cache=cache,
        init_adapter=checked.init_adapter.state,
        checkpoint=claim.checkpoint,
        continues_folder=claim.continues_folder,
        identity=record,
        environment=run.environment,
        status=status,
        phases=phases,
        repository=given.repository,
    )


def is_finished(options: TrainOptions, watch: Watch) -> bool:
    """Whether the output folder of a run of a table holds this run, finished. Checks the input as `prepare`
    does, prints no note and writes nothing. Raises UserError also if the folder holds another run, or files
    that a run would replace, or if a run in it cannot be continued."""
    given = check_input(options, watch, is_quiet=True)
    record = run_folder.read_identity(given.output_dir)
    seeds = [record["flags"].get("seed")] if record else []
    run = name_run(given.joined(record), given, output_folder.Claim(given.output_dir, None, {}, seeds))
    now = run.record([given.subject.source(run.options.run.seed)])
    if record is None:
        run.check(now)
        return False
    try:
        run_folder.check_new(given.output_dir, now, overwrite=False, is_resumed=True)
        if run_folder.is_finished(given.output_dir, run.max_steps):
            return True
        if not checkpoint_folders.list_checkpoints(given.output_dir):
            checks.check_no_steps_lost("latest", options.run)
    except UserError as error:
        advice = "In a table give the run another name, or move its folder away; --overwrite is refused there"
        raise UserError(f"{error}\n{advice}") from None
    return False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run whose input was checked, and nothing written."""

    options: ResolvedTrainOptions
    device: torch.device
    photos: int
    class_count: int
    class_images: class_images.ClassImageSettings | None
    """How missing class images are drawn; None if none are."""
    steps_of_pass: int
    max_steps: int
    prompts: int
    """Of the validation pictures."""


def plan(options: TrainOptions, watch: Watch) -> Plan:
    """A new run with these options, before anything is written. Raises UserError as `check_input`."""
    given = check_input(options, watch)
    given.peers.say_notes(given.cache.notes)
    run = name_run(given.joined(None), given, output_folder.Claim(given.output_dir, None, {}, []))
    counts = [given.subject.rows_of_pass, given.class_count]
    pictures = pictures_of_pass(counts, repeats=options.instance.repeats)
    return Plan(
        options=run.options,
        device=given.peers.accelerator.device,
        photos=len(given.subject.photos),
        class_count=given.class_count,
        class_images=run.class_images,
        steps_of_pass=run.options.run.steps(pictures, given.peers.world)[0],
        max_steps=run.max_steps,
        prompts=len(given.checked.validation_prompts),
    )


def choose_seed(given: int | None, earlier: list[int | None], peers: Peers) -> int:
    """--seed, else the first known seed of earlier runs, else a random one; the same on every process."""
    for seed in (given, *earlier):
        if seed is not None:
            return int(seed)
    return peers.broadcast(random.SystemRandom().randrange(2**31))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedRun:
    """A run with all its options, and the values that its record (`run_identity.identity`) is made of."""

    options: ResolvedTrainOptions
    subject: Subjects
    checked: CheckedBase
    fingerprint: str
    """Of the base."""
    claim: output_folder.Claim
    crops: Crops
    buckets: Buckets | None
    crops_are_cut_from: Literal["pixels", "latents"]
    class_images: class_images.ClassImageSettings | None
    """How missing class images are generated; None if none are."""
    slots: int
    """Micro-batches a step, of all processes."""
    max_steps: int
    environment: dict[str, Any]
    judge_plan: judging.Plan | None

    def record(self, sources: list[Source]) -> dict[str, Any]:
        """The record that identifies this run, with the pictures of `sources`."""
        checkpoint, start = self.claim.checkpoint, self.checked.init_adapter.digest
        if checkpoint and start is None:
            start = checkpoint.identity.get("start")
        seed, batch_size = self.options.run.seed, self.options.run.train_batch_size
        dataset = PhotoRows(sources, seed, self.crops, self.buckets, batch_size)
        varies = any(not crops.is_fixed(photo.size) for s in sources for photo, crops in dataset.all_crops(s))
        held_out = self.subject.held_out_source()
        compared = [*sources, *([held_out] if held_out.photos else [])]
        pictures = {
            s.purpose: dict(zip(s.names, [p.sha256 for p in s.photos], strict=True)) for s in compared
        }
        of_masks = {name: mask.sha256 for name, mask in self.subject.masks.items()}
        flags = as_table(self.options)
        if name := self.checked.base.options.tokenizer_name:
            flags["tokenizer_name"] = loading.tokenizer_identity(name)
        return run_identity.identity(
            flags,
            text_steps=self.options.text_steps(self.max_steps),
            slots=self.slots,
            base=self.fingerprint,
            pictures={**pictures, **({"mask": of_masks} if of_masks else {})},
            captions=self.subject.captions,
            subjects=[row.record for row in self.subject.rows],
            max_steps=self.max_steps,
            start=start,
            crops=self.crops_are_cut_from if varies else None,
            judges=self.judge_plan.record() if self.judge_plan else {},
        )

    def rate_notes(self) -> list[str]:
        """Notes on learning rates that leave the adapter next to untrained."""
        text_encoders = self.checked.base.family.text if self.options.text.train_text_encoder else ()
        is_scaled = self.options.optimization.scale_lr
        scale = self.slots * self.options.run.train_batch_size if is_scaled else 1
        return rates.notes(self.options, ("unet", *text_encoders), self.max_steps, scale)

    def check(self, record: Mapping[str, Any]) -> list[str]:
        """Check the folder and the checkpoint against `record`. Returns notes on resuming, and on
        what --overwrite removes.

        Raises UserError if files of the run would replace other files, if folder or checkpoint are of another
        run, or if the checkpoint is past the last step.
        """
        run, checkpoint = self.options.run, self.claim.checkpoint
        first_step = self.claim.first_step if self.claim.continues_folder else 0
        names = run_folder.names_to_write(self.options, len(self.checked.validation_prompts))
        # users edit run.yaml to resume with other flags
        keeps_options = self.claim.continues_folder and run_folder.is_edited(self.claim.folder)
        replaced = run_folder.replaced(self.claim.folder, names, is_resumed=self.claim.continues_folder)
        run_folder.check_names(self.claim.folder, replaced, range(first_step + 1, self.max_steps + 1))
        if not self.claim.continues_folder:
            is_resumed = run.resume_from_checkpoint is not None
            run_folder.check_new(self.claim.folder, record, overwrite=run.overwrite, is_resumed=is_resumed)
        if checkpoint is None:
            removed = run_folder.removable(self.claim.folder) if run.overwrite else []
            note = f"--overwrite removes {', '.join(removed)} from {shown(self.claim.folder)}"
            return [note] if removed else []
        notes = run_identity.check_resume(
            checkpoint, self.claim.state, record, self.environment, allow_data_change=run.allow_data_change
        )
        if checkpoint.step > self.max_steps:
            raise UserError(
                f"--resume_from_checkpoint: {checkpoint.folder} is past step {self.max_steps}, "
                "where this run ends; raise --max_train_steps"
            )
        if keeps_options:
            notes.append(f"{run_folder.OPTIONS} was edited: it is kept, without the flags of this run")
        return notes


def name_run(options: TrainOptions, given: Input, claim: output_folder.Claim) -> NamedRun:
    """Fill in every default: seed, precision, those of the base's family, and settings of class images."""
    peers, subject, checked, cache = given.peers, given.subject, given.checked, given.cache
    base, accelerator = checked.base, peers.accelerator
    seed = choose_seed(options.run.seed, claim.earlier_seeds, peers)
    # not the seed that was drawn: without --seed, all runs use the same class images
    prior = class_images.adopt(options.prior, options.run.seed or 0)
    resolved = resolve(
        options, base.family.key, seed=seed, mixed_precision=accelerator.mixed_precision, prior=prior
    )
    peers.say(f"seed: {seed}")
    device = accelerator.device
    pictures = pictures_of_pass([subject.rows_of_pass, given.class_count], repeats=options.instance.repeats)
    instance, has_latents = resolved.instance, cache.mode != "off" and base.family.has_vae
    crops = Crops(
        instance.side,
        instance.image_interpolation_mode,
        instance.center_crop,
        stride=1 if cache.mode == "off" else base.vae_stride,
    )
    return NamedRun(
        options=resolved,
        subject=subject,
        checked=checked,
        fingerprint=base.fingerprint(),
        claim=claim,
        crops=crops,
        buckets=checked.buckets,
        crops_are_cut_from="latents" if has_latents else "pixels",
        class_images=class_images.settings_of(prior, base, device) if prior else None,
        slots=options.run.gradient_accumulation_steps * peers.world,
        max_steps=options.run.steps(pictures, peers.world)[1],
        environment=run_identity.environment_of(resolved.run, device, is_compiled=options.speed.compile),
        judge_plan=checked.judge_plan,
    )


def check_run(run: NamedRun, instance: Source, peers: Peers) -> tuple[NamedRun, judging.Judging | None]:
    """(the run with its judges on disk, the loaded judges), after everything else was checked: a judge may be
    downloaded. Raises UserError as `NamedRun.check`, `judging.find_judges` and `judging.prepared` do, or if
    the processes have other input."""
    peers.say_notes(run.rate_notes())
    record = run.record([instance])
    peers.check_same({"options, base or photos": json.dumps(record, sort_keys=True)})
    peers.on_main(lambda: run.check(record))
    if (plan := run.judge_plan) is None:
        return run, None
    judged = dataclasses.replace(run, judge_plan=peers.on_main(lambda: judging.find_judges(plan)))
    peers.on_main(lambda: judged.check(judged.record([instance])))  # earlier steps may have had other judges
    return judged, judging.prepared(judged.judge_plan, peers, run.subject.photos, run.subject.held_out)


def save_decoded(decoded: DecodeCache | None, peers: Peers) -> None:
    """Store what was found out about photos and class images, on the main process."""
    if decoded and peers.is_main:
        for warning in decoded.save():
            peers.say(f"warning: {warning}")


def make_class_images(
    run: NamedRun,
    decoded: DecodeCache | None,
    peers: Peers,
    watch: Watch,
    phases: dict[str, memory.Reading],
) -> list[Source]:
    """Generate missing class images and check all of them. Returns their source; [] if no class images are
    drawn. `phases` receives a reading at their end. Raises UserError if an instance photo is among them."""
    prior = run.options.prior
    if run.class_images is None:
        return []
    assert isinstance(prior, ResolvedPriorOptions)
    source = class_sources.drawn(
        run.options,
        run.class_images,
        Path(prior.class_data_dir),
        prior.class_prompt,
        [*run.subject.photos, *run.subject.held_out],
        run.checked.base,
        decoded,
        peers,
        watch,
    )
    phases["class images"] = memory.reading(peers.accelerator.device)
    return [source]
