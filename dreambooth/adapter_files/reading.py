"""Adapters of every common layout, read into one form: ours, peft's, diffusers' new and old keys, kohya's and LyCORIS'.

What a module is, its keys tell, each for itself. A file is taken whole or not at all: a key that is not understood is an error, since whoever
skips it draws another adapter's pictures.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.adapter_files import layer_names, native, peft_config
from dreambooth.adapter_files.adapter import COMPONENTS, Adapter, Layers, Shape
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora, Module
from dreambooth.adapter_files.layer_names import Base
from dreambooth.adapter_files.peft_config import Settings
from dreambooth.errors import UserError, reason_of, shown
from dreambooth.files import safetensors_files


def read(path: Path, modules: Layers | None = None) -> Adapter:
    """The adapter in a file, in the folder of a run, in one saved by peft, or in a pair of those (`unet/`, `text_encoder/`).

    `modules` are the layers of the base: shapes of weights by component and module, as `families.Base.layers` gives them. Without them the file is
    taken at its word: its layers are those of the base, a layer in kohya's spelling keeps that as its name (`adapter_names.is_raw`), and kernels
    that LoHa and LoKr leave out stay flattened into the inputs.
    Raises UserError if there is none, if it is damaged or incomplete, has keys of no known layout, or does not fit this base.
    """
    base = None if modules is None else Base(modules)
    parts: list[Adapter] = []
    for file in _files(path):
        part = _read_file(file, base)
        if twice := [
            component
            for component in part.components
            if any(component in other.components for other in parts)
        ]:
            raise UserError(f"{shown(path)}: two of its files are for {twice[0]}")
        parts.append(part)
    components = {
        name: part.components[name] for name in COMPONENTS for part in parts if name in part.components
    }
    metadata = {field: text for part in parts for field, text in part.metadata.items()}
    return Adapter(
        components, metadata, {name: scales for part in parts for name, scales in part.scales.items()}
    )


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    component: str = ""  # what the folder around it says it is for
    config: Path | None = None  # peft's, beside it


_PEFT_NAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _files(path: Path) -> list[_File]:
    try:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{shown(path)}: there is no such file")
            if path.suffix != ".safetensors":
                raise UserError(
                    f"{shown(path)} is not a .safetensors file; other formats can carry code and are not loaded"
                )
            return [_peft_file(path) if path.name == _PEFT_NAME else _File(path)]
        if (whole := path / native.ADAPTER_NAME).exists():
            return [_File(whole)]
        if (path / _PEFT_CONFIG).exists() or (path / _PEFT_NAME).exists():
            return [_peft_file(path / _PEFT_NAME)]
        parts = [
            path / name
            for name in COMPONENTS
            if (path / name / _PEFT_CONFIG).exists() or (path / name / _PEFT_NAME).exists()
        ]
        if parts:
            return [_peft_file(part / _PEFT_NAME) for part in parts]
        held = (
            ", ".join(shown(name) for name in sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        )
    except OSError as error:  # a name that is too long, for one
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    raise UserError(
        f"{shown(path)}: no adapter is in this folder, which holds {held}; name the .safetensors file itself"
    )


def _peft_file(path: Path) -> _File:
    if not path.exists():
        raise UserError(
            f"{shown(path.parent)} has {_PEFT_CONFIG} and no {_PEFT_NAME}; other formats can carry code and are not loaded"
        )
    config = path.with_name(_PEFT_CONFIG)
    return _File(
        path, path.parent.name if path.parent.name in COMPONENTS else "", config if config.exists() else None
    )


def _read_file(file: _File, base: Base | None) -> Adapter:
    where = shown(file.path)
    limits = safetensors_files.ADAPTER
    # some programs store alpha as a whole number
    header = safetensors_files.read(
        file.path, dataclasses.replace(limits, dtypes=limits.dtypes | {"F64", "I64", "I32"})
    )
    if not header.shapes:
        raise UserError(f"{where}: the adapter is empty")
    splits = _splits(where, header.shapes)
    base = base or _own_base(where, header.shapes, splits, file.component)
    places = _places(where, header.shapes, splits, file.component, base)
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    try:
        with safe_open(file.path, framework="pt") as opened:
            for key, (component, path, part) in places.items():
                tensor = opened.get_tensor(key)
                if part != "alpha" and not tensor.is_floating_point():
                    raise UserError(f"{where}: {key} holds whole numbers; the adapter is broken")
                tensor = tensor.float()
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{where}: {key} has values that are not finite; the adapter is broken")
                found = parts.setdefault((component, path), {})
                if part in found:
                    raise UserError(
                        f"{where}: the {part} of {component}.{path} is there twice, in two spellings"
                    )
                found[part] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: not a whole safetensors file ({reason_of(error)})") from None
    configs = peft_config.of_file(where, file.config, header.metadata, {component for component, _ in parts})
    guess = _other_family(header.shapes, base)
    components: dict[str, dict[str, Module]] = {}
    scales: dict[str, dict[str, float]] = {}
    for (component, path), tensors in sorted(parts.items()):
        shape = base.layers[component][path]
        reader = _Reader(
            f"{where}: {component}.{path}", shape, path, configs.get(component, Settings()), guess
        )
        module = components.setdefault(component, {})[path] = reader.module(tensors)
        scales.setdefault(component, {})[path] = reader.scale(tensors, module.rank)
        if not all(
            torch.isfinite(tensor).all() for tensor in vars(module).values() if isinstance(tensor, Tensor)
        ):
            raise UserError(f"{where}: {component}.{path} is not finite once its scale is worked in")
    for component, config in configs.items():
        peft_config.check_whole(where, component, config, components[component], base.layers[component])
    return Adapter(components, header.metadata, scales)


def _splits(where: str, shapes: Mapping[str, Shape]) -> dict[str, tuple[str, str]]:
    """(what stands for the module, which of its tensors) for each key. Raises UserError if one is of no known layout."""
    # a key with a `*` is of another program's embedding, whatever it ends in
    splits = {
        key: None if "*" in key else layer_names.split(plain)
        for key, plain in layer_names.without_name(shapes).items()
    }
    if unknown := sorted(key for key, found in splits.items() if found is None):
        foreign = layer_names.FOREIGN.items()
        what = next(
            (f": {text}" for pattern, text in foreign if any(re.search(pattern, key) for key in unknown)), ""
        )
        raise UserError(
            f"{where}: {len(unknown)} of {len(splits)} keys belong to no kind of adapter that is read here, e.g. {unknown[0]}{what}"
        )
    return {key: found for key, found in splits.items() if found is not None}


def _placed(
    where: str, key: str, place: Callable[[str, str], tuple[str, str] | None], stem: str, component: str
) -> tuple[str, str] | None:
    try:
        return place(stem, component)
    except ValueError as error:
        raise UserError(
            f"{where}: {key} could be for {error}; put the file in a folder of that name"
        ) from None


def _own_base(
    where: str, shapes: Mapping[str, Shape], splits: Mapping[str, tuple[str, str]], component: str
) -> Base:
    """A base of exactly the layers that the file speaks of, each of the size that its tensors are for."""
    modules: dict[tuple[str, str], dict[str, Shape]] = collections.defaultdict(dict)
    raw: dict[str, tuple[str, str]] = {}
    for key, (stem, part) in splits.items():
        place = _placed(where, key, layer_names.own_place, stem, component)
        if place is None:
            raise UserError(
                f"{where}: {key} does not say what part of a base it is for: unet, text_encoder or text_encoder_2"
            )
        modules[place][part] = shapes[key]
        if layer_names.is_raw(place[1]):
            raw[stem] = place
    layers: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    for (owner, path), parts in modules.items():
        shape = _own_shape(parts)
        if len(shape) not in (2, 4):
            has = ", ".join(f"{part} {parts[part]}" for part in sorted(parts))
            raise UserError(
                f"{where}: {owner}.{path} has only {has}; that is no whole LoRA, LoHa or LoKr, the adapter is not whole"
            )
        layers[owner][path] = shape
    base = Base(layers)
    base.kohya |= raw
    return base


def _own_shape(parts: Mapping[str, Shape]) -> Shape:
    """The weight of the layer that tensors of these shapes are for; () if they are for none."""

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
    where: str, shapes: Mapping[str, Shape], splits: Mapping[str, tuple[str, str]], component: str, base: Base
) -> dict[str, tuple[str, str, str]]:
    """(component, module, tensor) for each key. Raises UserError if one has no place."""
    places: dict[str, tuple[str, str, str]] = {}
    homeless = []
    for key, (stem, part) in splits.items():
        place = _placed(where, key, base.place, stem, component)
        if place is None:
            homeless.append(key)
        else:
            places[key] = (*place, part)
    if homeless:
        absent = [
            name
            for name in COMPONENTS
            if name not in base.layers and any(_speaks_of(key, name) for key in homeless)
        ]
        also = (
            f": it has no {absent[0]}"
            if absent
            else _other_family(shapes, base) or "; the adapter is for another base"
        )
        raise UserError(
            f"{where}: {len(homeless)} of {len(splits)} keys are for no layer of this base, e.g. {min(homeless)}{also}"
        )
    return places


def _speaks_of(key: str, component: str) -> bool:
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    return key.startswith((f"{component}.", prefixes[component]))


_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


def _other_family(shapes: Mapping[str, Shape], base: Base) -> str:
    """What the width of the text that the UNet reads tells: the end of a message if the adapter's is another than the base's, else nothing."""
    is_cross = re.compile(
        r"attn2[._](?:processor\.)?to_[kv]\b|attn2_to_[kv]\.|attn2\.processor\.to_[kv]_lora"
    )
    own = {
        shape[1] for name, shape in base.layers.get("unet", {}).items() if re.search(r"attn2\.to_k$", name)
    }
    found = set()
    modules: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    for key, shape in shapes.items():
        if is_cross.search(key) and (found_split := layer_names.split(key)) and len(shape) > 1:
            modules[found_split[0]][found_split[1]] = shape
    for parts in modules.values():
        first, second = (parts.get(f"lokr_w{n}", parts.get(f"lokr_w{n}_b")) for n in (1, 2))
        if plain := parts.get("down", parts.get("hada_w1_b")):
            found.add(plain[1])
        elif first and second:
            found.add(first[1] * second[1])
    if len(own) != 1 or len(found) != 1 or own == found:
        return ""
    (width,), (theirs,) = own, found
    names = [f"{_FAMILIES[w]}'s {w}" if w in _FAMILIES else str(w) for w in (theirs, width)]
    return (
        f"; the adapter is for another base: its UNet reads text {names[0]} wide, and this one's {names[1]}"
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes one module of its tensors. `shape` is that of the layer's weight in the base, `guess` the end of a message when it does not fit."""

    where: str
    shape: Shape
    path: str
    config: Settings
    guess: str

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
                f"{self.where} has only {', '.join(sorted(tensors))}; that is no whole LoRA, LoHa or LoKr, the adapter is not whole"
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
        down = torch.einsum(
            "ij...,jr->ir...", core, self.fit(tensors, "down", rank, inputs, *ones).flatten(1)
        )
        return Lora(down, up)

    def loha(self, tensors: Mapping[str, Tensor]) -> LoHa:
        outputs, inputs, *kernel = self.shape
        found: dict[str, Tensor] = {}
        for n in (1, 2):
            rank = _rows(tensors[f"hada_w{n}_b"])
            if "hada_t1" in tensors:
                found[f"w{n}a"] = self.fit(tensors, f"hada_w{n}_a", rank, outputs)
                found[f"w{n}b"] = self.fit(tensors, f"hada_w{n}_b", rank, inputs)
                found[f"t{n}"] = self.fit(tensors, f"hada_t{n}", rank, rank, *kernel)
            else:
                found[f"w{n}a"] = self.fit(tensors, f"hada_w{n}_a", outputs, rank)
                found[f"w{n}b"] = self.fit(tensors, f"hada_w{n}_b", rank, inputs, *kernel)
        return LoHa(**found | {"w1a": found["w1a"] * self.scale(tensors, _rows(tensors["hada_w1_b"]))})

    def lokr(self, tensors: Mapping[str, Tensor]) -> LoKr:
        outputs, inputs, *kernel = self.shape
        rank1, rank2 = (
            _rows(tensors[name]) if name in tensors else None for name in ("lokr_w1_b", "lokr_w2_b")
        )
        scale = self.scale(tensors, rank2 if rank2 is not None else rank1)
        upper, lower = ("lokr_w1", "lokr_w1") if rank1 is None else ("lokr_w1_a", "lokr_w1_b")
        rows, columns = _rows(tensors[upper]), tensors[lower].shape[1] if tensors[lower].ndim > 1 else 0
        if not rows or not columns or outputs % rows or inputs % columns:
            raise self.misfit(upper, tensors[upper], "of a size that divides the layer's")
        k, n = outputs // rows, inputs // columns
        found: dict[str, Tensor] = {}
        if rank1 is None:
            found["w1"] = self.fit(tensors, "lokr_w1", rows, columns) * scale
        else:
            found["w1a"] = self.fit(tensors, "lokr_w1_a", rows, rank1) * scale
            found["w1b"] = self.fit(tensors, "lokr_w1_b", rank1, columns)
        if rank2 is None:
            found["w2"] = self.fit(tensors, "lokr_w2", k, n, *kernel)
        elif "lokr_t2" in tensors:
            found["w2a"] = self.fit(tensors, "lokr_w2_a", rank2, k)
            found["w2b"] = self.fit(tensors, "lokr_w2_b", rank2, n)
            found["t2"] = self.fit(tensors, "lokr_t2", rank2, rank2, *kernel)
        else:
            found["w2a"] = self.fit(tensors, "lokr_w2_a", k, rank2)
            found["w2b"] = self.fit(tensors, "lokr_w2_b", rank2, n, *kernel)
        return LoKr(**found)

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        outputs, ones = self.shape[0], (1,) * (len(self.shape) - 2)
        given = [name for name in ("dora_scale", "magnitude") if name in tensors]
        if not given:
            return None
        if len(given) > 1:
            raise UserError(f"{self.where} has its magnitude twice, in two spellings")
        tensor = tensors[given[0]]
        # peft's of a convolution has its outputs second; LyCORIS' with a 1 in front has one length for each input, which is another method
        forms = (
            {(outputs,), (1, outputs, *ones)}
            if given[0] == "magnitude"
            else {(outputs,), (outputs, 1, *ones)}
        )
        if tuple(tensor.shape) not in forms:
            by_input = given[0] == "dora_scale" and tensor.ndim > 1 and tensor.shape[0] == 1
            also = (
                ": lengths of inputs (LyCORIS before wd_on_out) are not supported" if by_input else self.guess
            )
            raise UserError(
                f"{self.where}: its magnitude of shape {tuple(tensor.shape)} is not one length for each of {outputs} outputs{also}"
            )
        return tensor.flatten()

    def scale(self, tensors: Mapping[str, Tensor], rank: int | None) -> float:
        """What dW is multiplied by: from the module's own alpha, else from peft's configuration, else 1."""
        said = self.config.rank_of(self.path)
        if "alpha" in tensors:
            if tensors["alpha"].numel() != 1 or not peft_config.is_alpha(own := tensors["alpha"].item()):
                raise UserError(f"{self.where}: its alpha must be one number other than 0, up to a million")
            # without any rank, LyCORIS, ComfyUI and A1111 all take no notice of it
            return own / rank if rank else 1.0
        if rank and said and said != rank:
            raise UserError(f"{self.where} has rank {rank}, and its metadata says {said}")
        alpha, divisor = self.config.alpha_of(self.path), said or rank
        if divisor is None or (alpha is None and not self.config.use_rslora):
            return 1.0
        alpha = divisor if alpha is None else alpha
        return alpha / (math.sqrt(divisor) if self.config.use_rslora else divisor)

    def fit(self, tensors: Mapping[str, Tensor], name: str, *expected: int) -> Tensor:
        """The tensor in the expected shape, which a kernel of 1x1, left out or written out, and a flattened kernel come to as well."""
        tensor = tensors[name]
        found = tuple(tensor.shape)
        flattened = (expected[0], math.prod(expected[1:]))
        if found in (expected, flattened, (*flattened, 1, 1)) or (found == (*expected, 1, 1)):
            return tensor.reshape(expected)
        raise self.misfit(name, tensor, f"of shape {expected}")

    def misfit(self, name: str, tensor: Tensor, expected: str) -> UserError:
        also = self.guess or "; the adapter is for another base, or broken"
        return UserError(
            f"{self.where}: its {name} has shape {tuple(tensor.shape)}; for this layer of {self.shape} it must be {expected}{also}"
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
