"""Adapter files: look into them, convert, merge and resize them, extract one from a fine-tuned base, bake some into a base.

Files may stand right after the command: `convert_adapter.py convert FILE --to kohya --output NEW`, or go by the flag --adapter."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dreambooth.files import atomic
from dreambooth.options.command_line import fail, parse
from dreambooth.options.conversion import (
    COMMANDS,
    BakeOptions,
    ConvertOptions,
    ExtractOptions,
    InspectOptions,
    KnownBase,
    MergeOptions,
    NeededBase,
    ResizeOptions,
)
from dreambooth.runtime import startup, stops


def parse_command(words: Sequence[str]) -> Any:
    """The options of the command that the first word is. Exits with status 2 and one message if it is none, or its flags are wrong."""
    name, *rest = words or [""]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {command:<9} {text}" for command, (_, _, text) in COMMANDS.items())
        print(f"{__doc__}\n\ncommands (each has its own --help):\n{lines}")
        raise SystemExit(0)
    if name not in COMMANDS:
        fail(f"the first word must be a command, one of {', '.join(COMMANDS)}; got {name!r}")
    kind, flag, text = COMMANDS[name]
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    given = [f"--{flag}", *files] if files else []
    return parse(kind, text, [*given, *rest[len(files) :]])


if __name__ == "__main__":
    OPTIONS = parse_command(sys.argv[1:])
    startup.begin()

import re
from collections import Counter, defaultdict
from pathlib import Path

import torch

from dreambooth.adapter_files import bake as base_weights
from dreambooth.adapter_files import deltas, layer_names, merging, native
from dreambooth.adapter_files.deltas import Lora
from dreambooth.adapter_files.formats import (
    Adapter,
    Family,
    read,
    table,
    to_lora,
    write_kohya,
    write_native,
    write_peft,
)
from dreambooth.errors import UserError, shown
from dreambooth.options import adapter_sets
from dreambooth.runtime.stops import Stop

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(options: Any) -> None:
    """Do what the options, which are of one command, ask for. Raises UserError, and SystemExit if a signal or a full disk ends it; nothing is
    left half written."""
    with stops.stoppable():
        _RUN[type(options)](options)


# ---- what is read


def _base(options: KnownBase | NeededBase) -> Any:
    """The base on disk, checked; None if none is given."""
    model = options.model()
    if model is None:
        return None
    from dreambooth.bases import families  # its libraries take seconds, and most conversions need no base

    return families.find(model)


def _read_whole(path: str, base: Any) -> Adapter:
    """The adapter to be made into another: every module with the name and shape that it has in a base."""
    adapter = read(Path(path), base.layers() if base else None)
    if base:
        return adapter
    modules = [
        (component, path, module)
        for component, own in adapter.components.items()
        for path, module in own.items()
    ]
    needs = "give --pretrained_model_name_or_path"
    if raw := [name for _, name, _ in modules if layer_names.is_raw(name)]:
        raise UserError(
            f"{shown(path)}: {raw[0]} is a name in kohya's layout, which only the base's own layers tell where to part; {needs}"
        )
    if others := [
        (f"{component}.{name}", deltas.kind(module))
        for component, name, module in modules
        if not isinstance(module, Lora)
    ]:
        layer, kind = others[0]
        raise UserError(
            f"{shown(path)}: {layer} is a {kind}, which does not say the size of its layer's kernel; {needs}"
        )
    return adapter


def _weighted(words: Sequence[str]) -> list[tuple[str, float]]:
    """(file, weight) of each FILE or FILE:WEIGHT."""
    return [(str(path), weight) for path, weight in (adapter_sets.split(word, "--adapter") for word in words)]


# ---- what is written


def _new_file(output: str, inputs: Sequence[str]) -> Path:
    """The file to write, its folder made. Raises UserError if it is one of those that are read."""
    path = Path(output)
    try:
        for given in inputs:
            source = Path(given)
            held = [source, source / native.ADAPTER_NAME] if source.is_dir() else [source]
            if path.exists() and any(other.exists() and path.samefile(other) for other in held):
                raise UserError(f"--output: {shown(output)} is the adapter that is read; name another file")
        if path.is_dir():
            raise UserError(f"--output: {shown(output)} is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {shown(output)} cannot be written: {error.strerror or error}") from None
    return path


def _new_folder(flag: str, name: str, inputs: Sequence[Path]) -> Path:
    """The folder to make; there is none of that name, or an empty one. Raises UserError otherwise, or if it lies in a folder that is read."""
    path = Path(name)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{flag}: {shown(name)} is a file; name a folder")
        if path.is_dir() and (held := sorted(entry.name for entry in path.iterdir())):
            raise UserError(
                f"{flag}: {shown(name)} is not empty, it holds {', '.join(map(shown, held[:3]))}; name a new folder"
            )
        if within := [folder for folder in inputs if path.resolve().is_relative_to(folder.resolve())]:
            raise UserError(
                f"{flag}: {shown(name)} lies in {shown(within[0])}, which is read; name a folder outside of it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {shown(name)} cannot be made: {error.strerror or error}") from None
    return path


def _write(path: Path, data: bytes) -> None:
    try:
        atomic.write(path, data)
    except OSError as error:
        raise Stop(f"{path} cannot be written: {error.strerror or error}") from None
    print(f"wrote {shown(path)}")


def _save(path: Path, adapter: Adapter, dtype: str) -> None:
    """Write a LoRA in our layout and say what it is."""
    data = write_native(adapter, native.recorded(adapter.metadata), DTYPES[dtype])
    print(table(adapter))
    _write(path, data)


def _say_kept(kept: merging.Share) -> None:
    """Shares of the squared update, by component."""
    for component, share in kept.items():
        print(f"{component}: {share:.4%} of the update's energy is kept")


# ---- commands


def inspect(options: InspectOptions) -> None:
    base = _base(options.base)
    if base:
        from dreambooth.adapters import apply  # brings peft

        adapter = apply.read(Path(options.adapter), base.layers())
    else:
        adapter = read(Path(options.adapter))
    if isinstance(adapter, Adapter):
        print(table(adapter), _scales(adapter), _norms(adapter), _metadata(adapter.metadata), sep="\n\n")
    else:
        print(_turning_table(adapter), _metadata(adapter.metadata), sep="\n\n")
    if base:
        print(f"\nfits {shown(options.base.pretrained_model_name_or_path)} ({base.family.name})")


def _turning_table(adapter: Any) -> str:
    """`table` for what turns weights instead of adding to them, OFT, BOFT and HRA, a `rotations.Rotations`."""
    lines = [f"{'component':<16} {'kind':<6} {'modules':>8}  side of blocks, or reflections"]
    for component, modules in adapter.components.items():
        counted = sorted(Counter(adapter.size(component, module) for module in modules).items())
        words = [f"{size}" + f" ({count}x)" * (len(counted) > 1) for size, count in counted]
        lines.append(
            f"{component:<16} {adapter.settings[component][0].lower():<6} {len(modules):>8}  {', '.join(words)}"
        )
    return "\n".join(lines)


def _scales(adapter: Adapter) -> str:
    """What the file multiplies each update by, most frequent first."""
    lines = [f"{'component':<16} scale"]
    for component, scales in adapter.scales.items():
        counted = Counter(f"{scale:.6g}" for scale in scales.values()).most_common(6)
        lines.append(
            f"{component:<16} {', '.join(scale + f' ({count}x)' * (len(counted) > 1) for scale, count in counted)}"
        )
    return "\n".join(lines)


_BLOCK = re.compile(r"((?:down|up)_blocks[._]\d+|mid_block|(?:input|output)_blocks_\d+|middle_block)[._]")


def _norms(adapter: Adapter) -> str:
    """Frobenius norms of the update, scales worked in, by block of the UNet and text encoder."""
    blocks: dict[str, list[float]] = defaultdict(list)
    for component, modules in adapter.components.items():
        for path, module in modules.items():
            found = _BLOCK.search(f"{path}.") if component == "unet" else None
            blocks[
                f"unet {found[1]}" if found else "unet, other" if component == "unet" else component
            ].append(deltas.norm(module))
    lines = [f"{'block':<24} {'layers':>6} {'norm of the update':>20} {'largest of a layer':>20}"]
    lines += [
        f"{name:<24} {len(norms):>6} {sum(n * n for n in norms) ** 0.5:>20.6g} {max(norms):>20.6g}"
        for name, norms in blocks.items()
    ]
    if any(
        module.magnitude is not None for modules in adapter.components.values() for module in modules.values()
    ):
        lines.append("(without the lengths of rows that DoRA has as well)")
    return "\n".join(lines)


def _metadata(metadata: Mapping[str, str]) -> str:
    if not metadata:
        return "no metadata"
    cut = {
        name: text if len(text) <= 300 else f"{text[:300]} ... ({len(text)} characters)"
        for name, text in sorted(metadata.items())
    }
    return "\n".join(["metadata", *(f"  {shown(name)}: {shown(text)}" for name, text in cut.items())])


def convert(options: ConvertOptions) -> None:
    dtype = DTYPES[options.dtype]
    if options.to == "peft":
        folder = _new_folder(
            "--output", options.output, [path for path in [Path(options.adapter)] if path.is_dir()]
        )
    else:
        path = _new_file(options.output, [options.adapter])
    base = _base(options.base)
    adapter = _read_whole(options.adapter, base)
    info = native.recorded(adapter.metadata)
    if options.to == "lora":
        lora, kept = to_lora(adapter, options.rank)
        if options.rank:
            _say_kept(merging.shares(to_lora(adapter)[0], kept))
        _save(path, lora, options.dtype)
        return
    print(table(adapter))
    if options.to == "native":
        _write(path, write_native(adapter, info, dtype))
    elif options.to == "kohya":
        depth = layer_names.depth_of(base.layers()["unet"]) if base else layer_names.XL_DEPTH
        if base:
            info.setdefault("prediction_type", base.prediction_type)
        _write(path, write_kohya(adapter, _family(options.adapter, adapter, base), info, dtype, depth=depth))
    else:
        _write_folder(folder, write_peft(adapter, _text_prefixes(), dtype))


def _family(path: str, adapter: Adapter, base: Any) -> Family:
    """Whose names kohya's layout has for the adapter's layers."""
    if base and base.kohya_family is None:
        raise UserError(f"--to kohya: {base.family.name} has no names in kohya's layout")
    if "text_encoder_2" in adapter.components:
        return "sdxl"
    if base:
        return base.kohya_family
    known: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    unet = adapter.components.get("unet", {})
    widths = {deltas.shape(module)[1] for name, module in unet.items() if re.search(r"attn2\.to_[kv]$", name)}
    if len(widths) != 1 or not widths <= known.keys():
        raise UserError(
            f"{shown(path)}: its layers do not tell whether it is for Stable Diffusion 1, 2 or XL; give --pretrained_model_name_or_path"
        )
    return known[widths.pop()]


def _text_prefixes() -> dict[str, str]:
    """What stands before the layers of text encoders in the transformers that is installed: it changed from one major version to the next."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        models = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=1)),
        }
    return {name: "text_model." if hasattr(model, "text_model") else "" for name, model in models.items()}


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """All of the files or none."""
    try:
        atomic.write_folder(folder, files)
    except OSError as error:
        raise Stop(f"{folder} cannot be written: {error.strerror or error}") from None
    print(f"wrote {', '.join(shown(folder / name) for name in files)}")


