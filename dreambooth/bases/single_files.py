"""Bases in a single safetensors file, in the layout of the original Stable Diffusion code (ldm, sgm).

Weights are converted by the functions of `diffusers.loaders.single_file_utils`. The file has no
configurations and no tokenizers: those of the published bases are in the folder `single_file` beside this
module, with CLIP's vocabulary (MIT licence). Nothing is asked of a hub.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers.loaders import single_file_utils
from transformers import CLIPTokenizer

from dreambooth.bases import file_kinds, folders, metadata_marks, weights
from dreambooth.bases.file_kinds import UNET, VAE
from dreambooth.bases.folders import BASE_FLAG, VAE_FLAG
from dreambooth.bases.weights import Weight
from dreambooth.files import safetensors_files
from dreambooth.io.errors import UserError, few, shown, type_and_reason
from dreambooth.options.training import BaseOptions

CONFIGS = Path(__file__).parent / "single_file"
_VOCABULARY = "vocabulary"  # the folder of CLIP's vocabulary in CONFIGS
EMA = "ema"  # the --variant of a file that has both weights of the UNet: the averaged ones
_EMA_PREFIX = "model_ema."
# A weight of Stable Diffusion 2.x whose values spread further in the bases that predict velocity.
_SPREAD_KEY, _LEAST_SPREAD_OF_V = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
# A solver that can begin at a noise level without signal, and spaces its timesteps so that it does.
_ZERO_SNR = {
    "_class_name": "EulerDiscreteScheduler",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """A file whose UNet and text encoders can be loaded."""

    path: Path
    kind: str
    """The published base whose configurations are used, by its folder in CONFIGS."""
    has_vae: bool
    is_ema: bool
    """Whether the averaged weights of the UNet are used."""
    scheduler: Mapping[str, Any]
    """The settings in which the scheduler differs from the published base's."""
    note: str
    """What the file is, for the user."""

    @property
    def folder(self) -> Path:
        """The folder with the configurations of every part."""
        return CONFIGS / self.kind

    @property
    def published(self) -> str:
        """The published base whose configurations are used, in words."""
        return file_kinds.NAMES[self.kind]

    def weights(self, part: str, config: Mapping[str, Any]) -> dict[str, Weight]:
        """The weights of a part that has this configuration, by the keys of diffusers' folders. Raises
        UserError if they cannot be converted."""
        stored = weights.of_files([self.path])
        prefixes = {"unet": UNET, "vae": VAE, **file_kinds.TEXT[self.kind]}
        checkpoint = {key: weight for key, weight in stored.items() if key.startswith(prefixes[part])}
        if part == "unet" and self.is_ema:
            names = {key: _ema_key(key) for key in checkpoint}
            checkpoint = {key: stored[name] for key, name in names.items() if name in stored}
        converted = _converted(self.path, prefixes[part], checkpoint, config)
        if part == "unet":
            self._check_unused(checkpoint, converted)
        return converted

    def _check_unused(self, stored: Mapping[str, Weight], converted: Mapping[str, Weight]) -> None:
        """Raise UserError if the UNet in the file has weights that diffusers leaves out."""
        used = {id(weight) for weight in converted.values()}
        if unknown := [key for key, weight in stored.items() if id(weight) not in used]:
            raise UserError(
                f"{shown(self.path)}: {self.published} has no {few(unknown)}: the file is of another "
                "model; take one without changes to the UNet"
            )

    def tokenizer_files(self, name: str) -> dict[str, Path]:
        """By file name, the files of the tokenizer that a base has in the folder `name`."""
        vocabulary = CONFIGS / _VOCABULARY
        return {
            **{file: vocabulary / file for file in ("vocab.json", "merges.txt")},
            "tokenizer_config.json": self.folder / name / "tokenizer_config.json",
        }

    def tokenizer(self, name: str) -> CLIPTokenizer:
        """The tokenizer that a base has in the folder `name`."""
        settings = folders.read_json(self.folder / name / "tokenizer_config.json")
        return CLIPTokenizer.from_pretrained(CONFIGS / _VOCABULARY, **settings)


def read(options: BaseOptions, needs_vae: bool) -> SingleFile:
    """The base in the file that --pretrained_model_name_or_path names. Only its header is read, and for a
    Stable Diffusion 2.x without marks one weight of 320 numbers.

    Raises UserError if there is no such file, if it holds something else than a base of a known family, or if
    a flag does not work with it.
    """
    name = options.pretrained_model_name_or_path
    path = existing(BASE_FLAG, name)
    header = _header(BASE_FLAG, path)
    if options.revision:
        raise UserError(f"--revision: {shown(name)} is a file; only a base on the hub has revisions")
    kind = file_kinds.of(f"{BASE_FLAG}: {shown(name)}", header.shapes)
    has_ema = _ema_key(f"{UNET}input_blocks.0.0.weight") in header.shapes
    if options.variant not in (None, EMA) or (options.variant and not has_ema):
        advice = f"leave it out, or give {EMA}" if has_ema else "leave it out"
        raise UserError(
            f"--variant {options.variant}: {shown(name)} is a single file, which can have the variant {EMA} "
            f"only{'' if has_ema else ', and this one has not'}; {advice}"
        )
    has_vae = any(key.startswith(VAE) for key in header.shapes)
    if needs_vae and not has_vae and not options.pretrained_vae_model_name_or_path:
        raise UserError(f"{BASE_FLAG}: {shown(name)} has no VAE ({VAE}*); give one with {VAE_FLAG}")
    prediction, reason = _prediction(kind, path, header, options.prediction_type)
    is_v = prediction == "v_prediction"
    marks = {
        "its metadata": metadata_marks.has_zero_terminal_snr(header.metadata),
        "its key ztsnr": "ztsnr" in header.shapes,
    }
    # only with velocity: without signal, the noise is the input itself
    zero_snr = next((mark for mark, is_set in marks.items() if is_set), None) if is_v else None
    about = [
        f"{shown(name)}: a single file of {file_kinds.NAMES[kind]}",
        f"predicts {'velocity' if is_v else 'noise'} ({reason})",
    ]
    about += [f"zero terminal SNR ({zero_snr})"] if zero_snr else []
    if has_ema:
        about.append(f"of its two UNets the {'averaged' if options.variant else 'plain'} one is used")
    scheduler = {"prediction_type": prediction, **(_ZERO_SNR if zero_snr else {})}
    folder = "sd2_v" if kind == "sd2" and is_v else kind
    return SingleFile(path, folder, has_vae, options.variant == EMA, scheduler, ", ".join(about))


