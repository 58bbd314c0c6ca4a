"""Adapter files: inspect, convert, merge and resize them; extract one from a fine-tuned base; bake
them into a base.

Files may follow the command, as in `convert_adapter.py convert FILE --to kohya --output NEW`, or the
flag --adapter."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dreambooth.files.ownership import check_apart
from dreambooth.io import console, writer
from dreambooth.options.command_line import fail, parse
from dreambooth.options.conversion import (
    COMMANDS,
    BakeOptions,
    ConvertOptions,
    ExtractOptions,
    InspectOptions,
    KnownBase,
    MergeOptions,
    ResizeOptions,
)
from dreambooth.runtime import startup, stops


def parse_command(words: Sequence[str]) -> Any:
    """The options of a command; the first of `words` is its name. Exits with status 2 and one message if
    there is no such command or a flag is wrong, and with 0 after --help."""
    name, *rest = words or [""]
    if name in ("-h", "--help", "--help_all"):
        lines = "\n".join(f"  {command:<9} {text}" for command, (_, _, text) in COMMANDS.items())
        console.say(f"{__doc__}\n\ncommands (each has its own --help):\n{lines}")
        raise SystemExit(0)
    if name not in COMMANDS:
        fail(f"the first word must be a command, one of {', '.join(COMMANDS)}; got {name!r}")
    kind, flag, text = COMMANDS[name]
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    given = [f"--{flag}", *files] if files else []
    return parse(kind, text, [*given, *rest[len(files) :]], command=name)


if __name__ == "__main__":  # before the slow imports, see runtime/startup.py
    startup.begin()
    OPTIONS = parse_command(sys.argv[1:])

import os
import re
from pathlib import Path

import torch

from dreambooth.adapter_files import bake as base_weights
from dreambooth.adapter_files import deltas, layer_names, reading, run_info, tables, writing
from dreambooth.adapter_files.adapter import Adapter, to_lora
from dreambooth.adapter_files.adapter import merge as merge_adapters
from dreambooth.adapter_files.deltas import Lora
from dreambooth.adapter_files.layer_names import KohyaFamily
from dreambooth.io.errors import UserError, shown
from dreambooth.options import adapter_sets
from dreambooth.runtime.stops import Stop

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GIVE_BASE = "give --pretrained_model_name_or_path"


def main(options: Any) -> None:
    """Run the command that `options` belong to. Output files are written whole or not at all. Raises
    UserError for a user's mistake, SystemExit if a signal or a full disk ends the command."""
    with stops.stoppable():
        _COMMAND_OF[type(options)](options)


# ---- reading


def _base(options: KnownBase) -> Any:
    """The base on disk, a checked `families.Base`; None if no base is given. Raises UserError."""
    model = options.model()
    if model is None:
        return None
    from dreambooth.bases import families  # its libraries take seconds, and most conversions need no base

    return families.find(model, needs_vae=False)


def _read_named(path: Path, base: Any) -> Adapter:
    """The adapter in a file or folder; each module has the name and the shape of its layer in the base.

    Raises UserError as `reading.read_additive` does, or if a name or shape is known with a base only and no
    base is given.
    """
    adapter = reading.read_additive(path, base.layers() if base else None)
    console.notes(adapter.notes)
    if base:
        console.notes(run_info.notes(shown(path), adapter.metadata, base))
        return adapter
    for component, modules in adapter.components.items():
        for name, module in modules.items():
            if layer_names.is_raw(name):
                raise UserError(
                    f"{shown(path)}: {name} is a name in kohya's layout, which is resolved by the base's"
                    f" layers; {_GIVE_BASE}"
                )
            if not isinstance(module, Lora):
                raise UserError(
                    f"{shown(path)}: {component}.{name} is a {deltas.kind(module)}, which has no kernel size;"
                    f" {_GIVE_BASE}"
                )
    return adapter


# ---- writing


def _new_file(output: str, base: str | None, tuned: str | None = None) -> Path:
    """The path of the file to write; its folder is made. Raises UserError if it lies in one of the bases, if
    it exists or cannot be written: an existing file may be the user's."""
    path = Path(output)
    check_apart({"--output": output}, {}, {"--pretrained_model_name_or_path": base, "--tuned": tuned})
    try:
        if path.is_dir():
            raise UserError(f"--output: {shown(output)} is a folder; name a file")
        if os.path.lexists(path):
            raise UserError(f"--output: {shown(output)} exists; name a new file, or remove this one first")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {shown(output)} cannot be written: {error.strerror or error}") from None
    return path


