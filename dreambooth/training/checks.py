"""Checks of a run's flags against device, photos and base, before slow work and before any file is written.

The functions raise UserError for a mistake that the user must correct. They return notes on input that works
but is probably not what the user wants.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from transformers import PreTrainedTokenizerBase

from dreambooth.adapter_files import native, reading, run_info, writing
from dreambooth.adapters import inject
from dreambooth.bases import compilation, families, prompt_syntax, prompts, quantization, schedulers
from dreambooth.data import buckets, encodings, photos
from dreambooth.io import reader
from dreambooth.io.errors import UserError, raise_all, shown
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.photos import InstanceOptions
from dreambooth.options.training import RunOptions, TextOptions, TrainOptions
from dreambooth.runtime import graphs, memory
from dreambooth.training import adapter_targets, run_folder

AdapterState = dict[str, dict[str, torch.Tensor]]
"""Tensors of an adapter by component and by peft's key."""


def reason_not_to_record(options: TrainOptions) -> str | None:
    """Why the steps of this run are not recorded as CUDA graphs; None if they may be."""
    adapter, run = options.adapter, options.run
    if options.speed.cuda_graph == "off":
        return "--cuda_graph off"
    if options.speed.offload:
        return "--offload copies activations to the computer's memory within a step"
    if adapter.rank_dropout or adapter.module_dropout:
        return "with --rank_dropout and --module_dropout the host draws what is left out"
    if run.gradient_checkpointing and (adapter.lora_dropout or adapter.text_encoder_dropout):
        flag = "--lora_dropout" if adapter.lora_dropout else "--text_encoder_dropout"
        return f"--gradient_checkpointing draws the dropout of {flag} anew from a stored state"
    if adapter.adapter == "boft":
        return "--adapter boft solves systems of equations, and the host reads whether they were solved"
    if options.text.train_text_encoder and options.text.text_encoder_use_attention_mask:
        return "with --text_encoder_use_attention_mask the host reads the mask"
    return None


def check_device(options: TrainOptions, device: torch.device, mixed_precision: str) -> list[str]:
    """Check that the device has what the flags need, and switch TF32 on for --allow_tf32. Returns notes."""
    if options.run.enable_xformers_memory_efficient_attention and device.type != "cuda":
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    quantization.check(options.speed, options.adapter.adapter, device)
    memory.check_offload(offload=options.speed.offload, device=device)
    if options.speed.compile:
        compilation.check(device)
    if options.run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    notes = []
    reason = reason_not_to_record(options)
    if graphs.can_record(device) and reason and options.speed.cuda_graph == "auto":
        notes.append(graphs.launched_note(reason))
    if options.speed.compile:
        notes.append(compilation.note(device, is_recorded=reason is None))
    return notes


def check_base(options: TrainOptions, base: families.Base) -> None:
    """Check that the flags work with the base. Raises UserError with a line for each problem."""
    problems = []
    name, objective = base.family.name, options.objective
    if base.is_edm and objective.snr_weighting:
        problems.append(
            f"{objective.snr_weighting} is not supported when conducting EDM-style training, "
            "which this base's scheduler requires."
        )
    if objective.do_edm_style_training and not base.family.has_vae:
        problems.append(f"--do_edm_style_training: {name} is trained on noise prediction; leave it out")
    if base.is_edm and (scheduler := options.validation.validation_scheduler):
        problems.append(
            "--validation_scheduler: a base with an EDM scheduler is drawn with its own scheduler;"
            f" leave {scheduler} out"
        )
    if options.adapter.output_kohya_format and not base.family.has_vae:
        problems.append(f"--output_kohya_format: there is no such format for {name}; leave it out")
    try:
        families.check_text(base, options.text)
    except UserError as error:
        problems.append(str(error))
    if options.prior.draws_class_images:
        try:
            schedulers.sampler_of(options.prior.generation.class_scheduler, base)
        except UserError as error:
            problems.append(str(error))
    problems += _wrong_layers(options.adapter, options.text, base)
    raise_all(problems)


