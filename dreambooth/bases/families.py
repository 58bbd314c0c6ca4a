"""Families of base models: Stable Diffusion 1.x and 2.x, Stable Diffusion XL, DeepFloyd IF.

A family is one record in `FAMILIES`, chosen by the pipeline class in the base's `model_index.json`. `find`
checks a base on disk without loading a model.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    IFPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from dreambooth.bases import configs, folders, noise_levels, prompts, single_files, weight_names, weights
from dreambooth.bases.folders import BASE_FLAG, VAE_FLAG, KohyaFamily
from dreambooth.bases.prompts import PromptEmbeds, TextParts, Tokens
from dreambooth.bases.single_files import SingleFile
from dreambooth.bases.weights import Weight
from dreambooth.files import digests
from dreambooth.io.errors import UserError, reason_of, shown
from dreambooth.options.training import BaseOptions, TextOptions


@dataclasses.dataclass(frozen=True)
class Family:
    """What all bases of one pipeline class have in common."""

    key: str
    """Names the family in options and cache keys."""
    name: str
    """Names the family in messages."""
    pipeline: type[DiffusionPipeline]
    text: dict[str, tuple[str, type]]
    """By folder of a text encoder: the folder of its tokenizer, the class of the encoder."""
    encode: Callable[[TextParts, Tokens], PromptEmbeds]
    unused_layers: dict[str, int]
    """By text encoder: how many of its last layers have no effect on the prompt embeddings."""
    has_vae: bool = True
    trains_text: bool = True
    max_tokens: int | None = None
    """Tokens of a padded prompt. None is the number of positions of the text encoder."""

    @property
    def kinds(self) -> dict[str, type]:
        """The class that each model must have, by its folder."""
        vae = {"vae": AutoencoderKL} if self.has_vae else {}
        return {"unet": UNet2DConditionModel, **vae, **{name: kind for name, (_, kind) in self.text.items()}}

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that a base of this family must have."""
        return (*(tokenizer for tokenizer, _ in self.text.values()), *self.kinds, "scheduler")


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
        # the second encoder's pooled embedding comes from its last layer
        unused_layers={"text_encoder": 1, "text_encoder_2": 0},
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
        max_tokens=77,  # T5 takes more, but the UNet was trained on 77
    ),
}


