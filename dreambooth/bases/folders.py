"""Checks a base's folder before anything of it is loaded: parts, classes, widths, and the headers of weight
files.

A base may come from anyone. Nothing here imports what its files name, and weights in .bin or .ckpt files are
refused, because those can carry code. This module imports no torch.
"""

import contextlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dreambooth.bases import weight_names
from dreambooth.files import digests, safetensors_files
from dreambooth.io import reader
from dreambooth.io.errors import UserError, shortened, shown
from dreambooth.options.training import BaseOptions

BASE_FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--pretrained_vae_model_name_or_path"
KohyaFamily = Literal["sd1", "sd2", "sdxl"]  # the versions by which kohya's files name layers
_LIBRARIES = {"diffusers", "transformers"}
_NEVER_LOADED = {"safety_checker", "watermarker", "feature_extractor", "image_encoder"}
_OBJECT_FILES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_SCRIPTS = {
    "StableDiffusion3Pipeline": "train_dreambooth_lora_sd3.py",
    "FluxPipeline": "train_dreambooth_lora_flux.py",
}


def unknown_class(name: str, pipeline: object, known: Sequence[str]) -> str:
    """The message for a base whose pipeline class is not one of `known`."""
    script = _OTHER_SCRIPTS.get(pipeline) if isinstance(pipeline, str) else None
    advice = f"; diffusers' {script} trains it" if script else ""
    return (
        f"{BASE_FLAG}: {shown(name)} is a {shortened(pipeline)}; "
        f"this version trains {', '.join(known)}{advice}"
    )


def no_index(folder: Path, name: str) -> str:
    """The message for a folder without model_index.json, with what the folder may be instead."""
    names = sorted(path.name for path in folder.iterdir())
    content = ", ".join(shown(n) for n in names[:5]) or "nothing"
    message = (
        f"{BASE_FLAG}: {shown(name)} is not a diffusers pipeline folder: "
        f"it has no model_index.json; it holds {content}"
    )
    if (folder.absolute().parent / "model_index.json").is_file():
        return f"{message}. It is one part of a base: name the folder above it"
    if "adapter_config.json" in names or any("lora" in n and n.endswith(".safetensors") for n in names):
        return (
            f"{message}. That is an adapter, not a base: give it as --adapter of infer.py or --init_adapter"
        )
    if any(n.endswith((".safetensors", *_OBJECT_FILES)) for n in names):
        return (
            f"{message}. Convert a single-file base with "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    return message


def read_json(path: Path, flag: str = BASE_FLAG) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, starting with `flag`, if the file holds none."""
    return reader.read_json_table(path, f"{flag}: {shown(path)}")


def check(
    folder: Path,
    name: str,
    index: Mapping[str, Any],
    classes: Mapping[str, str],
    folders: Sequence[str],
    *,
    variant: str | None,
    is_tokenizer_given: bool,
) -> None:
    """Raise UserError, with one line per fault, if a base cannot be loaded.

    `name` is how the user named it, `index` the content of its model_index.json. The base must have all
    `folders`, and models of `classes`. With `is_tokenizer_given`, --tokenizer_name replaces the folder
    "tokenizer".
    """
    # folders
    wanted = [part for part in folders if not (part == "tokenizer" and is_tokenizer_given)]
    if missing := [part for part in wanted if not (folder / part).is_dir()]:
        raise UserError(f"{BASE_FLAG}: {shown(name)} lacks the folders {', '.join(missing)}")

    # classes
    _raise(_foreign(index, classes))

    # configurations
    configs = {part: read_json(folder / part / "config.json") for part in classes}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    paths = {part: folder / part / "tokenizer_config.json" for part in wanted if part.startswith("tokenizer")}
    tokenizers = {part: read_json(path) for part, path in paths.items() if path.is_file()}
    with_code = [part for part, config in (configs | tokenizers).items() if "auto_map" in config]
    _raise(
        [
            f"the {part} of {shown(name)} names code of its own (auto_map), which is not run"
            for part in with_code
        ]
    )
    _raise(_wrong_kinds(configs, classes, name))
    _raise(_misfits(configs, name))

    # weights
    _check_variant(folder, name, classes, variant)
    _raise(_bad_weights(folder, configs, variant))


def _check_variant(folder: Path, name: str, parts: Iterable[str], variant: str | None) -> None:
    """Raise UserError if a part has its weights in other variants only, or if no part has `variant`.

    Parts without any safetensors weights are left to `_bad_weights`.
    """
    available = {part: weight_names.variants(_file_names(folder / part), part) for part in parts}
    problem = weight_names.problem(available, variant or weight_names.PLAIN)
    if problem and all(available.values()):
        flag = "--variant" if variant else BASE_FLAG
        raise UserError(f"{flag}: {shown(name)} has {problem}")


def has_variant(folder: Path, variant: str | None) -> bool:
    """Whether any part of the base in `folder` has weights of this variant."""
    parts = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return any(variant in weight_names.variants(_file_names(part), part.name) for part in parts)


def _file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def check_vae(folder: Path, name: str, base_folder: Path, variant: str | None) -> None:
    """Raise UserError unless `folder`, which the user named `name`, holds a VAE with latents like the
    base's, and weights as `given_vae_files` returns them."""
    config = read_json(folder / "config.json", VAE_FLAG)
    base_config = read_json(base_folder / "vae" / "config.json")
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise UserError(f"{VAE_FLAG}: {shown(name)} is a {shortened(kind)}; it must be an AutoencoderKL")
    channels, base_channels = config.get("latent_channels"), base_config["latent_channels"]
    blocks, base_blocks = config.get("block_out_channels"), base_config["block_out_channels"]
    depth = len(blocks) if isinstance(blocks, list) else None
    if channels != base_channels or depth != len(base_blocks):
        latents = f"{_value(channels)} channels at 1/{2 ** ((depth or 1) - 1)}"
        base_latents = f"{base_channels} channels at 1/{2 ** (len(base_blocks) - 1)}"
        raise UserError(f"{VAE_FLAG}: {shown(name)} has latents of {latents}; the base has {base_latents}")
    given_vae_files(folder, variant)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(f"{BASE_FLAG}: {problem}" for problem in problems))


