"""Before training: the input is checked, the output folder claimed, the run named, class images made. No model that is trained is loaded here.

What is wrong with flags, photos, base, prompts or output folder is found before anything slow, and before anything is written.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load
from transformers import PreTrainedTokenizerBase

from dreambooth.adapter_files import formats
from dreambooth.adapters import inject
from dreambooth.bases import compilation, families, loading, prompts, quantization, schedulers
from dreambooth.data import captions, class_images, encoding_cache, encodings, photo_sets, photos
from dreambooth.data.batches import Source
from dreambooth.data.crops import Crops
from dreambooth.data.decode_cache import SeenPhotos
from dreambooth.errors import UserError, shown
from dreambooth.files import atomic, checkpoint_folders, locks
from dreambooth.options.command_line import as_table
from dreambooth.options.photos import InstanceOptions
from dreambooth.options.resolved import (
    ResolvedPriorOptions,
    ResolvedTrainOptions,
    resolution_of,
    resolve,
)
from dreambooth.options.training import TrainOptions, pictures_of_pass
from dreambooth.runtime import memory, processes
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch, memory_errors_explained
from dreambooth.training import adapter_targets, checkpoints, hub, metrics, run_folder

AdapterState = dict[str, dict[str, torch.Tensor]]


@dataclasses.dataclass
class Start:
    """What training starts from."""

    options: ResolvedTrainOptions
    peers: Peers
    base: families.Base
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    weight_dtype: torch.dtype
    sources: list[Source]
    identity: dict[str, Any]
    checkpoint: checkpoint_folders.Content | None
    is_own: bool  # whether the checkpoint is one of the output folder's
    first_adapter: AdapterState
    status: run_folder.Status
    repository: str | None
    """Where the result is uploaded to, OWNER/NAME; None for nowhere."""
    cache: encodings.Mode
    encoded_dir: Path
    """Where a cache on disk lies."""
    crops: Crops


class Planned(Exception):
    """--dry_run has looked at everything; it carries the table of what would be trained."""


def prepare(options: TrainOptions, watch: Watch, stack: contextlib.ExitStack) -> Start:
    """Check, claim and complete everything that a run needs. `stack` then holds the output folder's lock and the record of how the run ends.

    Raises UserError for what the user can put right.
    """
    run = options.run
    processes.adopt_local_rank(run.local_rank)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    trackers, notes = metrics.trackers(options.reports.report_to)
    output_dir = Path(run.output_dir)
    peers = processes.join(
        watch,
        peer_timeout=run.peer_timeout,
        mixed_precision=run.mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=run.output_dir, logging_dir=str(output_dir / options.reports.logging_dir)
        ),
    )
    accelerator = peers.accelerator
    _check_device(options, accelerator.device, accelerator.mixed_precision)
    repository = peers.on_main(lambda: hub.check(options.reports, output_dir))

    peers.on_main(lambda: photo_sets.find(options.instance).flag)  # fetched, where that is needed, once
    photo_set = photo_sets.find(options.instance)
    encoded_dir = Path(options.speed.encoded_dir or output_dir / "encoded")
    known = SeenPhotos(encoded_dir) if options.speed.cache_latents in ("auto", "disk") else None
    instance = _pictures(
        options.instance,
        str(photo_set.folder),
        photo_set.flag,
        known,
        allow_odd_photos=options.instance.allow_odd_photos,
    )
    names = [photo.path.name for photo in instance.photos]
    own_captions, caption_notes = captions.read(photo_set.folder, photo_set.flag, names, options.instance)
    peers.on_main(lambda: families.find(options.base).folder)  # downloaded, where it must be, once
    base = families.find(options.base)
    said_of_flags = [*options.notes(), *hub.notes(options.reports)]
    resolution = resolution_of(options.instance, base.family.key)
    _check_base(options, base)
    tokenizers = loading.load_tokenizers(base)
    caption_notes += _check_prompts(options, base, tokenizers, own_captions)
    first_adapter, first_digest, adapter_notes = read_init_adapter(options, base)
    said_of_photos = [
        *photo_set.notes,
        *instance.notes,
        *caption_notes,
        *_size_notes(instance, resolution, base),
    ]
    for note in [
        *said_of_flags,
        *said_of_photos,
        *notes,
        *adapter_notes,
        *_device_notes(options, accelerator.device),
        *processes.notes(),
    ]:
        peers.say(f"note: {note}")

    if options.adapter.dry_run:
        raise Planned(adapter_targets.table(options, base) if peers.is_main else "")
    cache = _find_cache(options, len(instance.photos), encoded_dir, photo_set.folder, peers)
    atomic.make_output_folder(output_dir, "--output_dir")
    if cache == "disk":
        atomic.make_output_folder(encoded_dir, "--encoded_dir")
        if left := peers.on_main(lambda: encoding_cache.sweep(encoded_dir)):
            peers.say(
                f"note: removed what runs that died left half written in {shown(encoded_dir)}: {', '.join(left)}",
            )
    for note in peers.on_main(lambda: stack.enter_context(locks.hold(output_dir, "--output_dir"))):
        peers.say(f"note: {note}")
    if swept := peers.on_main(lambda: checkpoint_folders.sweep(output_dir)):
        peers.say(f"note: removed what a run that died left half done: {', '.join(swept)}")
    folder, said = peers.on_main(lambda: find_checkpoint(run.resume_from_checkpoint, output_dir))
    for line in said:
        peers.say(line)
    checkpoint = checkpoint_folders.read(folder) if folder else None
    state = checkpoints.read_state(checkpoint) if checkpoint else {}
    there = (
        peers.on_main(lambda: run_folder.read_identity(output_dir)) if run.resume_from_checkpoint else None
    )
    seed = choose_seed(run.seed, [state.get("seed"), there["flags"].get("seed") if there else None], peers)
    is_own = folder is not None and folder.resolve().parent == output_dir.resolve()
    # not the seed that was drawn: without --seed two runs make the same class images
    prior = class_images.adopt(options.prior, run.seed or 0)
    resolved = resolve(
        options, base.family.key, seed=seed, mixed_precision=accelerator.mixed_precision, prior=prior
    )
    peers.say(f"seed: {seed}")
    fingerprint = base.fingerprint()
    settings = class_images.settings_of(prior, base, fingerprint, accelerator.device) if prior else None
    counts = [len(instance.photos), prior.generation.num_class_images if prior else 0]
    longest = pictures_of_pass(counts, options.instance.repeats)
    max_steps = run.steps(longest, peers.world)[1]
    around = run_folder.environment_of(options.run, accelerator.device, is_compiled=options.speed.compile)

    limits = options.instance
    # crops that are cut from stored latents start at whole latents
    stride = 1 if cache == "off" else base.vae_stride
    crops = Crops(resolution, limits.image_interpolation_mode, limits.center_crop, stride)

    def identity(sources: list[Source]) -> dict[str, Any]:
        pictures = {
            source.purpose: {photo.path.name: photo.sha256 for photo in source.photos} for source in sources
        }
        slots = run.gradient_accumulation_steps * peers.world
        start = checkpoint.identity.get("start") if checkpoint and first_digest is None else first_digest
        vary = any(not crops.is_fixed(photo.size) for source in sources for photo in source.photos)
        cut_from: Literal["pixels", "latents"] = (
            "pixels" if cache == "off" or not base.family.has_vae else "latents"
        )
        return run_folder.identity(
            as_table(resolved),
            slots=slots,
            base=fingerprint,
            pictures=pictures,
            captions=own_captions,
            max_steps=max_steps,
            text_steps=resolved.text_steps(max_steps),
            start=start,
            crops=cut_from if vary else None,
        )

    def check(mine: Mapping[str, Any]) -> list[str]:
        if checkpoint is None or not is_own:
            run_folder.check_new(
                output_dir, mine, overwrite=run.overwrite, is_resumed=run.resume_from_checkpoint is not None
            )
        if checkpoint is None:
            return []
        found = run_folder.check_resume(
            checkpoint, state, mine, around, allow_data_change=run.allow_data_change
        )
        if checkpoint.step > max_steps:
            raise UserError(
                f"--resume_from_checkpoint: {folder} is past step {max_steps}, where this run ends; raise --max_train_steps"
            )
        return found

    instance_prompts = [own_captions.get(name, options.instance.instance_prompt) for name in names]
    flip, dropout = options.instance.random_flip, options.instance.caption_dropout
    sources = [
        Source("instance", instance.photos, instance_prompts, random_flip=flip, caption_dropout=dropout)
    ]
    photos_only = identity(sources)
    peers.check_same({"options, base or photos": json.dumps(photos_only, sort_keys=True)})
    peers.on_main(lambda: check(photos_only))  # before the minutes that class images may take
    status = stack.enter_context(run_folder.recorded(output_dir, state.get("step", 0), is_main=peers.is_main))
    stack.enter_context(memory_errors_explained())
    if prior and settings:
        sources.append(_class_source(prior, options.instance, settings, instance, base, known, peers, watch))
    if known and cache == "disk" and peers.is_main:
        for note in known.save():
            peers.say(f"warning: {note}")
    mine = identity(sources)
    for note in peers.on_main(lambda: check(mine)):
        peers.say(f"note: {note}")
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
        accelerator.mixed_precision, torch.float32
    )
    return Start(
        resolved,
        peers,
        base,
        tokenizers,
        weight_dtype,
        sources,
        mine,
        checkpoint,
        is_own,
        first_adapter,
        status,
        repository,
        cache,
        encoded_dir,
        crops,
    )


def _check_device(options: TrainOptions, device: torch.device, mixed_precision: str) -> None:
    if options.run.enable_xformers_memory_efficient_attention and device.type != "cuda":
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    quantization.check(options.speed, options.adapter.adapter, device)
    memory.check(options.speed.offload, device)
    if options.speed.compile:
        compilation.check(device)
    if options.run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True


def _device_notes(options: TrainOptions, device: torch.device) -> list[str]:
    if options.speed.compile and device.type == "cpu":
        return ["--compile is for GPUs: on a CPU it compiles for minutes, and steps are hardly faster"]
    return []


def _check_base(options: TrainOptions, base: families.Base) -> None:
    """Raise UserError, with a line for each, for flags that this base cannot follow."""
    problems = []
    name, objective = base.family.name, options.objective
    if base.is_edm and objective.snr_gamma is not None:
        problems.append(
            "--snr_gamma: Min-SNR formulation is not supported when conducting EDM-style training, as this base's scheduler asks for."
        )
    if objective.do_edm_style_training and not base.family.has_vae:
        problems.append(f"--do_edm_style_training: {name} is trained on noise prediction; leave it out")
    if base.is_edm and options.validation.validation_scheduler:
        given = options.validation.validation_scheduler
        problems.append(
            f"--validation_scheduler: a base with an EDM scheduler is drawn with that; leave {given} out"
        )
    if options.adapter.output_kohya_format and base.kohya_family is None:
        problems.append(f"--output_kohya_format: there is no such format for {name}; leave it out")
    try:
        families.check_text(base, options.text)
    except UserError as error:
        problems.append(str(error))
    if options.prior.with_prior_preservation:
        try:
            schedulers.sampler_of(options.prior.generation.class_scheduler, base)
        except UserError as error:
            problems.append(str(error))
    problems += _wrong_layers(options, base)
    if problems:
        raise UserError("\n".join(problems))


def _trained_layers(
    options: TrainOptions, base: families.Base
) -> dict[str, tuple[dict[str, tuple[int, ...]], list[str]]]:
    """By component that is trained: (shapes of its layers by name, names of those that get an adapter)."""
    adapter, found = options.adapter, {}
    for component, shapes in base.layers().items():
        is_text = component != "unet"
        if is_text and not (options.text.train_text_encoder and base.family.trains_text):
            continue
        layers = {layer.removeprefix("text_model."): shape for layer, shape in shapes.items()}
        targets = inject.unet_targets(adapter)
        if is_text:
            unused = families.unused_layers(base.family, component, options.text)
            targets = inject.text_targets(families.text_layers(base, component), unused, adapter, layers)
        found[component] = layers, inject.layers_at(targets, layers)
    return found


def _wrong_layers(options: TrainOptions, base: families.Base) -> list[str]:
    """What is wrong with the flags that name layers: names that no layer has."""
    adapter, problems, trained = options.adapter, [], []
    for component, (layers, found) in _trained_layers(options, base).items():
        named, flag = (
            (adapter.unet_layers(), "--lora_layers")
            if component == "unet"
            else (adapter.text_layers(), "--text_encoder_layers")
        )
        ends = sorted(
            {
                ".".join(words[-n:])
                for layer, shape in layers.items()
                if len(shape) > 1
                for words in [layer.split(".")]
                for n in (1, 2)
            }
        )
        for target in named or ():
            if not inject.layers_at((target,), layers):
                near = difflib.get_close_matches(target, ends, n=3)
                problems.append(
                    f"{flag}: no layer of {component} ends with {target}"
                    + (f"; there are {', '.join(near)}" if near else "")
                )
        if not found and not problems:
            problems.append(
                f"{flag}: all of these layers of {component} come after the last one whose output is used"
            )
        trained += [f"{component}.{layer}" for layer in found]
        if kernels := [
            layer for layer in found if max(layers[layer][2:], default=1) > 1 and adapter.adapter == "oft"
        ]:
            problems.append(
                f"{flag}: {kernels[0]} of {component} is a convolution of more than 1 x 1, which --adapter oft cannot rotate"
            )
    if not problems:
        problems += inject.unknown_parts("--rank_pattern", adapter.ranks, trained)
        problems += inject.unknown_parts("--lr_pattern", adapter.learning_rates, trained)
    return problems


def _check_prompts(
    options: TrainOptions,
    base: families.Base,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    own: Mapping[str, str],
) -> list[str]:
    """Notes on captions that do not fit. Raises UserError for prompts that do not."""
    asked = {
        "--instance_prompt": options.instance.instance_prompt,
        "--class_prompt": options.prior.class_prompt if options.prior.with_prior_preservation else None,
        "--validation_prompt": options.validation.validation_prompt,
    }
    limit = families.max_tokens(base, options.text)
    prompts.check(tokenizers, asked, limit)
    # captions are many, and often somebody else's: those are cut, as they always were
    cut = [
        shown(name)
        for name, caption in own.items()
        if any(prompts.words_cut(tokenizer, caption, limit) for tokenizer in tokenizers)
    ]
    return (
        [
            f"{len(cut)} captions are longer than {limit} tokens and are cut off there: {', '.join(cut[:5])}{' ...' * (len(cut) > 5)}"
        ]
        if cut
        else []
    )


def _size_notes(instance: photos.Folder, resolution: int, base: families.Base) -> list[str]:
    small = [photo for photo in instance.photos if min(photo.size) < resolution]
    notes = (
        [
            f"{len(small)} of {len(instance.photos)} photos are smaller than --resolution {resolution} and will be enlarged"
        ]
        if small
        else []
    )
    if base.default_resolution != resolution:
        notes.append(
            f"--resolution is {resolution}; pictures of {base.default_resolution} pixels are what this base was made for"
        )
    return notes


def read_init_adapter(
    options: TrainOptions, base: families.Base
) -> tuple[AdapterState, str | None, list[str]]:
    """(tensors by component of --init_adapter, SHA-256 of its files, notes). Raises UserError if this run's adapter is another."""
    if options.adapter.init_adapter is None:
        return {}, None, []
    path = Path(options.adapter.init_adapter)
    try:
        adapter = formats.read(path, base.layers())
    except UserError as error:
        raise UserError(f"--init_adapter: {error}") from None
    wanted = "dora" if options.adapter.use_dora else options.adapter.adapter
    if (kinds := list(adapter.kinds)) != [wanted]:
        raise UserError(
            f"--init_adapter: {shown(path)} is of {' and '.join(kinds)}; this run trains {wanted}"
        )
    state = _peft_state(adapter)
    if options.adapter.adapter == "lora":
        for component, tensors in state.items():
            ranks = sorted({tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key})
            own = (options.adapter.text_encoder_rank if component != "unet" else None) or options.adapter.rank
            if ranks != [own] and not options.adapter.rank_pattern:
                flag = "--rank" if component == "unet" else "--text_encoder_rank"
                raise UserError(
                    f"--init_adapter: {shown(path)} has {component} of rank {', '.join(map(str, ranks))}; give the same as {flag}"
                )
    for component, (_, layers) in _trained_layers(options, base).items():
        if component in adapter.components and (
            other := sorted(adapter.components[component].keys() ^ set(layers))
        ):
            counts = f"{len(adapter.components[component])} layers of {component} and this run trains {len(layers)}"
            raise UserError(
                f"--init_adapter: {shown(path)} has {counts}, e.g. only one of them has {other[0]}; give the same --target_preset or layers"
            )
    has_text = any(component.startswith("text_encoder") for component in state)
    if has_text and not options.text.train_text_encoder:
        raise UserError(
            f"--init_adapter: {shown(path)} adapts the text encoder too; add --train_text_encoder"
        )
    starts_anew = not has_text and options.text.train_text_encoder
    notes = (
        [f"{shown(path)} has no part for the text encoder: there the adapter starts at zero"]
        if starts_anew
        else []
    )
    digest = hashlib.sha256()
    for component in sorted(state):
        for key, tensor in sorted(state[component].items()):
            digest.update(f"{component}.{key}".encode() + tensor.contiguous().numpy().tobytes())
    return state, digest.hexdigest(), notes


