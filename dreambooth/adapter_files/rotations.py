"""Adapters that rotate a layer's weight instead of adding to it: OFT, BOFT and HRA, in files with peft's
keys.

Every program stores these in another layout; only peft's is read. peft's layers for them cannot be stacked:
HRA's takes the base's weight and ignores adapters between itself and the base. So they are never attached to
a live model. peft computes the rotated weight of one layer at a time, on a copy, and `adapters.apply` or
`bake` replaces the weight by it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreambooth.adapter_files import layer_names, peft_config
from dreambooth.adapter_files.adapter import Row
from dreambooth.adapter_files.layer_names import COMPONENTS, Layers, Shape
from dreambooth.files import safetensors_files
from dreambooth.files.safetensors_files import Header
from dreambooth.io.errors import UserError, shown

Fields = Mapping[str, Any]
Place = tuple[str, str, str, str]  # component, layer, kind, and which of the layer's tensors


@dataclasses.dataclass(frozen=True)
class _Field:
    """One field of peft's configuration that changes what the tensors mean. `rule` says in messages what it
    must be."""

    rule: str
    is_right: Callable[[Any], bool]
    default: Any


@dataclasses.dataclass(frozen=True)
class _RotationKind:
    """One kind: the names of its tensors in a layer, its fields, and functions of both.

    `problem` returns why tensors of these shapes, with these fields, cannot rotate a weight of that shape; ""
    if they can. `size` returns the side of a block, or the number of reflections, and `of_size` the fields of
    peft's configuration that state it.
    """

    parts: tuple[str, ...]
    fields: Mapping[str, _Field]
    problem: Callable[[Mapping[str, Shape], Shape, Fields], str]
    size: Callable[[Mapping[str, Tensor]], int]
    of_size: Callable[[int], dict[str, int]]


_MISFIT = "; the adapter is for another base, or broken"


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_small_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e3


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= 100


def _side_of(elements: int) -> int:
    """The side of a skew-symmetric block with this number of entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def _oft_problem(shapes: Mapping[str, Shape], weight: Shape, fields: Fields) -> str:
    shape = shapes["oft_R.weight"]
    if math.prod(weight[2:]) > 1:
        return "OFT on a kernel larger than 1 x 1 is not supported: peft adds up overlapping patches"
    if len(shape) != 2 or _side_of(shape[1]) * (_side_of(shape[1]) - 1) != 2 * shape[1]:
        return f"its oft_R has shape {shape}, which is no set of rotations"
    blocks, remainder = divmod(weight[1], _side_of(shape[1]))
    if remainder or shape[0] != (1 if fields["block_share"] else blocks):
        return f"its oft_R has shape {shape}, which does not rotate {weight[1]} inputs{_MISFIT}"
    return ""


def _boft_problem(shapes: Mapping[str, Shape], weight: Shape, fields: Fields) -> str:
    factors, blocks, *sides = shapes["boft_R"] if len(shapes["boft_R"]) == 4 else (0, 0, 0)
    inputs = math.prod(weight[1:])
    if factors > 1:
        return (
            f"{factors} butterfly factors need peft's CUDA extension, which is not used here;"
            " train with boft_n_butterfly_factor 1"
        )
    scales = (weight[0], 1) if len(weight) == 2 else (1, weight[0])
    if len(sides) != 2 or sides[0] != sides[1] or blocks * sides[0] != inputs or shapes["boft_s"] != scales:
        return (
            f"it has boft_R of shape {shapes['boft_R']} and boft_s of shape {shapes['boft_s']},"
            f" which do not rotate {inputs} inputs and scale {weight[0]} outputs{_MISFIT}"
        )
    return ""


def _hra_problem(shapes: Mapping[str, Shape], weight: Shape, fields: Fields) -> str:
    shape, inputs = shapes["hra_u"], math.prod(weight[1:])
    if len(shape) != 2 or shape[0] != inputs or not 0 < shape[1] <= 4096:
        return f"its hra_u has shape {shape}, which does not reflect {inputs} inputs{_MISFIT}"
    return ""


