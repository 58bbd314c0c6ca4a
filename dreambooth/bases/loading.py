"""Loads parts of a base: tokenizers, text encoders, VAE and UNet, all frozen.

A model's weights are read from its safetensors files once, each directly into its final dtype, memory layout
and device. `from_pretrained` would map whole files into memory and cast from there, so that file and model
are resident together; and weights that need no cast would keep the alignment they have in the file, which
changes the last bits of matrix products. Key names, tied weights, buffers and weights that stay in float32
are still decided by the libraries.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from dreambooth.files import digests, safetensors_files
from dreambooth.io import reader
from dreambooth.io.errors import UserError, is_memory_error, shown, type_and_reason
from dreambooth.options.training import TextOptions

_LARGEST_TOKENIZER = 32 * 2**20  # bytes of one of its files
_WORDS = ("tokenizer.json", "vocab.json", "vocab.txt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
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
    places = [(str(base.folder), BASE_FLAG, folder) for folder, _ in base.family.text.values()]
    if base.options.tokenizer_name:
        places[0] = (base.options.tokenizer_name, "--tokenizer_name", "")
    return tuple(
        _tokenizer(*place, base.config(encoder)["vocab_size"])
        for place, encoder in zip(places, base.family.text, strict=True)
    )


def _tokenizer(name: str, flag: str, subfolder: str, vocab_size: int) -> PreTrainedTokenizerBase:
    with _explained(flag, subfolder or "it", name):
        _check_tokenizer(Path(name, subfolder))
        tokenizer = AutoTokenizer.from_pretrained(
            name, subfolder=subfolder, use_fast=True, trust_remote_code=False
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


def load_part(base: Base, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of one part, frozen and in eval mode."""
    files = base.weight_files(part)
    place = BASE_FLAG, part, str(base.folder)
    if part == "vae" and base.given_vae:
        place = VAE_FLAG, "it", str(base.given_vae)
    with _explained(*place):
        return load_model(base.family.kinds[part], base.part_folder(part), files, dtype, device)


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


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight that is still in its file. Indexing it with `...`, as transformers does, reads it into memory
    of its own."""

    path: Path
    key: str
    dtype: str
    start: int
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.read(torch.empty(self.size, dtype=torch.uint8))

    def read(self, buffer: torch.Tensor) -> torch.Tensor:
        """The weight in the first bytes of `buffer`, uint8 [bytes]. Raises UserError if the file ends
        before."""
        data = buffer[: self.size]
        tensor = data.view(self.torch_dtype).view(self.shape)
        if not self.size:
            return tensor
        values = memoryview(data.numpy())  # type: ignore[arg-type]
        with reader.opened(self.path) as file:
            file.seek(self.start)
            if file.readinto(values) < values.nbytes:
                raise UserError(
                    f"{shown(self.path)} ends within {self.key}: it has changed since it was checked"
                )
        return tensor


def load_model(
    kind: type, folder: Path, files: Sequence[Path], dtype: torch.dtype, device: torch.device
) -> Any:
    """A model of class `kind`, of diffusers or transformers, with the config of `folder` and the weights of
    the safetensors `files`.

    The model is on `device` and in `dtype`, except for what the library keeps in float32, in eval mode and
    without gradients. One of diffusers is in channels_last: on a CPU, convolutions take minutes in another
    layout and seconds in this one. Weights that the model lacks are ignored, as `from_pretrained` does: many
    bases hold the rest of CLIP. Raises UserError if the files lack a weight of the model, or have it in
    another shape.
    """
    weights = _weights(files)
    if issubclass(kind, ModelMixin):
        model = _diffusers_model(kind, folder, weights, dtype, device)
    else:
        model = _transformers_model(kind, folder, weights, dtype)
    return model.requires_grad_(False).eval().to(device)


def _weights(files: Iterable[Path]) -> dict[str, _Weight]:
    """The weights of all files by key."""
    weights: dict[str, _Weight] = {}
    for path in files:
        header = safetensors_files.read(path, safetensors_files.BASE)
        weights |= {
            key: _Weight(path, key, dtype, start, header.shapes[key])
            for key, (dtype, start) in header.places.items()
        }
    return weights


def _diffusers_model(
    kind: Any, folder: Path, weights: Mapping[str, _Weight], dtype: torch.dtype, device: torch.device
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


def _transformers_model(kind: Any, folder: Path, weights: Mapping[str, _Weight], dtype: torch.dtype) -> Any:
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
