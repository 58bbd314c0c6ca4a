"""Adapters that turn a layer's weight instead of adding to it: OFT, BOFT and HRA, in files with peft's keys.

No two programs store these alike, and peft's own layers for them cannot be stacked: HRA's takes the base's weight and leaves out whatever is
put on in between. So they are never put on a live model: peft computes the turned weight of one layer at a time, on a copy, and that is what
takes the weight's place (`attach.Stack`).
"""

import contextlib
import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.boft import layer as boft_layer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.adapter_files.formats import COMPONENTS, Layers
from dreambooth.errors import UserError, reason_of, shown
from dreambooth.files import safetensors_files

_TEXT_PREFIX = "text_model."


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind: its tensors in a layer, those of peft's settings that change what they mean (with a test), and peft's settings made of both."""

    parts: tuple[str, ...]
    fields: Mapping[str, tuple[str, Callable[[Any], bool], Any]]  # name -> (rule, test, default)
    problem: Callable[[Mapping[str, tuple[int, ...]], tuple[int, ...], Mapping[str, Any]], str]
    config: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Any]
    size: Callable[[Mapping[str, Tensor]], int]


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _block_of(elements: int) -> int:
    """The side of a skew-symmetric block with so many entries over its diagonal."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def _oft_problem(
    shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...], fields: Mapping[str, Any]
) -> str:
    shape = shapes["oft_R.weight"]
    if math.prod(weight[2:]) > 1:
        return "peft's OFT of a kernel larger than 1 x 1 is none: it adds up patches that overlap"
    if len(shape) != 2 or _block_of(shape[1]) * (_block_of(shape[1]) - 1) != 2 * shape[1]:
        return f"its oft_R has shape {shape}, which is no set of rotations"
    blocks, rest = divmod(weight[1], _block_of(shape[1]))
    if rest or shape[0] != (1 if fields["block_share"] else blocks):
        return f"its oft_R has shape {shape}, which does not turn {weight[1]} inputs; the adapter is for another base, or broken"
    return ""


def _boft_problem(
    shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...], fields: Mapping[str, Any]
) -> str:
    factors, blocks, *sides = shapes["boft_R"] if len(shapes["boft_R"]) == 4 else (0, 0, 0)
    inputs = math.prod(weight[1:])
    if factors > 1:
        return f"{factors} butterfly factors need peft's CUDA extension, which is not used here; train with boft_n_butterfly_factor 1"
    scales = (weight[0], 1) if len(weight) == 2 else (1, weight[0])
    if len(sides) != 2 or sides[0] != sides[1] or blocks * sides[0] != inputs or shapes["boft_s"] != scales:
        found = f"boft_R of shape {shapes['boft_R']} and boft_s of shape {shapes['boft_s']}"
        return f"it has {found}, which do not turn {inputs} inputs and scale {weight[0]} outputs; the adapter is for another base, or broken"
    return ""


def _hra_problem(
    shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...], fields: Mapping[str, Any]
) -> str:
    shape, inputs = shapes["hra_u"], math.prod(weight[1:])
    if len(shape) != 2 or shape[0] != inputs or not 0 < shape[1] <= 4096:
        return f"its hra_u has shape {shape}, which does not reflect {inputs} inputs; the adapter is for another base, or broken"
    return ""


