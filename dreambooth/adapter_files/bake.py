"""Work on a base's weight files, tensor by tensor: `extract` makes a LoRA of what fine-tuning changed,
`ranked_lora` one of what a DoRA changes, `bake` merges adapters into a copy of the base.

No model is built. Weights are looked up by their keys, so a copied folder keeps its keys, its tokenizers and
its other files.
"""

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.adapter_files import deltas
from dreambooth.adapter_files.adapter import Adapter, to_lora
from dreambooth.adapter_files.deltas import Module
from dreambooth.adapter_files.layer_names import plain
from dreambooth.adapter_files.reading import AnyAdapter
from dreambooth.bases import folders, weight_names
from dreambooth.files import safetensors_files
from dreambooth.io import writer
from dreambooth.io.errors import UserError, reason_of, shown

if TYPE_CHECKING:  # its libraries take seconds, and most conversions need no base
    from dreambooth.bases import families
    from dreambooth.bases.weights import Weight

Weighted = tuple[AnyAdapter, float]  # an adapter and its weight
_WEIGHT_ENDS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".index.json")


# ---- reading


def _layer(key: str) -> str:
    """The layer whose weight has this key, by its name in adapters."""
    return plain(key).removesuffix(".weight")


class _BasePart:
    """The weights of one part of a base, which are read one at a time. Keys are plain
    (`layer_names.plain`)."""

    def __init__(self, weights: "Mapping[str, Weight]", where: str) -> None:
        self.where = where
        self.weights = {plain(key): weight for key, weight in weights.items()}
        self.shapes = {key: weight.shape for key, weight in self.weights.items()}

    def tensor(self, key: str) -> Tensor:
        """The tensor with this plain key. Raises UserError if a value is not finite."""
        weight = self.weights[key]
        tensor: Tensor = weight[...]
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.where}: {weight.key} has values that are not finite")
        return tensor


# ---- the difference between two bases


@dataclasses.dataclass(frozen=True)
class Extraction:
    """A LoRA that approximates the difference between two bases.

    Both shares are by component. `kept`: of the squared difference in the adapted layers, the share that the
    LoRA holds. `covered`: of the squared difference in all weights, the share in the adapted layers.
    """

    adapter: Adapter
    kept: dict[str, float]
    covered: dict[str, float]


def extract(
    base: "families.Base", tuned: "families.Base", targets: Mapping[str, Sequence[str]], rank: int
) -> Extraction:
    """The LoRA of at most `rank` that is nearest to tuned - base.

    `targets` are the layers by part of the base. Parts without a difference are left out. Raises UserError if
    the keys or shapes of the two bases differ, if they are equal in all `targets`, or if a value is not
    finite.
    """
    components: dict[str, dict[str, Module]] = {}
    kept: dict[str, float] = {}
    covered: dict[str, float] = {}
    for part, layers in targets.items():
        before, after = (
            _BasePart(model.weights(part), f"the {part} of {shown(model.place)}") for model in (base, tuned)
        )
        loras, in_layers, held, total = _difference(before, after, set(layers), rank)
        if in_layers:
            components[part] = dict(loras)
            kept[part] = held / in_layers
        if total:
            covered[part] = in_layers / total
    if not components:
        reason = ": the two bases are the same"
        if covered:
            reason = f"; the bases differ in other layers of {' and '.join(covered)} only"
        raise UserError(f"--tuned: nothing to extract{reason}")
    return Extraction(Adapter(components, {}), kept, covered)


def _difference(
    before: _BasePart, after: _BasePart, layers: set[str], rank: int
) -> tuple[dict[str, Module], float, float, float]:
    """(LoRA by layer; squared difference in these layers; of that, what the LoRA holds; squared difference in
    all weights)."""
    loras: dict[str, Module] = {}
    total = in_layers = held = 0.0
    for key in _common_keys(before, after):
        base_weight, tuned_weight = before.tensor(key), after.tensor(key)
        if not base_weight.is_floating_point():
            continue
        change = tuned_weight.float() - base_weight.float()
        square = float(change.double().square().sum())
        total += square
        if square and key.endswith(".weight") and _layer(key) in layers:
            loras[_layer(key)], share = deltas.extract(change, rank)
            in_layers += square
            held += share * square
    return loras, in_layers, held, total


