"""The folder of a base model, checked before anything of it is loaded: parts, classes, widths, and weights as far as their headers tell.

A base is files that somebody else wrote. Nothing here imports what they name, and weights in files of Python objects (.bin, .ckpt) are refused,
since those can carry code.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError, shown
from dreambooth.files import safetensors_files

_FLAG = "--pretrained_model_name_or_path"
_LARGEST_JSON = 16 * 2**20
_LIBRARIES = {"diffusers", "transformers"}
_NEVER_LOADED = {"safety_checker", "watermarker", "feature_extractor", "image_encoder"}
_OBJECT_FILES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_SCRIPTS = {
    "StableDiffusion3Pipeline": "train_dreambooth_lora_sd3.py",
    "FluxPipeline": "train_dreambooth_lora_flux.py",
}


def unknown_class(name: str, found: object, known: Sequence[str]) -> str:
    """The message for a base whose pipeline class is not one of `known`."""
    script = _OTHER_SCRIPTS.get(found) if isinstance(found, str) else None
    advice = f"; diffusers' {script} trains it" if script else ""
    return f"{_FLAG}: {shown(name)} is a {_short(found)}; this version trains {', '.join(known)}{advice}"


def no_index(folder: Path, name: str) -> str:
    """The message for a folder without model_index.json: what it seems to be, and what to give instead."""
    names = sorted(path.name for path in folder.iterdir())
    held = ", ".join(shown(n) for n in names[:5]) or "nothing"
    message = f"{_FLAG}: {shown(name)} is not a diffusers pipeline folder: it has no model_index.json; it holds {held}"
    if (folder.absolute().parent / "model_index.json").is_file():
        return f"{message}. It is one part of a base: name the folder above it"
    if "adapter_config.json" in names or any("lora" in n and n.endswith(".safetensors") for n in names):
        return (
            f"{message}. That is an adapter, not a base: give it as --adapter of infer.py or --init_adapter"
        )
    if any(n.endswith((".safetensors", *_OBJECT_FILES)) for n in names):
        return f"{message}. Convert a single-file base with StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
    return message


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises UserError, naming the file, if it is none."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it is over {_LARGEST_JSON:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it must be a table, and is a {type(content).__name__}")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{_FLAG}: {shown(path)} cannot be read ({shown(' '.join(str(error).split()))})"
        ) from None


def check(
    folder: Path,
    name: str,
    index: Mapping[str, Any],
    classes: Mapping[str, str],
    folders: Sequence[str],
    *,
    variant: str | None,
    own_tokenizer: bool,
) -> None:
    """Raise UserError, with one line for each fault, unless `folder` has all `folders` and its models are of the `classes` named for them."""
    missing = [
        part
        for part in folders
        if not (folder / part).is_dir() and not (part == "tokenizer" and own_tokenizer)
    ]
    if missing:
        raise UserError(f"{_FLAG}: {shown(name)} lacks the folders {', '.join(missing)}")
    _raise(_foreign(index, classes))
    configs = {part: read_json(folder / part / "config.json") for part in classes}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    own = [
        part
        for part in folders
        if part.startswith("tokenizer") and not (part == "tokenizer" and own_tokenizer)
    ]
    tokenizers = {part: folder / part / "tokenizer_config.json" for part in own}
    others = {part: read_json(path) for part, path in tokenizers.items() if path.is_file()}
    with_code = [part for part, config in (configs | others).items() if "auto_map" in config]
    _raise(
        [
            f"the {part} of {shown(name)} names code of its own (auto_map), which is not run"
            for part in with_code
        ]
    )
    _raise(_wrong_kinds(configs, classes, name))
    _raise(_misfits(configs, name))
    if variant:
        tag = re.compile(rf"\.{variant}[.-]")  # with a minus where a file is one of several
        lacking = [
            part
            for part in classes
            if not any(tag.search(path.name) for path in weight_files(folder, part, variant))
        ]
        if lacking:
            raise UserError(
                f"--variant: {shown(name)} has no {variant} weights of {', '.join(lacking)}; leave it out, or fetch them"
            )
    _raise(_bad_weights(folder, configs, variant))


def check_vae(folder: Path, name: str, base_folder: Path, flag: str) -> None:
    """Raise UserError unless `folder`, given by `flag`, holds a VAE whose latents are those of the base."""
    config, own = read_json(folder / "config.json"), read_json(base_folder / "vae" / "config.json")
    if (found := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise UserError(f"{flag}: {shown(name)} is a {_short(found)}; it must be an AutoencoderKL")
    sides = [
        len(c["block_out_channels"]) if isinstance(c.get("block_out_channels"), list) else None
        for c in (config, own)
    ]
    if config.get("latent_channels") != own["latent_channels"] or sides[0] != sides[1]:
        theirs = f"{_value(config.get('latent_channels'))} channels at 1/{2 ** ((sides[0] or 1) - 1)}"
        raise UserError(
            f"{flag}: {shown(name)} has latents of {theirs}; the base has {own['latent_channels']} channels at 1/{2 ** ((sides[1] or 1) - 1)}"
        )
    try:
        weight_files(folder.parent, folder.name, None, kind="vae")
    except UserError as error:
        raise UserError(str(error).replace(_FLAG, flag)) from None


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(f"{_FLAG}: {problem}" for problem in problems))


def _short(found: object) -> str:
    """A value of a JSON file, as it may stand in a message."""
    return found[:80] if isinstance(found, str) and found.isprintable() else ascii(found)[:80]


def _value(found: object) -> str:
    """The same where it matters whether it is a text or a number."""
    return ascii(found)[:80]


def _foreign(index: Mapping[str, Any], classes: Mapping[str, str]) -> list[str]:
    problems = []
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue  # settings of the pipeline itself
        if len(entry) != 2 or not all(word is None or isinstance(word, str) for word in entry):
            problems.append(
                f"model_index.json: {_short(part)} must name a library and a class, got {_short(entry)}"
            )
            continue
        library, kind = entry
        if library is None and part in classes:
            problems.append(f"model_index.json leaves out {part}")
        # these are never loaded, and some bases name a module of diffusers for them
        elif library is not None and library not in _LIBRARIES and part not in _NEVER_LOADED:
            problems.append(
                f"model_index.json: {_short(part)} comes from {_short(library)}; only diffusers and transformers are loaded"
            )
        elif part in classes and kind != classes[part]:
            problems.append(f"model_index.json: {part} is a {_short(kind)}; it must be a {classes[part]}")
    return problems


def _is_number(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _text_parts(configs: Mapping[str, Any]) -> list[str]:
    return [part for part in configs if part.startswith("text_encoder")]


def _width_field(config: Mapping[str, Any]) -> str:
    """How a text encoder calls its width: T5 has a name of its own for it."""
    return "d_model" if "d_model" in config else "hidden_size"


def _wrong_kinds(
    configs: Mapping[str, Mapping[str, Any]], classes: Mapping[str, str], name: str
) -> list[str]:
    problems = []
    wanted = [("unet", "in_channels")] + [
        (part, _width_field(configs[part])) for part in _text_parts(configs)
    ]
    # a UNet may have its text projected first, to a width that is then called otherwise
    wanted.append(
        (
            "unet",
            "encoder_hid_dim"
            if configs["unet"].get("encoder_hid_dim") is not None
            else "cross_attention_dim",
        )
    )
    if "vae" in configs:
        wanted.append(("vae", "latent_channels"))
        blocks = configs["vae"].get("block_out_channels")
        if not isinstance(blocks, list) or not blocks or not all(map(_is_number, blocks)) or len(blocks) > 10:
            problems.append(
                f"the vae of {shown(name)} has block_out_channels {_value(blocks)}; it must be a list of whole numbers"
            )
    for part, field in wanted:
        if not _is_number(configs[part].get(field)):
            problems.append(
                f"the {part} of {shown(name)} has {field} {_value(configs[part].get(field))}; it must be a whole number"
            )
    optional = [("unet", "sample_size", 64)]
    optional += [
        (part, field, n)
        for part in _text_parts(configs)
        for field, n in (("max_position_embeddings", 77), ("num_hidden_layers", 12))
    ]
    if "text_encoder_2" in configs:
        optional += [("unet", "addition_time_embed_dim", 256), ("text_encoder_2", "projection_dim", 512)]
        optional += [("unet", "projection_class_embeddings_input_dim", 2816)]
    for part, field, default in optional:
        if not _is_number(configs[part].get(field, default)):
            problems.append(
                f"the {part} of {shown(name)} has {field} {_value(configs[part][field])}; it must be a whole number"
            )
    for part in ("unet", "vae"):
        if part in configs and (found := configs[part].get("_class_name", classes[part])) != classes[part]:
            problems.append(f"the {part} of {shown(name)} is a {_short(found)}; it must be a {classes[part]}")
    return problems


def _misfits(configs: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    unet, problems = configs["unet"], []
    encoders = _text_parts(configs)
    given = sum(configs[part][_width_field(configs[part])] for part in encoders)
    taken = (
        unet["encoder_hid_dim"] if unet.get("encoder_hid_dim") is not None else unet["cross_attention_dim"]
    )
    if taken != given:
        widths = (
            f"{taken} wide text and its text encoder{'s give' if len(encoders) > 1 else ' gives'} {given}"
        )
        problems.append(f"the UNet of {shown(name)} takes {widths}: parts of two different bases")
    if "text_encoder_2" in configs:
        pooled = configs["text_encoder_2"].get("projection_dim", 512) + 6 * unet.get(
            "addition_time_embed_dim", 256
        )
        if (wanted := unet.get("projection_class_embeddings_input_dim", 2816)) != pooled:
            problems.append(
                f"the UNet of {shown(name)} takes {wanted} numbers of text and size and gets {pooled}: parts of two different bases"
            )
    if "vae" in configs and unet["in_channels"] != configs["vae"]["latent_channels"]:
        channels = f"{unet['in_channels']} channels and its VAE gives {configs['vae']['latent_channels']}"
        problems.append(
            f"the UNet of {shown(name)} takes {channels}: parts of two different bases, or a base for inpainting"
        )
    if "vae" not in configs and unet["in_channels"] != 3:
        problems.append(
            f"the UNet of {shown(name)} takes {unet['in_channels']} channels and not 3: a second stage, which is not trained here"
        )
    prediction_type = configs["scheduler"].get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        found = _short(prediction_type)
        problems.append(
            f"Unknown prediction type {found} in the scheduler of {shown(name)}; it must be epsilon or v_prediction"
        )
    return problems


def weight_files(folder: Path, part: str, variant: str | None, *, kind: str | None = None) -> list[Path]:
    """The safetensors files that a part is loaded from; `kind` is what the part is, where its folder has another name.

    Raises UserError if there are none, with the reason if they are of another format.
    """
    where = folder / part
    is_text = (kind or part).startswith("text_encoder")
    stem = "model" if is_text else "diffusion_pytorch_model"
    for tag in ([f".{variant}"] if variant else []) + [""]:
        whole = where / f"{stem}{tag}.safetensors"
        # where there are a whole file and pieces too, transformers takes the former and diffusers the latter
        if is_text and whole.is_file():
            return [whole]
        for index in (
            where / f"{stem}.safetensors.index{tag}.json",
            where / f"{stem}{tag}.safetensors.index.json",
        ):
            if index.is_file():
                return _shards(index)
        if whole.is_file():
            return [whole]
    names = sorted(path.name for path in where.iterdir())
    if objects := [n for n in names if n.endswith(_OBJECT_FILES)]:
        raise UserError(
            f"{_FLAG}: {shown(where)} has its weights in {shown(objects[0])} only, serialized Python objects, which can carry code and are not "
            "loaded. If you trust it, load it once with diffusers and save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise UserError(
        f"{_FLAG}: {shown(where)} has no weights: there is no {stem}.safetensors; it holds {', '.join(map(shown, names[:5]))}"
    )


def _shards(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    names = (
        sorted(set(table.values()))
        if isinstance(table, dict) and all(isinstance(n, str) for n in table.values())
        else []
    )
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):  # a name, never a path
            raise UserError(
                f"{_FLAG}: {shown(index)} names {_short(name)}, which is no safetensors file beside it"
            )
        if not (index.parent / name).is_file():
            raise UserError(f"{_FLAG}: {shown(index.parent)} lacks {shown(name)}, which {index.name} names")
    if not names:
        raise UserError(f"{_FLAG}: {shown(index)} names no weights")
    return [index.parent / name for name in names]


def weight_shapes(folder: Path, part: str, variant: str | None) -> dict[str, tuple[int, ...]]:
    """Shapes of a part's weights by key, from headers alone. Raises UserError if a file is damaged."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder, part, variant):
        try:
            shapes |= safetensors_files.read(path, safetensors_files.BASE).shapes
        except UserError as error:
            raise UserError(f"{_FLAG}: {error}") from None
    return shapes


