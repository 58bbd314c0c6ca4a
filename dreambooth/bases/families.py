"""Families of base models: find one on disk, load the frozen parts, make pipelines.

A family is one record in `FAMILIES`, chosen by the pipeline class that the base's `model_index.json` names, never by trying to load.
"""

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from dreambooth.bases import folders as base_folders
from dreambooth.bases import loading, prompts
from dreambooth.bases.prompts import PromptEmbeds, TextParts
from dreambooth.errors import UserError, shown
from dreambooth.files import digests
from dreambooth.options.training import BaseOptions, TextOptions

_FLAG, _VAE_FLAG = "--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path"
# Parts that draw nothing: never fetched, never loaded. A safety checker blackens pictures, a watermarker marks those that are trained on.
_LEFT_OUT = ("safety_checker", "feature_extractor", "watermarker", "image_encoder")

# a bar for every loaded file would tear the run's own
transformers_logging.disable_progress_bar()
diffusers_logging.disable_progress_bar()


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one kind of base apart. `key` names its defaults among the options; `text` are its encoders, as (tokenizer, encoder) folders
    and the encoder's class; `unused_layers` says how many layers at the end of each encoder change nothing of what the UNet sees."""

    key: str
    name: str
    pipeline: type[DiffusionPipeline]
    text: dict[str, tuple[str, type]]
    encode: Callable[[TextParts, Sequence[str]], PromptEmbeds]
    unused_layers: dict[str, int]
    has_vae: bool = True
    trains_text: bool = True
    max_tokens: int | None = None
    """None is what the text encoder has positions for."""

    @property
    def classes(self) -> dict[str, str]:
        """The class that each model must have, by its folder."""
        vae = {"vae": "AutoencoderKL"} if self.has_vae else {}
        return {
            "unet": "UNet2DConditionModel",
            **vae,
            **{encoder: kind.__name__ for encoder, (_, kind) in self.text.items()},
        }

    @property
    def folders(self) -> tuple[str, ...]:
        return (*(tokenizer for tokenizer, _ in self.text.values()), *self.classes, "scheduler")


FAMILIES = {
    "StableDiffusionPipeline": Family(
        "sd",
        "Stable Diffusion 1.x / 2.x",
        StableDiffusionPipeline,
        text={"text_encoder": ("tokenizer", CLIPTextModel)},
        encode=prompts.encode_clip,
        unused_layers={"text_encoder": 0},
    ),
    "StableDiffusionXLPipeline": Family(
        "sdxl",
        "Stable Diffusion XL",
        StableDiffusionXLPipeline,
        text={
            "text_encoder": ("tokenizer", CLIPTextModel),
            "text_encoder_2": ("tokenizer_2", CLIPTextModelWithProjection),
        },
        encode=prompts.encode_clip_pair,
        unused_layers={
            "text_encoder": 1,
            "text_encoder_2": 0,
        },  # the second's vector for the whole prompt comes from its last layer
    ),
    "IFPipeline": Family(
        "if",
        "DeepFloyd IF, first stage",
        IFPipeline,
        text={"text_encoder": ("tokenizer", T5EncoderModel)},
        encode=prompts.encode_t5,
        unused_layers={},
        has_vae=False,
        trains_text=False,
        max_tokens=77,  # T5 takes more; the UNet was trained with so many
    ),
}


