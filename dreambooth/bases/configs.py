"""The configurations of a base's models, whose values are checked before a library computes with them.

A base may come from anyone, and the libraries check little: a layer count of 10^7 takes hours, a width of
10^12 all memory. Which fields a configuration has, and of which types, is read from the model's class. The
limits of numbers are here; published bases are far below them.
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from dreambooth.bases import folders, single_files, weights
from dreambooth.bases.folders import BASE_FLAG, VAE_FLAG
from dreambooth.bases.single_files import SingleFile
from dreambooth.bases.weights import Weight
from dreambooth.files.safetensors_files import FLOATS
from dreambooth.io.errors import UserError, is_memory_error, raise_all, shortened, shown, type_and_reason

_LARGEST = 2**20  # of any number
_MOST_LAYERS = 512  # of a model, counted as blocks times layers of a block times transformer layers
_LONGEST_LIST = 100_000  # trained_betas has an entry for each timestep
_LONGEST_TEXT = 200  # characters
_LAYER_COUNTS = (
    *("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    *("num_hidden_layers", "num_layers"),
)
# Narrower types than the class has: this program computes with these fields.
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("cross_attention_dim", "eos_token_id"), int),
    **dict.fromkeys(("attention_dropout", "layer_norm_eps"), float),
    "sample_size": int | None,
}
# Models without data, by class and configuration: building one takes seconds, and a base is checked twice.
_MODELS: dict[tuple[type, str], nn.Module] = {}
_RANGE = (0, _LARGEST)
_SHARE, _SMALL, _FACTOR = (0, 0.999), (1e-12, 1), (1e-6, 10**6)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("dropout", "dropout_rate", "attention_dropout"), _SHARE),
    **dict.fromkeys(("norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _SMALL),
    **dict.fromkeys(("scaling_factor", "latents_std"), _FACTOR),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), _FACTOR),
    **dict.fromkeys(("freq_shift", "downsample_padding"), (0, 1)),
    **dict.fromkeys(("shift_factor", "latents_mean"), (-_LARGEST, _LARGEST)),
    **dict.fromkeys(("sample_size", "max_position_embeddings", "num_hidden_layers"), (1, _LARGEST)),
}


def check(folder: Path, name: str, kinds: Mapping[str, type], variant: str | None) -> None:
    """Raise UserError, with one line per fault, if the models of a base cannot be made of its configurations
    and weight files, or do not belong together.

    `name` is how the user named the base, `kinds` the class of each model. Only headers of weights are read.
    """
    configs = {part: read(kind, folder / part / "config.json") for part, kind in kinds.items()}
    raise_all(f"{BASE_FLAG}: {problem}" for problem in _misfits(configs, name))
    folders.check_variant(folder, name, kinds, variant)
    problems = []
    for part, kind in kinds.items():
        try:
            check_weights(kind, folder / part, folders.weight_files(folder, part, variant))
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)


def check_single_file(file: SingleFile, name: str, kinds: Mapping[str, type]) -> None:
    """Raise UserError, with one line per fault, unless a single file has the weights of the models `kinds`.
    `name` is how the user named it. Only its header is read."""
    problems = []
    for part, kind in kinds.items():
        folder, where = file.folder / part, f"the {part} of {shown(name)}"
        try:
            config = read(kind, folder / "config.json")
            _check_part(kind, config, file.weights(part, config), folder, where, file.published)
        except UserError as error:
            problems.append(f"{BASE_FLAG}: {error}")
    raise_all(problems)


def check_vae(place: Path, name: str, base_folder: Path, variant: str | None) -> None:
    """Raise UserError unless `place`, which the user named `name`, holds a VAE with latents like the
    base's: a folder has the weights as `folders.given_vae_files` returns them, a single file has a VAE of the
    base's configuration."""
    base_vae = base_folder / "vae"
    if place.is_file():
        try:
            config = read(AutoencoderKL, base_vae / "config.json")
            part = single_files.vae_weights(place, config)
            _check_part(AutoencoderKL, config, part, base_vae, shown(name), "the VAE of the base")
        except UserError as error:
            raise UserError(f"{VAE_FLAG}: {error}") from None
        return
    given = read(AutoencoderKL, place / "config.json", VAE_FLAG)
    latents, base_latents = (
        f"{config['latent_channels']} channels at 1/{2 ** (len(config['block_out_channels']) - 1)}"
        for config in (given, read(AutoencoderKL, base_vae / "config.json"))
    )
    if latents != base_latents:
        raise UserError(f"{VAE_FLAG}: {shown(name)} has latents of {latents}; the base has {base_latents}")
    check_weights(AutoencoderKL, place, folders.given_vae_files(place, variant), VAE_FLAG)