def _bad_weights(folder: Path, configs: Mapping[str, Mapping[str, Any]], variant: str | None) -> list[str]:
    problems = []
    wanted: dict[str, tuple[str | tuple[str, ...], int]] = {
        "unet": ("conv_in.weight", configs["unet"]["in_channels"]),
        **(
            {"vae": ("decoder.conv_in.weight", configs["vae"]["latent_channels"])} if "vae" in configs else {}
        ),
    }
    for part in _text_parts(configs):
        field = _width_field(configs[part])
        # T5 ties two names to one tensor, and either may have been saved
        wanted[part] = (
            ("shared.weight", "embed_tokens.weight") if field == "d_model" else "token_embedding.weight",
            configs[part][field],
        )
    for part, (end, width) in wanted.items():
        try:
            found = [
                shape for key, shape in weight_shapes(folder, part, variant).items() if key.endswith(end)
            ]
        except UserError as error:
            problems.append(str(error).removeprefix(f"{_FLAG}: "))
            continue
        end = end if isinstance(end, str) else end[0]
        if not found:
            problems.append(
                f"the weights in {shown(folder / part)} are of something else: they have no {end}"
            )
        elif len(found[0]) < 2 or width != found[0][1]:
            problems.append(
                f"the weights in {shown(folder / part)} are of another model: {end} has shape {found[0]}, and config.json says {width}"
            )
    return problems
