"""Reads adapters from files of every common layout: this project's, peft's, diffusers' new and old keys,
kohya's and LyCORIS', Stability's and ComfyUI's.

The keys of each module decide its kind. A file is read completely or refused: an unknown key is an error,
since the adapter would draw other pictures without that tensor. Only bundled embeddings are left out, with a
note.
"""

import collections
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dreambooth.adapter_files import layer_names, native, peft_config, rotations, tensor_names
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Module
from dreambooth.adapter_files.layer_names import COMPONENTS, LayerNames, Layers, Shape
from dreambooth.adapter_files.module_reader import ModuleReader
from dreambooth.adapter_files.peft_config import AdapterConfig
from dreambooth.adapter_files.rotations import Rotations
from dreambooth.files import safetensors_files
from dreambooth.files.safetensors_files import Header
from dreambooth.io import reader
from dreambooth.io.errors import UserError, few, shortened, shown

AnyAdapter = Adapter | Rotations


def read(path: Path, layers: Layers | None = None) -> AnyAdapter:
    """The adapter of any kind at `path`.

    `path` is a file, the output folder of a run, a folder saved by peft, or a folder of such folders (`unet`,
    `text_encoder`, `text_encoder_2`). `layers` are those of the base, as `families.Base.layers` returns them.
    OFT, BOFT and HRA need them, and are not read from peft's folders. Raises UserError as `read_additive`
    does.
    """
    files = _files(path)
    is_peft_folder = files[0].path not in (path, path / native.ADAPTER_NAME)
    if layers is not None and not is_peft_folder and rotations.has_keys(files[0].header):
        return rotations.read(files[0].path, files[0].header, layers)
    return _joined(path, files, layers)


def read_additive(path: Path, layers: Layers | None = None) -> Adapter:
    """The adapter at `path`, as `read`, for LoRA, DoRA, LoHa and LoKr only.

    Without `layers` the names and shapes of layers come from the file. A layer in kohya's spelling then keeps
    that name (`layer_names.is_raw`), and kernels that LoHa and LoKr flatten stay flattened into the inputs.
    Raises UserError if there is no adapter, if it is damaged or incomplete, if it has keys of no known
    layout, or if it does not fit the base.
    """
    return _joined(path, _files(path), layers)


@dataclasses.dataclass(frozen=True)
class Identity:
    """How pictures name an adapter: the name of its file, after that of its folder if runs give the file its
    name, and a hash of its files. Pictures are shown to others: the rest of the path is left out."""

    label: str
    sha256: str


def identity(path: Path) -> Identity:
    """The identity of the adapter at `path`, which `read` takes. Raises UserError if a file cannot be
    read."""
    run_file = path / native.ADAPTER_NAME
    location = run_file if path.is_dir() and run_file.exists() else path
    files = [location]
    if not location.is_file():
        files = sorted(p for p in location.rglob("adapter_*") if p.suffix in (".safetensors", ".json"))
    hashes = []
    try:
        for file in files:
            with reader.opened(file) as opened:
                hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    absolute = location.absolute()
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    is_of_run = absolute.name == native.ADAPTER_NAME and absolute.parent != Path.home()
    return Identity(f"{absolute.parent.name}/{absolute.name}" if is_of_run else absolute.name, sha256)


# ---- files


@dataclasses.dataclass(frozen=True)
class _File:
    """One file of an adapter."""

    path: Path
    component: str = ""  # the name of the file's folder, if it is a component's
    config: Path | None = None  # peft's adapter_config.json in the same folder

    @functools.cached_property
    def header(self) -> Header:
        """The file's header. Raises UserError if it is damaged."""
        return safetensors_files.read(self.path, safetensors_files.ADAPTER)


_PEFT_NAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _files(path: Path) -> list[_File]:
    """The files of the adapter at `path`, one or more. Raises UserError if there are none."""
    try:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{shown(path)}: there is no such file")
            if path.suffix != ".safetensors":
                raise UserError(
                    f"{shown(path)} is not a .safetensors file;"
                    " other formats can carry code and are not loaded"
                )
            return [_peft_file(path) if path.name == _PEFT_NAME else _File(path)]
        if (run_file := path / native.ADAPTER_NAME).exists():
            return [_File(run_file)]
        if _is_peft_folder(path):
            return [_peft_file(path / _PEFT_NAME)]
        if parts := [path / name for name in COMPONENTS if _is_peft_folder(path / name)]:
            return [_peft_file(part / _PEFT_NAME) for part in parts]
        # no adapter: the first names in the folder are for the message
        names = sorted(entry.name for entry in path.iterdir())[:5]
    except OSError as error:  # for example, a name that is too long
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    raise UserError(
        f"{shown(path)}: no adapter is in this folder,"
        f" which holds {', '.join(map(shown, names)) or 'nothing'};"
        " name the .safetensors file itself"
    )