_FLAG = "true or false"
_KINDS = {
    "OFT": _RotationKind(
        ("oft_R.weight",),
        {
            "coft": _Field(_FLAG, _is_flag, False),
            "eps": _Field("a number over 0", _is_small_positive, 6e-5),
            "block_share": _Field(_FLAG, _is_flag, False),
            "use_cayley_neumann": _Field(_FLAG, _is_flag, True),
            "num_cayley_neumann_terms": _Field("a whole number from 1 to 100", _is_count, 5),
        },
        _oft_problem,
        lambda tensors: _side_of(tensors["oft_R.weight"].shape[1]),
        lambda size: {"r": 0, "oft_block_size": size},
    ),
    "BOFT": _RotationKind(
        ("boft_R", "boft_s"),
        {},
        _boft_problem,
        lambda tensors: tensors["boft_R"].shape[-1],
        lambda size: {"boft_block_size": size},
    ),
    "HRA": _RotationKind(
        ("hra_u",),
        {"apply_GS": _Field(_FLAG, _is_flag, False)},
        _hra_problem,
        lambda tensors: tensors["hra_u"].shape[1],
        lambda size: {"r": size},
    ),
}
# Fields of peft that change what the tensors mean. Any value but false, none and empty is refused.
_CHANGE_MEANING = ("fan_in_fan_out", "modules_to_save", "exclude_modules", "layers_to_transform")


