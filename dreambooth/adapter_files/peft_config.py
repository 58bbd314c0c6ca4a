"""peft's configuration of an adapter, read from a file's metadata or from adapter_config.json: ranks, alphas
and the layers that the adapter must have.

The configuration is untrusted input: no value is passed to a constructor of another package, and no pattern
is run as a regular expression.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreambooth.adapter_files.deltas import Module
from dreambooth.adapter_files.layer_names import COMPONENTS, plain
from dreambooth.io import reader
from dreambooth.io.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of one component's configuration that are used here.

    `rank_pattern` and `alpha_pattern` are by layer name or its end. `targets`: ends of the names of the
    layers that the adapter must have; () if unknown.
    """

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    targets: tuple[str, ...] = ()
    use_dora: bool = False

    def rank_of(self, path: str) -> int | None:
        """The rank of a layer; None if the configuration has none."""
        return _matching(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float | None:
        """The alpha of a layer; None if the configuration has none."""
        return _matching(self.alpha_pattern, path, self.alpha)


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that equals `path` or its end, as in peft; `default` if none does. A
    pattern that begins with ^ must equal the full path."""
    for pattern, value in patterns.items():
        name = plain(pattern.lstrip("^"))
        if path == name or (not pattern.startswith("^") and path.endswith(f".{name}")):
            return value
    return default


_SCALE_FIELDS = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def of_file(
    where: str, beside: Path | None, metadata: Mapping[str, str], components: set[str]
) -> dict[str, AdapterConfig]:
    """The configuration of each component.

    It is in `beside`, peft's adapter_config.json, or in the file's `metadata` if `beside` is None.
    `components` are those that the file has tensors of. Raises UserError if the configuration is damaged. It
    also does if the metadata describes another component: its tensors are missing, or scales would not be
    applied.
    """
    if beside:
        fields = reader.read_json_table(beside, shown(beside), _LONGEST_TEXT)
        return {component: _config(shown(beside), fields) for component in components}
    parts = fields_in(metadata, f"{where}: its metadata about the LoRA")
    # files of diffusers' `save_lora_adapter`: neither keys nor fields name the component
    if parts.keys() == {""} and len(components) == 1:
        parts = {next(iter(components)): parts[""]}
    for owner, fields in parts.items():
        if owner not in components:
            _check_needless(where, owner, fields, components)
    return {
        owner: _config(f"{where}: its metadata about {owner}", fields)
        for owner, fields in parts.items()
        if owner in components
    }


def _check_needless(where: str, owner: str, fields: Mapping[str, Any], components: set[str]) -> None:
    """Raise UserError if the `fields` of `owner`, which has no tensors, show that the adapter is incomplete
    or its scale unknown."""
    if owner in COMPONENTS:
        raise UserError(
            f"{where} has metadata about a {owner} but no tensor of it; the adapter is incomplete"
        )
    if scales := [f"{owner}.{field}".lstrip(".") for field in _SCALE_FIELDS if field in fields]:
        raise UserError(
            f"{where}: its metadata has {shown(scales[0][:80])}, which is for no part of this adapter of"
            f" {' and '.join(sorted(components))}: the adapter's scale is uncertain"
        )


def fields_in(metadata: Mapping[str, str], what: str) -> dict[str, dict[str, Any]]:
    """The fields of peft's configurations in a file's metadata, by component: what stands before a name's
    last dot. Raises UserError, which begins with `what`, if they are no JSON table."""
    content = reader.parsed_json_table(metadata.get("lora_adapter_metadata", "{}"), what, _LONGEST_TEXT)
    parts: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        owner, _, field = name.rpartition(".")
        parts.setdefault(owner, {})[field] = value
    return parts


_LONGEST_TEXT = 4 * 2**20  # characters of settings; a table of more takes gigabytes
_KINDS = ("LORA", "LOHA", "LOKR")
_MOST_PATTERNS = 5_000  # more than any base has layers; every layer is compared with every pattern
# Fields of peft that change what the tensors mean. Any value but false, none and empty is refused.
_CHANGE_MEANING = (
    *("fan_in_fan_out", "lora_bias", "modules_to_save", "use_qalora", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora", "trainable_token_indices"),
    "target_parameters",
)
# Values of init_lora_weights that leave the base's weights alone; other initializations change them.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "lycoris")


def _is_rank(value: object) -> bool:
    # LoKr's rank may be larger than any layer: its factors are then dense
    return type(value) is int and 0 < value <= 10**6


def is_alpha(value: object) -> bool:
    """Whether a file's alpha is a number that can be used."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) <= 1e6


def _config(where: str, fields: Mapping[str, Any]) -> AdapterConfig:
    """The configuration in one component's `fields`. Raises UserError for a value that is wrong or not
    supported."""

    def wrong(name: str, rule: str) -> UserError:
        return UserError(f"{where} has {name} = {ascii(fields[name])[:80]}; it must be {rule}")

    # fields that are refused
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
    # rank and alpha, for all layers and by pattern
    values: dict[str, Any] = {}
    alpha = "lora_alpha" if "lora_alpha" in fields else "alpha"
    for name, field, rule, is_right in (
        ("r", "rank", "a whole number over 0", _is_rank),
        (alpha, "alpha", "a number other than 0, up to a million", is_alpha),
    ):
        if name in fields:
            if not is_right(fields[name]):
                raise wrong(name, rule)
            values[field] = fields[name]
        pattern = fields.get(f"{field}_pattern") or {}
        is_table = isinstance(pattern, dict) and len(pattern) <= _MOST_PATTERNS
        if not is_table or not all(is_right(value) for value in pattern.values()):
            raise wrong(f"{field}_pattern", f"a table of at most {_MOST_PATTERNS:,} names, each with {rule}")
        values[f"{field}_pattern"] = _names_alone(where, f"{field}_pattern", pattern)
    # flags
    for name in ("use_rslora", "use_dora"):
        if not isinstance(fields.get(name, False), bool):
            raise wrong(name, "true or false")
        values[name] = fields.get(name, False)
    return AdapterConfig(**values, targets=targets(fields))


def _names_alone(where: str, field: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    """The table `pattern` with plain dots for escaped dots in its keys. Raises UserError for a key that is a
    regular expression and not a layer's name."""
    names = {re.sub(r"\\\.", ".", key).removesuffix("$"): value for key, value in pattern.items()}
    if expressions := [name for name in names if not re.fullmatch(r"\^?[\w.-]+", name)]:
        raise UserError(
            f"{where} has the pattern {ascii(expressions[0])[:80]} in {field}; only names of layers are read"
        )
    return names


def targets(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `target_modules`; () if it is a pattern, or if other fields exclude layers."""
    names = fields.get("target_modules")
    is_narrowed = any(fields.get(name) for name in ("exclude_modules", "layers_to_transform"))
    if is_narrowed or not isinstance(names, list):
        return ()
    return tuple(plain(name) for name in names if isinstance(name, str))


def check_targets(
    where: str, component: str, targets: Iterable[str], layers: Iterable[str], modules: Mapping[str, object]
) -> None:
    """Raise UserError if one of the base's `layers` whose name ends with one of `targets` has no module."""
    ends = tuple(f".{target}" for target in targets)
    expected = {name for name in layers if f".{name}".endswith(ends)}
    if absent := sorted(expected - modules.keys()):
        raise UserError(
            f"{where} lacks {len(absent)} of the {len(expected)} layers of {component} that it was trained"
            f" on, e.g. {absent[0]}; the adapter is incomplete"
        )


def check_magnitudes(where: str, component: str, modules: Mapping[str, Module]) -> None:
    """Raise UserError if a module of a DoRA has no magnitude."""
    if plain_modules := sorted(path for path, module in modules.items() if module.magnitude is None):
        raise UserError(
            f"{where} is a DoRA and has no magnitudes for {len(plain_modules)} layers of {component},"
            f" e.g. {plain_modules[0]}; the adapter is incomplete"
        )