def _is_peft_folder(folder: Path) -> bool:
    return (folder / _PEFT_CONFIG).exists() or (folder / _PEFT_NAME).exists()


def _peft_file(path: Path) -> _File:
    """peft's file of weights with its configuration, if there is one. Raises UserError if `path` is
    absent."""
    folder, config = path.parent, path.with_name(_PEFT_CONFIG)
    if not path.exists():
        raise UserError(
            f"{shown(folder)} has {_PEFT_CONFIG} and no {_PEFT_NAME};"
            " other formats can carry code and are not loaded"
        )
    component = folder.name if folder.name in COMPONENTS else ""
    return _File(path, component, config if config.exists() else None)


def _joined(path: Path, files: list[_File], layers: Layers | None) -> Adapter:
    """The adapter in all `files`, which lie at `path`. Raises UserError if two files are for one
    component."""
    names = None if layers is None else LayerNames(layers)
    parts: dict[str, Adapter] = {}  # by component
    for file in files:
        part = _read_file(file, names)
        if twice := parts.keys() & part.components.keys():
            raise UserError(f"{shown(path)}: two of its files are for {min(twice)}")
        parts |= dict.fromkeys(part.components, part)
    return Adapter(
        {name: parts[name].components[name] for name in COMPONENTS if name in parts},
        {field: text for part in parts.values() for field, text in part.metadata.items()},
        {name: part.scales[name] for name, part in parts.items()},
        tuple(dict.fromkeys(note for part in parts.values() for note in part.notes)),
    )


Place = tuple[str, str]  # component and layer
Split = tuple[str, str]  # stem: the key's part that names the layer; part: which of the layer's tensors


def _read_file(file: _File, names: LayerNames | None) -> Adapter:
    """The adapter in one file. Without `names` of a base's layers, the layers come from the file."""
    where, header = shown(file.path), file.header
    shapes = {key: shape for key, shape in header.shapes.items() if not key.startswith(tensor_names.BUNDLED)}
    if not shapes:
        only = ": it holds only embeddings (textual inversion)" if header.shapes else ""
        raise UserError(f"{where}: the adapter is empty{only}")
    # the layer of each key, the tensors of each layer, and peft's configuration
    splits = _splits(where, shapes)
    # some programs store an alpha as a whole number
    alphas = [key for key, (_, part) in splits.items() if part == "alpha"]
    safetensors_files.check_values(where, header, splits, alphas)
    names = names or _names_in_file(where, shapes, splits, file.component)
    places = _places(where, shapes, splits, file.component, names)
    tensors = _unfused(where, _tensors(file, places, splits))
    configs = peft_config.of_file(
        where, file.config, header.metadata, {component for component, _ in tensors}
    )
    # the module of each layer
    hint = _other_family(shapes, names)
    components: dict[str, dict[str, Module]] = {}
    scales: dict[str, dict[str, float]] = {}
    for (component, path), parts in sorted(tensors.items()):
        config = configs.get(component, AdapterConfig())
        shape = names.layers[component][path]
        module_reader = ModuleReader(f"{where}: {component}.{path}", shape, path, config, hint)
        module = components.setdefault(component, {})[path] = module_reader.module(parts)
        scales.setdefault(component, {})[path] = module_reader.scale(parts, module.rank)
        results = [tensor for tensor in vars(module).values() if isinstance(tensor, Tensor)]
        if not all(torch.isfinite(tensor).all() for tensor in results):
            raise UserError(f"{where}: {component}.{path} is not finite after multiplication by its scale")
    for component, config in configs.items():
        modules = components[component]
        peft_config.check_targets(where, component, config.targets, names.layers[component], modules)
        if config.use_dora:
            peft_config.check_magnitudes(where, component, modules)
    return Adapter(components, header.metadata, scales, _notes(where, header.shapes))


def _notes(where: str, keys: Iterable[str]) -> tuple[str, ...]:
    """A note on the embeddings among a file's keys, if there are any."""
    bundled = (key.removeprefix(tensor_names.BUNDLED) for key in keys if key.startswith(tensor_names.BUNDLED))
    words = sorted({key.partition(".")[0] for key in bundled})
    if not words:
        return ()
    return (
        f"{where} also holds embeddings (textual inversion) for {few(words)}."
        " They are left out: in prompts these are ordinary words.",
    )


