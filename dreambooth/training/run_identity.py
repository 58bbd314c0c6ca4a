"""What makes a run this run: the record of its flags, base, pictures and captions. A run is resumed only with
an equal record; otherwise an error lists every difference.
"""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from dreambooth.files import checkpoint_folders
from dreambooth.io import reader
from dreambooth.io.errors import UserError
from dreambooth.options.evaluation import JudgeOptions, MeterOptions
from dreambooth.options.reports import ReportOptions, ValidationOptions
from dreambooth.options.training import RunOptions
from dreambooth.runtime.environment import environment

LIBRARIES = ("torch", "diffusers", "transformers", "peft")  # another version may give other last bits

# Flags that may change when a run is resumed, since they have no effect on the steps already done.
_FREE_FLAGS = {
    *(field.name for field in dataclasses.fields(ValidationOptions)),
    *(field.name for field in dataclasses.fields(ReportOptions)),
    *(field.name for field in dataclasses.fields(JudgeOptions)),  # the judges' hashes are compared
    *(field.name for field in dataclasses.fields(MeterOptions)),  # the photos are compared
    # Paths and hub ids: the contents are compared.
    *("output_dir", "instance_data_dir", "class_data_dir", "pretrained_model_name_or_path", "revision"),
    "subjects",
    *("variant", "pretrained_vae_model_name_or_path", "init_adapter", "dataset_name", "dataset_config_name"),
    *("cache_dir", "image_column"),
    "mask_dir",  # the masks are compared
    *("caption_column", "caption_extension", "in_json"),  # the captions are compared
    # Which photos are refused, and how class images are generated: the pictures are compared.
    *("max_image_pixels", "allow_odd_photos", "follow_symlinks", "num_class_images", "sample_batch_size"),
    *("prior_generation_precision", "class_guidance_scale", "class_inference_steps", "class_scheduler"),
    "class_seed",
    # Length of the run, and which files are written.
    *("max_train_steps", "num_train_epochs", "max_train_minutes", "repeats", "dry_run"),
    *("estimate", "runs", "run_number"),
    *("checkpointing_steps", "checkpoints_total_limit", "output_kohya_format"),
    *("resume_from_checkpoint", "overwrite", "allow_data_change"),
    # Speed and memory. What random crops are cut from is compared as `crops`.
    *("encoded_dir", "cache_latents", "pre_compute_text_embeddings", "dataloader_num_workers", "compile"),
    *("cuda_graph", "offload", "gradient_checkpointing", "auto_batch", "peer_timeout", "local_rank"),
    # Compared as `slots`: this flag times the number of processes.
    "gradient_accumulation_steps",
    # Other last bits: noted on resume, see `environment_of`.
    *("num_threads", "allow_tf32", "enable_xformers_memory_efficient_attention"),
}
_PRIOR_FLAGS = ("prior_loss_weight", "prior_source", "class_prompt")
# The trigger word, which is in the captions that are compared, also decides which of their tags vary.
_TAG_FLAGS = (
    "shuffle_caption",
    "keep_tokens",
    "caption_tag_dropout_rate",
    "caption_variants",
    "trigger_word",
)
# Flags with the values that mean what versions without the flag did: left out of the record then, so that
# runs of those versions can be resumed.
_LATER_FLAGS = {
    "prior_source": "images",
    "buckets": False,
    "alpha_mask": False,
    "unmasked_target": "photo",
    "debiased_estimation": False,
    "input_perturbation": 0.0,
    "min_timestep": 0,
    "max_timestep": 1000,
    "timestep_bias": 0.0,
}
# What is compared of judges, in words.
_JUDGES = {
    "dino": "the hash of --judge_dino",
    "clip": "the hash of --judge_clip",
    "reader": "the hash of --judge_reader's subject.json",
    "dino_transform": "--judge_dino_transform",
    "keep_rare_word": "--judge_keep_rare_word",
}
# With these a step's learning rate depends on the number of steps.
_SCHEDULES_WITH_AN_END = ("linear", "cosine", "cosine_with_restarts", "polynomial")