def read(kind: type, path: Path, flag: str = BASE_FLAG) -> dict[str, Any]:
    """The fields of a model's class `kind` from its configuration file, with the class's defaults for those
    that the file leaves out. Other fields of the file are ignored.

    Raises UserError, starting with `flag` and with one line per fault, if the file cannot be read or is of
    another class, or if a field has another type than the class gives it or is over a limit.
    """
    content = folders.read_json(path, flag)
    config = {field: content.get(field, default) for field, (_, default) in _fields(kind).items()}
    problems = faults(kind, config)
    if (named := content.get("_class_name", kind.__name__)) != kind.__name__:
        problems.append(f"is of a {shortened(named)}; it must be of a {kind.__name__}")
    if kind is AutoencoderKL and not problems:
        problems += _vae_faults(config)
    if not problems and (layers := _most_layers(config)) > _MOST_LAYERS:
        counted = [field for field in (*_LAYER_COUNTS, "block_out_channels") if config.get(field)]
        counts = ", ".join(_state(config, field) for field in counted)
        problems.append(f"{counts}: up to {layers:,} layers, and the most that are loaded are {_MOST_LAYERS}")
    raise_all(f"{flag}: {shown(path)}: {problem}" for problem in problems)
    return config


def faults(kind: type, config: Mapping[str, Any]) -> list[str]:
    """A phrase for each field of a configuration that has another type than the class `kind` gives it, or is
    over a limit. Fields that the class does not have are not checked."""
    return [
        f"{_state(config, field)}; it must be {_rule(annotation, *_RANGES.get(field, _RANGE))}"
        for field, (annotation, default) in _fields(kind).items()
        if field in config
        and not (type(config[field]) is type(default) and config[field] == default)
        and not _is_of(config[field], annotation, *_RANGES.get(field, _RANGE))
    ]


def build(kind: Any, config: Mapping[str, Any]) -> Any:
    """A model of a class of diffusers or transformers, with new weights, on torch's default device."""
    return kind(**config) if issubclass(kind, ConfigMixin) else kind(kind.config_class(**config))


