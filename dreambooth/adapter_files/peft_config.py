"""What peft's configuration of an adapter says, in the file's metadata or in a file beside it: scales, and which layers there must be.

Whoever made the file wrote it: nothing of it goes into another package's constructor, and no pattern is run.
"""

import dataclasses
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.adapter_files.adapter import COMPONENTS, Shape
from dreambooth.adapter_files.deltas import Module
from dreambooth.errors import UserError, reason_of, shown


@dataclasses.dataclass(frozen=True)
class Settings:
    """What peft's configuration of a component says about scales, and which layers there must be."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    targets: tuple[str, ...] = ()
    use_dora: bool = False

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


_SCALES = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def of_file(
    where: str, beside: Path | None, metadata: Mapping[str, str], components: set[str]
) -> dict[str, Settings]:
    """Settings for each component that the file's `metadata`, or peft's file `beside` it, says something about.

    Raises UserError if they are damaged, or describe a part that is not among `components`: half an adapter, or scales that nobody would apply.
    """
    if beside:
        try:
            info = beside.stat()
            if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
                raise UserError(f"{shown(beside)} is not a regular file")
            if info.st_size > 4 * 2**20:
                raise UserError(f"{shown(beside)}: {info.st_size:,} bytes are no settings of an adapter")
            text = beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{shown(beside)} cannot be read ({reason_of(error)})") from None
        fields = _json_table(shown(beside), text)
        return {component: _settings(shown(beside), fields) for component in components}
    content = _json_table(
        f"{where}: its metadata about the LoRA", metadata.get("lora_adapter_metadata", "{}")
    )
    parts: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        owner, _, field = name.rpartition(".")
        parts.setdefault(owner, {})[field] = value
    if (
        parts.keys() == {""} and len(components) == 1
    ):  # `save_lora_adapter` of diffusers' models: neither keys nor fields say the component
        parts = {next(iter(components)): parts[""]}
    for owner, fields in parts.items():
        if owner in COMPONENTS and owner not in components:
            raise UserError(
                f"{where} has metadata about a {owner} and no tensor of it; the adapter is not whole"
            )
        if owner not in components and (
            scales := [f"{owner}.{field}".lstrip(".") for field in _SCALES if field in fields]
        ):
            of = " and ".join(sorted(components))
            raise UserError(
                f"{where}: its metadata has {shown(scales[0][:80])}, which is for no part of this adapter of {of}: its scale is in doubt"
            )
    return {
        owner: _settings(f"{where}: its metadata about {owner}", fields)
        for owner, fields in parts.items()
        if owner in components
    }


def _json_table(what: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{what} is not a JSON table")
    return content


_KINDS = ("LORA", "LOHA", "LOKR")
_MOST_PATTERNS = 5_000  # more than there are layers; every layer is compared with each
# Settings of peft under which tensors mean something else. Any value but false, none and empty is refused.
_CHANGE_MEANING = (
    *(
        "fan_in_fan_out",
        "lora_bias",
        "modules_to_save",
        "use_qalora",
        "layer_replication",
        "alora_invocation_tokens",
        "arrow_config",
    ),
    *("kasa_config", "use_bdlora", "trainable_token_indices", "target_parameters"),
)
_INITS = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
    "lycoris",
)  # others change the base's own weights


def _is_rank(value: object) -> bool:
    return (
        type(value) is int and 0 < value <= 10**6
    )  # LoKr's may be larger than any layer: then its factors are dense


def is_alpha(value: object) -> bool:
    """Whether it may stand for a scale in a file."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) <= 1e6


def _settings(where: str, fields: Mapping[str, Any]) -> Settings:
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
    for name, field, rule, is_right in (
        ("r", "rank", "a whole number over 0", _is_rank),
        (alpha, "alpha", "a number other than 0", is_alpha),
    ):
        if name in fields:
            if not is_right(fields[name]):
                raise wrong(name, rule)
            values[field] = fields[name]
        pattern = fields.get(f"{field}_pattern") or {}
        if (
            not isinstance(pattern, dict)
            or len(pattern) > _MOST_PATTERNS
            or not all(is_right(value) for value in pattern.values())
        ):
            raise wrong(f"{field}_pattern", f"a table of at most {_MOST_PATTERNS:,} names, each with {rule}")
        plain = {re.sub(r"\\\.", ".", key).removesuffix("$"): value for key, value in pattern.items()}
        if odd := [key for key in plain if not re.fullmatch(r"\^?[\w.-]+", key)]:
            raise UserError(
                f"{where} has the pattern {ascii(odd[0])[:80]} in {field}_pattern; only names of layers are read"
            )
        values[f"{field}_pattern"] = plain
    for name in ("use_rslora", "use_dora"):
        if not isinstance(fields.get(name, False), bool):
            raise wrong(name, "true or false")
    targets = fields.get("target_modules")
    narrowed = any(fields.get(name) for name in ("exclude_modules", "layers_to_transform"))
    # a pattern that somebody wrote is not run
    listed = (
        targets
        if isinstance(targets, list) and all(isinstance(target, str) for target in targets) and not narrowed
        else []
    )
    names = tuple(target.removeprefix("text_model.") for target in listed)
    return Settings(
        **values,
        use_rslora=fields.get("use_rslora", False),
        use_dora=fields.get("use_dora", False),
        targets=names,
    )


def check_whole(
    where: str, component: str, config: Settings, found: Mapping[str, Module], layers: Mapping[str, Shape]
) -> None:
    """Raise UserError unless all of the base's layers that the settings name are among those found, and DoRA where they say so."""
    ends = tuple(f".{target}" for target in config.targets)
    expected = {path for path in layers if f".{path}".endswith(ends)} if ends else set()
    if lacking := sorted(expected - found.keys()):
        of = f"{len(lacking)} of the {len(expected)} layers of {component} that it was trained on"
        raise UserError(f"{where} lacks {of}, e.g. {lacking[0]}; the adapter is not whole")
    plain = sorted(path for path, module in found.items() if module.magnitude is None)
    if config.use_dora and plain:
        raise UserError(
            f"{where} is of DoRA and has no magnitudes for {len(plain)} layers of {component}, e.g. {plain[0]}; the adapter is not whole"
        )