@dataclasses.dataclass(frozen=True)
class Base:
    """A base on disk that has been checked: a folder in diffusers' layout, or a single file."""

    family: Family
    folder: Path
    """Has the configurations of the parts; for a single file, those of the published base."""
    given_vae: Path | None
    """Folder or single file of the VAE that replaces the base's; None without
    --pretrained_vae_model_name_or_path."""
    options: BaseOptions
    index: Mapping[str, Any]
    """Content of model_index.json."""
    single_file: SingleFile | None = None
    """The file that has the weights; None for a folder."""

    @property
    def place(self) -> Path:
        """What the user sees as the base: its single file, or its folder."""
        return self.single_file.path if self.single_file else self.folder

    def part_folder(self, part: str) -> Path:
        """The folder with the configuration of a part ("unet", "vae", "scheduler", ...)."""
        if part == "vae" and self.given_vae is not None and self.given_vae.is_dir():
            return self.given_vae
        return self.folder / part

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a model, with its class's defaults filled in, or of the scheduler. Raises
        UserError if it cannot be read."""
        if part == "scheduler":
            changes = self.single_file.scheduler if self.single_file else {}
            return {**folders.read_json(self.part_folder(part) / "scheduler_config.json"), **changes}
        return configs.read(self.family.kinds[part], self.part_folder(part) / "config.json")

    def weight_files(self, part: str) -> list[Path]:
        """The safetensors files that a part is loaded from. Raises UserError if there are none."""
        if part == "vae" and self.given_vae:
            if self.given_vae.is_file():
                return [self.given_vae]
            return folders.given_vae_files(self.given_vae, self.options.variant)
        if self.single_file:
            return [self.single_file.path]
        return folders.weight_files(self.folder, part, self.options.variant)

    def weights(self, part: str) -> dict[str, Weight]:
        """The weights of a part by their keys in a folder of diffusers; none is read. Raises UserError if a
        file is damaged."""
        if part == "vae" and self.given_vae and self.given_vae.is_file():
            return single_files.vae_weights(self.given_vae, self.config(part))
        if self.single_file and not (part == "vae" and self.given_vae):
            return self.single_file.weights(part, self.config(part))
        try:
            return weights.of_files(self.weight_files(part))
        except UserError as error:
            raise UserError(f"{BASE_FLAG}: {error}") from None

    def notes(self) -> list[str]:
        """Notes for the user: what a single file is; which parts are loaded from files that are not of
        --variant."""
        if self.single_file:
            return [self.single_file.note]
        variant = self.options.variant
        parts = ["unet", *self.family.text, *(["vae"] if self.family.has_vae and not self.given_vae else [])]
        plain = [part for part in parts if variant not in folders.variants_in(self.folder / part, part)]
        if not variant or not plain:
            return []
        return [f"there are no {variant} weights of {', '.join(plain)}: the plain ones are loaded"]

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the pictures that the base draws by default."""
        return (self.config("unet")["sample_size"] or 64) * self.vae_stride

    @property
    def vae_stride(self) -> int:
        """Pixels per latent along one side; 1 for a base that works on pixels."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1) if self.family.has_vae else 1

    @property
    def grid(self) -> int:
        """Pixels per side of the smallest square that VAE and UNet halve without a rest, as often as each
        of them halves it."""
        return self.vae_stride * 2 ** (len(self.config("unet")["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.config("vae")["latent_channels"] if self.family.has_vae else 3

    @property
    def vae_config(self) -> Mapping[str, Any] | None:
        """The VAE's configuration; None for a base that works on pixels."""
        return self.config("vae") if self.family.has_vae else None

    @property
    def is_edm(self) -> bool:
        """Whether the base was trained on continuous noise levels (EDM, arXiv 2206.00364), by the class of
        its scheduler."""
        return noise_levels.is_edm(self.index)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: --prediction_type, else the scheduler's, which is "epsilon" or
        "v_prediction"."""
        return self.options.prediction_type or self.config("scheduler").get("prediction_type", "epsilon")

    @property
    def kohya_family(self) -> KohyaFamily | None:
        """The model version by which kohya's files name layers; None for a family without such names."""
        if self.family.key == "sd":
            return "sd2" if self.config("unet")["cross_attention_dim"] == 1024 else "sd1"
        return "sdxl" if self.family.key == "sdxl" else None

    @property
    def takes_time_ids(self) -> bool:
        """Whether the UNet takes the sizes of pictures and of their crops."""
        return self.family.key == "sdxl"

    @property
    def zeros_for_empty(self) -> bool:
        """Whether the embeddings of an empty prompt are zeros."""
        return bool(self.index.get("force_zeros_for_empty_prompt", False))

    def layers(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Weight shapes of the layers of UNet and text encoders, by component and layer, from file
        headers."""
        return {
            part: {
                key.removesuffix(".weight"): shape
                for key, shape in self.shapes(part).items()
                if key.endswith(".weight")
            }
            for part in ("unet", *self.family.text)
        }

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a part's weights by key, from headers alone. Raises UserError if a file is
        damaged."""
        return {key: weight.shape for key, weight in self.weights(part).items()}

    def fingerprint(self) -> str:
        """A hash of the base's weight files and configurations. It does not depend on where they are."""
        digest = hashlib.sha256()
        for part in (*self.family.text, "unet", *(["vae"] if self.family.has_vae else []), "scheduler"):
            for name, path in self._files(part):
                digest.update(f"{part}/{name}\n".encode() + digests.of(path))
        if self.single_file:
            digest.update(json.dumps(self.config("scheduler"), sort_keys=True).encode())
        if self.options.prediction_type:
            digest.update(self.options.prediction_type.encode())
        return digest.hexdigest()[:16]

    def part_digest(self, part: str) -> str:
        """A hash of one part's weight files and configurations. It does not depend on where they are."""
        digest = hashlib.sha256()
        for name, path in self._files(part):
            digest.update(f"{name}\n".encode() + digests.of(path))
        return digest.hexdigest()

    def _files(self, part: str) -> list[tuple[str, Path]]:
        """(name, path) of the configurations and loaded weight files of a part. A single file has the same
        name wherever it is."""
        files = [(path.name, path) for path in sorted(self.part_folder(part).glob("*.json"))]
        for path in [] if part == "scheduler" else self.weight_files(part):
            name = path.name
            if self.single_file and path == self.single_file.path:
                name = "averaged weights" if part == "unet" and self.single_file.is_ema else "weights"
            files.append((name, path))
        return files


def find(options: BaseOptions, *, needs_vae: bool = True) -> Base:
    """The base on disk. A hub id is downloaded, without safety checker, or taken from the hub's cache. A
    single file may lack its VAE without `needs_vae`.

    Raises UserError if the base is no pipeline of a known family, or if a part of it is missing or unusable.
    """
    name = options.pretrained_model_name_or_path
    folder = Path(name)
    try:
        if single_files.is_named(name) and not folder.is_dir():
            return _find_single_file(options, needs_vae)
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise UserError(folders.no_index(folder, name))
        elif folder.exists():
            raise UserError(f"{BASE_FLAG}: {shown(name)} is neither a folder nor a regular file")
        else:
            folder = _download(options)
    except OSError as error:
        raise UserError(f"{BASE_FLAG}: {shown(name)} cannot be read: {error.strerror or error}") from None
    index = folders.read_json(folder / "model_index.json")
    family = _family_of(index, name)
    parts = [part for part in family.folders if part != "tokenizer" or options.tokenizer_name is None]
    classes = {part: kind.__name__ for part, kind in family.kinds.items()}
    folders.check(folder, name, index, classes, parts)
    configs.check(folder, name, family.kinds, options.variant)
    noise_levels.check(folder, name, index)
    return Base(family, folder, _find_vae(options, family, folder), options, index)


def _find_single_file(options: BaseOptions, needs_vae: bool) -> Base:
    """The base in a single file, with the configurations of the published base of its kind."""
    file = single_files.read(options, needs_vae)
    index = folders.read_json(file.folder / "model_index.json")
    if kind := file.scheduler.get("_class_name"):
        index |= {"scheduler": ["diffusers", kind]}
    family = FAMILIES[index["_class_name"]]
    given_vae = _find_vae(options, family, file.folder)
    kinds = {part: kind for part, kind in family.kinds.items() if part != "vae" or file.has_vae}
    configs.check_single_file(file, options.pretrained_model_name_or_path, kinds)
    return Base(family, file.folder, given_vae, options, index, file)


def _download(options: BaseOptions) -> Path:
    name = options.pretrained_model_name_or_path
    try:
        index = DiffusionPipeline.load_config(name, revision=options.revision)
        _family_of(index, name)  # before gigabytes are fetched
        noise_levels.check_class(index, name)
        return Path(
            DiffusionPipeline.download(
                name,
                revision=options.revision,
                variant=options.variant,
                use_safetensors=True,
                **{part: None for part in folders.UNUSED_PARTS if part in index},
            )
        )
    except (OSError, ValueError) as error:
        if problem := _hub_variant_problem(options):
            raise UserError(f"{BASE_FLAG}: {shown(name)} has {problem}") from None
        raise _no_such_hub_id(BASE_FLAG, name, error) from None


def _hub_variant_problem(options: BaseOptions) -> str | None:
    """What is wrong with --variant for a base on the hub, as `weight_names.problem` returns it; None if the
    hub cannot be asked."""
    names: dict[str, list[str]] = {}
    with contextlib.suppress(OSError, ValueError):
        repository = options.pretrained_model_name_or_path
        for path in huggingface_hub.list_repo_files(repository, revision=options.revision):
            part, _, name = path.partition("/")
            names.setdefault(part, []).append(name)
    wanted = [part for part in names if part in ("unet", "vae") or part.startswith("text_encoder")]
    available = {part: weight_names.variants(names[part], part) for part in wanted}
    return weight_names.problem(available, options.variant or weight_names.PLAIN) if available else None


def _find_vae(options: BaseOptions, family: Family, base_folder: Path) -> Path | None:
    """The folder or single file of the VAE that replaces the base's; None without one."""
    name = options.pretrained_vae_model_name_or_path
    if not name:
        return None
    if not family.has_vae:
        raise UserError(f"{VAE_FLAG}: {family.name} works on pixels and has no VAE; leave it out")
    folder = Path(name)
    if single_files.is_named(name) and not folder.is_dir():
        folder = single_files.existing(VAE_FLAG, name)
    elif not folder.is_dir():
        try:
            patterns = ["config.json", "*.safetensors"]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise _no_such_hub_id(VAE_FLAG, name, error) from None
    configs.check_vae(folder, name, base_folder, options.variant)
    return folder


def _no_such_hub_id(flag: str, name: str, error: Exception) -> UserError:
    reason = reason_of(error)
    return UserError(f"{flag}: there is no folder {shown(name)}, and as a hub id it cannot be read: {reason}")


def _family_of(index: Any, name: str) -> Family:
    pipeline = index.get("_class_name") if isinstance(index, Mapping) else index
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise UserError(folders.unknown_class(name, pipeline, list(FAMILIES)))
    return FAMILIES[pipeline]


def max_tokens(base: Base, text: TextOptions | None = None) -> int:
    """The number of tokens that a prompt is padded to, begin and end tokens included.

    Raises UserError if --tokenizer_max_length is over the limit of tokenizer and text encoder.
    """
    positions = [base.config(encoder).get("max_position_embeddings", 77) for encoder in base.family.text]
    limit = base.family.max_tokens or min(positions + _tokenizer_lengths(base))
    wanted = text.tokenizer_max_length if text else None
    if wanted is not None and wanted > limit:
        raise UserError(
            f"--tokenizer_max_length must be at most {limit}, the limit of tokenizer and text encoder; got "
            f"{wanted}"
        )
    return wanted or limit


def _tokenizer_lengths(base: Base) -> list[int]:
    """The `model_max_length` of the base's tokenizers, to which its pipeline pads prompts. An unset one is
    1e30 or missing."""
    names = [tokenizer for tokenizer, _ in base.family.text.values()]
    if base.options.tokenizer_name:
        names.remove("tokenizer")
    paths = [base.folder / name / "tokenizer_config.json" for name in names]
    lengths = [folders.read_json(path).get("model_max_length") for path in paths if path.is_file()]
    return [length for length in lengths if type(length) is int and length > 0]


def unused_layers(family: Family, encoder: str, text: TextOptions) -> int:
    """How many of a text encoder's last layers have no effect on the prompt embeddings."""
    # the pooled embedding of Stable Diffusion XL's second encoder comes from its last layer, whatever
    # --clip_skip is
    skipped = (text.clip_skip or 0) if encoder == "text_encoder" else 0
    return family.unused_layers[encoder] + skipped


def check_text(base: Base, text: TextOptions) -> None:
    """Raise UserError if a flag about text encoders does not work with this base."""
    if text.train_text_encoder and not base.family.trains_text:
        raise UserError(
            f"--train_text_encoder: {base.family.name} takes the text of a frozen T5; leave it out"
        )
    if text.clip_skip and base.family.encode is prompts.encode_t5:
        raise UserError(f"--clip_skip: {base.family.name} has no CLIP; leave it out")
    limits = [
        (base.config(encoder)["num_hidden_layers"] - 1 - unused, encoder)
        for encoder, unused in base.family.unused_layers.items()
    ]
    most, encoder = min(limits, default=(0, ""))
    if limits and (text.clip_skip or 0) > most:
        raise UserError(
            f"--clip_skip must be at most {most}, {encoder} has no more layers; got {text.clip_skip}"
        )


def prompt_embed_shapes(base: Base, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one prompt's `PromptEmbeds`, by field, for a prompt of so many tokens."""
    unet = base.config("unet")
    width = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    if "text_encoder_2" not in base.family.text:
        return {"embeds": (1, tokens, width)}
    pooled = base.config("text_encoder_2")["projection_dim"]
    return {"embeds": (1, tokens, width), "pooled": (1, pooled)}