def identity(
    flags: Mapping[str, Any],
    *,
    slots: int,
    base: str,
    pictures: Mapping[str, Mapping[str, str]],
    captions: Mapping[str, str],
    max_steps: int,
    text_steps: int,
    start: str | None,
    crops: Literal["latents", "pixels"] | None = None,
    judges: Mapping[str, Any] | None = None,
    subjects: Sequence[Any] = (),
) -> dict[str, Any]:
    """The record by which two runs are compared, as JSON types.

    `flags` are all flags of the run. `slots` is the number of micro-batches a step, `base` the fingerprint of
    the base. `pictures` are SHA-256 hashes by source and file name, `captions` are by file name. `text_steps`
    is the number of steps that train the text encoder. `start` is the hash of the adapter that training
    starts from, None for random values. `crops` is what random crops are cut from, None if all crops are
    fixed. `subjects` are the records of the rows of --subjects.
    """
    compared = {name: value for name, value in flags.items() if name not in _FREE_FLAGS}
    if not flags["with_prior_preservation"]:
        compared = {name: value for name, value in compared.items() if name not in _PRIOR_FLAGS}
    if not flags["shuffle_caption"] and not flags["caption_tag_dropout_rate"]:
        compared = {name: value for name, value in compared.items() if name not in _TAG_FLAGS}
    for name, value in _LATER_FLAGS.items():
        if compared.get(name) == value:
            del compared[name]
    if flags["lr_scheduler"] in _SCHEDULES_WITH_AN_END:
        compared["max_train_steps"] = max_steps
    if flags["train_text_encoder"] and flags["train_text_encoder_frac"] < 1:
        compared["text_encoder_steps"] = text_steps
    compared["crops"] = crops or "fixed"
    if subjects:
        compared["subjects"] = subjects
    record = {
        "flags": compared,
        "slots": slots,
        "base": base,
        "pictures": pictures,
        "captions": captions,
        "start": start,
        **({"judges": judges} if judges else {}),
    }
    # tuples become lists, as in a record that was read from a file
    return reader.parsed_json_table(json.dumps(record), "the record")