def _common_keys(before: _BasePart, after: _BasePart) -> list[str]:
    """The keys of both parts, sorted. Raises UserError unless both have the same keys and shapes."""
    # older files also hold the buffer `position_ids`
    shapes, tuned = (
        {key: shape for key, shape in part.shapes.items() if not key.endswith("position_ids")}
        for part in (before, after)
    )
    unlike = sorted(key for key in shapes.keys() | tuned.keys() if shapes.get(key) != tuned.get(key))
    if unlike:
        key = unlike[0]
        both = " and ".join(
            f"{part.shapes[key]} in {part.where}" if key in part.shapes else f"not in {part.where}"
            for part in (before, after)
        )
        raise UserError(
            f"--tuned: {len(unlike)} weights have other shapes than the base's, e.g. {key}: {both}"
        )
    return sorted(shapes)


# ---- an adapter with magnitudes as a LoRA


def ranked_lora(
    adapter: Adapter, weights_of: "Callable[[str], Mapping[str, Weight]]", rank: int
) -> tuple[Adapter, dict[str, float]]:
    """(the LoRA of at most `rank` nearest to what the adapter changes in this base; by component, the share
    of the squared change that it keeps).

    `weights_of` has the base's weights by part. They are read only for layers with a magnitude. Raises
    UserError if a value of the base is not finite.
    """
    parts = {part: _BasePart(weights_of(part), f"the base's {part}") for part in adapter.components}
    return to_lora(adapter, rank, lambda part, layer: parts[part].tensor(f"{layer}.weight").float())


# ---- adapters merged into a copy


def bake(
    base: "families.Base",
    parts: Sequence[str],
    adapters: Sequence[Weighted],
    target: Path,
    dtype: torch.dtype | None,
) -> list[str]:
    """Write to `target` a copy of the base, as a folder of diffusers, with the adapters merged into `parts`
    (UNet, text encoders).

    Returns a note for each file or part of the base that the copy lacks. Weights are changed in float32 and
    saved in `dtype`, or in their present dtype if it is None. Each adapter's change is computed from the
    base's unchanged weight, and the changes are added, as in a pipeline with several adapters. The names of
    weight files lose the variant, so that `from_pretrained` without a variant loads them. `target` is
    complete or absent. Raises UserError if a value is not finite in its dtype, or if the base holds something
    that cannot be copied, or that is larger than the space on the disk.
    """
    if base.single_file:
        _bake_single_file(base, parts, adapters, target, dtype)
        return []
    folder, variant = base.folder, base.options.variant
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(_WEIGHT_ENDS)]
    if sum(path.stat().st_size for path in files) > shutil.disk_usage(target.parent).free:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise UserError(f"--merge_to: too little space for what is copied of the base, as {shown(largest)}")
    notes: list[str] = []
    with writer.new_folder(target) as temporary:
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue  # .git, and files of editors
            if entry.name in parts:
                notes += _bake_part(folder, entry.name, variant, adapters, temporary / entry.name, dtype)
            elif entry.is_dir():
                _copy_folder(entry, variant, temporary / entry.name)
            elif entry.name.endswith(_WEIGHT_ENDS):
                notes.append(f"{entry.name} is not copied: it holds the base without the adapter")
            else:
                _copy(entry, temporary / entry.name)
        notes += _remove_absent_parts(folder, temporary)
    return notes


def _bake_single_file(
    base: "families.Base",
    parts: Sequence[str],
    adapters: Sequence[Weighted],
    target: Path,
    dtype: torch.dtype | None,
) -> None:
    """Write a base in a single file to the folder `target`, as `bake` does."""
    assert base.single_file is not None
    with writer.new_folder(target) as temporary:
        writer.write_new(temporary / "model_index.json", _json(base.index))
        for part in base.family.kinds:
            writer.make_folder(temporary / part)
            _copy(base.part_folder(part) / "config.json", temporary / part / "config.json")
            is_changed = part in parts
            tensors = {
                key: _changed(weight[...], adapters, dtype if is_changed else None, part, key)
                for key, weight in sorted(base.weights(part).items())
            }
            _write_weights(tensors, temporary / part / weight_names.single(part, weight_names.PLAIN))
        writer.make_folder(temporary / "scheduler")
        writer.write_new(temporary / "scheduler" / "scheduler_config.json", _json(base.config("scheduler")))
        for tokenizer, _ in base.family.text.values():
            writer.make_folder(temporary / tokenizer)
            for name, path in base.single_file.tokenizer_files(tokenizer).items():
                _copy(path, temporary / tokenizer / name)