def is_named(name: str) -> bool:
    """Whether the user names a single file, by its ending or because there is one: such a name is never
    asked of a hub."""
    return name.lower().endswith((".safetensors", *folders.OBJECT_FILES)) or Path(name).is_file()


def existing(flag: str, name: str) -> Path:
    """The path of a single file. Raises UserError, starting with `flag`, if there is none, or if its ending
    is one of files that can carry code."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {shown(name)}; such a name is not looked for on the hub")
    if path.suffix.lower() in folders.OBJECT_FILES:
        raise UserError(
            f"{flag}: {shown(name)} holds serialized Python objects, which can carry code and are not "
            "loaded; take the .safetensors file of this model"
        )
    return path


def vae_weights(path: Path, config: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights of a VAE alone in a single file, in the original layout or in that of diffusers, by the
    keys of diffusers. Raises UserError if the file holds no VAE."""
    stored = weights.of_files([path])
    if any(key.startswith("encoder.down_blocks.") for key in stored):
        return stored
    prefix = VAE if any(key.startswith(VAE) for key in stored) else ""
    checkpoint = {
        f"{VAE}{key.removeprefix(prefix)}": weight
        for key, weight in stored.items()
        if key.startswith((f"{prefix}encoder.", f"{prefix}decoder.", f"{prefix}quant", f"{prefix}post_quant"))
    }
    if not any(key.startswith(f"{VAE}encoder.down.") for key in checkpoint):
        raise UserError(f"{shown(path)} holds no VAE: it has no encoder.down.*")
    return _converted(path, VAE, checkpoint, config)


# ---- reading


def _header(flag: str, path: Path) -> safetensors_files.Header:
    try:
        return safetensors_files.read(path, safetensors_files.BASE)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def _ema_key(key: str) -> str:
    """The key of the averaged weight that belongs to a key of the UNet: the same without dots."""
    return _EMA_PREFIX + key.removeprefix("model.").replace(".", "")


def _prediction(
    kind: str, path: Path, header: safetensors_files.Header, given: str | None
) -> tuple[str, str]:
    """(what the UNet predicts, "epsilon" or "v_prediction"; how this is known)."""
    if given:
        return given, "--prediction_type"
    if "v_pred" in header.shapes:
        return "v_prediction", "its key v_pred"
    stated = metadata_marks.prediction_type(header.metadata)
    if stated in ("epsilon", "v_prediction"):
        return stated, "its metadata"
    if kind == "sd2" and _SPREAD_KEY in header.shapes:
        spread = float(weights.of_files([path])[_SPREAD_KEY][...].float().std(unbiased=False))
        is_v = spread > _LEAST_SPREAD_OF_V
        relation = "over" if is_v else "not over"
        reason = f"no mark; the spread of norm1.bias in its last block, {spread:.3f}, is {relation} "
        return "v_prediction" if is_v else "epsilon", f"{reason}{_LEAST_SPREAD_OF_V}"
    return "epsilon", "it has no mark of another prediction"


def _converted(
    path: Path, prefix: str, checkpoint: dict[str, Weight], config: Mapping[str, Any]
) -> dict[str, Weight]:
    """The weights of `checkpoint`, whose keys begin with `prefix`, by the keys of diffusers' folders. Raises
    UserError if diffusers cannot convert them."""
    try:
        return _converted_by_diffusers(prefix, checkpoint, config)
    except Exception as error:  # of a malformed file diffusers raises anything
        reason = type_and_reason(error)
        raise UserError(f"{shown(path)}: diffusers cannot convert its {prefix}* ({reason})") from None


def _converted_by_diffusers(
    prefix: str, checkpoint: dict[str, Weight], config: Mapping[str, Any]
) -> dict[str, Weight]:
    converted: dict[str, Weight]
    if prefix == UNET:
        converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
    elif prefix == VAE:
        converted = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, config)
    elif prefix in file_kinds.OPEN_CLIP:
        # the width is taken from a model where the file has no text_projection
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        converted = single_file_utils.convert_open_clip_checkpoint(model, checkpoint, prefix)
    else:
        converted = single_file_utils.convert_ldm_clip_checkpoint(checkpoint)
    return converted