def _tensors(
    file: _File, places: Mapping[str, Place], splits: Mapping[str, Split]
) -> dict[Place, dict[str, Tensor]]:
    """The file's tensors, float32, by place and part. Raises UserError if one is not finite, or occurs
    twice."""
    tensors: dict[Place, dict[str, Tensor]] = {}
    for key, tensor in safetensors_files.finite_tensors(file.path, places):
        place, part = places[key], splits[key][1]
        parts = tensors.setdefault(place, {})
        if part in parts:
            raise UserError(f"{shown(file.path)}: {'.'.join(place)} has its {part} twice, in two spellings")
        parts[part] = tensor
    return tensors


# Parts of a module, one row for each output, which are split with the outputs; the others are shared.
_BY_OUTPUT = {
    *("up", "diff", "dora_scale", "magnitude", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a"),
}


def _unfused(where: str, tensors: Mapping[Place, dict[str, Tensor]]) -> dict[Place, dict[str, Tensor]]:
    """`tensors` with three modules in place of each one for a layer that OpenCLIP fuses.

    They are for the queries, keys and values, which are thirds of its outputs. Raises UserError if a module
    cannot be split.
    """
    result: dict[Place, dict[str, Tensor]] = {}
    for (component, path), parts in tensors.items():
        if not path.endswith(layer_names.FUSED):
            result[component, path] = parts
            continue
        rows = {name: tensor.shape[0] for name, tensor in parts.items() if name in _BY_OUTPUT and tensor.ndim}
        if "hada_t1" in parts or any(size % 3 for size in rows.values()):
            raise UserError(
                f"{where}: {component}.{path} is one module for three layers of the base (q_proj, k_proj,"
                f" v_proj), and cannot be split into three: its outputs are {rows}"
            )
        for n, third in enumerate(("q_proj", "k_proj", "v_proj")):
            layer = path.removesuffix("in_proj") + third
            if (component, layer) in tensors:
                raise UserError(f"{where}: {component}.{layer} occurs twice, in two spellings")
            result[component, layer] = {
                name: tensor.chunk(3)[n] if name in rows else tensor for name, tensor in parts.items()
            }
    return result


# ---- from keys to layers


def _splits(where: str, shapes: Mapping[str, Shape]) -> dict[str, Split]:
    """The split of each key. Raises UserError for a key of no known layout."""
    splits: dict[str, Split] = {}
    for key, name in tensor_names.without_name(shapes).items():
        # a key with a `*` belongs to another program's embedding, whatever its end
        if "*" not in key and (split := tensor_names.split(name)):
            splits[key] = split
    if unknown := sorted(shapes.keys() - splits.keys()):
        raise UserError(
            f"{where}: {len(unknown)} of {len(shapes)} keys belong to no kind of adapter that is supported,"
            f" e.g. {shortened(unknown[0], 200)}{_foreign(unknown)}"
        )
    return splits


def _foreign(keys: Iterable[str]) -> str:
    """The end of a message about `keys`: the kind of adapter or file that one of them belongs to, or ""."""
    kinds = (
        f": {text}"
        for pattern, text in tensor_names.FOREIGN.items()
        if any(re.search(pattern, key) for key in keys)
    )
    return next(kinds, "")


def _placed(
    where: str, key: str, place: Callable[[str, str], Place | None], stem: str, component: str
) -> Place | None:
    """`place(stem, component)`. Raises UserError, naming `key`, where `place` raises ValueError."""
    try:
        return place(stem, component)
    except ValueError as error:
        raise UserError(
            f"{where}: {shortened(key, 200)} could be for {error}; put the file in a folder of that name"
        ) from None


def _names_in_file(
    where: str, shapes: Mapping[str, Shape], splits: Mapping[str, Split], component: str
) -> LayerNames:
    """The layers that the file names, with shapes from its tensors; they take the place of a base's layers.
    Raises UserError if a key names no component, or if the tensors of a layer make no module."""
    modules: dict[Place, dict[str, Shape]] = collections.defaultdict(dict)
    stems: dict[str, Place] = {}
    for key, (stem, part) in splits.items():
        place = _placed(where, key, layer_names.place_by_key, stem, component)
        if place is None:
            raise UserError(
                f"{where}: {shortened(key, 200)} does not name the part of a base that it is for: unet,"
                " text_encoder or text_encoder_2"
            )
        modules[place][part] = shapes[key]
        stems[stem] = place
    layers: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    for (owner, path), parts in modules.items():
        shape = _shape_from(parts)
        if len(shape) not in (2, 4):
            tensors = ", ".join(f"{part} {parts[part]}" for part in sorted(parts))
            raise UserError(
                f"{where}: {owner}.{path} has only {tensors}; that is not a complete LoRA, LoHa or LoKr;"
                " the adapter is incomplete"
            )
        layers[owner][path] = shape
    names = LayerNames(layers)
    names.stems |= {
        stem: (owner, path) for stem, (owner, path) in stems.items() if path in names.layers.get(owner, {})
    }
    return names


def _shape_from(parts: Mapping[str, Shape]) -> Shape:
    """The shape of the layer's weight, from the shapes of a module's tensors; () if they make no module."""

    def product(a: str, b: str, core: str) -> Shape:
        if core in parts:
            return (parts[a][1], parts[b][1], *parts[core][2:])
        return (parts[a][0], *parts[b][1:])

    try:
        if "diff" in parts:
            return parts["diff"]
        if "down" in parts:
            return (parts["up"][0], parts["down"][1], *parts.get("mid", parts["down"])[2:])
        if "hada_w1_b" in parts:
            return product("hada_w1_a", "hada_w1_b", "hada_t1")
        first = parts["lokr_w1"] if "lokr_w1" in parts else product("lokr_w1_a", "lokr_w1_b", "")
        second = parts["lokr_w2"] if "lokr_w2" in parts else product("lokr_w2_a", "lokr_w2_b", "lokr_t2")
        return (first[0] * second[0], first[1] * second[1], *second[2:])
    except (KeyError, IndexError):
        return ()


def _places(
    where: str,
    shapes: Mapping[str, Shape],
    splits: Mapping[str, Split],
    component: str,
    names: LayerNames,
) -> dict[str, Place]:
    """The place of each key. Raises UserError if a key is for no layer in `names`."""
    places: dict[str, Place] = {}
    unplaced = []
    for key, (stem, _) in splits.items():
        place = _placed(where, key, names.place, stem, component)
        if place is None:
            unplaced.append(key)
        else:
            places[key] = place
    if unplaced:
        stem = splits[min(unplaced)][0]
        owners = {key: component or layer_names.component_of(splits[key][0]) for key in unplaced}
        absent = [name for name in COMPONENTS if name in owners.values() and name not in names.layers]
        if absent:
            hint = f": it has no {absent[0]}"
        elif stem.endswith(layer_names.EMBEDDINGS):
            hint = ": a LoRA of an embedding"
        else:
            hint = _foreign(unplaced) or _other_family(shapes, names) or names.nearest(stem, bool(places))
        raise UserError(
            f"{where}: {len(unplaced)} of {len(splits)} keys are for no layer of this base,"
            f" e.g. {shortened(min(unplaced), 200)}{hint}"
        )
    return places


_CROSS_ATTENTION = re.compile(
    r"attn2[._](?:processor\.)?to_[kv]\b|attn2_to_[kv]\.|attn2\.processor\.to_[kv]_lora"
)


def _other_family(shapes: Mapping[str, Shape], names: LayerNames) -> str:
    """The end of a message if the adapter's UNet takes text embeddings of another width than the base's;
    else ""."""
    # the width that the base's UNet takes
    base_widths = {
        shape[1] for name, shape in names.layers.get("unet", {}).items() if name.endswith("attn2.to_k")
    }
    # the widths in the adapter: the inputs of its modules on cross-attention's keys and values
    modules: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    for key, shape in shapes.items():
        if _CROSS_ATTENTION.search(key) and (split := tensor_names.split(key)):
            modules[split[0]][split[1]] = shape
    widths = {shape[1] for shape in map(_shape_from, modules.values()) if len(shape) > 1}
    if len(base_widths) != 1 or len(widths) != 1 or base_widths == widths:
        return ""
    of_width = {n: layer_names.FAMILY_NAMES[family] for n, family in layer_names.FAMILY_OF_WIDTH.items()}
    both = (widths.pop(), base_widths.pop())
    named = [f"{width} ({of_width[width]})" if width in of_width else str(width) for width in both]
    return (
        f"; the adapter is for another base: its UNet takes text of width {named[0]}, this one's {named[1]}"
    )
