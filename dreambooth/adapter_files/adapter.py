"""An adapter in memory, the same for every file layout: LoRA, LoHa or LoKr modules by component and layer.

Layers have diffusers' names, without the `text_model.` of text encoders. Tensors are float32. The scale is
multiplied into them, so there is no alpha. `rotations.Rotations` has the same interface for OFT, BOFT and
HRA.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from dreambooth.adapter_files import deltas, run_info
from dreambooth.adapter_files.deltas import Module
from dreambooth.adapter_files.layer_names import COMPONENTS
from dreambooth.io.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """The modules of one component and kind. `sizes` has one number for each module: its rank, None if its
    factors are dense. For OFT and BOFT it is the side of a block, for HRA the number of reflections."""

    component: str
    kind: str
    sizes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Modules that add to a layer's weight.

    `components` has the modules by component and layer. `metadata` is the file's. `scales` has, by component
    and layer, the factors that were multiplied into the modules. `notes` say what the file holds and the
    adapter does not.
    """

    components: dict[str, dict[str, Module]]
    metadata: dict[str, str]
    scales: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    is_additive: ClassVar[bool] = True  # works with any weight, and can be attached to a live model
    size_title: ClassVar[str] = "rank"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the modules, in alphabetical order, of: lora, dora, loha, doha, lokr, dokr."""
        return tuple(sorted({row.kind for row in self.rows()}))

    def rows(self) -> list[Row]:
        """One row for each component and kind."""
        ranks: dict[tuple[str, str], list[int | None]] = {}
        for component, modules in self.components.items():
            for kind in sorted({deltas.kind(module) for module in modules.values()}):
                ranks[component, kind] = [m.rank for m in modules.values() if deltas.kind(m) == kind]
        return [Row(component, kind, tuple(sizes)) for (component, kind), sizes in ranks.items()]

    def adapted(self, component: str, layer: str, weight: Tensor) -> Tensor:
        """The layer's weight with the adapter merged into it. `weight` is the base's, float32; the result has
        its shape and device."""
        return deltas.adapted(deltas.to(self.components[component][layer], weight.device), weight)

    def update(self, component: str, layer: str, weight: Tensor) -> Tensor:
        """`adapted` minus `weight`. Without a magnitude it is dW itself, free of that subtraction's
        rounding."""
        module = deltas.to(self.components[component][layer], weight.device)
        return deltas.delta(module) if module.magnitude is None else deltas.adapted(module, weight) - weight


def to_lora(
    adapter: Adapter, rank: int | None = None, weight_of: Callable[[str, str], Tensor] | None = None
) -> tuple[Adapter, dict[str, float]]:
    """(the adapter with every module as LoRA or DoRA; by component, the share of the squared entries of all
    its dW that it keeps).

    The conversion is exact without `rank`. With it, modules of larger ranks become the nearest of that rank.
    `weight_of` returns the base's weight by component and layer, float32. With it and `rank` a module with a
    magnitude becomes the plain LoRA nearest to its change of that weight, which has full rank.
    """
    components: dict[str, dict[str, Module]] = {}
    kept: dict[str, float] = {}
    for component, modules in adapter.components.items():
        loras = components.setdefault(component, {})
        held = total = 0.0
        for path, module in modules.items():
            if rank is None:
                loras[path] = deltas.as_lora(module)
                continue
            if weight_of is None or module.magnitude is None:
                exact = deltas.as_lora(module)
                square = deltas.norm(exact) ** 2
                loras[path], share = deltas.shrink(exact, rank)
            else:
                change = adapter.update(component, path, weight_of(component, path))
                square = float(change.double().square().sum())
                loras[path], share = deltas.extract(change, rank)
            total += square
            held += share * square
        kept[component] = held / total if total else 1.0
    return Adapter(components, adapter.metadata), kept


# ---- merging


def merge(parts: Sequence[tuple[str, Adapter, float]]) -> Adapter:
    """The LoRA whose update of each layer is the weighted sum of the adapters' updates, exactly.

    `parts` are (name for messages, adapter, weight). The rank of a layer is the sum of its ranks in the
    adapters. The metadata about the training run keeps the fields that have the same value in all adapters.
    Raises UserError for DoRA, and if a layer has different shapes in two adapters.
    """
    components: dict[str, dict[str, Module]] = {}
    for component in COMPONENTS:
        terms: dict[str, list[tuple[str, Module, float]]] = {}  # by layer
        for name, adapter, weight in parts:
            for path, module in adapter.components.get(component, {}).items():
                terms.setdefault(path, []).append((name, module, weight))
        for path, summed in sorted(terms.items()):
            names, modules, weights = zip(*summed, strict=True)
            _check_add_up(f"{component}.{path}", list(zip(names, modules, strict=True)))
            loras = [deltas.as_lora(module) for module in modules]
            components.setdefault(component, {})[path] = deltas.concatenate(loras, weights)
    info, notes = run_info.merged([(name, run_info.of(adapter.metadata)) for name, adapter, _ in parts])
    return Adapter(components, {"dreambooth": json.dumps(info)}, notes=tuple(notes))


def _check_add_up(layer: str, modules: Sequence[tuple[str, Module]]) -> None:
    """Raise UserError unless the modules of one layer can be added. `modules` are (name for messages,
    module)."""
    for name, module in modules:
        if module.magnitude is not None:
            raise UserError(
                f"{name} is a {deltas.kind(module)} (e.g. {layer}), and its magnitudes cannot be added;"
                " `bake` merges it into a base, and `extract` makes a LoRA of the result"
            )
    (first_name, first), *rest = modules
    for name, module in rest:
        if deltas.shape(module) != deltas.shape(first):
            raise UserError(
                f"the adapters are for different bases: {layer} of shape {deltas.shape(first)} in"
                f" {first_name} and {deltas.shape(module)} in {name}"
            )