def _peft_state(adapter: formats.Adapter) -> AdapterState:
    """The tensors by component and by peft's key, as `Component.load_state_dict` takes them."""
    state: AdapterState = {}
    for name, tensor in load(formats.write_native(adapter, {})).items():
        component, _, key = name.partition(".")
        state.setdefault(component, {})[key.removeprefix("text_model.") if component != "unet" else key] = (
            tensor
        )
    return state


def find_checkpoint(resume_from: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from, what to say of those passed over and of none)."""
    if resume_from is None:
        return None, []
    choice = checkpoint_folders.choose(resume_from, output_dir)
    said = [f"warning: passed over {reason}" for reason in choice.skipped]
    if choice.folder is None:
        said.append(f"Checkpoint '{resume_from}' does not exist. Starting a new training run.")
    return choice.folder, said


def choose_seed(given: int | None, of_before: Sequence[int | None], peers: Peers) -> int:
    """The seed given, else the first known `of_before`, else a new one; the same on every process."""
    for seed in (given, *of_before):
        if seed is not None:
            return int(seed)
    return peers.broadcast(random.SystemRandom().randrange(2**31))


def _find_cache(
    options: TrainOptions, count: int, encoded_dir: Path, photos_dir: Path, peers: Peers
) -> encodings.Mode:
    """Where what is encoded of `count` photos and the class images is kept. Raises UserError if that would be beside the user's pictures, or beside
    the run's own files."""
    speed, prior = options.speed, options.prior
    pictures = count * (2 if options.instance.random_flip else 1) + (
        prior.generation.num_class_images if prior.with_prior_preservation else 0
    )
    cache = encodings.mode_of(speed.cache_latents, pictures, is_folder_given=speed.encoded_dir is not None)
    if cache != "off" and options.instance.dataloader_num_workers:
        peers.say("note: You need not use --dataloader_num_workers without --cache_latents off.")
    if cache != "disk":
        if speed.encoded_dir is not None:
            peers.say(f"note: You need not use --encoded_dir with --cache_latents {cache}.")
        return cache
    place = os.path.realpath(encoded_dir)
    if place == os.path.realpath(options.run.output_dir):
        raise UserError(
            f"--encoded_dir and --output_dir must be two folders, got {shown(encoded_dir)} for both; leave --encoded_dir out"
        )
    for folder in (photos_dir, prior.class_data_dir if prior.with_prior_preservation else None):
        if folder is not None and place == os.path.realpath(folder):
            raise UserError(
                f"--encoded_dir: {shown(encoded_dir)} is a folder of pictures; name one of its own"
            )
    return cache