def _wrong_layers(adapter: AdapterOptions, text: TextOptions, base: families.Base) -> list[str]:
    """A line for each flag that names layers which the base does not have, or which cannot be trained."""
    problems, trained = [], []
    for component, targets in adapter_targets.trained_layers(base, adapter, text).items():
        names, flag = adapter.unet_layers(), "--lora_layers"
        if component != "unet":
            names, flag = adapter.text_layers(), "--text_encoder_layers"
        for name in names or ():
            if not inject.layers_at((name,), targets.shapes):
                near = difflib.get_close_matches(name, _name_ends(targets.shapes), n=3)
                advice = f"; there are {', '.join(near)}" if near else ""
                problems.append(f"{flag}: no layer of {component} ends with {name}{advice}")
        if not targets.layers and not problems:
            problems.append(
                f"{flag}: all of these layers of {component} come after the last layer whose output is used"
            )
        trained += [f"{component}.{layer}" for layer in targets.layers]
        kernels = [layer for layer in targets.layers if max(targets.shapes[layer][2:], default=1) > 1]
        if kernels and adapter.adapter == "oft":
            problems.append(
                f"{flag}: {kernels[0]} of {component} is a convolution of more than 1 x 1, "
                "which --adapter oft cannot rotate"
            )
    if not problems:
        problems += inject.unknown_parts("--rank_pattern", adapter.ranks, trained)
        problems += inject.unknown_parts("--lr_pattern", adapter.learning_rates, trained)
    return problems


def _name_ends(shapes: adapter_targets.Shapes) -> list[str]:
    """The last word, and the last two words, of the names of layers with weights."""
    words = [layer.split(".") for layer, shape in shapes.items() if len(shape) > 1]
    return sorted({".".join(name[-count:]) for name in words for count in (1, 2)})


