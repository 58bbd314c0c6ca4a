"""Before training: the input is checked, the output folder claimed, the run named, class images made. No model that is trained is loaded here.

What is wrong with flags, photos, base, prompts or output folder is found before anything slow, and before anything is written.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import ProjectConfiguration
from transformers import PreTrainedTokenizerBase

from dreambooth import adapter_files, checkpoints, class_images, families, locks, photos, processes, report, runs
from dreambooth.command_line import adopt_local_rank
from dreambooth.errors import UserError
from dreambooth.options import TrainOptions
from dreambooth.processes import Peers
from dreambooth.samples import Source
from dreambooth.stops import Watch, memory_errors_explained

AdapterState = dict[str, dict[str, torch.Tensor]]


@dataclasses.dataclass
class Start:
    """What training starts from. `options` are resolved: seed, precision and the class images' settings are filled in."""

    options: TrainOptions
    peers: Peers
    base_folder: Path
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    weight_dtype: torch.dtype
    sources: list[Source]
    identity: dict[str, Any]
    checkpoint: checkpoints.Content | None
    is_own: bool  # whether the checkpoint is one of the output folder's
    first_adapter: AdapterState
    status: runs.Status


def steps_of_run(options: TrainOptions, pictures: int, world: int) -> tuple[int, int]:
    """(steps of one pass over `pictures`, the larger of the two sets; steps of the run)."""
    run = options.run
    per_pass = math.ceil(math.ceil(pictures / (run.train_batch_size * world)) / run.gradient_accumulation_steps)
    return per_pass, run.max_train_steps or run.num_train_epochs * per_pass


def prepare(options: TrainOptions, watch: Watch, stack: contextlib.ExitStack) -> Start:
    """Check, claim and complete everything that a run needs. `stack` then holds the output folder's lock and the record of how the run ends.

    Raises UserError for what the user can put right.
    """
    run = options.run
    adopt_local_rank(run)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    trackers, notes = report.trackers(options.reports.report_to)
    output_dir = Path(run.output_dir)
    peers = processes.join(
        watch,
        peer_timeout=run.peer_timeout,
        mixed_precision=run.mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=run.output_dir, logging_dir=str(output_dir / options.reports.logging_dir)),
    )
    accelerator = peers.accelerator
    _check_device(options, accelerator.device, accelerator.mixed_precision)

    instance = _pictures(options, options.instance.instance_data_dir, "--instance_data_dir")
    peers.on_main(lambda: families.local_folder(options.base))  # where it must be downloaded, once
    base_folder = families.local_folder(options.base)
    tokenizer = families.load_tokenizer(options.base, base_folder)
    max_tokens = families.max_tokens(base_folder, options.text)
    _check_prompts(options, tokenizer, max_tokens)
    first_adapter, first_digest, adapter_notes = read_init_adapter(options)
    for note in [*options.notes(), *instance.notes, *_size_notes(instance, options), *notes, *adapter_notes, *processes.notes()]:
        report.say(accelerator, f"note: {note}")

    processes.make_folder(output_dir, "--output_dir")
    for note in peers.on_main(lambda: stack.enter_context(locks.hold(output_dir, "--output_dir"))):
        report.say(accelerator, f"note: {note}")
    if swept := peers.on_main(lambda: checkpoints.sweep(output_dir)):
        report.say(accelerator, f"note: removed what a run that died left half done: {', '.join(swept)}")
    folder, said = peers.on_main(lambda: find_checkpoint(run.resume_from_checkpoint, output_dir))
    for line in said:
        report.say(accelerator, line)
    checkpoint = checkpoints.read(folder) if folder else None
    state = checkpoints.read_state(checkpoint) if checkpoint else {}
    there = peers.on_main(lambda: runs.read_identity(output_dir)) if run.resume_from_checkpoint else None
    seed = choose_seed(run.seed, [state.get("seed"), there["flags"].get("seed") if there else None], peers)
    is_own = folder is not None and folder.resolve().parent == output_dir.resolve()
    run = dataclasses.replace(run, seed=seed, mixed_precision=accelerator.mixed_precision)
    options = dataclasses.replace(options, run=run, prior=class_images.adopt(options.prior, options.run.seed))
    report.say(accelerator, f"seed: {seed}")
    fingerprint = families.fingerprint(base_folder, options.base.variant)
    settings = class_images.settings_of(options.prior, base_folder, fingerprint, accelerator.device)
    longest = max(len(instance.photos), options.prior.num_class_images if settings else 0)
    max_steps = steps_of_run(options, longest, peers.world)[1]
    around = runs.surroundings(threads=torch.get_num_threads(), device=accelerator.device.type, options=options)

    def identity(sources: list[Source]) -> dict[str, Any]:
        pictures = {source.purpose: {photo.path.name: photo.sha256 for photo in source.photos} for source in sources}
        slots = run.gradient_accumulation_steps * peers.world
        start = checkpoint.identity.get("start") if checkpoint else first_digest
        return runs.identity(options, slots=slots, base=fingerprint, pictures=pictures, max_steps=max_steps, start=start)

    def check(mine: Mapping[str, Any]) -> list[str]:
        if checkpoint is None or not is_own:
            runs.check_new(output_dir, mine, overwrite=run.overwrite, again=run.resume_from_checkpoint is not None)
        if checkpoint is None:
            return []
        found = runs.check_resume(checkpoint, state, mine, around, allow_data_change=run.allow_data_change)
        if checkpoint.step > max_steps:
            raise UserError(f"--resume_from_checkpoint: {folder} is past step {max_steps}, where this run ends; raise --max_train_steps")
        return found

    sources = [Source("instance", instance.photos)]
    photos_only = identity(sources)
    peers.check_same({"options, base or photos": json.dumps(photos_only, sort_keys=True)})
    peers.on_main(lambda: check(photos_only))  # before the minutes that class images may take
    status = stack.enter_context(runs.recorded(output_dir, state.get("step", 0), is_main=peers.is_main))
    stack.enter_context(memory_errors_explained())
    if settings is not None:
        sources.append(_class_source(options, settings, instance, base_folder, peers, watch))
    mine = identity(sources)
    for note in peers.on_main(lambda: check(mine)):
        report.say(accelerator, f"note: {note}")
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    return Start(options, peers, base_folder, tokenizer, max_tokens, weight_dtype, sources, mine, checkpoint, is_own, first_adapter, status)


