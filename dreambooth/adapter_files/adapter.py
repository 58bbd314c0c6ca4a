"""The form in which adapters of every file layout are held: LoRA, LoHa or LoKr modules by component and
layer.

Layers have diffusers' names, without the `text_model.` of text encoders. Tensors are float32 and contain
their scale: alpha is gone. `rotations.Rotations` has the same interface for OFT, BOFT and HRA.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from dreambooth.adapter_files import deltas, native
from dreambooth.adapter_files.deltas import Module
from dreambooth.adapter_files.layer_names import COMPONENTS
from dreambooth.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """The modules of one component and kind. `sizes`: their ranks, None for dense factors; or sides of
    blocks, or reflections."""

    component: str
    kind: str
    sizes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Modules that add to a layer's weight. `metadata` is the file's; `scales` are those that were worked
    into the modules."""

    components: dict[str, dict[str, Module]]
    metadata: dict[str, str]
    scales: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    is_additive: ClassVar[bool] = True  # can have any weight, and be put on a live model
    size_title: ClassVar[str] = "rank"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occur, in alphabetical order: lora, dora, loha, doha, lokr, dokr."""
        return tuple(sorted({row.kind for row in self.rows()}))

    def rows(self) -> list[Row]:
        """One row for each component and kind."""
        ranks: dict[tuple[str, str], list[int | None]] = {}
        for component, modules in self.components.items():
            for kind in sorted({deltas.kind(module) for module in modules.values()}):
                ranks[component, kind] = [m.rank for m in modules.values() if deltas.kind(m) == kind]
        return [Row(component, kind, tuple(sizes)) for (component, kind), sizes in ranks.items()]

    def norms(self) -> dict[str, dict[str, float]]:
        """Frobenius norm of the update of each layer, by component."""
        return {
            component: {layer: deltas.norm(module) for layer, module in modules.items()}
            for component, modules in self.components.items()
        }

    def adapted(self, component: str, layer: str, weight: Tensor) -> Tensor:
        """The layer's weight, float32, with the adapter in it."""
        return deltas.adapted(deltas.to(self.components[component][layer], weight.device), weight)

    def update(self, component: str, layer: str, weight: Tensor) -> Tensor:
        """`adapted` less `weight`; without a magnitude it is computed without the rounding of that
        difference."""
        module = deltas.to(self.components[component][layer], weight.device)
        return deltas.delta(module) if module.magnitude is None else deltas.adapted(module, weight) - weight


def to_lora(adapter: Adapter, rank: int | None = None) -> tuple[Adapter, dict[str, float]]:
    """(every module as LoRA or DoRA, share of its squared entries that each keeps, by `component.layer`).

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


def kept_shares(adapter: Adapter, kept: Mapping[str, float]) -> dict[str, float]:
    """The share of its squared entries that each component keeps; `kept` has the shares of its modules, as
    `to_lora` returns them."""
    shares: dict[str, float] = {}
    for component, norms in adapter.norms().items():
        squares = {path: norm**2 for path, norm in norms.items()}
        total = sum(squares.values())
        kept_total = sum(kept[f"{component}.{path}"] * square for path, square in squares.items())
        shares[component] = kept_total / total if total else 1.0
    return shares


# ---- merging


def merge(parts: Sequence[tuple[str, Adapter, float]]) -> Adapter:
    """The LoRA whose update of each layer is the weighted sum of the adapters' updates, exactly.

    `parts` are (name for messages, adapter, weight). The rank of a layer is the sum of its ranks. The
    metadata about the training run keeps the fields in which all files agree. Raises UserError for DoRA, and
    if two adapters are for layers of different shapes.
    """
    components: dict[str, dict[str, Module]] = {}
    for component in COMPONENTS:
        layers = {path for _, adapter, _ in parts for path in adapter.components.get(component, {})}
        for path in sorted(layers):
            terms = [
                (name, adapter.components[component][path], weight)
                for name, adapter, weight in parts
                if path in adapter.components.get(component, {})
            ]
            _check_add_up(f"{component}.{path}", [(name, module) for name, module, _ in terms])
            loras = [deltas.as_lora(module) for _, module, _ in terms]
            weights = [weight for _, _, weight in terms]
            components.setdefault(component, {})[path] = deltas.concatenate(loras, weights)
    runs = [native.recorded(adapter.metadata) for _, adapter, _ in parts]
    return Adapter(components, {"dreambooth": json.dumps(_common(runs))})


def _common(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields that all have with the same value."""
    first, *others = runs
    return {
        field: value
        for field, value in first.items()
        if all(field in other and other[field] == value for other in others)
    }


def _check_add_up(layer: str, modules: Sequence[tuple[str, Module]]) -> None:
    for name, module in modules:
        if module.magnitude is not None:
            raise UserError(
                f"{name} is a {deltas.kind(module)}, which has lengths of rows as well (e.g. {layer}),"
                " and lengths do"
                " not add up; `bake` works it into a base, and `extract` makes a LoRA of that"
            )
    (first_name, first), *others = modules
    for name, module in others:
        if deltas.shape(module) != deltas.shape(first):
            raise UserError(
                f"the adapters are for different bases: {layer} of shape {deltas.shape(first)} in"
                f" {first_name}"
                f" and {deltas.shape(module)} in {name}"
            )
