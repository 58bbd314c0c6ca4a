"""Adapters of every common layout, read into one form and written from it: ours, peft's, diffusers' new and old keys, kohya's and LyCORIS'.

The one form: per component (`unet`, `text_encoder`, `text_encoder_2`) and module, named as diffusers names it and without the text encoders'
`text_model.`, a Lora, LoHa or LoKr of `deltas`, in float32, with its scale worked in. What a module is, its keys tell, each for itself.
A file is taken whole or not at all: a key that is not understood is an error, since whoever skips it draws another adapter's pictures.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth import adapter_files, deltas, safetensors_headers
from dreambooth.deltas import LoHa, LoKr, Lora, Module
from dreambooth.errors import UserError
from dreambooth.printable import shown

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
Family = Literal["sd1", "sd2", "sdxl"]
Shape = tuple[int, ...]
Layers = Mapping[str, Mapping[str, Shape]]  # component -> module -> shape of its weight


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a file holds. `metadata` is the file's own; what it said about scales is in the modules by now."""

    components: dict[str, dict[str, Module]]
    metadata: dict[str, str]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occur, in alphabetical order: lora, dora, loha, doha, lokr, dokr."""
        return tuple(sorted({deltas.kind(module) for modules in self.components.values() for module in modules.values()}))


def table(adapter: Adapter) -> str:
    """One line for each component and kind: modules and ranks."""
    lines = [f"{'component':<16} {'kind':<6} {'modules':>8}  rank"]
    for component, modules in adapter.components.items():
        for kind in sorted({deltas.kind(module) for module in modules.values()}):
            ranks = [module.rank for module in modules.values() if deltas.kind(module) == kind]
            counted = sorted(collections.Counter(ranks).items(), key=lambda item: item[0] or 0)
            words = [f"{'dense' if rank is None else rank}" + f" ({count}x)" * (len(counted) > 1) for rank, count in counted]
            lines.append(f"{component:<16} {kind:<6} {len(ranks):>8}  {', '.join(words)}")
    return "\n".join(lines)


def to_lora(adapter: Adapter, rank: int | None = None) -> tuple[Adapter, dict[str, float]]:
    """(every module as LoRA or DoRA, share of its squared entries that each keeps, by component and module).

    Exact without `rank`; with it, modules of larger ranks become the nearest of that rank.
    """
    components: dict[str, dict[str, Module]] = {}
    kept: dict[str, float] = {}
    for component, modules in adapter.components.items():
        for path, module in modules.items():
            lora = deltas.as_lora(module)
            lora, kept[f"{component}.{path}"] = deltas.shrink(lora, rank) if rank else (lora, 1.0)
            components.setdefault(component, {})[path] = lora
    return Adapter(components, adapter.metadata), kept


# ---- reading


def read(path: Path, modules: Layers) -> Adapter:
    """The adapter in a file, in the folder of a run, in one saved by peft, or in a pair of those (`unet/`, `text_encoder/`).

    `modules` are the layers of the base: shapes of weights by component and module, as `infer.base_shapes` gives them.
    Raises UserError if there is none, if it is damaged or incomplete, has keys of no known layout, or does not fit this base.
    """
    base = _Base(modules)
    components: dict[str, dict[str, Module]] = {}
    metadata: dict[str, str] = {}
    for file in _files(path):
        found, file_metadata = _read_file(file, base)
        for component, part in found.items():
            if component in components:
                raise UserError(f"{shown(path)}: two of its files are for {component}")
            components[component] = part
        metadata |= file_metadata
    return Adapter({name: components[name] for name in COMPONENTS if name in components}, metadata)


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
                raise UserError(f"{shown(path)} is not a .safetensors file; other formats can carry code and are not loaded")
            return [_peft_file(path) if path.name == _PEFT_NAME else _File(path)]
        if (whole := path / adapter_files.ADAPTER_NAME).exists():
            return [_File(whole)]
        if (path / _PEFT_CONFIG).exists() or (path / _PEFT_NAME).exists():
            return [_peft_file(path / _PEFT_NAME)]
        parts = [path / name for name in COMPONENTS if (path / name / _PEFT_CONFIG).exists() or (path / name / _PEFT_NAME).exists()]
        if parts:
            return [_peft_file(part / _PEFT_NAME) for part in parts]
        held = ", ".join(shown(name) for name in sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    except OSError as error:  # a name that is too long, for one
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    raise UserError(f"{shown(path)}: no adapter is in this folder, which holds {held}; name the .safetensors file itself")


def _peft_file(path: Path) -> _File:
    if not path.exists():
        raise UserError(f"{shown(path.parent)} has {_PEFT_CONFIG} and no {_PEFT_NAME}; other formats can carry code and are not loaded")
    config = path.with_name(_PEFT_CONFIG)
    return _File(path, path.parent.name if path.parent.name in COMPONENTS else "", config if config.exists() else None)


_EMBEDDINGS = ("token_embedding", "position_embedding")


class _Base:
    """The layers that an adapter may be for, under every name that they have in files."""

    def __init__(self, modules: Layers) -> None:
        self.layers: dict[str, dict[str, Shape]] = {}
        self.kohya: dict[str, tuple[str, str]] = {}
        for component in COMPONENTS:
            own = {name.removeprefix("text_model."): tuple(shape) for name, shape in modules.get(component, {}).items()}
            # embeddings have two dimensions as well, and are looked up, not multiplied
            layers = {name: shape for name, shape in own.items() if len(shape) in (2, 4) and not name.endswith(_EMBEDDINGS)}
            if not layers:
                continue
            self.layers[component] = layers
            depth = 1 + max([int(m[1]) for name in layers if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))], default=1)
            for name in layers:
                if component == "unet":
                    names = {f"lora_unet_{_flat(name)}", f"lora_unet_{_flat(_sgm_name(name, depth))}"}
                else:
                    prefixes = ("lora_te_", "lora_te1_") if component == "text_encoder" else ("lora_te2_",)
                    names = {f"{prefix}{form}{_flat(name)}" for prefix in prefixes for form in ("", "text_model_")}
                self.kohya |= dict.fromkeys(names, (component, name))

    def place(self, stem: str, component: str) -> tuple[str, str] | None:
        """(component, module) of a key without its last part; None if there is no such layer. Raises ValueError if it could be two."""
        if stem in self.kohya:
            return self.kohya[stem]
        stem = stem.replace(".base_layer", "")  # of an adapter that was put over another one
        head, _, rest = stem.partition(".")
        if not component and head in COMPONENTS:
            component, stem = head, rest
        stem = stem.removeprefix("base_model.model.").removeprefix("text_model.")
        holders = [name for name in ([component] if component else self.layers) if stem in self.layers.get(name, {})]
        if len(holders) > 1:
            raise ValueError(" and ".join(holders))
        return (holders[0], stem) if holders else None


def _flat(name: str) -> str:
    return name.replace(".", "_")


_SGM_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_SGM_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def _sgm_name(name: str, depth: int) -> str:
    """A UNet's module as Stability's own code names it, and kohya's scripts for Stable Diffusion XL. `depth`: resnets in a down block."""
    if name in _SGM_LAYERS:
        return _SGM_LAYERS[name]
    found = re.fullmatch(r"(?:(mid)_block|(down|up)_blocks\.(\d+))\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not found:
        return name
    is_mid, side, block, part, index, rest = found.groups()
    tail = _SGM_RESNET.get(rest, rest) if part == "resnets" else rest
    if is_mid:
        return f"{_SGM_LAYERS[f'mid_block.{part}.{index}']}.{tail}"
    start = (depth + 1) * int(block)
    if part == "downsamplers":
        return f"input_blocks.{start + depth + 1}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{start + depth}.2.conv"
    first = f"input_blocks.{start + int(index) + 1}" if side == "down" else f"output_blocks.{start + int(index)}"
    return f"{first}.{0 if part == 'resnets' else 1}.{tail}"


# End of a key -> which tensor of a module it is.
_ENDS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
} | {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")}
_ENDS |= {name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")}
_OLD_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight")
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# What else such a key may belong to.
_FOREIGN = {
    r"oft_|\.oft\b": "OFT, which no two programs store alike",
    r"boft_": "BOFT, which no two programs store alike",
    r"\bhra_": "HRA, which peft alone knows",
    r"on_input$": "IA3",
    r"\.diff(_b)?$|\bw_norm$|\bb_norm$": "trained whole weights",
    r"emb_params$|string_to_param": "an embedding (textual inversion), not an adapter",
    r"lora_embedding_": "a LoRA of an embedding",
    r"\.bias$": "a trained bias",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"^(transformer|double_blocks|lora_transformer)": "a transformer (Stable Diffusion 3, Flux), not a UNet",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": "a whole checkpoint, not an adapter",
}


def _split(key: str) -> tuple[str, str] | None:
    """(what stands for the module, which of its tensors); None for a key of no known layout."""
    key = re.sub(r"\.default(_\d+)?(?=(\.weight)?$)", "", key)  # peft's name of the adapter, where it was not taken off
    if old := _OLD_PROCESSOR.fullmatch(key):
        names = _OLD_TEXT if old[1].endswith("self_attn") else _OLD_UNET
        return f"{old[1]}.{names.get(old[2], old[2])}", old[3]
    return next(((key[: -len(end) - 1], part) for end, part in _ENDS.items() if key.endswith(f".{end}")), None)


def _read_file(file: _File, base: _Base) -> tuple[dict[str, dict[str, Module]], dict[str, str]]:
    where = shown(file.path)
    limits = safetensors_headers.ADAPTER
    # some programs store alpha as a whole number
    header = safetensors_headers.read(file.path, dataclasses.replace(limits, dtypes=limits.dtypes | {"F64", "I64", "I32"}))
    if not header.shapes:
        raise UserError(f"{where}: the adapter is empty")
    places = _places(where, header.shapes, file.component, base)
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
                module = parts.setdefault((component, path), {})
                if part in module:
                    raise UserError(f"{where}: the {part} of {component}.{path} is there twice, in two spellings")
                module[part] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: not a whole safetensors file ({shown(' '.join(str(error).split()))})") from None
    configs = _configs(where, file, header.metadata, {component for component, _ in parts})
    guess = _other_family(header.shapes, base)
    components: dict[str, dict[str, Module]] = {}
    for (component, path), tensors in sorted(parts.items()):
        shape = base.layers[component][path]
        config = configs.get(component, _Config())
        components.setdefault(component, {})[path] = _Reader(f"{where}: {component}.{path}", shape, path, config, guess).module(tensors)
    for component, config in configs.items():
        _check_whole(where, component, config, components[component], base.layers[component])
    return components, header.metadata


def _places(where: str, shapes: Mapping[str, Shape], component: str, base: _Base) -> dict[str, tuple[str, str, str]]:
    """(component, module, tensor) for each key. Raises UserError if one has no place."""
    splits = {key: _split(key) for key in shapes}
    if unknown := sorted(key for key, split in splits.items() if split is None):
        what = next((f": {text}" for pattern, text in _FOREIGN.items() if any(re.search(pattern, key) for key in unknown)), "")
        raise UserError(f"{where}: {len(unknown)} of {len(splits)} keys belong to no kind of adapter that is read here, e.g. {unknown[0]}{what}")
    places: dict[str, tuple[str, str, str]] = {}
    homeless = []
    for key, split in splits.items():
        stem, part = split  # type: ignore[misc]
        try:
            place = base.place(stem, component)
        except ValueError as error:
            raise UserError(f"{where}: {key} could be for {error}; put the file in a folder of that name") from None
        if place is None:
            homeless.append(key)
        else:
            places[key] = (*place, part)
    if homeless:
        absent = [name for name in COMPONENTS if name not in base.layers and any(_speaks_of(key, name) for key in homeless)]
        also = f": it has no {absent[0]}" if absent else _other_family(shapes, base) or "; the adapter is for another base"
        raise UserError(f"{where}: {len(homeless)} of {len(splits)} keys are for no layer of this base, e.g. {min(homeless)}{also}")
    return places


def _speaks_of(key: str, component: str) -> bool:
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    return key.startswith((f"{component}.", prefixes[component]))


_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


def _other_family(shapes: Mapping[str, Shape], base: _Base) -> str:
    """What the width of the text that the UNet reads tells: the end of a message if the adapter's is another than the base's, else nothing."""
    is_cross = re.compile(r"attn2[._](?:processor\.)?to_[kv]\b|attn2_to_[kv]\.|attn2\.processor\.to_[kv]_lora")
    own = {shape[1] for name, shape in base.layers.get("unet", {}).items() if re.search(r"attn2\.to_k$", name)}
    found = set()
    modules: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    for key, shape in shapes.items():
        if is_cross.search(key) and (split := _split(key)) and len(shape) > 1:
            modules[split[0]][split[1]] = shape
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
    return f"; the adapter is for another base: its UNet reads text {names[0]} wide, and this one's {names[1]}"


@dataclasses.dataclass(frozen=True)
class _Config:
    """What peft's configuration of a component says about scales, and which layers there must be."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    targets: tuple[str, ...] = ()

    def rank_of(self, path: str) -> int | None:
        return _matching(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float | None:
        return _matching(self.alpha_pattern, path, self.alpha)


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that is `path` or its end, as peft matches them; a pattern with ^ must be all of it."""
    for pattern, value in patterns.items():
        name = pattern.lstrip("^").removeprefix("text_model.")
        if path == name or (not pattern.startswith("^") and path.endswith(f".{name}")):
            return value
    return default


def _configs(where: str, file: _File, metadata: Mapping[str, str], components: set[str]) -> dict[str, _Config]:
    """A configuration for each component that the file, or peft's beside it, says something about."""
    if file.config:
        try:
            text = file.config.read_text(encoding="utf-8") if file.config.stat().st_size <= 4 * 2**20 else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{shown(file.config)} cannot be read ({shown(' '.join(str(error).split()))})") from None
        fields = _json_table(shown(file.config), text)
        return {component: _config(shown(file.config), fields) for component in components}
    content = _json_table(f"{where}: its metadata about the LoRA", metadata.get("lora_adapter_metadata", "{}"))
    configs = {}
    for component in components:
        start = f"{component}."
        if fields := {name.removeprefix(start): value for name, value in content.items() if name.startswith(start)}:
            configs[component] = _config(f"{where}: its metadata about {component}", fields)
    return configs


def _json_table(what: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{what} is not a JSON table")
    return content


_KINDS = ("LORA", "LOHA", "LOKR")
# Settings of peft under which tensors mean something else. Any value but false, none and empty is refused.
_CHANGE_MEANING = (
    *("fan_in_fan_out", "lora_bias", "modules_to_save", "use_qalora", "layer_replication", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "use_bdlora", "trainable_token_indices", "target_parameters"),
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "lycoris")  # others change the base's own weights


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= 10**6  # LoKr's may be larger than any layer: then its factors are dense


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) <= 1e6


def _config(where: str, fields: Mapping[str, Any]) -> _Config:
    def wrong(name: str, rule: str) -> UserError:
        return UserError(f"{where} has {name} = {ascii(fields[name])[:80]}; it must be {rule}")

    for name in _CHANGE_MEANING:
        if fields.get(name):
            raise wrong(name, "left out: such adapters are not supported")
    if fields.get("peft_type", "LORA") not in _KINDS:
        raise wrong("peft_type", f"one of {', '.join(_KINDS)}")
    if fields.get("bias", "none") != "none":
        raise wrong("bias", "none: trained biases are not supported")
    for name in ("init_lora_weights", "init_weights"):
        if fields.get(name) not in _INITS:
            raise wrong(name, "one that leaves the base's weights alone; convert the adapter with peft first")
    values: dict[str, Any] = {}
    alpha = "lora_alpha" if "lora_alpha" in fields else "alpha"
    for name, field, rule, is_right in (("r", "rank", "a whole number over 0", _is_rank), (alpha, "alpha", "a number other than 0", _is_alpha)):
        if name in fields:
            if not is_right(fields[name]):
                raise wrong(name, rule)
            values[field] = fields[name]
        pattern = fields.get(f"{field}_pattern") or {}
        if not isinstance(pattern, dict) or not all(is_right(value) for value in pattern.values()):
            raise wrong(f"{field}_pattern", f"a table of names, each with {rule}")
        plain = {re.sub(r"\\\.", ".", key).removesuffix("$"): value for key, value in pattern.items()}
        if odd := [key for key in plain if not re.fullmatch(r"\^?[\w.-]+", key)]:
            raise UserError(f"{where} has the pattern {ascii(odd[0])[:80]} in {field}_pattern; only names of layers are read")
        values[f"{field}_pattern"] = plain
    if not isinstance(fields.get("use_rslora", False), bool):
        raise wrong("use_rslora", "true or false")
    targets = fields.get("target_modules")
    narrowed = any(fields.get(name) for name in ("exclude_modules", "layers_to_transform"))
    # a pattern that somebody wrote is not run
    listed = targets if isinstance(targets, list) and all(isinstance(target, str) for target in targets) and not narrowed else []
    names = tuple(target.removeprefix("text_model.") for target in listed)
    return _Config(**values, use_rslora=fields.get("use_rslora", False), targets=names)


def _check_whole(where: str, component: str, config: _Config, found: Mapping[str, Module], layers: Mapping[str, Shape]) -> None:
    ends = tuple(f".{target}" for target in config.targets)
    expected = {path for path in layers if f".{path}".endswith(ends)} if ends else set()
    if lacking := sorted(expected - found.keys()):
        of = f"{len(lacking)} of the {len(expected)} layers of {component} that it was trained on"
        raise UserError(f"{where} lacks {of}, e.g. {lacking[0]}; the adapter is not whole")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes one module of its tensors. `shape` is that of the layer's weight in the base, `guess` the end of a message when it does not fit."""

    where: str
    shape: Shape
    path: str
    config: _Config
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
            raise UserError(f"{self.where} has only {', '.join(sorted(tensors))}; that is no whole LoRA, LoHa or LoKr, the adapter is not whole")
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
        down = torch.einsum("ij...,jr->ir...", core, self.fit(tensors, "down", rank, inputs, *ones).flatten(1))
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
        rank1, rank2 = (_rows(tensors[name]) if name in tensors else None for name in ("lokr_w1_b", "lokr_w2_b"))
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
        forms = {(outputs,), (1, outputs, *ones)} if given[0] == "magnitude" else {(outputs,), (outputs, 1, *ones)}
        if tuple(tensor.shape) not in forms:
            by_input = given[0] == "dora_scale" and tensor.ndim > 1 and tensor.shape[0] == 1
            also = ": lengths of inputs (LyCORIS before wd_on_out) are not supported" if by_input else self.guess
            raise UserError(f"{self.where}: its magnitude of shape {tuple(tensor.shape)} is not one length for each of {outputs} outputs{also}")
        return tensor.flatten()

    def scale(self, tensors: Mapping[str, Tensor], rank: int | None) -> float:
        """What dW is multiplied by: from the module's own alpha, else from peft's configuration, else 1."""
        said = self.config.rank_of(self.path)
        if "alpha" in tensors:
            if tensors["alpha"].numel() != 1 or not _is_alpha(own := tensors["alpha"].item()):
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
        return UserError(f"{self.where}: its {name} has shape {tuple(tensor.shape)}; for this layer of {self.shape} it must be {expected}{also}")


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 0


_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR_FIRST = {"lokr_w1", "lokr_w1_a", "lokr_w1_b"}
_LOKR_WAYS_FIRST: tuple[set[str], ...] = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_LOKR_WAYS_SECOND: tuple[set[str], ...] = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})


