"""Checks a base's folder before anything of it is loaded: its parts, their classes and their weight files.

A base may come from anyone. Nothing here imports what its files name, and weights in .bin or .ckpt files are
refused, because those can carry code. This module imports no torch.
"""

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dreambooth.bases import weight_names
from dreambooth.files import digests
from dreambooth.io import reader
from dreambooth.io.errors import UserError, raise_all, shortened, shown
from dreambooth.options.training import BaseOptions

BASE_FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--pretrained_vae_model_name_or_path"
KohyaFamily = Literal["sd1", "sd2", "sdxl"]  # the versions by which kohya's files name layers
_LIBRARIES = {"diffusers", "transformers"}
# Parts that are never fetched and never loaded: a safety checker blackens pictures, a watermarker marks
# training images.
UNUSED_PARTS = ("safety_checker", "feature_extractor", "watermarker", "image_encoder")
OBJECT_FILES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_SCRIPTS = {
    "StableDiffusion3Pipeline": "train_dreambooth_lora_sd3.py",
    "FluxPipeline": "train_dreambooth_lora_flux.py",
}


def is_hub_id(name: str) -> bool:
    """Whether the name is valid for a repository of the hub, and no file or folder has it."""
    if Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def unknown_class(name: str, pipeline: object, known: Sequence[str]) -> str:
    """The message for a base whose pipeline class is not one of `known`."""
    script = _OTHER_SCRIPTS.get(pipeline) if isinstance(pipeline, str) else None
    advice = f"; diffusers' {script} trains it" if script else ""
    trained = ", ".join(known)
    return f"{BASE_FLAG}: {shown(name)} is a {shortened(pipeline)}; this version trains {trained}{advice}"


def no_index(folder: Path, name: str) -> str:
    """The message for a folder without model_index.json, with what the folder may be instead."""
    names = sorted(path.name for path in folder.iterdir())
    content = ", ".join(shown(n) for n in names[:5]) or "nothing"
    advice = ""
    if (folder.absolute().parent / "model_index.json").is_file():
        advice = ". It is one part of a base: name the folder above it"
    elif "adapter_config.json" in names or any("lora" in n and n.endswith(".safetensors") for n in names):
        advice = ". That is an adapter, not a base: give it as --adapter of infer.py or --init_adapter"
    elif any(n.endswith((".safetensors", *OBJECT_FILES)) for n in names):
        advice = ". A base in a single .safetensors file is named by its path, ending included"
    lack = f"is not a diffusers pipeline folder: it has no model_index.json; it holds {content}"
    return f"{BASE_FLAG}: {shown(name)} {lack}{advice}"


def read_json(path: Path, flag: str = BASE_FLAG) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, starting with `flag`, if the file holds none."""
    return reader.read_json_table(path, f"{flag}: {shown(path)}")


def check(
    folder: Path, name: str, index: Mapping[str, Any], classes: Mapping[str, str], parts: Sequence[str]
) -> None:
    """Raise UserError, with one line per fault, if a base has not the parts of its family.

    `name` is how the user named the base, `index` the content of its model_index.json. The base must have the
    folders `parts`, and models of `classes`.
    """
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise UserError(f"{BASE_FLAG}: {shown(name)} lacks the folders {', '.join(missing)}")
    raise_all(f"{BASE_FLAG}: {problem}" for problem in _foreign(index, classes))
    paths = {part: folder / part / "tokenizer_config.json" for part in parts if part.startswith("tokenizer")}
    paths = {part: path for part, path in paths.items() if path.exists()}
    paths |= {part: folder / part / "config.json" for part in classes}
    raise_all(
        f"{BASE_FLAG}: the {part} of {shown(name)} names code of its own (auto_map), which is not run"
        for part, path in paths.items()
        if "auto_map" in read_json(path)
    )


def check_variant(folder: Path, name: str, parts: Iterable[str], variant: str | None) -> None:
    """Raise UserError if a part has its weights in other variants only, or if no part has `variant`.

    Parts without any safetensors weights are left to `weight_files`.
    """
    available = {part: variants_in(folder / part, part) for part in parts}
    problem = weight_names.problem(available, variant or weight_names.PLAIN)
    if problem and all(available.values()):
        flag = "--variant" if variant else BASE_FLAG
        raise UserError(f"{flag}: {shown(name)} has {problem}")


def has_variant(folder: Path, variant: str | None) -> bool:
    """Whether any part of the base in `folder` has weights of this variant."""
    parts = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return any(variant in variants_in(part, part.name) for part in parts)


def variants_in(folder: Path, part: str) -> set[str]:
    """The variants, `weight_names.PLAIN` among them, that the files in `folder` have of a part."""
    return weight_names.variants([path.name for path in folder.iterdir() if path.is_file()], part)


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
        elif library is not None and library not in _LIBRARIES and part not in UNUSED_PARTS:
            problems.append(
                f"model_index.json: {shortened(part)} comes from {shortened(library)}; only diffusers and "
                "transformers are loaded"
            )
        elif part in classes and kind != classes[part]:
            problems.append(f"model_index.json: {part} is a {shortened(kind)}; it must be a {classes[part]}")
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
    if objects := [n for n in names if n.endswith(OBJECT_FILES)]:
        raise UserError(
            f"{flag}: {shown(part_folder)} has its weights in {shown(objects[0])} only, serialized Python "
            "objects, which can carry code and are not loaded. If you trust it, load it once with diffusers "
            "and save_pretrained(FOLDER, safe_serialization=True)"
        )
    content = ", ".join(map(shown, names[:5]))
    wanted = weight_names.single(part_kind, weight_names.PLAIN)
    raise UserError(f"{flag}: {shown(part_folder)} has no weights: there is no {wanted}; it holds {content}")


def given_vae_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a VAE that replaces the base's: the plain ones, else those of `variant`, else
    those of the only variant that there is.

    Raises UserError as `weight_files` does, or if none of these is the case.
    """
    kinds = variants_in(folder, "vae")
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
    values = list(table.values()) if isinstance(table, dict) else []
    names = sorted(set(values)) if all(isinstance(name, str) for name in values) else []
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


def hash_ahead(base: BaseOptions) -> None:
    """Begin to hash the weights of a base on disk, in a daemon thread; `digests.of` then has them.

    The thread reports nothing: what is wrong with a base is reported by `check`.
    """

    def work() -> None:
        with contextlib.suppress(UserError, OSError, ValueError):
            for path in _weights_on_disk(base):
                digests.of(path)

    threading.Thread(target=work, name="hash_ahead", daemon=True).start()


def _weights_on_disk(base: BaseOptions) -> Iterator[Path]:
    """The weight files of a base on disk. Parts without any are passed over."""
    folder, vae = Path(base.pretrained_model_name_or_path), base.pretrained_vae_model_name_or_path
    parts = [(folder, part, base.variant) for part in ("unet", "text_encoder_2", "text_encoder", "vae")]
    if vae:
        parts[-1] = (Path(vae).parent, Path(vae).name, None)
    if folder.is_file():  # a single file, which has all parts
        yield folder
        parts = parts[-1:] if vae else []
    for place, part, variant in parts:
        kind = None if part.startswith("text_encoder") else "unet"
        if (place / part).is_file():
            yield place / part
            continue
        with contextlib.suppress(UserError, OSError, ValueError):
            yield from weight_files(place, part, variant, kind=kind)