def _bake_part(
    folder: Path,
    part: str,
    variant: str | None,
    adapters: Sequence[Weighted],
    target: Path,
    dtype: torch.dtype | None,
) -> list[str]:
    """Write to `target` a copy of one part with the adapters merged into it. Returns notes as `bake` does."""
    files = folders.weight_files(folder, part, variant)
    is_changed = any(part in adapter.components for adapter, _ in adapters)
    if not is_changed and dtype is None and not (variant and len(files) > 1):
        _copy_folder(folder / part, variant, target)
        return []
    writer.make_folder(target)
    # everything but the weights
    notes = []
    for entry in sorted((folder / part).iterdir()):
        if entry.name.startswith(".") or entry in files or weight_names.is_index(entry.name):
            continue
        if entry.name.endswith(_WEIGHT_ENDS):
            notes.append(f"{part}/{entry.name} is not copied: it holds the base without the adapter")
        else:
            _copy(entry, target / entry.name)
    # the weights, file by file
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        name = _plain_name(file.name, variant)
        with safetensors_files.opened(file) as opened:
            tensors = {
                key: _changed(opened.get_tensor(key), adapters, dtype, part, key)
                for key in sorted(opened.keys())
            }
        _write_weights(tensors, target / name)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # several files, or one under another name, need an index
    if next(iter(weight_map.values())) != weight_names.single(part, weight_names.PLAIN):
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        writer.write_new(target / weight_names.indexes(part, weight_names.PLAIN)[0], text.encode())
    return notes


def _write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a new safetensors file. Raises WriteError."""
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise writer.WriteError(errno.EIO, reason_of(error), str(path)) from None
    writer.flush(path)


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _changed(
    weight: Tensor, adapters: Sequence[Weighted], dtype: torch.dtype | None, part: str, key: str
) -> Tensor:
    """The weight with this key of a part, with the adapters merged into it, in `dtype`, or in the weight's if
    that is None.

    Weights that are not floating point keep their dtype. Raises UserError if a value is not finite in the new
    dtype.
    """
    new_dtype = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    layer = _layer(key)
    if changing := [(a, scale) for a, scale in adapters if layer in a.components.get(part, {})]:
        base = weight.float()
        # an adapter's weight scales its whole change, magnitudes included, as in `adapters.apply`
        weight = base + sum(scale * (a.adapted(part, layer, base) - base) for a, scale in changing)
    weight = weight.to(new_dtype).contiguous()
    if weight.is_floating_point() and not torch.isfinite(weight).all():
        name = str(new_dtype).removeprefix("torch.")
        raise UserError(f"{part}.{key} is not finite in {name}; give another --dtype")
    return weight


def _plain_name(name: str, variant: str | None) -> str:
    """A file's name without the variant: model.fp16.safetensors is model.safetensors."""
    return name.replace(f".{variant}", "", 1) if variant else name


def _copy_folder(folder: Path, variant: str | None, target: Path) -> None:
    """Copy a folder and the folders in it; a weight file that exists only as `variant` loses it in its name.
    Raises UserError if the variant's weights are in several files."""
    writer.make_folder(target)
    entries = {entry.name: entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")}
    if variant and (shards := [name for name in entries if f".{variant}" in name and ".index." in name]):
        raise UserError(
            f"--variant: {shown(folder / shards[0])} has a variant in several files, which cannot be renamed;"
            " save it in one file first"
        )
    for name, entry in entries.items():
        if entry.is_dir():
            _copy_folder(entry, None, target / name)
        elif entry.name.endswith(_WEIGHT_ENDS) and (plain_name := _plain_name(name, variant)) not in entries:
            _copy(entry, target / plain_name)  # there is no file without the variant
        else:
            _copy(entry, target / name)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(f"{shown(source)} is not a regular file; a base must hold only files and folders")
    writer.copy_new(source, target)


def _remove_absent_parts(folder: Path, target: Path) -> list[str]:
    """Remove from model_index.json the parts that the base has no folder for. Returns a note for each.

    A base from the hub is downloaded without its safety checker, but its index names one: `from_pretrained`
    would look for it.
    """
    path = target / "model_index.json"
    index = folders.read_json(path)
    absent = [
        part
        for part, entry in index.items()
        if isinstance(entry, list) and any(entry) and not (folder / part).is_dir()
    ]
    if absent:
        content = index | {part: [None, None] for part in absent}
        writer.write(path, _json(content))
    return [f"the base has no folder {part}: it is removed from the new model_index.json" for part in absent]