def merge(options: MergeOptions) -> None:
    named = _weighted(options.adapter)
    path = _new_file(options.output, [name for name, _ in named])
    base = _base(options.base)
    whole = merging.merge([(shown(name), _read_whole(name, base), weight) for name, weight in named])
    merged, kept = to_lora(whole, options.rank)
    if options.rank:
        _say_kept(merging.shares(whole, kept))
    _save(path, merged, options.dtype)


def resize(options: ResizeOptions) -> None:
    path = _new_file(options.output, [options.adapter])
    whole, _ = to_lora(_read_whole(options.adapter, _base(options.base)))
    small, kept = to_lora(whole, options.rank)
    _say_kept(merging.shares(whole, kept))
    _save(path, small, options.dtype)


def extract(options: ExtractOptions) -> None:
    from dreambooth.adapters import inject
    from dreambooth.bases import families
    from dreambooth.options.adapter import AdapterOptions as Kind
    from dreambooth.options.training import BaseOptions

    path = _new_file(options.output, [])
    base = _base(options.base)
    try:
        tuned = families.find(BaseOptions(options.tuned, variant=options.base.variant))
        layers = tuned.layers()
    except UserError as error:
        raise UserError(str(error).replace("--pretrained_model_name_or_path", "--tuned")) from None
    if tuned.family is not base.family:
        raise UserError(
            f"--tuned: {shown(options.tuned)} is a {tuned.family.name}, and the base a {base.family.name}"
        )
    kind = Kind(target_preset=options.target_preset)
    targets = {
        part: [
            layer.removeprefix("text_model.")
            for layer in inject.layers_at(
                inject.unet_targets(kind) if part == "unet" else inject.text_targets(0, 0, kind), own
            )
        ]
        for part, own in layers.items()
        if part == "unet" or base.family.trains_text
    }
    lora, kept, covered = base_weights.extract(
        base.folder, tuned.folder, options.base.variant, targets, options.rank
    )
    for part, share in covered.items():
        print(
            f"{part}: {share:.4%} of what differs lies in the layers of --target_preset {options.target_preset}"
        )
    _say_kept(kept)
    _save(path, lora, options.dtype)


