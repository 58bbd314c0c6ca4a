"""Families of base models: load the frozen parts, encode prompts, make pipelines.

A family is one record in `FAMILIES`, chosen by the pipeline class that the base's `model_index.json` names, never by trying to load.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dreambooth.errors import UserError
from dreambooth.options import BaseModel, TextEncoding

_FLAG = "--pretrained_model_name_or_path"

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
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            shown = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise UserError(f"{_FLAG}: {name} is not a diffusers pipeline folder: it has no model_index.json; it holds {shown}")
    elif folder.is_file():
        raise UserError(f"{_FLAG}: {name} is a single file; convert it to a diffusers folder first")
    else:
        folder = _download(base)
    _check_parts(folder, name, own_tokenizer=base.tokenizer_name is not None)
    return folder


def _download(base: BaseModel) -> Path:
    name = base.pretrained_model_name_or_path
    try:
        config = DiffusionPipeline.load_config(name, revision=base.revision)
        if config.get("_class_name") not in FAMILIES:  # before gigabytes are fetched
            raise UserError(_unknown(name, config))
        return Path(DiffusionPipeline.download(name, revision=base.revision, variant=base.variant, safety_checker=None, feature_extractor=None))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{_FLAG}: there is no folder {name}, and as a hub id it cannot be read: {reason}") from None


def _unknown(name: str, config: Any) -> str:
    return f"{_FLAG}: {name} is a {config.get('_class_name')}; this version trains {', '.join(FAMILIES)}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{_FLAG}: {path} cannot be read ({' '.join(str(error).split())})") from None


def _check_parts(folder: Path, name: str, *, own_tokenizer: bool) -> None:
    config = _read_json(folder / "model_index.json")
    if config.get("_class_name") not in FAMILIES:
        raise UserError(_unknown(name, config))
    family = FAMILIES[config["_class_name"]]
    missing = [part for part in family.components if not (folder / part).is_dir() and not (part == "tokenizer" and own_tokenizer)]
    if missing:
        raise UserError(f"{_FLAG}: {name} lacks the folders {', '.join(missing)}")
    unet, text = (_read_json(folder / part / "config.json") for part in ("unet", "text_encoder"))
    if unet.get("cross_attention_dim") != text.get("hidden_size"):
        widths = f"{unet.get('cross_attention_dim')} wide text and its text encoder gives {text.get('hidden_size')}"
        raise UserError(f"{_FLAG}: the UNet of {name} takes {widths}: parts of two different bases")
    prediction_type = _read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{_FLAG}: Unknown prediction type {prediction_type} in the scheduler of {name}; it must be epsilon or v_prediction")


def own_side(folder: Path) -> int:
    """Pixels along one side of the pictures that the base draws unasked."""
    unet, vae = (_read_json(folder / part / "config.json") for part in ("unet", "vae"))
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
        return _load(AutoTokenizer, base.tokenizer_name, "--tokenizer_name", use_fast=True)
    return _load(AutoTokenizer, str(folder), _FLAG, subfolder="tokenizer", use_fast=True)


def _load(kind: Any, name: str, flag: str, **where: Any) -> Any:
    """`from_pretrained` whose failure is one line for the user."""
    try:
        return kind.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        part = where.get("subfolder") or "it"
        raise UserError(f"{flag}: {part} of {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def max_tokens(folder: Path, text: TextEncoding | None = None) -> int:
    """Tokens that a prompt is padded to, begin and end included. Raises UserError if --tokenizer_max_length is more than fits."""
    # the encoder's positions, not the tokenizer's model_max_length, which is 1e30 where its files do not say
    room = _read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", 77)
    wanted = text.tokenizer_max_length if text else None
    if wanted is not None and wanted > room:
        raise UserError(f"--tokenizer_max_length must be at most {room}, the text encoder's positions; got {wanted}")
    return wanted or room


def words_cut(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> str:
    """The end of the prompt that does not fit into `limit` tokens, "" if all of it does."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[limit - 2 :])).strip()


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, str | None], limit: int) -> None:
    """Raise UserError naming flag and words for every prompt that would be cut off."""
    problems = []
    for flag, prompt in prompts.items():
        if prompt and (cut := words_cut(tokenizer, prompt, limit)):
            problems.append(f"{flag} is longer than {limit} tokens; cut off would be: {cut!r}. Make it shorter")
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
        text_encoder=_load(CLIPTextModel, name, _FLAG, subfolder="text_encoder", dtype=dtype, variant=variant),
        vae=_load(AutoencoderKL, name, _FLAG, subfolder="vae", dtype=torch.float32, variant=variant),
        unet=_load(UNet2DConditionModel, name, _FLAG, subfolder="unet", dtype=dtype, variant=variant),
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
    family = FAMILIES[_read_json(folder / "model_index.json")["_class_name"]]
    own = {"tokenizer": load_tokenizer(base, folder)} if base.tokenizer_name else {}
    pipeline = _load(family.pipeline, str(folder), _FLAG, variant=base.variant, dtype=dtype, safety_checker=None, **own)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to(device)
