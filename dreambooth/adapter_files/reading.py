"""Adapters read from files of every common layout: this project's, peft's, diffusers' new and old keys,
kohya's and LyCORIS'.

The keys of each module decide its kind. A file is read as a whole or refused: an unknown key is an error,
since without its tensor the adapter would draw other pictures.
"""

import collections
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.adapter_files import layer_names, native, peft_config, rotations
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora, Module
from dreambooth.adapter_files.layer_names import COMPONENTS, LayerNames, Layers, Shape
from dreambooth.adapter_files.peft_config import AdapterConfig
from dreambooth.adapter_files.rotations import Rotations
from dreambooth.errors import UserError, reason_of, shown
from dreambooth.files import safetensors_files
from dreambooth.files.safetensors_files import Header

AnyAdapter = Adapter | Rotations
# some programs store alpha as float64 or as a whole number
_LIMITS = dataclasses.replace(
    safetensors_files.ADAPTER, dtypes=safetensors_files.ADAPTER.dtypes | {"F64", "I64", "I32"}
)


def read(path: Path, layers: Layers | None = None) -> AnyAdapter:
    """The adapter of any kind in a file, in the folder of a run, in one saved by peft, or in a pair of those
    (`unet/`, `text_encoder/`).

    `layers` are those of the base, as `families.Base.layers` returns them. OFT, BOFT and HRA are only read
    with a base, and not from peft's folders. Raises UserError as `read_additive` does.
    """
    files = _files(path)
    is_peft_folder = files[0].path not in (path, path / native.ADAPTER_NAME)
    if layers is not None and not is_peft_folder and rotations.has_keys(files[0].header):
        return rotations.read(files[0].path, files[0].header, layers)
    return _joined(path, files, layers)


def read_additive(path: Path, layers: Layers | None = None) -> Adapter:
    """`read` for LoRA, DoRA, LoHa and LoKr only.

    Without `layers` the layers are those that the file names, each with the sizes of its tensors: a layer in
    kohya's spelling keeps that as its name (`layer_names.is_raw`), and kernels that LoHa and LoKr flatten
    stay flattened into the inputs. Raises UserError if there is no adapter, if it is damaged or not whole, if
    it has keys of no known layout, or if it does not fit the base.
    """
    return _joined(path, _files(path), layers)


@dataclasses.dataclass(frozen=True)
class Identity:
    """How pictures name an adapter: the ends of its path, and a hash of its files."""

    label: str
    sha256: str


def identity(path: Path) -> Identity:
    """The identity of the adapter in a file or folder that `read` takes. Raises UserError if a file cannot be
    read."""
    run_file = path / native.ADAPTER_NAME
    place = run_file if path.is_dir() and run_file.exists() else path
    files = [place]
    if not place.is_file():
        files = sorted(p for p in place.rglob("adapter_*") if p.suffix in (".safetensors", ".json"))
    hashes = []
    try:
        for file in files:
            with file.open("rb") as opened:
                hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    absolute = place.absolute()
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return Identity(f"{absolute.parent.name}/{absolute.name}", sha256)


# ---- files


@dataclasses.dataclass(frozen=True)
class _File:
    """One file of an adapter."""

    path: Path
    component: str = ""  # that of the folder around it, if it has such a name
    config: Path | None = None  # peft's, beside it

    @functools.cached_property
    def header(self) -> Header:
        return safetensors_files.read(self.path, _LIMITS)


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
        names = sorted(entry.name for entry in path.iterdir())[:5]
    except OSError as error:  # a name that is too long, for one
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    raise UserError(
        f"{shown(path)}: no adapter is in this folder,"
        f" which holds {', '.join(map(shown, names)) or 'nothing'};"
        " name the .safetensors file itself"
    )


def _is_peft_folder(folder: Path) -> bool:
    return (folder / _PEFT_CONFIG).exists() or (folder / _PEFT_NAME).exists()


def _peft_file(path: Path) -> _File:
    folder, config = path.parent, path.with_name(_PEFT_CONFIG)
    if not path.exists():
        raise UserError(
            f"{shown(folder)} has {_PEFT_CONFIG} and no {_PEFT_NAME};"
            " other formats can carry code and are not loaded"
        )
    component = folder.name if folder.name in COMPONENTS else ""
    return _File(path, component, config if config.exists() else None)


