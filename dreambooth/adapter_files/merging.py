"""Adapters out of adapters: several merged into one, and how much of them a smaller rank keeps."""

import json
from collections.abc import Mapping, Sequence

from dreambooth.adapter_files import deltas, native
from dreambooth.adapter_files.adapter import COMPONENTS, Adapter
from dreambooth.adapter_files.deltas import Module
from dreambooth.errors import UserError

Share = Mapping[str, float]


def merge(parts: Sequence[tuple[str, Adapter, float]]) -> Adapter:
    """The LoRA whose update of each layer is the weighted sum of theirs, exactly; a layer's rank is the sum of ranks. `parts` are (name for
    messages, adapter, weight). Of what the files say about their runs, that stays which they all say.

    Raises UserError for DoRA, and if two are for layers of different shapes.
    """
    components: dict[str, dict[str, Module]] = {}
    for component in COMPONENTS:
        paths = dict.fromkeys(
            path for _, adapter, _ in parts for path in adapter.components.get(component, {})
        )
        for path in sorted(paths):
            own = [
                (name, adapter.components[component][path], w)
                for name, adapter, w in parts
                if path in adapter.components.get(component, {})
            ]
            _check_add_up(f"{component}.{path}", own)
            loras = [deltas.as_lora(module) for _, module, _ in own]
            components.setdefault(component, {})[path] = deltas.concatenate(
                loras, [weight for _, _, weight in own]
            )
    said, *others = [native.recorded(adapter.metadata) for _, adapter, _ in parts]
    common = {
        field: value
        for field, value in said.items()
        if all(field in other and other[field] == value for other in others)
    }
    return Adapter(components, {"dreambooth": json.dumps(common)})


def _check_add_up(layer: str, own: Sequence[tuple[str, Module, float]]) -> None:
    for name, module, _ in own:
        if module.magnitude is not None:
            what = f"{name} is a {deltas.kind(module)}, which has lengths of rows as well (e.g. {layer}), and lengths do not add up"
            raise UserError(f"{what}; `bake` works it into a base, and `extract` makes a LoRA of that")
    (first, one, _), *others = own
    for name, other, _ in others:
        if deltas.shape(other) != deltas.shape(one):
            shapes = f"{layer} of shape {deltas.shape(one)} in {first} and {deltas.shape(other)} in {name}"
            raise UserError(f"the adapters are for different bases: {shapes}")


def shares(adapter: Adapter, kept: Share) -> dict[str, float]:
    """The share of each component's squared entries that is kept, where `kept` has that of each module, by `component.path`."""
    found: dict[str, float] = {}
    for component, modules in adapter.components.items():
        squares = {path: deltas.norm(module) ** 2 for path, module in modules.items()}
        total = sum(squares.values())
        found[component] = (
            sum(kept[f"{component}.{path}"] * square for path, square in squares.items()) / total
            if total
            else 1.0
        )
    return found
