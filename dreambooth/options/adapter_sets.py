"""Which adapters are drawn with, at which weights: the words of --adapter and --adapter_weights, and files of named sets.

Imports no torch; nothing here opens an adapter.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError, reason_of, shown

LARGEST_WEIGHT = 100  # of an adapter; nothing of the picture is left far below it
_LARGEST_FILE = 2**20
_FIELDS = ("adapters", "prompts", "weights")
_FILES_OF_RUNS = ("pytorch_lora_weights", "adapter_model")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One adapter of a set. `name` is what the user calls it in weights; `factors` are those of parts of the models, by part."""

    path: Path
    weight: float
    name: str
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def weights(self, factor: float = 1.0) -> dict[str, float]:
        """The weight by part, "" being all others; `factor` is that of a sweep."""
        return {"": self.weight * factor} | {
            part: self.weight * factor * own for part, own in self.factors.items()
        }


@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """Adapters that are worn together. `where` names it in messages; without `prompts` it is drawn with all."""

    name: str
    where: str
    choices: tuple[Choice, ...]
    prompts: tuple[str, ...] = ()


def of(adapter: Sequence[str], adapter_weights: Sequence[str], adapters_file: str | None) -> list[AdapterSet]:
    """The sets of these three flags of infer.py, [] without any. Raises UserError if a flag or the file is wrong."""
    if adapters_file:
        return _read(Path(adapters_file))
    if not adapter:
        return []
    choices = _choices("--adapter", adapter, "--adapter_weights", adapter_weights)
    return [AdapterSet("adapter", "--adapter", choices)]


def _weight(text: str) -> float | None:
    """None if it is no number."""
    try:
        return float(text)
    except ValueError:
        return None


def split(word: str, where: str) -> tuple[Path, float]:
    """(file or folder, weight) of `FILE[:weight]`; what there is under the whole word wins. Raises UserError if the weight is none."""
    head, _, tail = word.rpartition(":")
    if not head or _exists(word) or "/" in tail:
        return Path(word), 1.0
    weight = _weight(tail)
    if weight is None and not _exists(head):
        return Path(word), 1.0  # whoever opens it says that it is not there
    if weight is None or not abs(weight) <= LARGEST_WEIGHT:
        raise UserError(
            f"{where}: the weight of {shown(head)} must be a number from -{LARGEST_WEIGHT} to {LARGEST_WEIGHT}, got {tail!r}"
        )
    return Path(head), weight


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # a name that is too long, for one
        return False


def _choices(where: str, words: Sequence[str], flag: str, weights: Sequence[str]) -> tuple[Choice, ...]:
    choices: list[Choice] = []
    for word in words:
        path, weight = split(word, where)
        if any(path == choice.path for choice in choices):
            raise UserError(
                f"{where}: {shown(path)} is named twice; name it once, with the sum of the weights"
            )
        name = base = _name(path)
        number = 2
        while any(name == choice.name for choice in choices):
            name, number = f"{base}-{number}", number + 1
        choices.append(Choice(path, weight, name))
    return tuple(
        dataclasses.replace(choice, factors=_factors(choice.name, flag, weights, choices))
        for choice in choices
    )


def _name(path: Path) -> str:
    """That of the file, or of the folder around it where every run's file has the same."""
    own = path.absolute()
    own = own.parent if own.stem in _FILES_OF_RUNS else own
    return re.sub(r"[^\w.-]+", "_", own.name.removesuffix(".safetensors")) or "adapter"


def _factors(name: str, flag: str, words: Sequence[str], choices: Sequence[Choice]) -> dict[str, float]:
    """The factors for the adapter `name`: those without a name, and over them its own."""
    found: dict[str, dict[str, float]] = {"": {}, name: {}}
    for word in words:
        owner, colon, rest = word.rpartition(":")
        if colon and owner not in [choice.name for choice in choices]:
            raise UserError(
                f"{flag}: no adapter is called {owner!r}; there are {', '.join(choice.name for choice in choices)}"
            )
        table = {}
        for entry in rest.split(","):
            part, _, number = entry.partition("=")
            factor = _weight(number)
            if (
                not re.fullmatch(r"\w+(\.\w+)*", part.strip())
                or factor is None
                or not abs(factor) <= LARGEST_WEIGHT
            ):
                raise UserError(
                    f"{flag} must be PART=NUMBER with commas between, as unet=0.8,unet.up_blocks=1.2, got {entry!r}"
                )
            table[part.strip()] = factor
        if owner in found:
            found[owner] |= table
    return found[""] | found[name]


def check_parts(sets: Sequence[AdapterSet], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if a part that has a factor is none of the base's: `layers` are its modules by component."""
    places = set(layers)
    for component, modules in layers.items():
        for module in modules:
            words = f"{component}.{module.removeprefix('text_model.')}".split(".")
            places |= {".".join(words[:n]) for n in range(2, len(words) + 1)}
    for one in sets:
        for part in dict.fromkeys(part for choice in one.choices for part in choice.factors):
            if part not in places:
                near = difflib.get_close_matches(part, sorted(places), n=3) or sorted(layers)
                flag = "--adapter_weights" if one.where == "--adapter" else f"{one.where}: weights"
                raise UserError(f"{flag}: this base has no {part}; there are {', '.join(near)}")


def _read(path: Path) -> list[AdapterSet]:
    import yaml

    where = f"--adapters_file {shown(path)}"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: not a regular file")  # reading a pipe would wait for ever
        if path.is_file() and path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{where}: {path.stat().st_size:,} bytes are no table of sets")
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # ValueError: a date that cannot be; TypeError: a list as a key
        raise UserError(f"{where}: not a YAML file: {reason_of(error)}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{where}: must be a table of sets, `name: [FILE, FILE:weight]`, got {type(content).__name__}"
        )
    names = (
        [key.value for key, _ in root.value] if root else []
    )  # YAML itself would take the last of two in silence
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{where}: the set {shown(str(twice)[:80])} is there twice")
    for key, node in root.value if root else []:
        fields = [field.value for field, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := next((field for field in fields if fields.count(field) > 1), None):
            raise UserError(f"{where}: set {shown(str(key.value)[:80])} has {shown(str(twice)[:80])!r} twice")
    return [
        _set(f"{where}: set {shown(str(name)[:80])}", str(name), value) for name, value in content.items()
    ]


def _set(where: str, name: str, value: Any) -> AdapterSet:
    table = value if isinstance(value, dict) else {"adapters": value}
    for key in table:
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key)[:80], _FIELDS, n=1)
            raise UserError(
                f"{where} has {shown(str(key)[:80])!r}; "
                + (f"did you mean {near[0]}?" if near else f"it may have {', '.join(_FIELDS)}")
            )
    texts = {}
    for key in _FIELDS:
        found = table.get(key) if table.get(key) is not None else []
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(
            isinstance(item, str) and item.strip() and "\0" not in item for item in found
        ):
            raise UserError(f"{where}: {key} must be a text or a list of texts, got {ascii(found)[:80]}")
        texts[key] = found
    if texts["weights"] and not texts["adapters"]:
        raise UserError(f"{where} has weights and no adapters")
    choices = _choices(where, texts["adapters"], f"{where}: weights", texts["weights"])
    return AdapterSet(name, where, choices, tuple(texts["prompts"]))