def _joined(path: Path, files: list[_File], layers: Layers | None) -> Adapter:
    """The adapter in all the files of `path`."""
    names = None if layers is None else LayerNames(layers)
    parts: list[Adapter] = []
    for file in files:
        part = _read_file(file, names)
        for component in part.components:
            if any(component in other.components for other in parts):
                raise UserError(f"{shown(path)}: two of its files are for {component}")
        parts.append(part)
    components = {
        name: part.components[name] for name in COMPONENTS for part in parts if name in part.components
    }
    metadata = {field: text for part in parts for field, text in part.metadata.items()}
    scales = {name: by_layer for part in parts for name, by_layer in part.scales.items()}
    return Adapter(components, metadata, scales)


Place = tuple[str, str]  # component and layer
Split = tuple[str, str]  # the key's part that names the layer, which of its tensors


def _read_file(file: _File, names: LayerNames | None) -> Adapter:
    where, header = shown(file.path), file.header
    if not header.shapes:
        raise UserError(f"{where}: the adapter is empty")
    splits = _splits(where, header.shapes)
    names = names or _names_in_file(where, header.shapes, splits, file.component)
    places = _places(where, header.shapes, splits, file.component, names)
    tensors = _tensors(file.path, places, splits)
    configs = peft_config.of_file(
        where, file.config, header.metadata, {component for component, _ in tensors}
    )
    hint = _other_family(header.shapes, names)
    components: dict[str, dict[str, Module]] = {}
    scales: dict[str, dict[str, float]] = {}
    for (component, path), parts in sorted(tensors.items()):
        config = configs.get(component, AdapterConfig())
        shape = names.layers[component][path]
        reader = _Reader(f"{where}: {component}.{path}", shape, path, config, hint)
        module = components.setdefault(component, {})[path] = reader.module(parts)
        scales.setdefault(component, {})[path] = reader.scale(parts, module.rank)
        results = [tensor for tensor in vars(module).values() if isinstance(tensor, Tensor)]
        if not all(torch.isfinite(tensor).all() for tensor in results):
            raise UserError(f"{where}: {component}.{path} is not finite once its scale is worked in")
    for component, config in configs.items():
        peft_config.check_whole(where, component, config, components[component], names.layers[component])
    return Adapter(components, header.metadata, scales)