def _pictures(
    limits: InstanceOptions, folder: str, flag: str, known: SeenPhotos | None, *, allow_odd_photos: bool
) -> photos.Folder:
    return photos.check_folder(
        folder,
        flag,
        max_pixels=limits.max_image_pixels,
        allow_odd_photos=allow_odd_photos,
        follow_symlinks=limits.follow_symlinks,
        known=known,
    )


def _class_source(
    prior: ResolvedPriorOptions,
    limits: InstanceOptions,
    settings: class_images.ClassImageSettings,
    instance: photos.Folder,
    base: families.Base,
    known: SeenPhotos | None,
    peers: Peers,
    watch: Watch,
) -> Source:
    """The class images, the missing ones generated first. Raises UserError if a photo of the subject is among them."""
    folder, wanted = prior.class_data_dir, prior.generation.num_class_images
    class_images.make(Path(folder), settings, wanted, base, peers, watch)
    are_small = base.default_resolution < photos.ODD_SIDE  # those of the base's own
    found = _pictures(
        limits,
        folder,
        "--class_data_dir",
        known,
        allow_odd_photos=limits.allow_odd_photos or are_small,
    )
    photos.check_disjoint(instance, found)
    taken = found.photos[:wanted]
    return Source("class", taken, [prior.class_prompt] * len(taken))