@dataclasses.dataclass(frozen=True)
class Base:
    """A base on disk, checked: what it is, and where."""

    family: Family
    folder: Path
    own_vae: Path | None
    """Folder of the VAE that takes the place of the base's."""
    options: BaseOptions
    index: Mapping[str, Any]
    """Its model_index.json."""

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the pictures that the base draws by default."""
        sample = int(base_folders.read_json(self.folder / "unet" / "config.json").get("sample_size", 64))
        return sample * self.vae_stride

    @property
    def vae_stride(self) -> int:
        """Pixels per latent along one side; 1 for a base that works on pixels."""
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1) if self.family.has_vae else 1

    @property
    def latent_channels(self) -> int:
        return self._vae_config["latent_channels"] if self.family.has_vae else 3

    @property
    def vae_config(self) -> Mapping[str, Any] | None:
        """The configuration of the VAE as its model would have it, without loading that; None for a base that works on pixels."""
        if not self.family.has_vae:
            return None
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(AutoencoderKL.__init__).parameters.items()
        }
        return defaults | self._vae_config

    @property
    def _vae_config(self) -> dict[str, Any]:
        return base_folders.read_json((self.own_vae or self.folder / "vae") / "config.json")

    @property
    def is_edm(self) -> bool:
        """Whether it was trained on continuous noise levels (arXiv 2206.00364), as its scheduler's class says."""
        scheduler = self.index.get("scheduler")
        return isinstance(scheduler, list) and "EDM" in str(scheduler[-1])

    def layers(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the base's layers by component and module, from its files' headers."""
        found = {
            part: base_folders.weight_shapes(self.folder, part, self.options.variant)
            for part in ("unet", *self.family.text)
        }
        return {
            part: {
                key.removesuffix(".weight"): shape for key, shape in own.items() if key.endswith(".weight")
            }
            for part, own in found.items()
        }

    def fingerprint(self) -> str:
        """A hash of the base's weight files and configurations: the same base counts as the same wherever it lies."""
        digest = hashlib.sha256()
        for part in (*self.family.text, "unet", *(["vae"] if self.family.has_vae else []), "scheduler"):
            for path in self._files(part):
                digest.update(f"{part}/{path.name}\n".encode() + digests.of(path))
        if self.options.prediction_type:
            digest.update(self.options.prediction_type.encode())
        return digest.hexdigest()[:16]

    def part_digest(self, part: str) -> str:
        """A hash of one part's weight files and configurations, wherever it lies."""
        digest = hashlib.sha256()
        for path in self._files(part):
            digest.update(f"{path.name}\n".encode() + digests.of(path))
        return digest.hexdigest()

    def _files(self, part: str) -> list[Path]:
        """Configurations and weights of a part. Of the weights those that are loaded: others may lie beside them."""
        own = self.own_vae if part == "vae" else None
        folder = own or self.folder / part
        files = sorted(folder.glob("*.json"))
        if part != "scheduler":
            files += base_folders.weight_files(
                folder.parent, folder.name, None if own else self.options.variant, kind=part
            )
        return files


@dataclasses.dataclass
class FrozenParts:
    """What of the base is in memory, frozen. `text` and `vae` are None where all that is asked of them has been encoded; `vae` also for a base
    that works on pixels."""

    base: Base
    text: TextParts | None
    vae: AutoencoderKL | None
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler | EDMEulerScheduler | EulerDiscreteScheduler

    @property
    def family(self) -> Family:
        return self.base.family


def find(options: BaseOptions) -> Base:
    """The base on disk; a hub id is downloaded (without its safety checker) or found in the cache.

    Raises UserError if it is no pipeline of a family that this version knows, or lacks a part.
    """
    name = options.pretrained_model_name_or_path
    folder = Path(name)
    try:
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise UserError(base_folders.no_index(folder, name))
        elif folder.exists():
            how = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
            raise UserError(
                f"{_FLAG}: {shown(name)} is a single file; convert it to a diffusers folder first: {how}"
            )
        else:
            folder = _download(options)
    except OSError as error:
        raise UserError(f"{_FLAG}: {shown(name)} cannot be read: {error.strerror or error}") from None
    index = base_folders.read_json(folder / "model_index.json")
    family = _family_of(index, name)
    own_tokenizer = options.tokenizer_name is not None
    base_folders.check(
        folder,
        name,
        index,
        family.classes,
        family.folders,
        variant=options.variant,
        own_tokenizer=own_tokenizer,
    )
    vae_name = options.pretrained_vae_model_name_or_path
    own_vae = _find_vae(vae_name, family, folder) if vae_name else None
    return Base(family, folder, own_vae, options, index)


def _download(base: BaseOptions) -> Path:
    name = base.pretrained_model_name_or_path
    try:
        index = DiffusionPipeline.load_config(name, revision=base.revision)
        _family_of(index, name)  # before gigabytes are fetched
        left_out = dict.fromkeys((part for part in _LEFT_OUT if part in index), None)
        return Path(
            DiffusionPipeline.download(
                name, revision=base.revision, variant=base.variant, use_safetensors=True, **left_out
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{_FLAG}: there is no folder {shown(name)}, and as a hub id it cannot be read: {shown(reason)}"
        ) from None


def _find_vae(name: str, family: Family, base_folder: Path) -> Path:
    if not family.has_vae:
        raise UserError(f"{_VAE_FLAG}: {family.name} works on pixels and has no VAE; leave it out")
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(
                huggingface_hub.snapshot_download(name, allow_patterns=["config.json", "*.safetensors"])
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{_VAE_FLAG}: there is no folder {shown(name)}, and as a hub id it cannot be read: {shown(reason)}"
            ) from None
    base_folders.check_vae(folder, name, base_folder, _VAE_FLAG)
    return folder


def _family_of(index: Any, name: str) -> Family:
    found = index.get("_class_name") if isinstance(index, Mapping) else index
    if not isinstance(found, str) or found not in FAMILIES:
        raise UserError(base_folders.unknown_class(name, found, list(FAMILIES)))
    return FAMILIES[found]


def load_tokenizers(base: Base) -> tuple[PreTrainedTokenizerBase, ...]:
    """One for each text encoder; --tokenizer_name stands for the first."""
    own = base.options.tokenizer_name
    found = []
    for number, (folder, _) in enumerate(base.family.text.values()):
        if own and number == 0:
            found.append(
                _load(AutoTokenizer, own, "--tokenizer_name", use_fast=True, trust_remote_code=False)
            )
        else:
            found.append(
                _load(
                    AutoTokenizer,
                    str(base.folder),
                    _FLAG,
                    subfolder=folder,
                    use_fast=True,
                    trust_remote_code=False,
                )
            )
    return tuple(found)


def _load(kind: Any, name: str, flag: str, **where: Any) -> Any:
    """`from_pretrained` whose failure is one line for the user."""
    with _explained(flag, where.get("subfolder") or "it", name):
        return kind.from_pretrained(name, **where)


@contextlib.contextmanager
def _explained(flag: str, part: str, name: str) -> Iterator[None]:
    """Turn the failure to load a part of what `flag` names into one line for the user."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {part} of {shown(name)} cannot be loaded: {error}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # the libraries raise KeyError, TypeError, AttributeError, ... for files that say nonsense
        if "can't allocate memory" in str(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{flag}: {part} of {shown(name)} cannot be loaded: {shown(reason)}") from None


def max_tokens(base: Base, text: TextOptions | None = None) -> int:
    """Tokens that a prompt is padded to, begin and end included. Raises UserError if --tokenizer_max_length is more than fits."""
    rooms = [
        base_folders.read_json(base.folder / encoder / "config.json").get("max_position_embeddings", 77)
        for encoder in base.family.text
    ]
    room = base.family.max_tokens or min(rooms + _tokenizer_lengths(base))
    wanted = text.tokenizer_max_length if text else None
    if wanted is not None and wanted > room:
        raise UserError(
            f"--tokenizer_max_length must be at most {room}, the room in tokenizer and text encoder; got {wanted}"
        )
    return wanted or room


def _tokenizer_lengths(base: Base) -> list[int]:
    """The `model_max_length` of the base's tokenizers, to which its pipeline pads prompts; it is 1e30, or missing, where nobody set it."""
    folders = [tokenizer for tokenizer, _ in base.family.text.values()]
    paths = [
        base.folder / name / "tokenizer_config.json"
        for name in folders
        if not (name == "tokenizer" and base.options.tokenizer_name)
    ]
    found = [base_folders.read_json(path).get("model_max_length") for path in paths if path.is_file()]
    return [length for length in found if type(length) is int and length > 0]


def text_layers(base: Base, encoder: str) -> int:
    """How many layers a text encoder has."""
    return int(base_folders.read_json(base.folder / encoder / "config.json").get("num_hidden_layers", 12))


def unused_layers(family: Family, encoder: str, text: TextOptions) -> int:
    """How many layers at the end of a text encoder change nothing of what the UNet sees."""
    # the vector of Stable Diffusion XL's second encoder comes from its last layer, whatever is skipped
    skipped = (text.clip_skip or 0) if encoder == "text_encoder" else 0
    return family.unused_layers[encoder] + skipped


def check_text(base: Base, text: TextOptions) -> None:
    """Raise UserError if the base cannot do what the flags about its text encoder ask for."""
    if text.train_text_encoder and not base.family.trains_text:
        raise UserError(
            f"--train_text_encoder: {base.family.name} takes the text of a frozen T5; leave it out"
        )
    if text.clip_skip and base.family.encode is prompts.encode_t5:
        raise UserError(f"--clip_skip: {base.family.name} has no CLIP; leave it out")
    for encoder, unused in base.family.unused_layers.items():
        most = text_layers(base, encoder) - 1 - unused
        if (text.clip_skip or 0) > most:
            raise UserError(
                f"--clip_skip must be at most {most}, {encoder} has no more layers; got {text.clip_skip}"
            )


def text_without_encoders(
    base: Base, tokenizers: tuple[PreTrainedTokenizerBase, ...], text: TextOptions
) -> TextParts:
    """How the prompts of a run are read; its encoders are still to be loaded."""
    return TextParts(
        encode=base.family.encode,
        tokenizers=tokenizers,
        encoders={},
        max_tokens=max_tokens(base, text),
        attention_mask=text.text_encoder_use_attention_mask,
        clip_skip=text.clip_skip or 0,
        zeros_for_empty=bool(base.index.get("force_zeros_for_empty_prompt", False)),
    )


def condition_shapes(base: Base, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the `PromptEmbeds` of one prompt of so many tokens, by their names there."""
    unet = base_folders.read_json(base.folder / "unet" / "config.json")
    width = (
        unet["encoder_hid_dim"] if unet.get("encoder_hid_dim") is not None else unet["cross_attention_dim"]
    )
    if "text_encoder_2" not in base.family.text:
        return {"embeds": (1, tokens, width)}
    pooled = base_folders.read_json(base.folder / "text_encoder_2" / "config.json").get("projection_dim", 512)
    return {"embeds": (1, tokens, width), "pooled": (1, pooled)}


def load_encoders(base: Base, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The text encoders, frozen and in eval mode, by their folders. Raises UserError if one is missing or not understood, as all loaders do."""
    return {encoder: _load_model(base, encoder, dtype, device) for encoder in base.family.text}


def load_vae(base: Base, device: torch.device) -> AutoencoderKL | None:
    """The VAE, frozen and in eval mode; None for a base that works on pixels. In float32: it is small, and Stable Diffusion's overflow in float16."""
    return _load_model(base, "vae", torch.float32, device) if base.family.has_vae else None


def load_unet(base: Base, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The UNet, frozen and in eval mode."""
    return _load_model(base, "unet", dtype, device)


def _load_model(base: Base, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    """One model of the base, frozen and in eval mode. What convolves is in channels_last, which convolutions want: on a CPU it is the difference
    between seconds and minutes."""
    own = base.own_vae if part == "vae" else None
    folder = own or base.folder / part
    files = base_folders.weight_files(
        folder.parent, folder.name, None if own else base.options.variant, kind=part
    )
    kind = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        **{encoder: kind for encoder, (_, kind) in base.family.text.items()},
    }[part]
    with _explained(_VAE_FLAG if own else _FLAG, "it" if own else part, str(own or base.folder)):
        return loading.load(
            kind, folder, files, dtype=dtype, device=device, channels_last=part in ("unet", "vae")
        )


def load_scheduler(base: Base, *, edm: bool = False) -> Any:
    """The noise levels that are trained on; `edm` asks for continuous ones where the base does not."""
    kind = EDMEulerScheduler if base.is_edm else EulerDiscreteScheduler if edm else DDPMScheduler
    scheduler = _load(kind, str(base.folder), _FLAG, subfolder="scheduler")
    return (
        type(scheduler).from_config(scheduler.config, prediction_type=base.options.prediction_type)
        if base.options.prediction_type
        else scheduler
    )


def sampler(parts: FrozenParts, wanted: str | None) -> Any:
    """What draws validation pictures: the scheduler named, else the multistep DPM solver, for a base in pixels DDPM, for an EDM base its own."""
    config = parts.noise_scheduler.config
    if isinstance(parts.noise_scheduler, EDMEulerScheduler):
        return EDMEulerScheduler.from_config(config)
    if wanted == "DDPMScheduler" or (wanted is None and not parts.family.has_vae):
        return DDPMScheduler.from_config(config, **_fixed_variance(config))
    return _solver(config)


def class_sampler(own: Any, wanted: str) -> Any:
    """What draws class images, where the base's pipeline has the scheduler `own`: that one for "base", for "dpm" the multistep DPM solver."""
    return _solver(own.config) if wanted == "dpm" else own


def _solver(config: Mapping[str, Any]) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on the base's noise levels, whatever solver its own config is of. Raises UserError if it does not know those levels."""
    own = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
    try:
        return DPMSolverMultistepScheduler.from_config(config, **own, **_fixed_variance(config))
    except NotImplementedError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the multistep DPM solver cannot draw with this base's scheduler ({shown(reason)}); give --class_scheduler base"
        ) from None


def _fixed_variance(config: Mapping[str, Any]) -> dict[str, str]:
    """A UNet that learned the variance too is trained here on noise alone, so that its variance is no longer to be used."""
    return {"variance_type": "fixed_small"} if "learned" in str(config.get("variance_type", "")) else {}


def pipeline_of(parts: FrozenParts, scheduler: Any, vae: AutoencoderKL | None) -> Any:
    """A pipeline on the models in memory, with this VAE and without a safety checker (it blackens pictures)."""
    encoders = parts.text.encoders if parts.text else {}
    names = parts.family.text
    models: dict[str, Any] = {encoder: encoders.get(encoder) for encoder in names}
    models |= {
        tokenizer: parts.text.tokenizers[n] if parts.text else None
        for n, (tokenizer, _) in enumerate(names.values())
    }
    models |= {"unet": parts.unet, "scheduler": scheduler} | ({"vae": vae} if vae is not None else {})
    if parts.family.pipeline is StableDiffusionXLPipeline:
        models["add_watermarker"] = False
    else:
        models |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if not parts.family.has_vae:
        models["watermarker"] = None
    pipeline = parts.family.pipeline(**models)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(base: Base, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole pipeline from disk, as plain diffusers loads it, with its own scheduler and no safety checker.

    A VAE that says that float16 overflows in it is loaded in float32.
    """
    family, options = base.family, base.options
    own: dict[str, Any] = dict.fromkeys((part for part in _LEFT_OUT if part in base.index), None)
    if options.tokenizer_name:
        own["tokenizer"] = load_tokenizers(base)[0]
    if family.has_vae:
        folder = base.own_vae or base.folder / "vae"
        overflows = dtype == torch.float16 and base_folders.read_json(folder / "config.json").get(
            "force_upcast", True
        )
        own["vae"] = _load_model(base, "vae", torch.float32 if overflows else dtype, device)
    own |= {part: _load_model(base, part, dtype, device) for part in ("unet", *family.text)}
    if family.pipeline is StableDiffusionXLPipeline:
        own["add_watermarker"] = False
    pipeline = _load(family.pipeline, str(base.folder), _FLAG, use_safetensors=True, **own)
    config = pipeline.scheduler.config
    other = _fixed_variance(config) | (
        {"prediction_type": options.prediction_type} if options.prediction_type else {}
    )
    if other:
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, **other)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def text_of(pipeline: Any, base: Base, *, clip_skip: int = 0) -> TextParts:
    """The text encoders of a pipeline, to encode prompts as training does."""
    return TextParts(
        encode=base.family.encode,
        tokenizers=tuple(getattr(pipeline, tokenizer) for tokenizer, _ in base.family.text.values()),
        encoders={encoder: getattr(pipeline, encoder) for encoder in base.family.text},
        max_tokens=max_tokens(base),
        clip_skip=clip_skip,
        zeros_for_empty=bool(base.index.get("force_zeros_for_empty_prompt", False)),
    )