def check_weights(kind: type, folder: Path, files: Iterable[Path], flag: str = BASE_FLAG) -> None:
    """Raise UserError, starting with `flag`, unless the configuration in `folder` makes a model of class
    `kind` whose weights are in the safetensors `files`. Only headers are read."""
    config = read(kind, folder / "config.json", flag)
    try:
        _check_part(kind, config, weights.of_files(files), folder, shown(folder), "its config.json")
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def _check_part(
    kind: type,
    config: Mapping[str, Any],
    part: Mapping[str, Weight],
    folder: Path,
    where: str,
    owner: str,
) -> None:
    """Raise UserError unless the configuration, of `folder`, makes a model of class `kind` with these
    weights, of which none is read. `where` and `owner` name the weights and the configuration."""
    key = kind, repr(config)
    try:
        if key not in _MODELS:
            with torch.device("meta"), no_init_weights():
                _MODELS[key] = build(kind, config)
    except Exception as error:  # the libraries raise anything for values that do not fit each other
        if is_memory_error(error):
            raise
        reason = type_and_reason(error)
        raise UserError(f"no model can be made of {shown(folder)}/config.json ({reason})") from None
    model = _MODELS[key]
    shapes = {key: weight.shape for key, weight in part.items() if weight.dtype in FLOATS}
    try:
        if isinstance(model, ModelMixin):
            model._fix_state_dict_keys_on_load(shapes)  # attention layers of older VAEs have other names
        check_fit(*_compared(model, shapes), owner)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_fit(
    missing: Iterable[str],
    shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    owner: str = "its config.json",
) -> None:
    """Raise UserError, in one line, if weights are missing or have other shapes than the model's.

    `shapes` are (name, shape in the file, shape in the model); `owner` names the model's configuration.
    """
    problems = []
    if names := sorted(missing):
        problems.append(f"lack {shown(names[0])}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    mismatched = sorted(
        (name, tuple(in_file), tuple(in_model))
        for name, in_file, in_model in shapes
        if tuple(in_file) != tuple(in_model)
    )
    if mismatched:
        name, in_file, in_model = mismatched[0]
        more = f" and {len(mismatched) - 1} more of other shapes" if len(mismatched) > 1 else ""
        problems.append(f"have {shown(name)} of shape {in_file}, which must be {in_model}{more}")
    if problems:
        raise UserError(f"its weights do not fit {owner}: they {'; they '.join(problems)}")


def _compared(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[Any]]:
    """The arguments of `check_fit` for a model, and the shapes of weights in files by key."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        # the files of text encoders have or lack this prefix; T5 ties two names to one weight
        bare = name.removeprefix("text_model.")
        names.setdefault(id(weight), []).extend((name, bare, f"text_model.{bare}"))
    missing, compared = [], []
    for weight in model.parameters():
        key = next((name for name in names[id(weight)] if name in shapes), None)
        if key is None:
            missing.append(names[id(weight)][0])
        else:
            compared.append((key, shapes[key], weight.shape))
    return missing, compared


# --- values


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[Any, Any]]:
    """(type, default) of each field of a class's configuration."""
    if issubclass(kind, ConfigMixin):
        parameters = inspect.signature(kind.__init__).parameters.values()
        fields = {p.name: (p.annotation, p.default) for p in parameters if p.annotation is not p.empty}
    else:
        own = inspect.get_annotations(kind.config_class)  # without those that steer the library
        fields = {name: (own[name], getattr(kind.config_class, name)) for name in own}
        fields["use_attention_mask"] = bool, False  # for diffusers, not for the model
    return {name: (_TYPES.get(name, annotation), default) for name, (annotation, default) in fields.items()}


def _is_of(value: object, annotation: Any, least: float, most: float) -> bool:
    """Whether a JSON value is of an annotated type, and its numbers are from `least` to `most`."""
    if options := _options(annotation):
        return any(_is_of(value, option, least, most) for option in options)
    if annotation in (int, float):
        is_number = type(value) is int or (type(value) is float and annotation is float)
        return is_number and least <= value <= most  # type: ignore[operator]
    if annotation is bool:
        return value is None or isinstance(value, bool)  # some published bases have null for false
    if annotation is str:
        return isinstance(value, str) and len(value) <= _LONGEST_TEXT
    if entry := _entry(annotation):
        is_list = isinstance(value, list) and 0 < len(value) <= _LONGEST_LIST
        return is_list and all(_is_of(v, entry, least, most) for v in value)  # type: ignore[attr-defined]
    return value is None and annotation is types.NoneType


def _rule(annotation: Any, least: float, most: float) -> str:
    """The values that `_is_of` accepts, in words."""
    if options := _options(annotation):
        return " or ".join(dict.fromkeys(_rule(option, least, most) for option in options))
    if entry := _entry(annotation):
        return f"a list, each entry {_rule(entry, least, most)}"
    numbers = {int: "a whole number", float: "a number"}
    if annotation in numbers:
        return f"{numbers[annotation]} from {least:,} to {most:,}"
    return {bool: "true or false", str: f"text of at most {_LONGEST_TEXT} characters"}.get(annotation, "null")


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types of a union. The values of a Literal are left to the library."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return (str,)
    return typing.get_args(annotation) if origin in (types.UnionType, typing.Union) else ()


