"""The weights of a base, one by one from its files: what fine-tuning has changed in them, and the same base with adapters worked in.

No model is built: a weight is found by its key, so that a folder keeps its keys, its tokenizers and everything else as they are.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.adapter_files import deltas
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Module
from dreambooth.bases import folders
from dreambooth.errors import UserError, reason_of, shown
from dreambooth.files import atomic

if TYPE_CHECKING:
    from dreambooth.adapter_files.rotations import Rotations  # brings peft, for which nothing else here waits

Use = tuple["Adapter | Rotations", float]  # an adapter and its weight
_Adapted = Callable[[Tensor], Tensor]  # a layer's weight, in float32 -> with an adapter in it
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".index.json")


# ---- reading


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{shown(path)}: not a whole safetensors file ({reason_of(error)})") from None


def _module(key: str) -> str:
    """The layer whose weight has this key, by the name that it has in adapters."""
    return key.removeprefix("text_model.").removesuffix(".weight")


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{what} has values that are not finite")
    return tensor


class _Part:
    """One part of a base, open for reading, by keys without `text_model.`."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, part: str, variant: str | None) -> None:
        self.where = shown(folder / part)
        self.shapes = {
            key.removeprefix("text_model."): shape
            for key, shape in folders.weight_shapes(folder, part, variant).items()
        }
        self.files = [
            stack.enter_context(_opened(path)) for path in folders.weight_files(folder, part, variant)
        ]
        self.places = {
            key.removeprefix("text_model."): (file, key) for file in self.files for key in sorted(file.keys())
        }

    def tensor(self, key: str) -> Tensor:
        file, own = self.places[key]
        return _finite(file.get_tensor(own), f"{self.where}: {own}")


# ---- what fine-tuning has changed


def extract(
    base: Path, tuned: Path, variant: str | None, targets: Mapping[str, Sequence[str]], rank: int
) -> tuple[Adapter, dict[str, float], dict[str, float]]:
    """(the LoRA of at most `rank` nearest to tuned - base, the share of the squared difference in its layers that each component keeps, the share
    of all squared difference that lies in these layers). `targets` are the layers to look at, by part of the base; parts that are the same in
    both are left out.

    Raises UserError if the two are of different shapes, are the same, or hold values that are not finite.
    """
    components: dict[str, dict[str, Module]] = {}
    kept: dict[str, float] = {}
    covered: dict[str, float] = {}
    for part, layers in targets.items():
        with contextlib.ExitStack() as stack:
            one, other = (_Part(stack, folder, part, variant) for folder in (base, tuned))
            _check_same_shapes(one, other)
            wanted = set(layers)
            total = in_layers = held = 0.0
            for key in sorted(one.shapes):
                before, after = one.tensor(key), other.tensor(key)
                if not before.is_floating_point():
                    continue
                change = after.float() - before.float()
                square = float(change.double().square().sum())
                total += square
                if square and key.endswith(".weight") and _module(key) in wanted:
                    lora, share = deltas.extract(change, rank)
                    components.setdefault(part, {})[_module(key)] = lora
                    in_layers += square
                    held += share * square
        if in_layers:
            kept[part] = held / in_layers
        if total:
            covered[part] = in_layers / total
    if not components:
        elsewhere = (
            f"; what differs lies in other layers of {' and '.join(covered)}"
            if covered
            else ": the two bases are the same"
        )
        raise UserError(f"--tuned: nothing to extract{elsewhere}")
    return Adapter(components, {}), kept, covered


def _check_same_shapes(one: _Part, other: _Part) -> None:
    # older files hold the numbers of positions as well
    shapes, others = (
        {k: s for k, s in part.shapes.items() if not k.endswith("position_ids")} for part in (one, other)
    )
    if unlike := sorted(key for key in shapes.keys() | others.keys() if shapes.get(key) != others.get(key)):
        key = unlike[0]
        found = " and ".join(
            f"{part.shapes[key]} in {part.where}" if key in part.shapes else f"not in {part.where}"
            for part in (one, other)
        )
        raise UserError(
            f"--tuned: {len(unlike)} weights are of other shapes than the base's, e.g. {key}: {found}"
        )
    one.shapes, other.shapes = shapes, others


# ---- adapters worked in