def bake(options: BakeOptions) -> None:
    from dreambooth.adapters import apply  # brings peft

    base = _base(options.base)
    folder = _new_folder("--merge_to", options.merge_to, [base.folder])
    layers = base.layers()
    uses = []
    for name, weight in _weighted(options.adapter):
        adapter = apply.read(Path(name), layers)
        if not isinstance(adapter, Adapter) and weight != 1:
            kinds = ", ".join(adapter.kinds).upper()
            raise UserError(
                f"--adapter: {shown(name)} is {kinds}, which turns weights: its own can be 1 only, got {weight:g}"
            )
        contents = table(adapter) if isinstance(adapter, Adapter) else _turning_table(adapter)
        print(f"{shown(name)}, weight {weight:g}", contents, sep="\n")
        uses.append((adapter, weight))
    dtype = DTYPES[options.dtype] if options.dtype else None
    try:
        notes = base_weights.bake(base.folder, options.base.variant, list(layers), uses, folder, dtype)
    except OSError as error:
        raise Stop(f"{folder} cannot be written: {error.strerror or error}") from None
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {shown(folder)}")


_RUN: dict[type, Any] = {
    InspectOptions: inspect,
    ConvertOptions: convert,
    MergeOptions: merge,
    ResizeOptions: resize,
    ExtractOptions: extract,
    BakeOptions: bake,
}


if __name__ == "__main__":
    startup.run(main, OPTIONS)