def _tensors(
    path: Path, places: Mapping[str, Place], splits: Mapping[str, Split]
) -> dict[Place, dict[str, Tensor]]:
    """The file's tensors, float32, by place and part. Raises UserError if one is not finite, or is there
    twice."""
    where = shown(path)
    tensors: dict[Place, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            for key, place in places.items():
                part = splits[key][1]
                tensor = opened.get_tensor(key)
                if part != "alpha" and not tensor.is_floating_point():
                    raise UserError(f"{where}: {key} holds whole numbers; the adapter is broken")
                tensor = tensor.float()
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{where}: {key} has values that are not finite; the adapter is broken")
                parts = tensors.setdefault(place, {})
                if part in parts:
                    raise UserError(
                        f"{where}: the {part} of {'.'.join(place)} is there twice, in two spellings"
                    )
                parts[part] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: not a whole safetensors file ({reason_of(error)})") from None
    return tensors


# ---- from keys to layers


def _splits(where: str, shapes: Mapping[str, Shape]) -> dict[str, Split]:
    """The split of each key. Raises UserError if one is of no known layout."""
    # a key with a `*` is of another program's embedding, whatever its end
    splits = {
        key: None if "*" in key else layer_names.split(name)
        for key, name in layer_names.without_name(shapes).items()
    }
    if unknown := sorted(key for key, split in splits.items() if split is None):
        hints = (
            f": {text}"
            for pattern, text in layer_names.FOREIGN.items()
            if any(re.search(pattern, key) for key in unknown)
        )
        raise UserError(
            f"{where}: {len(unknown)} of {len(splits)} keys belong to no kind of adapter that is read here,"
            f" e.g. {unknown[0]}{next(hints, '')}"
        )
    return {key: split for key, split in splits.items() if split is not None}


def _placed(
    where: str, key: str, place: Callable[[str, str], Place | None], stem: str, component: str
) -> Place | None:
    """`place` of the stem, with a UserError for its ValueError."""
    try:
        return place(stem, component)
    except ValueError as error:
        raise UserError(
            f"{where}: {key} could be for {error}; put the file in a folder of that name"
        ) from None


def _names_in_file(
    where: str, shapes: Mapping[str, Shape], splits: Mapping[str, Split], component: str
) -> LayerNames:
    """The layers that the file names, each with the sizes of its tensors: in place of a base's."""
    modules: dict[Place, dict[str, Shape]] = collections.defaultdict(dict)
    raw: dict[str, Place] = {}
    for key, (stem, part) in splits.items():
        place = _placed(where, key, layer_names.place_by_key, stem, component)
        if place is None:
            raise UserError(
                f"{where}: {key} does not say what part of a base it is for: unet,"
                " text_encoder or text_encoder_2"
            )
        modules[place][part] = shapes[key]
        if layer_names.is_raw(place[1]):
            raw[stem] = place
    layers: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    for (owner, path), parts in modules.items():
        shape = _shape_from(parts)
        if len(shape) not in (2, 4):
            has = ", ".join(f"{part} {parts[part]}" for part in sorted(parts))
            raise UserError(
                f"{where}: {owner}.{path} has only {has}; that is no whole LoRA, LoHa or LoKr,"
                " the adapter is not whole"
            )
        layers[owner][path] = shape
    names = LayerNames(layers)
    names.kohya |= raw
    return names


def _shape_from(parts: Mapping[str, Shape]) -> Shape:
    """The shape of the layer's weight, from the shapes of a module's tensors; () if they make no module."""

    def product(a: str, b: str, core: str) -> Shape:
        if core in parts:
            return (parts[a][1], parts[b][1], *parts[core][2:])
        return (parts[a][0], *parts[b][1:])

    try:
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
    """The place of each key. Raises UserError if one has none."""
    places: dict[str, Place] = {}
    homeless = []
    for key, (stem, _) in splits.items():
        place = _placed(where, key, names.place, stem, component)
        if place is None:
            homeless.append(key)
        else:
            places[key] = place
    if homeless:
        absent = [name for name in COMPONENTS if name not in names.layers]
        hints = [f": it has no {name}" for name in absent if any(_is_for(key, name) for key in homeless)]
        hint = hints[0] if hints else _other_family(shapes, names) or "; the adapter is for another base"
        raise UserError(
            f"{where}: {len(homeless)} of {len(splits)} keys are for no layer of this base,"
            f" e.g. {min(homeless)}{hint}"
        )
    return places


def _is_for(key: str, component: str) -> bool:
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    return key.startswith((f"{component}.", prefixes[component]))


_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
_CROSS_ATTENTION = re.compile(
    r"attn2[._](?:processor\.)?to_[kv]\b|attn2_to_[kv]\.|attn2\.processor\.to_[kv]_lora"
)


def _other_family(shapes: Mapping[str, Shape], names: LayerNames) -> str:
    """The end of a message if the adapter's UNet reads text of another width than the base's, else ""."""
    base_widths = {
        shape[1] for name, shape in names.layers.get("unet", {}).items() if name.endswith("attn2.to_k")
    }
    modules: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    for key, shape in shapes.items():
        if _CROSS_ATTENTION.search(key) and len(shape) > 1 and (split := layer_names.split(key)):
            modules[split[0]][split[1]] = shape
    widths = set()
    for parts in modules.values():
        first, second = (parts.get(f"lokr_w{n}", parts.get(f"lokr_w{n}_b")) for n in (1, 2))
        if rows := parts.get("down", parts.get("hada_w1_b")):
            widths.add(rows[1])
        elif first and second:
            widths.add(first[1] * second[1])
    if len(base_widths) != 1 or len(widths) != 1 or base_widths == widths:
        return ""
    both = (widths.pop(), base_widths.pop())
    texts = [f"{_FAMILIES[width]}'s {width}" if width in _FAMILIES else str(width) for width in both]
    return (
        f"; the adapter is for another base: its UNet reads text {texts[0]} wide, and this one's {texts[1]}"
    )


# ---- from tensors to modules


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes a module from its tensors, given by part, and checks their shapes.

    `shape` is that of the layer's weight. `hint` is the end of the message for tensors that do not fit.
    """

    where: str
    shape: Shape
    path: str
    config: AdapterConfig
    hint: str

    def module(self, tensors: Mapping[str, Tensor]) -> Module:
        parts = tensors.keys() - {"alpha", "dora_scale", "magnitude"}
        if parts in ({"down", "up"}, {"down", "up", "mid"}):
            module: Module = self.lora(tensors)
        elif parts in (_LOHA, _LOHA | {"hada_t1", "hada_t2"}):
            module = self.loha(tensors)
        elif parts & _LOKR_FIRST in _LOKR_WAYS_FIRST and parts - _LOKR_FIRST in _LOKR_WAYS_SECOND:
            module = self.lokr(tensors)
        else:
            raise UserError(
                f"{self.where} has only {', '.join(sorted(tensors))};"
                " that is no whole LoRA, LoHa or LoKr, the adapter is not whole"
            )
        return dataclasses.replace(module, magnitude=self.magnitude(tensors))

    def lora(self, tensors: Mapping[str, Tensor]) -> Lora:
        outputs, inputs, *kernel = self.shape
        rank = _rows(tensors["down"])
        ones = [1] * len(kernel)
        up = self.fit(tensors, "up", outputs, rank, *ones) * self.scale(tensors, rank)
        if "mid" not in tensors:
            return Lora(self.fit(tensors, "down", rank, inputs, *kernel), up)
        # LyCORIS' Tucker form of a convolution: its core goes into `down`
        core = self.fit(tensors, "mid", rank, rank, *kernel)
        down = self.fit(tensors, "down", rank, inputs, *ones).flatten(1)
        return Lora(torch.einsum("ij...,jr->ir...", core, down), up)

    def loha(self, tensors: Mapping[str, Tensor]) -> LoHa:
        outputs, inputs, *kernel = self.shape
        parts: dict[str, Tensor] = {}
        for n in (1, 2):
            a, b, core = f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}"
            rank = _rows(tensors[b])
            if "hada_t1" in tensors:
                parts[f"w{n}a"] = self.fit(tensors, a, rank, outputs)
                parts[f"w{n}b"] = self.fit(tensors, b, rank, inputs)
                parts[f"t{n}"] = self.fit(tensors, core, rank, rank, *kernel)
            else:
                parts[f"w{n}a"] = self.fit(tensors, a, outputs, rank)
                parts[f"w{n}b"] = self.fit(tensors, b, rank, inputs, *kernel)
        parts["w1a"] = parts["w1a"] * self.scale(tensors, _rows(tensors["hada_w1_b"]))
        return LoHa(**parts)

    def lokr(self, tensors: Mapping[str, Tensor]) -> LoKr:
        outputs, inputs, *kernel = self.shape
        rank1, rank2 = (
            _rows(tensors[name]) if name in tensors else None for name in ("lokr_w1_b", "lokr_w2_b")
        )
        scale = self.scale(tensors, rank2 if rank2 is not None else rank1)
        # the sizes of the first factor decide those of the second
        upper, lower = ("lokr_w1", "lokr_w1") if rank1 is None else ("lokr_w1_a", "lokr_w1_b")
        rows, columns = _rows(tensors[upper]), tensors[lower].shape[1] if tensors[lower].ndim > 1 else 0
        if not rows or not columns or outputs % rows or inputs % columns:
            raise self.misfit(upper, tensors[upper], "of a size that divides the layer's")
        k, n = outputs // rows, inputs // columns
        parts: dict[str, Tensor] = {}
        if rank1 is None:
            parts["w1"] = self.fit(tensors, "lokr_w1", rows, columns) * scale
        else:
            parts["w1a"] = self.fit(tensors, "lokr_w1_a", rows, rank1) * scale
            parts["w1b"] = self.fit(tensors, "lokr_w1_b", rank1, columns)
        if rank2 is None:
            parts["w2"] = self.fit(tensors, "lokr_w2", k, n, *kernel)
        elif "lokr_t2" in tensors:
            parts["w2a"] = self.fit(tensors, "lokr_w2_a", rank2, k)
            parts["w2b"] = self.fit(tensors, "lokr_w2_b", rank2, n)
            parts["t2"] = self.fit(tensors, "lokr_t2", rank2, rank2, *kernel)
        else:
            parts["w2a"] = self.fit(tensors, "lokr_w2_a", k, rank2)
            parts["w2b"] = self.fit(tensors, "lokr_w2_b", rank2, n, *kernel)
        return LoKr(**parts)

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """[out], or None without one."""
        outputs, ones = self.shape[0], (1,) * (len(self.shape) - 2)
        spellings = [name for name in ("dora_scale", "magnitude") if name in tensors]
        if not spellings:
            return None
        if len(spellings) > 1:
            raise UserError(f"{self.where} has its magnitude twice, in two spellings")
        is_peft = spellings[0] == "magnitude"
        tensor = tensors[spellings[0]]
        # peft's of a convolution is [1, out, 1, 1], LyCORIS' [out, 1, 1, 1]
        shape = (1, outputs, *ones) if is_peft else (outputs, 1, *ones)
        if tuple(tensor.shape) not in ((outputs,), shape):
            # LyCORIS' with a 1 in front has one length for each input: another method
            by_input = not is_peft and tensor.ndim > 1 and tensor.shape[0] == 1
            hint = (
                ": lengths of inputs (LyCORIS before wd_on_out) are not supported" if by_input else self.hint
            )
            raise UserError(
                f"{self.where}: its magnitude of shape {tuple(tensor.shape)}"
                f" is not one length for each of {outputs} outputs{hint}"
            )
        return tensor.flatten()

    def scale(self, tensors: Mapping[str, Tensor], rank: int | None) -> float:
        """The factor of dW: from the module's alpha, else from peft's configuration, else 1."""
        config_rank = self.config.rank_of(self.path)
        if "alpha" in tensors:
            if tensors["alpha"].numel() != 1 or not peft_config.is_alpha(alpha := tensors["alpha"].item()):
                raise UserError(f"{self.where}: its alpha must be one number other than 0, up to a million")
            return alpha / rank if rank else 1.0  # LyCORIS, ComfyUI and A1111 ignore an alpha without a rank
        if rank and config_rank and config_rank != rank:
            raise UserError(f"{self.where} has rank {rank}, and its metadata says {config_rank}")
        config_alpha, divisor = self.config.alpha_of(self.path), config_rank or rank
        if divisor is None or (config_alpha is None and not self.config.use_rslora):
            return 1.0
        config_alpha = divisor if config_alpha is None else config_alpha
        return config_alpha / (math.sqrt(divisor) if self.config.use_rslora else divisor)

    def fit(self, tensors: Mapping[str, Tensor], name: str, *expected: int) -> Tensor:
        """The tensor in the expected shape. A flattened kernel is unflattened; a kernel of 1x1 may be written
        or left out."""
        tensor = tensors[name]
        flattened = (expected[0], math.prod(expected[1:]))
        if tuple(tensor.shape) in (expected, (*expected, 1, 1), flattened, (*flattened, 1, 1)):
            return tensor.reshape(expected)
        raise self.misfit(name, tensor, f"of shape {expected}")

    def misfit(self, name: str, tensor: Tensor, expected: str) -> UserError:
        return UserError(
            f"{self.where}: its {name} has shape {tuple(tensor.shape)}; for this layer of {self.shape}"
            f" it must be {expected}{self.hint or '; the adapter is for another base, or broken'}"
        )


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 0


_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR_FIRST = {"lokr_w1", "lokr_w1_a", "lokr_w1_b"}
_LOKR_WAYS_FIRST: tuple[set[str], ...] = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_LOKR_WAYS_SECOND: tuple[set[str], ...] = (
    {"lokr_w2"},
    {"lokr_w2_a", "lokr_w2_b"},
    {"lokr_w2_a", "lokr_w2_b", "lokr_t2"},
)
