"""Families of base models: load the frozen parts, encode prompts, make pipelines.

A family is one record in `FAMILIES`, chosen by the pipeline class that the base's `model_index.json` names, never by trying to load.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dreambooth import base_folders
from dreambooth.errors import UserError
from dreambooth.options import BaseModel, TextEncoding
from dreambooth.printable import shown

_FLAG = "--pretrained_model_name_or_path"
_LONGEST_PROMPT = 20_000  # characters: far more than fits, and little enough to find the words that do not

# a bar for every loaded file would tear the run's own
transformers_logging.disable_progress_bar()
diffusers_logging.disable_progress_bar()


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one kind of base apart. `pipeline` draws with it; `components` must be in its folder."""

    name: str
    pipeline: type[DiffusionPipeline]
    components: tuple[str, ...]


FAMILIES = {
    "StableDiffusionPipeline": Family(
        "Stable Diffusion 1.x / 2.x", StableDiffusionPipeline, ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
    ),
}


@dataclasses.dataclass
class FrozenParts:
    """The base, frozen. `text_encoder` is None once it has been freed."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: CLIPTextModel | None
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    max_tokens: int


def local_folder(base: BaseModel) -> Path:
    """The base's folder on disk; a hub id is downloaded (without the safety checker, which is never used) or found in the cache.

    Raises UserError if it is no pipeline of a family that this version knows, or lacks a part.
    """
    name = base.pretrained_model_name_or_path
    folder = Path(name)
    try:
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise UserError(base_folders.no_index(folder, name))
        elif folder.exists():
            how = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
            raise UserError(f"{_FLAG}: {shown(name)} is a single file; convert it to a diffusers folder first: {how}")
        else:
            folder = _download(base)
    except OSError as error:
        raise UserError(f"{_FLAG}: {shown(name)} cannot be read: {error.strerror or error}") from None
    index = base_folders.read_json(folder / "model_index.json")
    family = _family_of(index, name)
    base_folders.check(folder, name, index, family.components, variant=base.variant, own_tokenizer=base.tokenizer_name is not None)
    return folder


def _download(base: BaseModel) -> Path:
    name = base.pretrained_model_name_or_path
    try:
        _family_of(DiffusionPipeline.load_config(name, revision=base.revision), name)  # before gigabytes are fetched
        left_out = {"safety_checker": None, "feature_extractor": None}
        return Path(DiffusionPipeline.download(name, revision=base.revision, variant=base.variant, use_safetensors=True, **left_out))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{_FLAG}: there is no folder {shown(name)}, and as a hub id it cannot be read: {shown(reason)}") from None


def _family_of(index: Any, name: str) -> Family:
    found = index.get("_class_name") if isinstance(index, Mapping) else index
    if not isinstance(found, str) or found not in FAMILIES:
        raise UserError(base_folders.unknown_class(name, found, list(FAMILIES)))
    return FAMILIES[found]


def own_side(folder: Path) -> int:
    """Pixels along one side of the pictures that the base draws unasked."""
    unet, vae = (base_folders.read_json(folder / part / "config.json") for part in ("unet", "vae"))
    return int(unet.get("sample_size", 64)) * 2 ** (len(vae["block_out_channels"]) - 1)


def fingerprint(folder: Path, variant: str | None) -> str:
    """A hash of the base's weight files and configurations: the same base counts as the same wherever it lies."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "unet", "vae", "scheduler"):
        files = sorted((folder / part).glob("*.json")) + sorted((folder / part).glob("*.safetensors")) + sorted((folder / part).glob("*.bin"))
        of_variant = [f for f in files if f".{variant}." in f.name]
        plain = [f for f in files if f.name.count(".") == 1]  # other variants may lie beside the files that are loaded
        files = [f for f in files if f.suffix == ".json"] + [f for f in (of_variant or plain) if f.suffix != ".json"]
        for path in files:
            digest.update(f"{part}/{path.name}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_tokenizer(base: BaseModel, folder: Path) -> PreTrainedTokenizerBase:
    if base.tokenizer_name:
        return _load(AutoTokenizer, base.tokenizer_name, "--tokenizer_name", use_fast=True, trust_remote_code=False)
    return _load(AutoTokenizer, str(folder), _FLAG, subfolder="tokenizer", use_fast=True, trust_remote_code=False)


def _load(kind: Any, name: str, flag: str, **where: Any) -> Any:
    """`from_pretrained` whose failure is one line for the user."""
    try:
        return kind.from_pretrained(name, **where)
    except Exception as error:  # the libraries raise KeyError, TypeError, AttributeError, ... for files that say nonsense
        part = where.get("subfolder") or "it"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{flag}: {part} of {shown(name)} cannot be loaded: {shown(reason)}") from None


def max_tokens(folder: Path, text: TextEncoding | None = None) -> int:
    """Tokens that a prompt is padded to, begin and end included. Raises UserError if --tokenizer_max_length is more than fits."""
    # the encoder's positions, not the tokenizer's model_max_length, which is 1e30 where its files do not say
    room = base_folders.read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", 77)
    wanted = text.tokenizer_max_length if text else None
    if wanted is not None and wanted > room:
        raise UserError(f"--tokenizer_max_length must be at most {room}, the text encoder's positions; got {wanted}")
    return wanted or room


def _shortened(text: str) -> str:
    """A text that may hold a whole prompt, as it may stand in a message."""
    return shown(text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}")


def words_cut(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> str:
    """The end of the prompt that does not fit into `limit` tokens, "" if all of it does."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[limit - 2 :])).strip()


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, str | None], limit: int) -> None:
    """Raise UserError naming flag and words for every prompt that would be cut off, or is no text."""
    problems = []
    for flag, prompt in prompts.items():
        if not prompt:
            continue
        if len(prompt) > _LONGEST_PROMPT:
            problems.append(f"{_shortened(flag)} has {len(prompt):,} characters; only {limit} tokens, about as many words, are read. Make it shorter")
            continue
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            problems.append(f"{_shortened(flag)} has bytes in it that are no UTF-8 text")
            continue
        if cut := words_cut(tokenizer, prompt, limit):
            problems.append(f"{_shortened(flag)} is longer than {limit} tokens; cut off would be: {_shortened(repr(cut))}. Make it shorter")
    if problems:
        raise UserError("\n".join(problems))


def load_parts(
    folder: Path, variant: str | None, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device, limit: int
) -> FrozenParts:
    """The frozen models on `device`: UNet and text encoder in `dtype`, the VAE in float32, all in eval mode.

    The VAE is small, and Stable Diffusion's overflows in float16. Raises UserError if a part is missing or not understood.
    """
    name = str(folder)
    parts = FrozenParts(
        tokenizer=tokenizer,
        text_encoder=_load(CLIPTextModel, name, _FLAG, subfolder="text_encoder", dtype=dtype, variant=variant, use_safetensors=True),
        vae=_load(AutoencoderKL, name, _FLAG, subfolder="vae", dtype=torch.float32, variant=variant, use_safetensors=True),
        unet=_load(UNet2DConditionModel, name, _FLAG, subfolder="unet", dtype=dtype, variant=variant, use_safetensors=True),
        noise_scheduler=_load(DDPMScheduler, name, _FLAG, subfolder="scheduler"),
        max_tokens=limit,
    )
    for model in (parts.unet, parts.vae, parts.text_encoder):
        assert model is not None
        model.requires_grad_(False).eval().to(device)
    # the layout that convolutions want: on a CPU it is the difference between seconds and minutes
    parts.unet.to(memory_format=torch.channels_last)
    parts.vae.to(memory_format=torch.channels_last)
    return parts


def encode_prompts(parts: FrozenParts, prompts: Sequence[str], *, attention_mask: bool = False) -> torch.Tensor:
    """[prompts, tokens, width]: the text encoder's last hidden state after its final norm; gradients flow if it is trained."""
    assert parts.text_encoder is not None
    tokens = parts.tokenizer(list(prompts), padding="max_length", max_length=parts.max_tokens, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask.to(parts.text_encoder.device) if attention_mask else None
    return parts.text_encoder(tokens.input_ids.to(parts.text_encoder.device), attention_mask=mask)[0]


def pipeline_of(parts: FrozenParts) -> Any:
    """A pipeline on the models in memory, with the multistep DPM solver and no safety checker (it blackens pictures)."""
    config = {}
    if "learned" in str(getattr(parts.noise_scheduler.config, "variance_type", "")):
        config["variance_type"] = "fixed_small"
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=DPMSolverMultistepScheduler.from_config(parts.noise_scheduler.config, **config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(base: BaseModel, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole pipeline from disk, as plain diffusers loads it, with its own scheduler and no safety checker."""
    family = FAMILIES[base_folders.read_json(folder / "model_index.json")["_class_name"]]
    own = {"tokenizer": load_tokenizer(base, folder)} if base.tokenizer_name else {}
    pipeline = _load(family.pipeline, str(folder), _FLAG, variant=base.variant, dtype=dtype, use_safetensors=True, safety_checker=None, **own)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to(device)