def check_prompts(
    prompts_by_flag: Mapping[str, str | None],
    captions: Mapping[str, str],
    text: TextOptions,
    base: families.Base,
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> list[str]:
    """Check that prompts fit into the text encoder. Raises UserError for a prompt that does not.

    `captions` are by file name. A caption that does not fit is cut off; a note lists these. Other notes are
    on syntax of other programs.
    """
    limit = families.max_tokens(base, text)
    prompts.check(tokenizers, prompts_by_flag, limit)
    # no error for captions: a data set has many, and often the user did not write them
    cut = [
        shown(name)
        for name, caption in captions.items()
        if any(prompts.words_cut(tokenizer, caption, limit) for tokenizer in tokenizers)
    ]
    notes = [*prompt_syntax.notes(prompts_by_flag.values()), *prompt_syntax.caption_notes(captions)]
    if not cut:
        return notes
    names = ", ".join(cut[:5]) + " ..." * (len(cut) > 5)
    return [*notes, f"{len(cut)} captions are longer than {limit} tokens and are cut off there: {names}"]


def choose_buckets(instance: InstanceOptions, resolution: int, base: families.Base) -> buckets.Buckets | None:
    """How --buckets chooses the shapes of photos; None without the flag. `resolution` is the default of the
    flag. Raises UserError if a resolution is too small for the base."""
    if not instance.buckets:
        return None
    chosen = buckets.Buckets(instance.sides or (resolution,), base.grid)
    chosen.check()
    return chosen


def size_notes(
    instance: Sequence[photos.Photo],
    resolution: int,
    base: families.Base,
    chosen: buckets.Buckets | None,
    batch_size: int,
) -> list[str]:
    """Notes on photos that are small for the resolution, on buckets with fewer photos than `batch_size`, and
    on a resolution that the base was not trained for."""
    notes = []
    if chosen:
        sizes = [(photo.path.name, photo.size) for photo in instance]
        notes += buckets.notes(chosen, sizes, batch_size)
    elif small := [photo for photo in instance if min(photo.size) < resolution]:
        notes.append(
            f"{len(small)} of {len(instance)} photos are smaller than --resolution {resolution} "
            "and will be enlarged"
        )
    if base.default_resolution != resolution:
        notes.append(
            f"--resolution is {resolution}; this base was trained on pictures of {base.default_resolution} "
            "pixels"
        )
    return notes


@dataclasses.dataclass(frozen=True)
class InitAdapter:
    """The adapter of --init_adapter."""

    state: AdapterState
    """Its tensors; empty without the flag."""
    digest: str | None
    """SHA-256 of the tensors; None without the flag."""
    notes: list[str]


def read_init_adapter(adapter: AdapterOptions, text: TextOptions, base: families.Base) -> InitAdapter:
    """Read --init_adapter. Raises UserError if its kind, rank or layers are not those of this run."""
    if adapter.init_adapter is None:
        return InitAdapter({}, None, [])
    path = Path(adapter.init_adapter)
    try:
        file = reading.read_additive(path, base.layers())
    except UserError as error:
        raise UserError(f"--init_adapter: {error}") from None
    kind = "dora" if adapter.use_dora else adapter.adapter
    if (kinds := list(file.kinds)) != [kind]:
        raise UserError(f"--init_adapter: {shown(path)} is of {' and '.join(kinds)}; this run trains {kind}")
    state = native.by_component(load(writing.write_native(file, {})))
    if adapter.adapter == "lora":
        _check_ranks(path, state, adapter)
    for component, targets in adapter_targets.trained_layers(base, adapter, text).items():
        layers = set(file.components.get(component, targets.layers))
        if differing := sorted(layers ^ set(targets.layers)):
            raise UserError(
                f"--init_adapter: {shown(path)} has {len(layers)} layers of {component} and this run trains "
                f"{len(targets.layers)}; {differing[0]} is only in one of the two; "
                "give the same --target_preset or layers"
            )
    has_text = any(component.startswith("text_encoder") for component in state)
    if has_text and not text.train_text_encoder:
        raise UserError(
            f"--init_adapter: {shown(path)} has layers of the text encoder too; add --train_text_encoder"
        )
    notes = [*file.notes, *run_info.notes(shown(path), file.metadata, base)]
    skipped = run_info.of(file.metadata).get("clip_skip", 0)
    if skipped != (text.clip_skip or 0):
        notes.append(
            f"{shown(path)} was trained with --clip_skip {skipped}, this run with {text.clip_skip or 0}"
        )
    if text.train_text_encoder and not has_text:
        notes.append(f"{shown(path)} has no layers of the text encoder: their adapter starts at zero")
    return InitAdapter(state, _digest(state), notes)


def _check_ranks(path: Path, state: AdapterState, adapter: AdapterOptions) -> None:
    """Raise UserError unless a LoRA has the ranks of --rank, --text_encoder_rank and --rank_pattern."""
    problems = []
    ranks: dict[str, int] = {}  # of each layer in the file
    defaults: dict[str, int] = {}  # without --rank_pattern
    # the UNet first: --rank, which it needs, is also the text encoder's without --text_encoder_rank
    for component, tensors in sorted(state.items(), key=lambda item: item[0] != "unet"):
        rank, flag = adapter.rank, "--rank"
        if component != "unet":
            rank, flag = adapter.text_encoder_rank or adapter.rank, "--text_encoder_rank"
        own = {
            f"{component}.{key.partition('.lora_A')[0]}": tensor.shape[0]
            for key, tensor in tensors.items()
            if ".lora_A" in key
        }
        ranks |= own
        defaults |= dict.fromkeys(own, rank)
        if len(set(own.values())) == 1 and rank not in own.values():
            problems.append(f"has {component} of rank {min(own.values())}; {flag} must be the same")
    trained = {name: inject.by_part(adapter.ranks, name) or defaults[name] for name in ranks}
    differing = sorted(name for name, rank in ranks.items() if rank != trained[name])
    if not differing:
        return
    lowest, highest = min(ranks.values()), max(ranks.values())
    if not problems or adapter.rank_pattern:
        pattern = _rank_pattern(dict(sorted(ranks.items())), defaults)  # safetensors has keys in any order
        is_allowed = len(pattern) <= _LONGEST_ADVICE and highest <= 1024  # the most of --rank_pattern
        advice = f"give --rank_pattern {pattern}, or " if is_allowed else ""
        problems = [
            f"has layers of ranks {lowest} to {highest}; {differing[0]} has {ranks[differing[0]]}, and this"
            f" run trains {int(trained[differing[0]])}; {advice}write a file for --rank {lowest}"
            f" with `convert_adapter.py resize --rank {lowest}`, which prints what is lost"
        ]
    raise UserError(f"--init_adapter: {shown(path)} {problems[0]}")


_LONGEST_ADVICE = 1_000  # characters


def _rank_pattern(ranks: Mapping[str, int], defaults: Mapping[str, int]) -> str:
    """The --rank_pattern that gives each layer its rank in `ranks` where it differs from `defaults`.

    Its first parts are components, with their most frequent ranks. The others are ends of the layers' names,
    as short as possible.
    """
    by_component: dict[str, Counter[int]] = {}
    for name, rank in ranks.items():
        by_component.setdefault(name.partition(".")[0], Counter())[rank] += 1
    frequent = {component: counts.most_common(1)[0][0] for component, counts in by_component.items()}
    usual = {name: frequent[name.partition(".")[0]] for name in ranks}
    common = {name.partition(".")[0]: rank for name, rank in usual.items() if rank != defaults[name]}
    # a number belongs to the word before it: "to_out.0"
    words = {name: re.findall(r"[A-Za-z_]\w*(?:\.\d+)*", name) for name in ranks}
    table: dict[str, int] = {}
    for count in range(1, max(map(len, words.values())) + 1):
        parts = {name: ".".join(names[-count:]) for name, names in words.items()}
        table = common | {parts[name]: rank for name, rank in ranks.items() if rank != usual[name]}
        if all((inject.by_part(table, name) or defaults[name]) == rank for name, rank in ranks.items()):
            break
    return ",".join(f"{part}={rank}" for part, rank in table.items())


def _digest(state: AdapterState) -> str:
    """SHA-256 of names and values, in hexadecimal."""
    digest = hashlib.sha256()
    for component in sorted(state):
        for key, tensor in sorted(state[component].items()):
            digest.update(f"{component}.{key}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Cache:
    """Where latents and prompt embeddings are kept. `folder` is used by mode disk."""

    mode: encodings.Mode
    folder: Path
    notes: list[str]


def choose_cache(options: TrainOptions, photo_count: int, class_count: int, folder: Path) -> Cache:
    """The cache for `photo_count` instance photos and `class_count` class images, each counted once for every
    shape that it is encoded in. `folder` is for a cache on disk."""
    speed = options.speed
    is_folder_given = speed.encoded_dir is not None
    pictures = photo_count * (2 if options.instance.random_flip else 1) + class_count
    mode = encodings.mode_of(speed.cache_latents, pictures, is_folder_given=is_folder_given)
    notes = []
    if mode != "off" and options.instance.dataloader_num_workers:
        notes.append("You need not use --dataloader_num_workers without --cache_latents off.")
    if mode != "disk" and is_folder_given:
        notes.append(f"You need not use --encoded_dir with --cache_latents {mode}.")
    return Cache(mode, folder, notes)


def check_no_steps_lost(resume_from: str, run: RunOptions) -> None:
    """Raise UserError if the output folder has the record of a run but no checkpoint to resume it from.

    A run that ended before its first step, or was killed before its first checkpoint was due, has none to
    lose: job scripts start it again with the same command.
    """
    folder = Path(run.output_dir)
    if not (folder / run_folder.IDENTITY).exists():
        return
    status = _last_record(folder / run_folder.STATUS, whole_file=True)
    last_step = _last_record(folder / run_folder.METRICS, whole_file=False).get("step", 0)
    state, ended_at = status.get("state"), status.get("step")
    # a step is recorded before its checkpoint is written
    was_killed = state == "running" and isinstance(last_step, int) and last_step <= run.checkpointing_steps
    if was_killed or (state not in (None, "running") and ended_at == 0):
        return
    raise UserError(
        f"--resume_from_checkpoint {resume_from}: {shown(folder)} has the record of a run "
        f"({run_folder.IDENTITY}) and no checkpoint; put its checkpoints back, or give --overwrite in place "
        "of this flag to start it again"
    )


def _last_record(path: Path, *, whole_file: bool) -> dict[str, Any]:
    """The JSON table in a file, or on its last whole line; {} if there is none."""
    try:
        text = reader.read_text(path, path.name, reader.LARGEST_LOG)
    except UserError:
        return {}
    for record in [text] if whole_file else reversed(reader.lines(text)):
        with contextlib.suppress(UserError):  # a torn line
            return reader.parsed_json_table(record, path.name)
    return {}