def environment_of(run: RunOptions, device: torch.device, *, is_compiled: bool) -> dict[str, Any]:
    """Settings and versions that change the last bits of a run on `device`, but not its identity."""
    return environment(
        device,
        LIBRARIES,
        threads=torch.get_num_threads(),
        tf32=run.allow_tf32,
        xformers=run.enable_xformers_memory_efficient_attention,
        compile=is_compiled,
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """One difference between two runs."""

    subject: str
    """The name of a flag, or slots, base, start, pictures, captions, crops or judges."""
    phrase: str
    """The difference in words, with both values."""

    @property
    def is_of_data(self) -> bool:
        """Whether --allow_data_change allows it."""
        return self.subject in ("pictures", "captions")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Every difference between two records of `identity`."""
    return [
        *_flag_differences(before["flags"], now["flags"]),
        *_input_differences(before, now),
        *_crop_differences(before["flags"], now["flags"]),
        *_picture_differences(before["pictures"], now["pictures"]),
        *_caption_differences(before.get("captions", {}), now.get("captions", {})),
        *_judge_differences(before.get("judges", {}), now.get("judges", {})),
    ]


def _flag_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(name, f"--{name} was {before.get(name, 'not given')} and is {now.get(name, 'not given')}")
        for name in sorted({*before, *now} - {"crops"})
        if before.get(name) != now.get(name)
    ]


def _input_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    if before["slots"] != now["slots"]:
        slots = "--gradient_accumulation_steps times the processes"
        yield Difference("slots", f"{slots} was {before['slots']} and is {now['slots']}")
    if before["base"] != now["base"]:
        yield Difference("base", f"the base's weights were {before['base']} and are {now['base']}")
    if before.get("start") != now.get("start"):
        yield Difference("start", "the adapter of --init_adapter was another one")


def _judge_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    # a judge may be added or left out: what it says of one step does not depend on other steps
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield Difference("judges", f"{_JUDGES[name]} was {before[name]} and is {now[name]}")


def _crop_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    # Older versions cut crops from pixels and recorded nothing. `fixed` is equal to both others: crops may
    # become random when class images are added, or fixed with other pictures.
    was, is_now = before.get("crops", "pixels"), now.get("crops", "pixels")
    if was != is_now and "fixed" not in (was, is_now):
        advice = "--cache_latents off cuts pixels, any other latents"
        yield Difference("crops", f"random crops were cut from {was} and are cut from {is_now}: {advice}")


def _picture_differences(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> Iterator[Difference]:
    # before class images are generated, `now` lacks them: not compared then; masks are there from the start
    for source in sorted({*now, *({"mask"} & before.keys())}):
        if source == "held_out" and source not in before:  # of a run that is measured from now on
            continue
        old, new = before.get(source, {}), now.get(source, {})
        for change, names in (
            ("removed", old.keys() - new.keys()),
            ("added", new.keys() - old.keys()),
            ("changed", {name for name in old.keys() & new.keys() if old[name] != new[name]}),
        ):
            if names:
                phrase = f"{len(names)} {source} pictures {change} ({_first_three(names)})"
                yield Difference("pictures", phrase)


def _caption_differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    if names := {name for name in {*before, *now} if before.get(name) != now.get(name)}:
        yield Difference("captions", f"{len(names)} captions changed ({_first_three(names)})")


def _first_three(names: Collection[str]) -> str:
    """The first three names, with escapes spelled out."""
    return ", ".join(ascii(name)[1:-1] for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def is_identity(record: Mapping[str, Any]) -> bool:
    """Whether a record that was read from a file has the tables of `identity`."""
    pictures = record.get("pictures")
    tables = [record.get("flags"), record.get("captions", {}), pictures]
    if isinstance(pictures, dict):
        tables += pictures.values()
    return all(isinstance(table, dict) for table in tables) and {"slots", "base"} <= record.keys()


def check_resume(
    checkpoint: checkpoint_folders.Content,
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    allow_data_change: bool,
) -> list[str]:
    """Check that the run with the record `now` may resume from `checkpoint`. Returns notes.

    `state` is the checkpoint's state, and `environment` that of this run. Raises UserError, with every
    difference, if the checkpoint is of another run.
    """
    folder = checkpoint.folder
    if not is_identity(checkpoint.identity):
        raise UserError(f"--resume_from_checkpoint: the manifest of {folder} has no record of its run")
    refused, notes = [], []
    for difference in differences(checkpoint.identity, now):
        if difference.subject == "max_train_steps":
            effect = "--lr_scheduler depends on it, so the result is not that of an unbroken run"
            notes.append(f"{difference.phrase}: {effect}")
        elif difference.is_of_data and allow_data_change:
            notes.append(f"{difference.phrase}; the run goes on with the present ones")
        else:
            refused.append(difference)
    if refused:
        phrases = [difference.phrase for difference in refused]
        if any(difference.is_of_data for difference in refused):
            phrases.append("(--allow_data_change allows other pictures)")
        raise UserError(f"--resume_from_checkpoint: {folder} is of another run:\n  " + "\n  ".join(phrases))
    return notes + _environment_notes(state.get("surroundings", {}), environment)


def _environment_notes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A note for each difference between two environments."""
    effect = "the result may differ in its last bits"
    before = {"compile": False, **before}  # checkpoints older than --compile do not record it
    changes = {name: f"is {value}" for name, value in now.items() if before.get(name) != value}
    changes |= {name: "is not recorded by this version" for name in before if name not in now}
    return [f"{name} was {before.get(name)} and {change}: {effect}" for name, change in changes.items()]