def _oft_config(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> OFTConfig:
    return OFTConfig(r=0, oft_block_size=_block_of(tensors["oft_R.weight"].shape[1]), **fields)


_KINDS = {
    "OFT": _Kind(
        ("oft_R.weight",),
        {
            "coft": ("true or false", _is_flag, False),
            "eps": (
                "a number over 0",
                lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1e3,
                6e-5,
            ),
            "block_share": ("true or false", _is_flag, False),
            "use_cayley_neumann": ("true or false", _is_flag, True),
            "num_cayley_neumann_terms": (
                "a whole number from 1 to 100",
                lambda v: type(v) is int and 1 <= v <= 100,
                5,
            ),
        },
        _oft_problem,
        _oft_config,
        lambda tensors: _block_of(tensors["oft_R.weight"].shape[1]),
    ),
    "BOFT": _Kind(
        ("boft_R", "boft_s"),
        {},
        _boft_problem,
        lambda tensors, fields: BOFTConfig(boft_block_size=tensors["boft_R"].shape[-1]),
        lambda tensors: tensors["boft_R"].shape[-1],
    ),
    "HRA": _Kind(
        ("hra_u",),
        {"apply_GS": ("true or false", _is_flag, False)},
        _hra_problem,
        lambda tensors, fields: HRAConfig(r=tensors["hra_u"].shape[1], **fields),
        lambda tensors: tensors["hra_u"].shape[1],
    ),
}
# Settings under which such a file means something else. Any value but false, none and empty is refused.
_CHANGE_MEANING = ("fan_in_fan_out", "modules_to_save", "exclude_modules", "layers_to_transform")


@dataclasses.dataclass(frozen=True, eq=False)
class Rotations:
    """What such a file holds: tensors by component, module (without `text_model.`) and part; per component its kind and settings."""

    components: dict[str, dict[str, dict[str, Tensor]]]
    settings: dict[str, tuple[str, dict[str, Any]]]
    metadata: dict[str, str]

    @property
    def kinds(self) -> tuple[str, ...]:
        """oft, boft, hra: those that occur, in alphabetical order."""
        return tuple(sorted({kind.lower() for kind, _ in self.settings.values()}))

    def size(self, component: str, module: str) -> int:
        """The side of OFT's and BOFT's blocks; the number of HRA's reflections."""
        return _KINDS[self.settings[component][0]].size(self.components[component][module])

    def turned(self, component: str, module: str, layer: torch.nn.Module) -> Tensor:
        """The weight of `layer` as the adapter turns it, in float32, in its shape and on its device. The layer itself stays as it is."""
        kind, fields = self.settings[component]
        tensors = self.components[component][module]
        scratch = torch.nn.ModuleDict({"layer": copy.deepcopy(layer).float()})
        config = _KINDS[kind].config(tensors, fields)
        config.target_modules, config.inference_mode = {"layer"}, True
        with torch.random.fork_rng(devices=[]), _quiet():
            inject_adapter_in_model(config, scratch, "turning")
        expected = {
            key for key in scratch.state_dict() if key.partition(".")[2].startswith(f"{kind.lower()}_")
        }
        result = set_peft_model_state_dict(
            scratch, {f"layer.{part}": tensor for part, tensor in tensors.items()}, "turning"
        )
        if result.unexpected_keys or expected & set(result.missing_keys):
            raise UserError(
                f"{component}.{module}: this version of peft has other tensors for {kind}: {', '.join(sorted(expected))}"
            )
        with torch.no_grad():
            scratch["layer"].merge()  # type: ignore[operator]
        return scratch["layer"].get_base_layer().weight.detach()  # type: ignore[operator,union-attr]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """peft would try to build its CUDA extension for every layer of BOFT, and complain of each failure."""
    before = boft_layer._FBD_CUDA
    boft_layer._FBD_CUDA = False  # None is "not tried yet"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that came from the tensors themselves
            yield
    finally:
        boft_layer._FBD_CUDA = before


def is_one(path: Path) -> bool:
    """Whether a file's keys are of OFT, BOFT or HRA. Raises UserError if it is no whole safetensors file."""
    limits = safetensors_files.ADAPTER
    header = safetensors_files.read(
        path, dataclasses.replace(limits, dtypes=limits.dtypes | {"F64", "I64", "I32"})
    )
    return any(_split(key) for key in header.shapes)


def _split(key: str) -> tuple[str, str, str] | None:
    """(what stands for the module, kind, part); None for another key."""
    ends = ((kind, part) for kind, own in _KINDS.items() for part in own.parts)
    return next(
        ((key[: -len(part) - 1], kind, part) for kind, part in ends if key.endswith(f".{part}")), None
    )


def read(path: Path, layers: Layers) -> Rotations:
    """The adapter in a file of which `is_one` is true; `layers` are the base's: shapes of weights by component and module.

    Raises UserError if it is damaged or incomplete, if its metadata lacks or garbles peft's settings, or if it does not fit this base.
    """
    where = shown(path)
    header = safetensors_files.read(path, safetensors_files.ADAPTER)
    places: dict[str, tuple[str, str, str, str]] = {}
    for key in header.shapes:
        found = _split(key)
        component, _, module = found[0].partition(".") if found else ("", "", "")
        if not found or component not in COMPONENTS:
            raise UserError(
                f"{where}: the key {key} is none of an OFT, BOFT or HRA adapter as peft has them (unet.*, text_encoder.*)"
            )
        places[key] = (component, module.removeprefix(_TEXT_PREFIX), found[1], found[2])
    settings = {
        component: _settings(where, component, header.metadata)
        for component in sorted({place[0] for place in places.values()})
    }
    components: dict[str, dict[str, dict[str, Tensor]]] = {
        name: {} for name in COMPONENTS if name in settings
    }
    try:
        with safe_open(path, framework="pt") as file:
            for key, (component, module, kind, part) in sorted(places.items()):
                if kind != settings[component][0]:
                    raise UserError(
                        f"{where}: {key} is of {kind}, and its metadata says that {component} has {settings[component][0]}"
                    )
                tensor = file.get_tensor(key).float()
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{where}: {key} has values that are not finite; the adapter is broken")
                components[component].setdefault(module, {})[part] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: not a whole safetensors file ({reason_of(error)})") from None
    rotations = Rotations(components, settings, header.metadata)
    _check(where, rotations, layers)
    return rotations


def _content(where: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{where}: its metadata about the adapter is not a JSON table")
    return content


def _settings(where: str, component: str, metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """(kind, what peft's settings for it take from a file): each value tested, none passed on unseen."""
    content = _content(where, metadata)
    fields = {
        key.removeprefix(f"{component}."): value
        for key, value in content.items()
        if key.startswith(f"{component}.")
    }

    def wrong(name: str, rule: str) -> UserError:
        return UserError(
            f"{where}: its metadata has {component}.{name} = {ascii(fields.get(name))[:80]}; it must be {rule}"
        )

    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise wrong(
            "peft_type",
            f"one of {', '.join(_KINDS)}: without peft's settings nobody knows what such tensors mean",
        )
    for name in _CHANGE_MEANING:
        if fields.get(name):
            raise wrong(name, "left out: such adapters are not supported")
    if fields.get("bias", "none") != "none":
        raise wrong("bias", "none: trained biases are not supported")
    known = {}
    for name, (rule, is_right, default) in _KINDS[kind].fields.items():
        known[name] = fields.get(name, default)
        if not is_right(known[name]):
            raise wrong(name, rule)
    return kind, known


def _check(where: str, rotations: Rotations, layers: Layers) -> None:
    """Raise UserError unless every layer of the base that is named can be turned so, and none that was trained is lacking."""
    content = _content(where, rotations.metadata)
    for component, modules in rotations.components.items():
        kind, fields = rotations.settings[component]
        own = {
            name.removeprefix(_TEXT_PREFIX): tuple(shape)
            for name, shape in layers.get(component, {}).items()
            if len(shape) in (2, 4)
        }
        if component not in layers:
            raise UserError(f"{where}: the adapter has a {component}, and this base has none")
        for module, tensors in modules.items():
            place = f"{where}: {component}.{module}"
            if module not in own:
                raise UserError(f"{place} is no layer of this base; the adapter is for another base")
            if lacking := set(_KINDS[kind].parts) - tensors.keys():
                raise UserError(f"{place} lacks its {', '.join(sorted(lacking))}; the adapter is not whole")
            if problem := _KINDS[kind].problem(
                {part: tuple(tensor.shape) for part, tensor in tensors.items()}, own[module], fields
            ):
                raise UserError(f"{place}: {problem}")
        targets = content.get(f"{component}.target_modules")
        ends = (
            tuple(f".{t.removeprefix(_TEXT_PREFIX)}" for t in targets if isinstance(t, str))
            if isinstance(targets, list)
            else ()
        )
        expected = {name for name in own if f".{name}".endswith(ends)} if ends else set()
        if absent := sorted(expected - modules.keys()):
            of = f"{len(absent)} of the {len(expected)} layers of {component} that it was trained on"
            raise UserError(f"{where} lacks {of}, e.g. {absent[0]}; the adapter is not whole")