# ---- writing


def write_native(adapter: Adapter, info: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes of a file in our layout: peft's keys with the component in front, and the few stable fields of its configuration.

    Plain diffusers loads LoRA and DoRA from it, alpha = rank; LoHa and LoKr are for us and peft. `info` is about the run, without local paths.
    Raises UserError if a component mixes kinds, which one configuration cannot describe, or a value is not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for component, modules in adapter.components.items():
        kinds = sorted({deltas.kind(module) for module in modules.values()})
        if len(kinds) > 1 or kinds[0] in ("doha", "dokr"):
            raise UserError(f"{component} has {' and '.join(kinds)}, which peft's layout cannot hold; convert to LoRA, or write kohya's layout")
        for path, module in modules.items():
            # older stacks and other programs know the text encoder's modules by this prefix only
            prefix = "text_model." if component != "unet" and not path.startswith("text_projection") else ""
            for name, tensor in _peft_tensors(module).items():
                tensors[f"{component}.{prefix}{path}.{name}"] = tensor
        fields |= {f"{component}.{name}": value for name, value in _peft_fields(modules).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(fields, sort_keys=True), "dreambooth": json.dumps(dict(info), sort_keys=True)}
    return adapter_files.stable_bytes(_stored(tensors, dtype), metadata)


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if not tensors:
        raise UserError("the adapter is empty")
    stored = {}
    for key, tensor in tensors.items():
        stored[key] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(stored[key]).all():
            raise UserError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}")
    return stored


