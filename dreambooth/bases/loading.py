"""Loads parts of a base: tokenizers, text encoders, VAE and UNet, all frozen.

A model's weights are read from its safetensors files once, each directly into its final dtype, memory layout
and device. `from_pretrained` would map whole files into memory and cast from there, so that file and model
are resident together; and weights that need no cast would keep the alignment they have in the file, which
changes the last bits of matrix products. Key names, tied weights, buffers and weights that stay in float32
are still decided by the libraries.
"""

import contextlib
import copy
import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.models.modeling_utils import no_init_weights
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dreambooth.bases import configs, families
from dreambooth.bases.families import Base, Family
from dreambooth.bases.folders import BASE_FLAG, VAE_FLAG
from dreambooth.bases.prompts import TextParts
from dreambooth.bases.weights import Weight
from dreambooth.files import digests
from dreambooth.io import reader
from dreambooth.io.errors import UserError, is_memory_error, shown, type_and_reason
from dreambooth.options.training import TextOptions

_LARGEST_TOKENIZER = 32 * 2**20  # bytes of one of its files
_WORDS = ("tokenizer.json", "vocab.json", "vocab.txt")
# Weights read at once. Each is held twice while it is cast: as in the file, in a buffer of the largest
# weight's size, and as wanted.
_READERS = 2

# one progress bar per loaded file would break up the run's own
transformers_logging.disable_progress_bar()
diffusers_logging.disable_progress_bar()


@dataclasses.dataclass
class FrozenParts:
    """The frozen parts of a base that are in memory."""

    base: Base
    text: TextParts | None
    """None once every prompt is encoded."""
    vae: AutoencoderKL | None
    """None once every photo is encoded, and for a base that works on pixels."""
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler | EDMEulerScheduler | EulerDiscreteScheduler

    @property
    def family(self) -> Family:
        return self.base.family


def load_tokenizers(base: Base) -> tuple[PreTrainedTokenizerBase, ...]:
    """One tokenizer for each text encoder. --tokenizer_name replaces the first. Raises UserError if one
    cannot be loaded, fails, or gives tokens that its encoder does not have."""
    return tuple(
        _tokenizer(base, name, None if number else base.options.tokenizer_name, encoder)
        for number, (encoder, (name, _)) in enumerate(base.family.text.items())
    )


