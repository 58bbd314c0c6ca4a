"""Which adapters infer.py draws with, and at which weights: from --adapter and --adapter_weights, or from a
file of named sets.

Imports no torch, and opens no adapter.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.io import reader
from dreambooth.io.errors import UserError, shown
from dreambooth.options import paths

LARGEST_WEIGHT = 100  # of an adapter; much smaller ones already draw noise
_FIELDS = ("adapters", "prompts", "weights")
_FILES_OF_RUNS = ("pytorch_lora_weights", "adapter_model")  # stems: every run's file has the same name


@dataclasses.dataclass(frozen=True)
class WeightedAdapter:
    """One adapter of a set. `name` is its name in --adapter_weights. `factors` are by part of the models;
    each multiplies the weight in that part. `hub_id` is the repository that the file at `path` is from."""

    path: Path
    weight: float
    name: str
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    hub_id: str | None = None

    @property
    def weights(self) -> dict[str, float]:
        """The weight by part of the models; "" stands for all other parts."""
        return {"": self.weight} | {part: self.weight * factor for part, factor in self.factors.items()}


@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """Adapters that are used together. `where` names the set in messages. A set without `prompts` is drawn
    with the prompts of the command line."""

    name: str
    where: str
    adapters: tuple[WeightedAdapter, ...]
    prompts: tuple[str, ...] = ()

    def scaled(self, factor: float) -> "AdapterSet":
        """The set with every weight times `factor`."""
        adapters = (dataclasses.replace(a, weight=a.weight * factor) for a in self.adapters)
        return dataclasses.replace(self, adapters=tuple(adapters))


def of(adapter: Sequence[str], adapter_weights: Sequence[str], adapters_file: str | None) -> list[AdapterSet]:
    """The sets that these flags of infer.py give; [] if none is given. Raises UserError if a flag or the file
    is wrong."""
    if adapters_file:
        return _read(Path(adapters_file))
    if not adapter:
        return []
    adapters = _weighted_adapters("--adapter", adapter, "--adapter_weights", adapter_weights)
    return [AdapterSet("adapter", "--adapter", adapters)]


def _number(text: str) -> float | None:
    """The number; None if the text is not one."""
    try:
        return float(text)
    except ValueError:
        return None


def split(word: str, where: str) -> tuple[Path, float]:
    """(file or folder, weight) of `FILE` or `FILE:WEIGHT`. A word that is the name of a file is that file.
    `where` begins the message. Raises UserError if the weight is no number, or too large."""
    head, _, tail = word.rpartition(":")
    if not head or _exists(word) or "/" in tail:
        return Path(word), 1.0
    weight = _number(tail)
    if weight is None and not _exists(head):
        return Path(word), 1.0  # opening it will fail with a message of its own
    if weight is None or not abs(weight) <= LARGEST_WEIGHT:
        raise UserError(
            f"{where}: the weight of {shown(head)} must be a number "
            f"from -{LARGEST_WEIGHT} to {LARGEST_WEIGHT}, got {tail!r}"
        )
    return Path(head), weight


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # for example, the name is too long
        return False


def _weighted_adapters(
    where: str, words: Sequence[str], flag: str, weights: Sequence[str]
) -> tuple[WeightedAdapter, ...]:
    """The adapters of one set. Messages on `words` begin with `where`, those on `weights` with `flag`."""
    adapters: list[WeightedAdapter] = []
    for word in words:
        path, weight = split(word, where)
        if any(path == adapter.path for adapter in adapters):
            raise UserError(
                f"{where}: {shown(path)} is named twice; name it once, with the sum of the weights"
            )
        name = stem = name_of(path)
        number = 2
        while any(name == adapter.name for adapter in adapters):
            name, number = f"{stem}-{number}", number + 1
        adapters.append(WeightedAdapter(path, weight, name))
    names = [adapter.name for adapter in adapters]
    factors = [_factors(name, flag, weights, names) for name in names]
    return tuple(dataclasses.replace(a, factors=f) for a, f in zip(adapters, factors, strict=True))


def name_of(path: Path) -> str:
    """The name of an adapter: that of its file, or of its folder if the file has the name that runs give."""
    path = path.absolute()
    path = path.parent if path.stem in _FILES_OF_RUNS else path
    return re.sub(r"[^\w.-]+", "_", path.name.removesuffix(".safetensors")) or "adapter"


def _factors(name: str, flag: str, words: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The factors of the adapter `name`, by part. Factors for this adapter replace those for all adapters."""
    by_adapter: dict[str, dict[str, float]] = {"": {}, name: {}}  # "": for all adapters
    for word in words:
        adapter, colon, text = word.rpartition(":")
        if colon and adapter not in names:
            raise UserError(f"{flag}: no adapter is called {adapter!r}; there are {', '.join(names)}")
        factors = dict(_factor(flag, entry) for entry in text.split(","))
        by_adapter.setdefault(adapter, {}).update(factors)
    return by_adapter[""] | by_adapter[name]