def _check_device(options: TrainOptions, device: torch.device, mixed_precision: str) -> None:
    if options.run.enable_xformers_memory_efficient_attention and device.type != "cuda":
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    if options.run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True


def _check_prompts(options: TrainOptions, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    prompts = {
        "--instance_prompt": options.instance.instance_prompt,
        "--class_prompt": options.prior.class_prompt if options.prior.with_prior_preservation else None,
        "--validation_prompt": options.validation.validation_prompt,
    }
    families.check_prompts(tokenizer, prompts, max_tokens)


def _size_notes(instance: photos.Folder, options: TrainOptions) -> list[str]:
    resolution = options.instance.resolution
    small = [photo for photo in instance.photos if min(photo.size) < resolution]
    return [f"{len(small)} of {len(instance.photos)} photos are smaller than --resolution {resolution} and will be enlarged"] if small else []


def read_init_adapter(options: TrainOptions) -> tuple[AdapterState, str | None, list[str]]:
    """(tensors by component of --init_adapter, its SHA-256, notes). Raises UserError if this run's adapter is another."""
    if options.adapter.init_adapter is None:
        return {}, None, []
    path = adapter_files.find(options.adapter.init_adapter, "--init_adapter")
    state, metadata = adapter_files.read(path)
    fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    for component, tensors in state.items():
        ranks = sorted({tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key})
        if ranks != [options.adapter.rank]:
            raise UserError(f"--init_adapter: {path} has {component} of rank {', '.join(map(str, ranks))}; give the same as --rank")
        alpha = fields.get(f"{component}.lora_alpha", ranks[0])
        if alpha != ranks[0]:
            raise UserError(f"--init_adapter: {path} has {component} with alpha {alpha} at rank {ranks[0]}; this script trains alpha = rank")
    if "text_encoder" in state and not options.text.train_text_encoder:
        raise UserError(f"--init_adapter: {path} adapts the text encoder too; add --train_text_encoder")
    starts_anew = "text_encoder" not in state and options.text.train_text_encoder
    notes = [f"{path} has no part for the text encoder: there the adapter starts at zero"] if starts_anew else []
    return state, hashlib.sha256(path.read_bytes()).hexdigest(), notes


def find_checkpoint(resume_from: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from, what to say of those passed over and of none)."""
    if resume_from is None:
        return None, []
    choice = checkpoints.choose(resume_from, output_dir)
    said = [f"warning: passed over {reason}" for reason in choice.skipped]
    if choice.folder is None:
        said.append(f"Checkpoint '{resume_from}' does not exist. Starting a new training run.")
    return choice.folder, said


def choose_seed(given: int | None, of_before: Sequence[int | None], peers: Peers) -> int:
    """The seed given, else the first known `of_before`, else a new one; the same on every process."""
    for seed in (given, *of_before):
        if seed is not None:
            return int(seed)
    return peers.share(random.SystemRandom().randrange(2**31))


def _pictures(options: TrainOptions, folder: str, flag: str) -> photos.Folder:
    limits = options.instance
    return photos.check_folder(
        folder, flag, max_pixels=limits.max_image_pixels, allow_odd_photos=limits.allow_odd_photos, follow_symlinks=limits.follow_symlinks
    )


def _class_source(
    options: TrainOptions, settings: class_images.Settings, instance: photos.Folder, base_folder: Path, peers: Peers, watch: Watch
) -> Source:
    """The class images, the missing ones generated first. Raises UserError if a photo of the subject is among them."""
    folder, wanted = options.prior.class_data_dir, options.prior.num_class_images
    assert folder is not None
    class_images.make(Path(folder), settings, wanted, options.base, base_folder, peers, watch)
    found = _pictures(options, folder, "--class_data_dir")
    photos.check_disjoint(instance, found)
    return Source("class", found.photos[:wanted])