def _tokenizer(base: Base, folder: str, given: str | None, encoder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a text encoder: the `given` one, else the one that the base has in `folder`."""
    place = (given or str(base.folder), "" if given else folder)
    vocab_size = base.config(encoder)["vocab_size"]
    with _explained("--tokenizer_name" if given else BASE_FLAG, place[1] or "it", place[0]):
        if base.single_file and not given:
            return base.single_file.tokenizer(folder)
        _check_tokenizer(Path(*place))
        tokenizer = AutoTokenizer.from_pretrained(
            place[0], subfolder=place[1], use_fast=True, trust_remote_code=False
        )
        # of odd files a tokenizer can be made that fails when it is used
        tokenizer.decode(tokenizer("a", verbose=False).input_ids)
        tokens = tokenizer(["a"], padding="max_length", max_length=8, truncation=True).input_ids[0]
        if max(tokens) >= vocab_size:
            raise UserError(f"it has a token {max(tokens)}, and its text encoder has {vocab_size} tokens")
    return tokenizer  # type: ignore[no-any-return]


def _check_tokenizer(folder: Path) -> None:
    """Raise UserError unless the files of a tokenizer's folder can be read, one with words among them.

    transformers passes over what is no file, and makes a tokenizer of other words. A `folder` that does not
    exist may be the id of a repository.
    """
    if not folder.is_dir():
        return
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".model", ".txt")]
    for path in paths:
        reader.read_bytes(path, shown(path.name), _LARGEST_TOKENIZER)
    if not any(path.name.startswith(_WORDS) or path.suffix == ".model" for path in paths):
        raise UserError(f"it has none of {', '.join(_WORDS)} and *.model")


def text_without_encoders(
    base: Base, tokenizers: tuple[PreTrainedTokenizerBase, ...], text: TextOptions
) -> TextParts:
    """How the prompts of a run are tokenized and encoded, with no encoder loaded yet."""
    return TextParts(
        encode=base.family.encode,
        tokenizers=tokenizers,
        encoders={},
        max_tokens=families.max_tokens(base, text),
        attention_mask=text.text_encoder_use_attention_mask,
        clip_skip=text.clip_skip or 0,
        zeros_for_empty=base.zeros_for_empty,
    )


def load_encoders(base: Base, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The text encoders by folder, frozen and in eval mode. Raises UserError, as all loaders here do, if one
    cannot be loaded."""
    return {encoder: load_part(base, encoder, dtype, device) for encoder in base.family.text}


def load_vae(base: Base, device: torch.device) -> AutoencoderKL | None:
    """The VAE, frozen and in eval mode; None for a base that works on pixels.

    It is in float32: it is small, and Stable Diffusion's VAE overflows in float16.
    """
    return load_part(base, "vae", torch.float32, device) if base.family.has_vae else None


def load_unet(base: Base, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The UNet, frozen and in eval mode."""
    return load_part(base, "unet", dtype, device)


# Parts of bases by digest, part and dtype, within `parts_kept`; None at other times.
_kept: dict[tuple[str, str, torch.dtype], Any] | None = None


@contextlib.contextmanager
def parts_kept() -> Iterator[None]:
    """Within the block each part of a base is read from its files once, and kept in main memory. `load_part`
    returns models of their own with the same weights: what is injected into one, or put in the place of its
    weights, is in no other."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def load_part(base: Base, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of one part, frozen and in eval mode."""
    if _kept is None:
        return _read_part(base, part, dtype, device)
    key = base.part_digest(part), part, dtype
    if key not in _kept:
        _kept[key] = _read_part(base, part, dtype, torch.device("cpu"))
    return _with_same_weights(_kept[key]).to(device)


def _with_same_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model whose parameters and buffers are the memory of the model's."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): torch.nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def _read_part(base: Base, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    place = BASE_FLAG, part, str(base.place)
    if part == "vae" and base.given_vae:
        place = VAE_FLAG, "it", str(base.given_vae)
    with _explained(*place):
        weights = base.weights(part)
        return load_model(base.family.kinds[part], base.part_folder(part), weights, dtype, device)


def load_scheduler(base: Base, kind: Any, **changes: Any) -> Any:
    """A scheduler of a class of diffusers with the settings of the base and these `changes`."""
    if base.options.prediction_type:
        changes["prediction_type"] = base.options.prediction_type
    with _explained(BASE_FLAG, "scheduler", str(base.place)):
        return kind.from_config({**base.config("scheduler"), **changes})


def tokenizer_identity(name: str) -> str:
    """What --tokenizer_name `name` is compared by: a hash of the files of a folder, or the id on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\n".encode() + digests.of(path))
    return f"a folder with files {digest.hexdigest()[:16]}"


def from_pretrained(kind: Any, name: str, flag: str, **settings: Any) -> Any:
    """`kind.from_pretrained`. Raises UserError in one line, starting with `flag`, if that fails."""
    with _explained(flag, settings.get("subfolder") or "it", name):
        return kind.from_pretrained(name, **settings)


@contextlib.contextmanager
def _explained(flag: str, part: str, name: str) -> Iterator[None]:
    """Turns a failure to load `part` of `name`, given by `flag`, into a UserError of one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {part} of {shown(name)} cannot be loaded: {error}") from None
    # for malformed files the libraries raise KeyError, TypeError, ...; those in Rust a BaseException
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if is_memory_error(error) or not (isinstance(error, Exception) or is_panic):
            raise
        reason = type_and_reason(error)
        raise UserError(f"{flag}: {part} of {shown(name)} cannot be loaded: {reason}") from None


def load_model(
    kind: type, folder: Path, weights: Mapping[str, Weight], dtype: torch.dtype, device: torch.device
) -> Any:
    """A model of class `kind`, of diffusers or transformers, with the config of `folder` and these weights.

    The model is on `device` and in `dtype`, except for what the library keeps in float32, in eval mode and
    without gradients. One of diffusers is in channels_last: on a CPU, convolutions take minutes in another
    layout and seconds in this one. Weights that the model lacks are ignored, as `from_pretrained` does: many
    bases hold the rest of CLIP. Raises UserError if a weight of the model is missing, or has another shape.
    """
    if issubclass(kind, ModelMixin):
        model = _diffusers_model(kind, folder, weights, dtype, device)
    else:
        model = _transformers_model(kind, folder, weights, dtype)
    return model.requires_grad_(False).eval().to(device)


def _diffusers_model(
    kind: Any, folder: Path, weights: Mapping[str, Weight], dtype: torch.dtype, device: torch.device
) -> Any:
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), accelerate.init_empty_weights():
            model = kind.from_config(kind.load_config(folder))
    finally:
        torch.set_default_dtype(default_dtype)
    keys = {key: key for key in weights}
    model._fix_state_dict_keys_on_load(keys)  # attention layers of older VAEs have other names
    wanted = model.state_dict()
    mismatched = [
        (name, weights[key].shape, wanted[name].shape) for name, key in keys.items() if name in wanted
    ]
    configs.check_fit(wanted.keys() - keys.keys(), mismatched)

    largest = max(weights[keys[name]].size for name in wanted)
    of_thread = threading.local()

    def read(name: str) -> torch.Tensor:
        weight = weights[keys[name]]
        is_kept = any(part in name.split(".") for part in kind._keep_in_fp32_modules or ())
        float_dtype = torch.float32 if is_kept else dtype
        weight_dtype = float_dtype if weight.torch_dtype.is_floating_point else weight.torch_dtype
        layout = torch.channels_last if len(weight.shape) == 4 else torch.preserve_format
        if device.type == "cpu" and weight.torch_dtype == weight_dtype and len(weight.shape) != 4:
            return weight[...]  # as it is in the file
        # one buffer for each thread: the first use of a page of memory takes longer than filling it
        if not hasattr(of_thread, "buffer"):
            of_thread.buffer = torch.empty(largest, dtype=torch.uint8)
        tensor = weight.read(of_thread.buffer)
        if device.type == "cuda":  # which casts faster, and without new pages of main memory
            tensor = tensor.to(device)
        return tensor.to(device, weight_dtype, memory_format=layout, copy=device.type != "cuda")

    with ThreadPoolExecutor(_READERS) as pool:
        model.load_state_dict(dict(zip(wanted, pool.map(read, wanted), strict=True)), assign=True)
    model.register_to_config(_name_or_path=str(folder))
    # for buffers, and for weights of one pixel and channel, which count as being in both layouts
    return model.to(memory_format=torch.channels_last)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Suppresses transformers' table of missing and unused keys: what matters of it, `configs.check_fit`
    raises."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_let_through(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    # a filter: at a higher log level transformers would warn of weights that are not sharded
    logger.addFilter(is_let_through)
    try:
        yield
    finally:
        logger.removeFilter(is_let_through)


def _transformers_model(kind: Any, folder: Path, weights: Mapping[str, Weight], dtype: torch.dtype) -> Any:
    config = kind.config_class(**configs.read(kind, folder / "config.json"))
    with _without_report():
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    configs.check_fit(report["missing_keys"], report["mismatched_keys"])
    model.config.name_or_path = str(folder)
    return model
