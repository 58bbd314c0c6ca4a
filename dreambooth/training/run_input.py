"""What a run reads, checked before anything is written: processes, photos, captions, base and prompts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import ProjectConfiguration
from transformers import PreTrainedTokenizerBase

from dreambooth.bases import families, loading
from dreambooth.data import buckets, captions
from dreambooth.data.batches import Source
from dreambooth.data.buckets import Buckets
from dreambooth.data.decode_cache import DecodeCache
from dreambooth.options.reports import ReportOptions
from dreambooth.options.resolved import resolution_of
from dreambooth.options.training import RunOptions, TrainOptions
from dreambooth.runtime import launcher, processes
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch
from dreambooth.training import (
    adapter_targets,
    checks,
    class_sources,
    hub,
    judging,
    output_folder,
    passes,
    photo_check,
    subjects,
    trackers,
)
from dreambooth.training.subjects import Subjects


@dataclasses.dataclass(frozen=True)
class CheckedBase:
    """The base on disk, with the tokenizers and the adapter to start from."""

    base: families.Base
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    init_adapter: checks.InitAdapter
    validation_prompts: list[str]
    judge_plan: judging.Plan | None
    buckets: Buckets | None
    """With --buckets, how the shapes of photos are chosen."""
    notes: list[str]


def check_base(options: TrainOptions, subject: Subjects, peers: Peers) -> CheckedBase:
    """Find the base, and check flags, prompts and --init_adapter against it."""
    peers.on_main(lambda: families.find(options.base).folder)  # a base of the hub is downloaded once
    base = families.find(options.base)
    checks.check_base(options, base)
    tokenizers = loading.load_tokenizers(base)
    wanted, prompts_file = options.validation.validation_prompt, options.validation.validation_prompts_file
    in_file = captions.read_prompts(prompts_file, "--validation_prompts_file") if prompts_file else []
    prompts = {
        "--instance_prompt": options.instance.instance_prompt,
        "--class_prompt": options.prior.class_prompt if options.uses_class_prompt else None,
        "--validation_prompt": wanted,
        **{f"--validation_prompts_file: prompt {number}": prompt for number, prompt in enumerate(in_file, 1)},
    }
    for row in subject.rows:
        prompts |= {f"{row.where}: prompt": row.prompt, f"{row.where}: class_prompt": row.class_prompt}
        prompts |= {f"{row.where}: validation prompt {n}": p for n, p in enumerate(row.validation_prompts, 1)}
    prompt_notes = checks.check_prompts(prompts, subject.all_captions, options.text, base, tokenizers)
    init_adapter = checks.read_init_adapter(options.adapter, options.text, base)
    resolution = resolution_of(options.instance, base.family.key)
    chosen = checks.choose_buckets(options.instance, resolution, base)
    size_notes = checks.size_notes(subject.photos, resolution, base, chosen, options.run.train_batch_size)
    reader_notes = adapter_targets.reader_notes(base, options.adapter, options.text)
    if chosen:
        sizes = [photo.size for photo in subject.photos]
        peers.say(buckets.table(chosen.filled(sizes), sizes))
    of_photos = peers.on_main(lambda: photo_check.notes(options, subject, resolution, tokenizers[0]))
    notes = [*base.notes(), *prompt_notes, *of_photos, *size_notes, *reader_notes, *init_adapter.notes]
    of_rows = [prompt for row in subject.rows for prompt in row.validation_prompts]
    validation_prompts = list(dict.fromkeys([*([wanted] if wanted is not None else []), *in_file, *of_rows]))
    judge_plan = peers.on_main(lambda: judging.plan(options, validation_prompts, resolution))
    return CheckedBase(base, tokenizers, init_adapter, validation_prompts, judge_plan, chosen, notes)


@dataclasses.dataclass(frozen=True)
class Input:
    """What a run reads, checked. Nothing was written."""

    options: TrainOptions
    peers: Peers
    log_with: list[str]
    """Names of the trackers."""
    output_dir: Path
    repository: str | None
    decoded: DecodeCache | None
    subject: Subjects
    checked: CheckedBase
    priors: list[Source]
    """The source of the class rows with --prior_source base."""
    class_count: int
    cache: checks.Cache

    def joined(self, before: Mapping[str, Any] | None) -> TrainOptions:
        """The options with the micro-batches of --auto_batch. `before` is the record of the run that is
        resumed."""
        has_buckets = self.checked.buckets is not None
        return passes.joined(self.options, before, self.peers.world, has_buckets=has_buckets)


def check_input(options: TrainOptions, watch: Watch, *, is_quiet: bool = False) -> Input:
    """Join the processes, and check flags, photos, captions and base. With `is_quiet` no note is printed.
    Raises UserError for a mistake that the user can correct."""
    log_with, notes = trackers.installed(options.reports.report_to)
    peers = join_processes(options.run, options.reports, watch, log_with)
    peers.is_quiet = is_quiet
    notes += checks.check_device(options, peers.accelerator.device, peers.accelerator.mixed_precision)
    output_dir = output_folder.check_apart_from_input(options, log_with)
    repository = peers.on_main(lambda: hub.check(options.reports, output_dir))
    encoded_dir = Path(options.speed.encoded_dir or output_dir / "encoded")
    decoded = DecodeCache(encoded_dir) if options.speed.cache_latents in ("auto", "disk") else None
    subject = subjects.check(options.instance, options.meter, decoded, peers)
    checked = check_base(options, subject, peers)
    peers.say_notes([*options.notes(), *hub.notes(options.reports), *subject.notes, *checked.notes, *notes])
    priors = class_sources.given(options, subject, checked.base, decoded, peers)
    class_count = class_sources.count(options.prior, priors)
    sizes = [photo.size for photo in subject.photos]
    filled = checked.buckets.filled(sizes) if checked.buckets else ()
    cache = checks.choose_cache(  # a picture is encoded once for every shape
        options,
        sum(len(bucket.photos) for bucket in filled) or len(sizes),
        class_count * max(1, len(filled)),
        encoded_dir,
    )
    return Input(
        options=options,
        peers=peers,
        log_with=log_with,
        output_dir=output_dir,
        repository=repository,
        decoded=decoded,
        subject=subject,
        checked=checked,
        priors=priors,
        class_count=class_count,
        cache=cache,
    )


def join_processes(run: RunOptions, reports: ReportOptions, watch: Watch, log_with: list[str]) -> Peers:
    """Join the processes that the launcher started, with the run's threads and precision."""
    launcher.adopt_local_rank(run.local_rank)
    logging_dir = Path(run.output_dir) / reports.logging_dir
    return processes.join(
        watch,
        threads=run.num_threads,
        accumulation=run.gradient_accumulation_steps,
        peer_timeout=run.peer_timeout,
        mixed_precision=run.mixed_precision,
        log_with=[trackers.Tracker(name, logging_dir) for name in log_with] or None,
        project_config=ProjectConfiguration(project_dir=run.output_dir, logging_dir=str(logging_dir)),
    )