@dataclasses.dataclass(frozen=True, eq=False)
class Rotations:
    """An adapter of OFT, BOFT or HRA, with the interface of `adapter.Adapter`.

    `components` has the tensors by component, layer and part. `settings` has, by component, the kind and the
    fields of peft's configuration.
    """

    components: dict[str, dict[str, dict[str, Tensor]]]
    settings: dict[str, tuple[str, dict[str, Any]]]
    metadata: dict[str, str]

    is_additive: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = ()
    size_title: ClassVar[str] = "side of blocks, or reflections"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the components, in alphabetical order, of: oft, boft, hra."""
        return tuple(sorted({kind.lower() for kind, _ in self.settings.values()}))

    def rows(self) -> list[Row]:
        """One row for each component."""
        rows = []
        for component, modules in self.components.items():
            kind, _ = self.settings[component]
            sizes = tuple(_KINDS[kind].size(tensors) for tensors in modules.values())
            rows.append(Row(component, kind.lower(), sizes))
        return rows

    def update(self, component: str, layer: str, weight: Tensor) -> Tensor:
        """`adapted` minus `weight`."""
        return self.adapted(component, layer, weight) - weight

    def adapted(self, component: str, layer: str, weight: Tensor) -> Tensor:
        """The layer's weight, rotated by the adapter. `weight` is the base's, float32, and does not change;
        the result has its shape and device.

        Raises UserError if the installed version of peft has other tensors for this kind.
        """
        import peft  # takes seconds, and reading a file does not need it

        from dreambooth.adapter_files import peft_internals

        kind, fields = self.settings[component]
        tensors = self.components[component][layer]
        # a copy of the layer, alone in a model, with an adapter of this kind
        copy = peft_internals.stand_in(weight.shape)
        copy.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        model = torch.nn.ModuleDict({"layer": copy})
        values = _KINDS[kind].of_size(_KINDS[kind].size(tensors)) | fields
        config = getattr(peft, f"{kind}Config")(target_modules=["layer"], inference_mode=True, **values)
        with torch.random.fork_rng(devices=[]), peft_internals.without_boft_extension():
            peft.inject_adapter_in_model(config, model, "turning")
        # the adapter's tensors
        prefix = f"{kind.lower()}_"
        expected = {key for key in model.state_dict() if key.partition(".")[2].startswith(prefix)}
        state = {f"layer.{part}": tensor for part, tensor in tensors.items()}
        result = peft.set_peft_model_state_dict(model, state, "turning")
        if result.unexpected_keys or expected & set(result.missing_keys):
            raise UserError(
                f"{component}.{layer}: this version of peft has other tensors for {kind}:"
                f" {', '.join(sorted(expected))}"
            )
        # peft rotates the weight by merging the adapter into the layer
        layer_copy: Any = model["layer"]
        with torch.no_grad():
            layer_copy.merge()
        return layer_copy.get_base_layer().weight.detach()


# ---- reading


def has_keys(header: Header) -> bool:
    """Whether a file has a key of OFT, BOFT or HRA."""
    return any(_split(key) for key in header.shapes)


def _split(key: str) -> tuple[str, str, str] | None:
    """(stem: the part that names component and layer; kind; which of the layer's tensors); None for a key of
    another kind."""
    for kind, record in _KINDS.items():
        for part in record.parts:
            if key.endswith(f".{part}"):
                return key[: -len(part) - 1], kind, part
    return None


def read(path: Path, header: Header, layers: Layers) -> Rotations:
    """The adapter in a file for whose header `has_keys` is true. `layers` are the base's: shapes of weights
    by component and layer.

    Raises UserError if the file is damaged or incomplete, if its metadata lacks peft's fields or has wrong
    ones, or if it does not fit the base.
    """
    where = shown(path)
    safetensors_files.check_values(where, header, header.shapes)
    places = {key: _place(where, key) for key in header.shapes}
    fields = peft_config.fields_in(header.metadata, f"{where}: its metadata about the adapter")
    settings = {
        component: _settings(where, component, fields.get(component, {}))
        for component in sorted({component for component, _, _, _ in places.values()})
    }
    components = _tensors(path, places, settings)
    rotations = Rotations(components, settings, header.metadata)
    _check(where, rotations, fields, layers)
    return rotations


def _place(where: str, key: str) -> Place:
    """The place of a key. Raises UserError if it is not one of peft's for these kinds, with a component in
    front."""
    if parts := _split(key):
        stem, kind, part = parts
        component, _, layer = stem.partition(".")
        if component in COMPONENTS:
            return component, layer_names.plain(layer), kind, part
    raise UserError(
        f"{where}: the key {shown(key)} is not one of peft's keys (unet.*, text_encoder.*)"
        " of OFT, BOFT or HRA"
    )


def _tensors(
    path: Path, places: Mapping[str, Place], settings: Mapping[str, tuple[str, Any]]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The file's tensors, float32, by component, layer and part. Raises UserError if one is not finite or of
    another kind than its component."""
    components: dict[str, dict[str, dict[str, Tensor]]] = {
        name: {} for name in COMPONENTS if name in settings
    }
    for key, tensor in safetensors_files.finite_tensors(path, sorted(places)):
        component, layer, kind, part = places[key]
        stated, _ = settings[component]
        if kind != stated:
            raise UserError(
                f"{shown(path)}: {key} is of {kind}, but in its metadata {component} has {stated}"
            )
        components[component].setdefault(layer, {})[part] = tensor
    return components


def _settings(where: str, component: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(kind, its fields of peft's configuration). Every value is checked; other fields are not passed on.
    Raises UserError for a missing kind, or a value that is wrong or not supported."""

    def wrong(name: str, rule: str) -> UserError:
        value = ascii(fields.get(name))[:80]
        return UserError(f"{where}: its metadata has {component}.{name} = {value}; it must be {rule}")

    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        rule = f"one of {', '.join(_KINDS)}: without peft's settings the tensors cannot be interpreted"
        raise wrong("peft_type", rule)
    for name in _CHANGE_MEANING:
        if fields.get(name):
            raise wrong(name, "left out: such adapters are not supported")
    if fields.get("bias", "none") != "none":
        raise wrong("bias", "none: trained biases are not supported")
    values = {}
    for name, field in _KINDS[kind].fields.items():
        values[name] = fields.get(name, field.default)
        if not field.is_right(values[name]):
            raise wrong(name, field.rule)
    return kind, values


def _check(
    where: str, rotations: Rotations, content: Mapping[str, Mapping[str, Any]], layers: Layers
) -> None:
    """Raise UserError unless the adapter can rotate every layer that it names, and has all layers that it was
    trained on."""
    by_plain_name = layer_names.plain_layers(layers)
    for component, modules in rotations.components.items():
        kind, fields = rotations.settings[component]
        if component not in layers:
            raise UserError(f"{where}: the adapter has a {component}, and this base has none")
        weights = {name: shape for name, shape in by_plain_name[component].items() if len(shape) in (2, 4)}
        for layer, tensors in modules.items():
            place = f"{where}: {component}.{layer}"
            if layer not in weights:
                raise UserError(f"{place} is not a layer of this base; the adapter is for another base")
            if missing := set(_KINDS[kind].parts) - tensors.keys():
                raise UserError(f"{place} lacks its {', '.join(sorted(missing))}; the adapter is incomplete")
            shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
            if problem := _KINDS[kind].problem(shapes, weights[layer], fields):
                raise UserError(f"{place}: {problem}")
        ends = peft_config.targets(content[component])
        peft_config.check_targets(where, component, ends, weights, modules)