def _value(value: object) -> str:
    """A JSON value for a message in which the number 1 and the text "1" must differ."""
    return ascii(value)[:80]


def _foreign(index: Mapping[str, Any], classes: Mapping[str, str]) -> list[str]:
    """Faults of model_index.json: parts of other classes or of other libraries."""
    problems = []
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue  # settings of the pipeline itself
        if len(entry) != 2 or not all(word is None or isinstance(word, str) for word in entry):
            problems.append(
                f"model_index.json: {shortened(part)} must name a library and a class, got {shortened(entry)}"
            )
            continue
        library, kind = entry
        if library is None and part in classes:
            problems.append(f"model_index.json leaves out {part}")
        # unused parts may be of any library: some bases name a module of diffusers for them
        elif library is not None and library not in _LIBRARIES and part not in _NEVER_LOADED:
            problems.append(
                f"model_index.json: {shortened(part)} comes from {shortened(library)}; only diffusers and "
                "transformers are loaded"
            )
        elif part in classes and kind != classes[part]:
            problems.append(f"model_index.json: {part} is a {shortened(kind)}; it must be a {classes[part]}")
    return problems


def _is_number(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _text_parts(configs: Mapping[str, Any]) -> list[str]:
    return [part for part in configs if part.startswith("text_encoder")]


def _width_field(config: Mapping[str, Any]) -> str:
    """The field of a text encoder's config that holds its width. T5 has another than CLIP."""
    return "d_model" if "d_model" in config else "hidden_size"


def _text_width_field(unet: Mapping[str, Any]) -> str:
    """The field of a UNet's config that holds the width of the text: the first if the UNet projects the
    text."""
    return "encoder_hid_dim" if unet.get("encoder_hid_dim") is not None else "cross_attention_dim"


def _wrong_kinds(
    configs: Mapping[str, Mapping[str, Any]], classes: Mapping[str, str], name: str
) -> list[str]:
    """Faults of single values: a number is no number, or a class is another."""
    problems = []
    required = [("unet", "in_channels")]
    required += [(part, _width_field(configs[part])) for part in _text_parts(configs)]
    required.append(("unet", _text_width_field(configs["unet"])))
    if "vae" in configs:
        required.append(("vae", "latent_channels"))
        blocks = configs["vae"].get("block_out_channels")
        if not isinstance(blocks, list) or not blocks or not all(map(_is_number, blocks)) or len(blocks) > 10:
            problems.append(
                f"the vae of {shown(name)} has block_out_channels {_value(blocks)}; it must be a list of "
                "whole numbers"
            )
    values = [(part, field, configs[part].get(field)) for part, field in required]

    # fields with the defaults that diffusers and transformers give them
    optional = [("unet", "sample_size", 64)]
    for part in _text_parts(configs):
        optional += [(part, "max_position_embeddings", 77), (part, "num_hidden_layers", 12)]
    if "text_encoder_2" in configs:
        optional += [("unet", "addition_time_embed_dim", 256), ("text_encoder_2", "projection_dim", 512)]
        optional += [("unet", "projection_class_embeddings_input_dim", 2816)]
    values += [(part, field, configs[part].get(field, default)) for part, field, default in optional]

    problems += [
        f"the {part} of {shown(name)} has {field} {_value(value)}; it must be a whole number"
        for part, field, value in values
        if not _is_number(value)
    ]
    for part in ("unet", "vae"):
        if part in configs and (kind := configs[part].get("_class_name", classes[part])) != classes[part]:
            problems.append(
                f"the {part} of {shown(name)} is a {shortened(kind)}; it must be a {classes[part]}"
            )
    return problems


def _misfits(configs: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """Faults between configurations: parts that do not belong together, and bases that cannot be trained
    here."""
    unet, problems = configs["unet"], []
    encoders = _text_parts(configs)
    text_width = sum(configs[part][_width_field(configs[part])] for part in encoders)
    unet_width = unet[_text_width_field(unet)]
    if unet_width != text_width:
        gives = "encoders give" if len(encoders) > 1 else "encoder gives"
        problems.append(
            f"the UNet of {shown(name)} takes {unet_width} wide text and its text {gives} {text_width}: "
            "parts of two different bases"
        )
    if "text_encoder_2" in configs:
        # the pooled embedding, and six embedded numbers: original size, crop corner, target size
        projection = configs["text_encoder_2"].get("projection_dim", 512)
        added = projection + 6 * unet.get("addition_time_embed_dim", 256)
        if (taken := unet.get("projection_class_embeddings_input_dim", 2816)) != added:
            problems.append(
                f"the UNet of {shown(name)} takes {taken} numbers of text and size and gets {added}: "
                "parts of two different bases"
            )
    if "vae" in configs and unet["in_channels"] != configs["vae"]["latent_channels"]:
        channels = f"{unet['in_channels']} channels and its VAE gives {configs['vae']['latent_channels']}"
        problems.append(
            f"the UNet of {shown(name)} takes {channels}: parts of two different bases, or a base for "
            "inpainting"
        )
    if "vae" not in configs and unet["in_channels"] != 3:
        problems.append(
            f"the UNet of {shown(name)} takes {unet['in_channels']} channels and not 3: "
            "a second stage, which is not trained here"
        )
    if unet.get("time_cond_proj_dim") is not None:
        problems.append(
            f"the UNet of {shown(name)} takes the guidance scale as an input (time_cond_proj_dim): "
            "a distilled base, which is not trained here"
        )
    return problems


def weight_files(
    folder: Path, part: str, variant: str | None, *, kind: str | None = None, flag: str = BASE_FLAG
) -> list[Path]:
    """The safetensors files that a part is loaded from.

    `kind` is the name of the part if its folder has another name. Raises UserError, starting with `flag`, if
    there are no such files; the message tells if the weights are in another format.
    """
    part_folder, part_kind = folder / part, kind or part
    for tag in ([variant] if variant else []) + [weight_names.PLAIN]:
        single = part_folder / weight_names.single(part_kind, tag)
        # with both a single file and shards, transformers loads the single file and diffusers the shards
        if part_kind.startswith("text_encoder") and single.is_file():
            return [single]
        for index in (part_folder / name for name in weight_names.indexes(part_kind, tag)):
            if index.is_file():
                return _shards(index, flag)
        if single.is_file():
            return [single]
    names = sorted(path.name for path in part_folder.iterdir())
    if objects := [n for n in names if n.endswith(_OBJECT_FILES)]:
        raise UserError(
            f"{flag}: {shown(part_folder)} has its weights in {shown(objects[0])} only, serialized Python "
            "objects, "
            "which can carry code and are not loaded. If you trust it, load it once with diffusers and "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    content = ", ".join(map(shown, names[:5]))
    wanted = weight_names.single(part_kind, weight_names.PLAIN)
    raise UserError(f"{flag}: {shown(part_folder)} has no weights: there is no {wanted}; it holds {content}")


def given_vae_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a VAE that replaces the base's: the plain ones, else those of `variant`, else
    those of the only variant that there is.

    Raises UserError as `weight_files` does, or if none of these is the case.
    """
    kinds = weight_names.variants(_file_names(folder), "vae")
    if kinds and not kinds & {weight_names.PLAIN, variant}:
        if len(kinds) > 1:
            raise UserError(
                f"{VAE_FLAG}: {shown(folder)} has several variants, {', '.join(sorted(kinds))}; copy the "
                f"wanted weights to {weight_names.single('vae', weight_names.PLAIN)}"
            )
        (variant,) = kinds
    chosen = None if weight_names.PLAIN in kinds else variant
    return weight_files(folder.parent, folder.name, chosen, kind="vae", flag=VAE_FLAG)


def _shards(index: Path, flag: str) -> list[Path]:
    """The files that an index of shards names."""
    table = read_json(index, flag).get("weight_map")
    names: list[str] = []
    if isinstance(table, dict) and all(isinstance(name, str) for name in table.values()):
        names = sorted(set(table.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):  # a bare name, never a path
            raise UserError(
                f"{flag}: {shown(index)} names {shortened(name)}, which is no safetensors file beside it"
            )
        if not (index.parent / name).is_file():
            raise UserError(f"{flag}: {shown(index.parent)} lacks {shown(name)}, which {index.name} names")
    if not names:
        raise UserError(f"{flag}: {shown(index)} names no weights")
    return [index.parent / name for name in names]


def weight_shapes(folder: Path, part: str, variant: str | None) -> dict[str, tuple[int, ...]]:
    """Shapes of a part's weights by key, from headers alone. Raises UserError if a file is damaged."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder, part, variant):
        try:
            shapes |= safetensors_files.read(path, safetensors_files.BASE).shapes
        except UserError as error:
            raise UserError(f"{BASE_FLAG}: {error}") from None
    return shapes


def _bad_weights(folder: Path, configs: Mapping[str, Mapping[str, Any]], variant: str | None) -> list[str]:
    """Faults of weight files: one weight of each part must have the width that config.json states."""
    # by part: how the key of that weight may end, and its width
    wanted: dict[str, tuple[tuple[str, ...], int]] = {
        "unet": (("conv_in.weight",), configs["unet"]["in_channels"])
    }
    if "vae" in configs:
        wanted["vae"] = ("decoder.conv_in.weight",), configs["vae"]["latent_channels"]
    for part in _text_parts(configs):
        field = _width_field(configs[part])
        # T5 ties two names to one tensor, and either may have been saved
        t5, clip = ("shared.weight", "embed_tokens.weight"), ("token_embedding.weight",)
        wanted[part] = t5 if field == "d_model" else clip, configs[part][field]
    problems = []
    for part, (ends, width) in wanted.items():
        try:
            shapes = weight_shapes(folder, part, variant)
        except UserError as error:
            problems.append(str(error).removeprefix(f"{BASE_FLAG}: "))
            continue
        shape = next((shape for key, shape in shapes.items() if key.endswith(ends)), None)
        if shape is None:
            problems.append(
                f"the weights in {shown(folder / part)} are of something else: they have no {ends[0]}"
            )
        elif len(shape) < 2 or width != shape[1]:
            problems.append(
                f"the weights in {shown(folder / part)} are of another model: {ends[0]} has shape {shape}, "
                f"and config.json says {width}"
            )
    return problems


def hash_ahead(base: BaseOptions) -> None:
    """Begin to hash the weights of a base on disk, in a daemon thread; `digests.of` then has them.

    The thread reports nothing: what is wrong with a base is reported by `check`.
    """
    folder, vae = Path(base.pretrained_model_name_or_path), base.pretrained_vae_model_name_or_path
    parts = [(folder, part, base.variant) for part in ("unet", "text_encoder_2", "text_encoder", "vae")]
    if vae:
        parts[-1] = (Path(vae).parent, Path(vae).name, None)

    def work() -> None:
        for place, part, variant in parts:
            kind = None if part.startswith("text_encoder") else "unet"
            with contextlib.suppress(UserError, OSError, ValueError):
                for path in weight_files(place, part, variant, kind=kind):
                    digests.of(path)

    threading.Thread(target=work, name="hash_ahead", daemon=True).start()