def _new_folder(flag: str, name: str, inputs: Sequence[Path]) -> Path:
    """The path of the folder to write, which is not made yet; `flag` gave its `name`. Raises UserError unless
    it is new or empty, and outside of the `inputs`."""
    path = Path(name)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{flag}: {shown(name)} is a file; name a folder")
        if path.is_dir() and (names := sorted(entry.name for entry in path.iterdir())):
            raise UserError(
                f"{flag}: {shown(name)} is not empty, it holds {', '.join(map(shown, names[:3]))};"
                " name a new folder"
            )
        if within := [folder for folder in inputs if path.resolve().is_relative_to(folder.resolve())]:
            raise UserError(
                f"{flag}: {shown(name)} lies in {shown(within[0])}, which is read;"
                " name a folder outside of it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {shown(name)} cannot be made: {error.strerror or error}") from None
    return path


def _write(path: Path, data: bytes) -> None:
    if os.path.lexists(path):
        raise Stop(f"{shown(path)} has appeared since the start; move it away, and start again")
    writer.write(path, data)
    console.say(f"wrote {shown(path)}")


def _save(path: Path, adapter: Adapter, dtype: str) -> None:
    """Write a LoRA in the native layout, and print its table."""
    data = writing.write_native(adapter, run_info.of(adapter.metadata), DTYPES[dtype])
    console.say(tables.table(adapter))
    _write(path, data)


def _print_kept(kept: Mapping[str, float]) -> None:
    """Print the kept share of the update's energy (its squared Frobenius norm), by component."""
    for component, share in kept.items():
        console.say(f"{component}: {share:.4%} of the update's energy is kept")


# ---- commands


def inspect(options: InspectOptions) -> None:
    """Print what an adapter holds, and whether it fits the base if one is given."""
    base = _base(options.base)
    console.say(tables.report(reading.read(Path(options.adapter), base.layers() if base else None)))
    if base:
        console.say(f"\nfits {shown(options.base.pretrained_model_name_or_path)} ({base.family.name})")


def convert(options: ConvertOptions) -> None:
    """Write an adapter in another layout."""
    dtype = DTYPES[options.dtype]
    if options.to == "peft":
        base_name = options.base.pretrained_model_name_or_path
        inputs = [path for path in map(Path, filter(None, [options.adapter, base_name])) if path.is_dir()]
        folder = _new_folder("--output", options.output, inputs)
    else:
        path = _new_file(options.output, options.base.pretrained_model_name_or_path)
    base = _base(options.base)
    adapter = _read_named(Path(options.adapter), base)
    info = run_info.of(adapter.metadata)
    if options.rank:
        adapter = _ranked(options, adapter, base)
    elif options.to == "lora":
        adapter = to_lora(adapter)[0]
    console.say(tables.table(adapter))
    if options.to in ("native", "lora"):
        _write(path, writing.write_native(adapter, info, dtype))
    elif options.to == "kohya":
        family = _family(options.adapter, adapter, base)
        depth = layer_names.depth_of(base.layers()["unet"]) if base else layer_names.XL_DEPTH
        if base:
            info.setdefault("prediction_type", base.prediction_type)
        _write(path, writing.write_kohya(adapter, family, info, dtype, depth=depth))
        console.notes(writing.kohya_notes(adapter))
    else:
        files = writing.write_peft(adapter, layer_names.installed_text_prefixes(), info, dtype)
        writer.write_folder(folder, files)
        console.say(f"wrote {', '.join(shown(folder / name) for name in files)}")


def _ranked(options: ConvertOptions, adapter: Adapter, base: Any) -> Adapter:
    """The LoRA of --rank that is nearest to the adapter; prints the share that it keeps. Raises UserError if
    the adapter has magnitudes (DoRA) and no base is given."""
    magnitudes = [kind for kind in adapter.kinds if kind.startswith("d")]
    if magnitudes and not base:
        raise UserError(
            f"--rank: {shown(options.adapter)} is a {magnitudes[0]}, whose change depends on the base's"
            f" weights; {_GIVE_BASE}, or lower the rank of its matrices with `resize`"
        )
    assert options.rank is not None  # as in `convert`
    if magnitudes:
        lora, kept = base_weights.ranked_lora(adapter, base.weights, options.rank)
    else:
        lora, kept = to_lora(adapter, options.rank)
    _print_kept(kept)
    return lora


def _family(path: str, adapter: Adapter, base: Any) -> KohyaFamily:
    """The model version, which decides the names in kohya's layout. Raises UserError if the version is
    unknown, or kohya's layout has no names for it."""
    if base and base.kohya_family is None:
        raise UserError(f"--to kohya: {base.family.name} has no names in kohya's layout")
    if "text_encoder_2" in adapter.components:
        return "sdxl"
    if base:
        return base.kohya_family  # type: ignore[no-any-return]
    # by the width of the text that the UNet reads
    by_width = layer_names.FAMILY_OF_WIDTH
    unet = adapter.components.get("unet", {})
    widths = {deltas.shape(module)[1] for name, module in unet.items() if re.search(r"attn2\.to_[kv]$", name)}
    if len(widths) != 1 or not widths <= by_width.keys():
        raise UserError(
            f"{shown(path)}: its layers do not show which version it is for (Stable Diffusion 1, 2 or XL);"
            f" {_GIVE_BASE}"
        )
    return by_width[widths.pop()]