def bake(
    folder: Path,
    variant: str | None,
    parts: Sequence[str],
    uses: Sequence[Use],
    target: Path,
    dtype: torch.dtype | None,
) -> list[str]:
    """Make `target` a copy of the base in `folder` with adapters worked into its `parts`, the UNet and text encoders; a note for each thing of the
    base that it lacks. Weights are changed in float32 and saved in their own dtype, or `dtype`.

    Several adapters add up, each on the base as it was, as pipelines with several of them draw. Files of weights lose their variant's name, so that
    plain `from_pretrained` finds them. `target` appears whole or not at all. Raises UserError if a value is not finite in its dtype.
    """
    notes: list[str] = []
    with atomic.new_folder(target) as temporary:
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue  # a repository's own, or an editor's
            if entry.name in parts:
                notes += _bake_part(folder, entry.name, variant, uses, temporary / entry.name, dtype)
            elif entry.is_dir():
                _copy_folder(entry, variant, temporary / entry.name)
            elif entry.name.endswith(_WEIGHTS):
                notes.append(f"{entry.name} is left out: it holds the base without the adapter")
            else:
                _copy(entry, temporary / entry.name)
        notes += _name_no_absent_parts(folder, temporary)
    return notes


def _bake_part(
    folder: Path, part: str, variant: str | None, uses: Sequence[Use], target: Path, dtype: torch.dtype | None
) -> list[str]:
    files = folders.weight_files(folder, part, variant)
    changes: dict[str, list[tuple[_Adapted, float]]] = {}
    for adapter, weight in uses:
        for path in adapter.components.get(part, {}):
            changes.setdefault(path, []).append((_adapted(adapter, part, path), weight))
    if not changes and dtype is None and not (variant and len(files) > 1):
        _copy_folder(folder / part, variant, target)
        return []
    target.mkdir()
    notes = []
    for entry in sorted((folder / part).iterdir()):
        if entry.name.startswith(".") or entry in files or ".safetensors.index." in entry.name:
            continue
        if entry.name.endswith(_WEIGHTS):
            notes.append(f"{part}/{entry.name} is left out: it holds the base without the adapter")
        else:
            _copy(entry, target / entry.name)
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        name = _plain_name(file.name, variant)
        with _opened(file) as opened:
            tensors = {
                key: _changed(opened.get_tensor(key), changes.get(_module(key), []), dtype, f"{part}.{key}")
                for key in sorted(opened.keys())
            }
        save_file(tensors, target / name, {"format": "pt"})
        atomic.flush(target / name)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    if next(iter(weight_map.values())) != f"{stem}.safetensors":
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    return notes


def _adapted(adapter: "Adapter | Rotations", part: str, path: str) -> _Adapted:
    if isinstance(adapter, Adapter):
        return functools.partial(deltas.adapted, adapter.components[part][path])

    def turned(weight: Tensor) -> Tensor:
        outputs, inputs, *kernel = weight.shape
        layer = (
            torch.nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=False)
            if kernel
            else torch.nn.Linear(inputs, outputs, bias=False)
        )
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return adapter.turned(part, path, layer)

    return turned


def _changed(
    weight: Tensor, uses: Sequence[tuple[_Adapted, float]], dtype: torch.dtype | None, key: str
) -> Tensor:
    """The weight with the adapters in it, in `dtype` or its own."""
    wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    if uses:
        base = weight.float()
        # the weight of an adapter is that of all that it changes, lengths of rows included: as pipelines draw with it
        weight = base + sum(scale * (adapted(base) - base) for adapted, scale in uses)
    found = weight.to(wanted).contiguous()
    if found.is_floating_point() and not torch.isfinite(found).all():
        raise UserError(f"{key} is not finite in {str(wanted).removeprefix('torch.')}; give another --dtype")
    return found


def _plain_name(name: str, variant: str | None) -> str:
    return name.replace(f".{variant}", "", 1) if variant else name


def _copy_folder(folder: Path, variant: str | None, target: Path) -> None:
    target.mkdir()
    entries = {entry.name: entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")}
    if variant and (shards := [name for name in entries if f".{variant}" in name and ".index." in name]):
        raise UserError(
            f"--variant: {shown(folder / shards[0])} has a variant in several files, which cannot be renamed; save it in one file first"
        )
    for name, entry in entries.items():
        if entry.is_dir():
            _copy_folder(entry, None, target / name)
        elif entry.name.endswith(_WEIGHTS) and (plain := _plain_name(name, variant)) not in entries:
            _copy(entry, target / plain)  # the only weights there are
        else:
            _copy(entry, target / name)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(f"{shown(source)} is no regular file; a base has files and folders only")
    shutil.copyfile(source, target)
    atomic.flush(target)


def _name_no_absent_parts(folder: Path, target: Path) -> list[str]:
    """A base from the hub comes without its safety checker and still names it: plain `from_pretrained` would look for it."""
    path = target / "model_index.json"
    index = folders.read_json(path)
    absent = [
        part
        for part, entry in index.items()
        if isinstance(entry, list) and any(entry) and not (folder / part).is_dir()
    ]
    if absent:
        path.write_text(
            json.dumps(index | {part: [None, None] for part in absent}, indent=2) + "\n", encoding="utf-8"
        )
    return [
        f"the base has no folder {part}, and the new model_index.json does not name it any more"
        for part in absent
    ]
