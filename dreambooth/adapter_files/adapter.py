"""What an adapter is, whatever file it came from.

Per component (`unet`, `text_encoder`, `text_encoder_2`) and module, named as diffusers names it and without the text encoders' `text_model.`, a
Lora, LoHa or LoKr of `deltas`, in float32, with its scale worked in.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Literal

from dreambooth.adapter_files import deltas
from dreambooth.adapter_files.deltas import Module

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
Family = Literal["sd1", "sd2", "sdxl"]
Shape = tuple[int, ...]
Layers = Mapping[str, Mapping[str, Shape]]  # component -> module -> shape of its weight


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a file holds. `metadata` is the file's own; the scales that it gave, by component and module, are in the modules by now."""

    components: dict[str, dict[str, Module]]
    metadata: dict[str, str]
    scales: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occur, in alphabetical order: lora, dora, loha, doha, lokr, dokr."""
        return tuple(
            sorted(
                {deltas.kind(module) for modules in self.components.values() for module in modules.values()}
            )
        )


def table(adapter: Adapter) -> str:
    """One line for each component and kind: modules and ranks."""
    lines = [f"{'component':<16} {'kind':<6} {'modules':>8}  rank"]
    for component, modules in adapter.components.items():
        for kind in sorted({deltas.kind(module) for module in modules.values()}):
            ranks = [module.rank for module in modules.values() if deltas.kind(module) == kind]
            counted = sorted(collections.Counter(ranks).items(), key=lambda item: item[0] or 0)
            words = [
                f"{'dense' if rank is None else rank}" + f" ({count}x)" * (len(counted) > 1)
                for rank, count in counted
            ]
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