def merge(options: MergeOptions) -> None:
    """Merge several adapters into one LoRA."""
    weighted = [adapter_sets.split(word, "--adapter") for word in options.adapter]
    path = _new_file(options.output, options.base.pretrained_model_name_or_path)
    base = _base(options.base)
    exact = merge_adapters([(shown(file), _read_named(file, base), weight) for file, weight in weighted])
    console.notes(exact.notes)
    merged, kept = to_lora(exact, options.rank)
    if options.rank:
        _print_kept(kept)
    _save(path, merged, options.dtype)


def resize(options: ResizeOptions) -> None:
    """Write a LoRA of a smaller rank."""
    path = _new_file(options.output, options.base.pretrained_model_name_or_path)
    small, kept = to_lora(_read_named(Path(options.adapter), _base(options.base)), options.rank)
    _print_kept(kept)
    _save(path, small, options.dtype)


def extract(options: ExtractOptions) -> None:
    """Write a LoRA of the difference between a fine-tuned base and the base."""
    from dreambooth.adapters import inject  # these import peft and diffusers, which takes seconds
    from dreambooth.bases import families, folders
    from dreambooth.options.adapter import AdapterOptions
    from dreambooth.options.training import BaseOptions

    path = _new_file(options.output, options.base.pretrained_model_name_or_path, options.tuned)
    # one of the two bases may have no files of the variant
    variant, names = options.base.variant, (options.base.pretrained_model_name_or_path, options.tuned)
    has_variant = [Path(name).is_file() or folders.has_variant(Path(name), variant) for name in names]
    variants = [variant if has or not any(has_variant) else None for has in has_variant]
    base_options = BaseOptions(names[0], revision=options.base.revision, variant=variants[0])
    base = families.find(base_options, needs_vae=False)
    try:
        tuned = families.find(BaseOptions(options.tuned, variant=variants[1]), needs_vae=False)
        layers = layer_names.plain_layers(tuned.layers())
    except UserError as error:
        raise UserError(str(error).replace("--pretrained_model_name_or_path", "--tuned")) from None
    if tuned.family is not base.family:
        raise UserError(
            f"--tuned: {shown(options.tuned)} is a {tuned.family.name}, and the base a {base.family.name}"
        )
    preset = AdapterOptions(target_preset=options.target_preset)
    targets = {"unet": inject.layers_at(inject.unet_targets(preset), layers.pop("unet"))}
    if base.family.trains_text:
        ends = inject.text_targets(preset)
        targets |= {part: inject.layers_at(ends, shapes) for part, shapes in layers.items()}
    extraction = base_weights.extract(base, tuned, targets, options.rank)
    for part, share in extraction.covered.items():
        console.say(
            f"{part}: {share:.4%} of the difference is in the layers of --target_preset"
            f" {options.target_preset}"
        )
    _print_kept(extraction.kept)
    _save(path, extraction.adapter, options.dtype)


def bake(options: BakeOptions) -> None:
    """Write a copy of a base with adapters in its weights."""
    base = _base(options.base)
    if base.single_file and not base.single_file.has_vae:
        raise UserError(f"{shown(base.place)} has no VAE, and a base that is written needs one")
    console.notes(base.notes())
    folder = _new_folder("--merge_to", options.merge_to, [base.place])
    layers = base.layers()
    adapters = []
    for file, weight in (adapter_sets.split(word, "--adapter") for word in options.adapter):
        adapter = reading.read(file, layers)
        if not adapter.is_additive and weight != 1:
            raise UserError(
                f"--adapter: {shown(file)} is {', '.join(adapter.kinds).upper()}, which rotates weights:"
                f" its own weight must be 1, got {weight:g}"
            )
        console.say(f"{shown(file)}, weight {weight:g}\n{tables.table(adapter)}")
        console.notes([*adapter.notes, *run_info.notes(shown(file), adapter.metadata, base)])
        if skipped := run_info.of(adapter.metadata).get("clip_skip"):
            console.notes([f"{shown(file)} was trained with --clip_skip {skipped}: draw with that flag"])
        adapters.append((adapter, weight))
    dtype = DTYPES[options.dtype] if options.dtype else None
    notes = base_weights.bake(base, list(layers), adapters, folder, dtype)
    console.notes(notes)
    console.say(f"wrote {shown(folder)}")


_COMMAND_OF: dict[type, Any] = {
    InspectOptions: inspect,
    ConvertOptions: convert,
    MergeOptions: merge,
    ResizeOptions: resize,
    ExtractOptions: extract,
    BakeOptions: bake,
}


if __name__ == "__main__":
    startup.run(main, OPTIONS)