def _entry(annotation: Any) -> Any:
    """The type of a list's entries; None for another type. JSON has lists for tuples and arrays."""
    if annotation in (tuple, list):
        return int
    return (typing.get_args(annotation) or (None,))[0]


def _most_layers(config: Mapping[str, Any]) -> int:
    """A number that a model has at most as many layers as: its blocks times the largest of each count."""
    counts = [max(_numbers(config[field]), default=1) for field in _LAYER_COUNTS if config.get(field)]
    return math.prod(counts) * len(config.get("block_out_channels", "1"))


def _numbers(value: Any) -> Iterator[int]:
    for entry in value if isinstance(value, list | tuple) else ():
        yield from _numbers(entry)
    if isinstance(value, int):
        yield value


def _state(config: Mapping[str, Any], field: str) -> str:
    return f"{field} is {ascii(config[field])[:80]}"


def _vae_faults(config: Mapping[str, Any]) -> list[str]:
    """Faults between the fields of a VAE, which must encode colored pictures."""
    colors = [field for field in ("in_channels", "out_channels") if config[field] != 3]
    statistics = [config[field] for field in ("latents_mean", "latents_std") if config[field] is not None]
    problems = [f"{_state(config, field)}; it must be 3" for field in colors]
    if any(len(values) != config["latent_channels"] for values in statistics):
        problems.append("latents_mean and latents_std must have one number for each of latent_channels")
    return problems


# --- parts that belong together


def _misfits(configs: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """Faults between configurations: parts that do not belong together, and bases that cannot be trained
    here."""
    unet, phrases = configs["unet"], []
    vae, second = configs.get("vae"), configs.get("text_encoder_2")
    widths = [
        config.get("d_model", config.get("hidden_size"))
        for part, config in configs.items()
        if part.startswith("text_encoder")
    ]
    projects = unet["encoder_hid_dim"] is not None
    unet_width = unet["encoder_hid_dim" if projects else "cross_attention_dim"]
    if unet_width != sum(widths):
        gives = "encoders give" if len(widths) > 1 else "encoder gives"
        text = f"{unet_width} wide text and its text {gives} {sum(widths)}"
        phrases.append(f" takes {text}: parts of two different bases")
    if second:
        # the pooled embedding, and six embedded numbers: original size, crop corner, target size
        added = second["projection_dim"] + 6 * (unet["addition_time_embed_dim"] or 0)
        if (taken := unet["projection_class_embeddings_input_dim"]) != added:
            numbers = f"{taken} numbers of text and size and gets {added}"
            phrases.append(f" takes {numbers}: parts of two different bases")
    channels = unet["in_channels"]
    if vae and channels != vae["latent_channels"]:
        given = f"{channels} channels and its VAE gives {vae['latent_channels']}"
        phrases.append(f" takes {given}: parts of two different bases, or a base for inpainting")
    if not vae and channels != 3:
        phrases.append(f" takes {channels} channels and not 3: a second stage, which is not trained here")
    if unet["time_cond_proj_dim"] is not None:
        given = "the guidance scale as an input (time_cond_proj_dim)"
        phrases.append(f" takes {given}: a distilled base, which is not trained here")
    # what the UNet takes beside latents, timesteps and text
    inputs = {
        "class_embed_type": None,
        "num_class_embeds": None,
        "encoder_hid_dim_type": "text_proj" if projects and unet["encoder_hid_dim_type"] else None,
        "addition_embed_type": "text_time" if second else None if vae else "text",
    }
    phrases += [
        f": {_state(unet, field)}; for such a base it must be {wanted or 'null'}"
        for field, wanted in inputs.items()
        if unet[field] != wanted
    ]
    return [f"the UNet of {shown(name)}{fault}" for fault in phrases]