def _peft_tensors(module: Module) -> dict[str, Tensor]:
    if isinstance(module, Lora):
        tensors = {"lora_A.weight": module.down, "lora_B.weight": module.up}
        if module.magnitude is not None:
            is_conv = module.down.ndim > 2
            # `.weight`, as the parameter itself is called: without it a text encoder's is dropped on loading
            tensors["lora_magnitude_vector.weight"] = module.magnitude.reshape(1, -1, 1, 1) if is_conv else module.magnitude
        return tensors
    return _lycoris_tensors(module)


def _lycoris_tensors(module: LoHa | LoKr) -> dict[str, Tensor]:
    """Under the names that peft and LyCORIS share; a product's second factor flattened, as both have it."""
    prefix = "hada" if isinstance(module, LoHa) else "lokr"
    found = {field.name: getattr(module, field.name) for field in dataclasses.fields(module) if field.name != "magnitude"}
    named = {"_".join([prefix, name[:2], *name[2:]]): tensor for name, tensor in found.items()}
    return {name: tensor.flatten(1) if name.endswith("_b") else tensor for name, tensor in named.items() if tensor is not None}


def _peft_fields(modules: Mapping[str, Module]) -> dict[str, Any]:
    """The fields of a component's configuration with which peft makes modules of these shapes, every scale 1."""
    ranks = {path: _peft_rank(module) for path, module in modules.items()}
    given = collections.Counter(module.rank for module in modules.values() if module.rank is not None)
    # of equally many the largest; without any, one so large that all factors become dense
    rank = max(given, key=lambda r: (given[r], r)) if given else max(ranks.values())
    other = {}
    for path, module in modules.items():
        becomes_dense = module.rank is None and rank >= ranks[path]
        if ranks[path] != rank and not becomes_dense:
            other[path] = ranks[path]
    common = {"r": rank, "target_modules": sorted(modules), "rank_pattern": other, "alpha_pattern": other}
    kinds = list(modules.values())
    if isinstance(kinds[0], Lora):
        same = {"peft_type": "LORA", "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}
        return common | same | {"use_dora": kinds[0].magnitude is not None}
    if isinstance(kinds[0], LoHa):
        has_cores = any(isinstance(module, LoHa) and module.t1 is not None for module in kinds)
        return common | {"peft_type": "LOHA", "alpha": rank, "use_effective_conv2d": has_cores}
    lokrs = [module for module in kinds if isinstance(module, LoKr)]
    return common | {
        "peft_type": "LOKR",
        "alpha": rank,
        "decompose_both": any(module.w1 is None for module in lokrs),
        "decompose_factor": _decompose_factor(lokrs),
        "use_effective_conv2d": any(module.t2 is not None for module in lokrs),
    }


def _peft_rank(module: Module) -> int:
    """The module's rank; of one with dense factors, the smallest for which peft makes them dense."""
    if module.rank is not None or not isinstance(module, LoKr):
        return module.rank or 1
    first, second = module.factors()
    return math.ceil(max(*second.shape[:2], *first.shape) / 2)


def divided(width: int, factor: int) -> int:
    """The size of LoKr's first factor along a side: `factor` where it divides the width, else its largest divisor up to `factor` and the root."""
    if factor > 0 and width % factor == 0:
        return factor
    limit = min(math.isqrt(width), factor if factor > 0 else width)
    return max(size for size in range(1, limit + 1) if width % size == 0)


def _decompose_factor(modules: Iterable[LoKr]) -> int:
    """The factor with which peft divides every layer as these are; -1, peft's default, where there is none."""
    sides: set[tuple[int, int]] = set()
    for module in modules:
        first, second = module.factors()
        sides |= {(first.shape[side] * second.shape[side], first.shape[side]) for side in (0, 1)}
    return next((f for f in (-1, *sorted({size for _, size in sides})) if all(divided(width, f) == size for width, size in sides)), -1)


_KOHYA_PREFIXES = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
_XL_DEPTH = 2  # resnets in a down block of every Stable Diffusion XL


def write_kohya(adapter: Adapter, family: Family, info: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes of a file that kohya's scripts, LyCORIS, ComfyUI, A1111, Forge and, for LoRA, any diffusers read.

    LoRA is filled up with zeros to one rank for each component, alpha = rank: of mixed ranks diffusers makes another adapter, in silence.
    Of `info`, resolution, seed and steps go into kohya's own fields. Raises UserError if a component is none of the family's, or a value is
    not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    ranks: set[int] = set()
    for component, modules in adapter.components.items():
        if component not in _KOHYA_PREFIXES[family]:
            raise UserError(f"the adapter has a {component}, and {family} has none")
        largest = max([module.rank for module in modules.values() if isinstance(module, Lora)], default=0)
        for path, module in modules.items():
            if isinstance(module, Lora):
                module = deltas.pad(module, largest)
                named = {"lora_down.weight": module.down, "lora_up.weight": module.up}
                alpha = largest
            else:
                named = _lycoris_tensors(module)
                alpha = module.rank or 1  # both factors dense: readers take no notice of it
            ranks.add(alpha)
            if module.magnitude is not None:
                named["dora_scale"] = module.magnitude.reshape(-1, *[1] * (deltas.ndim(module) - 1))
            stem = _KOHYA_PREFIXES[family][component] + _kohya_path(component, path, family)
            tensors |= {f"{stem}.{name}": tensor for name, tensor in (named | {"alpha": torch.tensor(float(alpha))}).items()}
    metadata = _kohya_metadata(adapter, family, info, max(ranks, default=1))
    return adapter_files.stable_bytes(_stored(tensors, dtype), metadata)


def _kohya_path(component: str, path: str, family: Family) -> str:
    if component == "unet":
        return _flat(_sgm_name(path, _XL_DEPTH) if family == "sdxl" else path)
    return _flat(path if path.startswith("text_projection") else f"text_model.{path}")


def _kohya_metadata(adapter: Adapter, family: Family, info: Mapping[str, Any], rank: int) -> dict[str, str]:
    """The fields by which kohya's scripts and A1111 know a file. No names, no times: they would differ from run to run."""
    kinds = {kind.replace("d", "l", 1) for kind in adapter.kinds}
    modules = [module for part in adapter.components.values() for module in part.values()]
    arguments: dict[str, str] = {}
    if adapter.kinds != ("lora",):
        arguments["algo"] = next(iter(kinds)) if len(kinds) == 1 else "mixed"
        if any(module.magnitude is not None for module in modules):
            arguments |= {"dora_wd": "True", "wd_on_out": "True"}
    if any(deltas.ndim(module) > 2 for module in modules):
        arguments |= {"conv_dim": str(rank), "conv_alpha": str(rank)}
    is_velocity = info.get("prediction_type") == "v_prediction"
    found = {
        "ss_network_module": "networks.lora" if adapter.kinds == ("lora",) else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(arguments, sort_keys=True),
        "ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2_v" if is_velocity else "sd_v2", "sdxl": "sdxl_base_v1-0"}[family],
        "ss_v2": str(family == "sd2"),
        "dreambooth": json.dumps(dict(info), sort_keys=True),
    }
    for field, name in (("ss_resolution", "resolution"), ("ss_seed", "seed"), ("ss_steps", "steps")):
        if info.get(name) is not None:
            found[field] = f"({info[name]}, {info[name]})" if name == "resolution" else str(info[name])
    return found