def _factor(flag: str, entry: str) -> tuple[str, float]:
    """(part, factor) of `PART=NUMBER`."""
    part, _, text = entry.partition("=")
    factor = _number(text)
    is_part = re.fullmatch(r"\w+(\.\w+)*", part.strip())
    if not is_part or factor is None or not abs(factor) <= LARGEST_WEIGHT:
        raise UserError(
            f"{flag} must be PART=NUMBER, separated by commas (unet=0.8,unet.up_blocks=1.2), got {entry!r}"
        )
    return part.strip(), factor


def check_parts(sets: Sequence[AdapterSet], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if a factor is for a part that the base does not have. `layers` of the base are by
    component and plain name."""
    parts = set(layers)
    for component, modules in layers.items():
        for module in modules:
            words = f"{component}.{module}".split(".")
            parts |= {".".join(words[:n]) for n in range(2, len(words) + 1)}
    for adapter_set in sets:
        for part in dict.fromkeys(part for adapter in adapter_set.adapters for part in adapter.factors):
            if part not in parts:
                near = difflib.get_close_matches(part, sorted(parts), n=3) or sorted(layers)
                where = adapter_set.where
                flag = "--adapter_weights" if where == "--adapter" else f"{where}: weights"
                raise UserError(f"{flag}: this base has no {part}; there are {', '.join(near)}")


# ---- files of sets


def _read(path: Path) -> list[AdapterSet]:
    """The sets of --adapters_file. Raises UserError if the file is wrong."""
    where = f"--adapters_file {shown(path)}"
    content = reader.read_yaml(path, where)
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{where}: must be a table of sets, `name: [FILE, FILE:weight]`, got {type(content).__name__}"
        )
    return [
        _set(f"{where}: set {shown(str(name)[:80])}", str(name), value) for name, value in content.items()
    ]


def _set(where: str, name: str, value: Any) -> AdapterSet:
    """The set of one entry of the file. `value` is a table, or the list of adapters alone."""
    table = value if isinstance(value, dict) else {"adapters": value}
    for key in table:
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key)[:80], _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(_FIELDS)}"
            raise UserError(f"{where} has {shown(str(key)[:80])!r}; {hint}")
    texts = {key: _texts(f"{where}: {key}", table.get(key)) for key in _FIELDS}
    if texts["weights"] and not texts["adapters"]:
        raise UserError(f"{where} has weights and no adapters")
    words = [paths.expanded(word, f"{where}: adapters") for word in texts["adapters"]]
    adapters = _weighted_adapters(where, words, f"{where}: weights", texts["weights"])
    return AdapterSet(name, where, adapters, tuple(texts["prompts"]))


def _texts(where: str, value: Any) -> list[str]:
    """A field's value as a list: None is [], and a text is a list of one."""
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(
        isinstance(item, str) and item.strip() and "\0" not in item for item in items
    ):
        raise UserError(f"{where} must be a text or a list of texts, got {ascii(items)[:80]}")
    return items
