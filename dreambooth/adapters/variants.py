"""The variants that infer.py draws: each set of adapters, times each factor of --sweep, with its prompts and
seeds. Reading of the adapters, checks, and the table of what was read."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dreambooth.adapter_files import layer_names, native, reading
from dreambooth.adapter_files.reading import AnyAdapter, Identity
from dreambooth.adapters import apply
from dreambooth.bases import families, loading, prompts
from dreambooth.errors import UserError, shown
from dreambooth.options import adapter_sets
from dreambooth.options.adapter_sets import AdapterSet, WeightedAdapter
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import TextOptions


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that has been read. `key` is its name on the models. `clip_skip` is the flag's, else that of
    its training."""

    key: str
    adapter: AnyAdapter
    identity: Identity
    clip_skip: int


Loaded = Mapping[Path, LoadedAdapter]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One column of the contact sheet. `set` has its final weights; None is the base alone. `jobs` are the
    (prompt, seed) of its pictures."""

    label: str
    set: AdapterSet | None
    clip_skip: int
    jobs: tuple[tuple[str, int], ...]

    @property
    def adapters(self) -> tuple[WeightedAdapter, ...]:
        return self.set.adapters if self.set else ()

    def weights(self, loaded: Loaded) -> dict[str, apply.Weight]:
        """The weights by the adapters' names on the models."""
        return {loaded[adapter.path].key: adapter.weights for adapter in self.adapters}


def read_adapters(
    sets: Sequence[AdapterSet], base: families.Base, clip_skip: int | None
) -> dict[Path, LoadedAdapter]:
    """Every adapter of the sets by its path, each read once. Raises UserError, naming flag or set and file,
    if one cannot be used."""
    layers = layer_names.plain_layers(base.layers())
    adapter_sets.check_parts(sets, layers)
    loaded: dict[Path, LoadedAdapter] = {}
    for one in sets:
        for path in (adapter.path for adapter in one.adapters):
            if path in loaded:
                continue
            try:
                adapter, identity = reading.read(path, layers), reading.identity(path)
            except UserError as error:
                raise UserError(f"{one.where}: {error}") from None
            trained = native.recorded(adapter.metadata).get("clip_skip", 0)
            trained = trained if type(trained) is int and trained >= 0 else 0
            key = f"adapter_{len(loaded)}"
            loaded[path] = LoadedAdapter(key, adapter, identity, trained if clip_skip is None else clip_skip)
    return loaded


def plan(
    options: InferOptions, sets: Sequence[AdapterSet], loaded: Loaded, words: Sequence[str]
) -> list[Variant]:
    """The variants in the order of their columns; first the base alone, if it is drawn. `words` are the
    prompts of the flags."""
    all_prompts = dict.fromkeys([*words, *(prompt for one in sets for prompt in one.prompts)])
    all_skips = [loaded[adapter.path].clip_skip for one in sets for adapter in one.adapters]

    def variant(label: str, one: AdapterSet | None) -> Variant:
        chosen = list(all_prompts) if one is None else list(one.prompts or words)
        if not chosen:
            where = one.where if one else "--prompt"
            raise UserError(f"{where} has no prompts; give it some, or --prompt for all sets")
        skips = [loaded[adapter.path].clip_skip for adapter in one.adapters] if one else []
        clip_skip = options.clip_skip if options.clip_skip is not None else next(iter(skips or all_skips), 0)
        jobs = tuple((prompt, seed) for prompt in chosen for seed in options.seeds)
        return Variant(label, one, clip_skip, jobs)

    variants = [variant("base", None)] if options.compare or not sets else []
    for one in sets:
        name = one.name if options.adapters_file else "adapter"
        for factor in options.factors():
            label = name if options.sweep is None else f"{name} x {factor:g}"
            variants.append(variant(label, one.scaled(factor)))
    return variants


def check(options: InferOptions, variants: Sequence[Variant], loaded: Loaded, base: families.Base) -> None:
    """Raise UserError if a variant needs what its adapters or this base cannot do."""
    texts = {f"the prompt {prompt!r}": prompt for variant in variants for prompt, _ in variant.jobs}
    texts["--negative_prompt"] = options.negative_prompt
    prompts.check(loading.load_tokenizers(base), texts, families.max_tokens(base))
    for clip_skip in dict.fromkeys(variant.clip_skip for variant in variants):
        families.check_text(base, TextOptions(clip_skip=clip_skip))
    for variant in variants:
        for weighted in variant.adapters:
            adapter = loaded[weighted.path].adapter
            if variant.set and not adapter.is_additive:
                what = f"{variant.set.where}: {shown(weighted.path)} is {', '.join(adapter.kinds).upper()}"
                _check_turning(what, weighted.weights, options.fuse)


def _check_turning(what: str, weights: Mapping[str, float], fuse: apply.Fusing) -> None:
    """Raise UserError unless OFT, BOFT or HRA has such weights that it can be fused, and is fused."""
    for weight in weights.values():
        if weight not in (0, 1):
            raise UserError(f"{what}, which rotates weights: its own weight must be 0 or 1, got {weight:g}")
    if fuse == "no":
        raise UserError(f"{what}, which is always worked into the weights; leave --fuse no out")


def table(variants: Sequence[Variant], loaded: Loaded, fuse: apply.Fusing, dtype: torch.dtype) -> str:
    """A line for each component and kind of each adapter of each variant, and notes on clip_skip. Each line
    ends with a newline."""
    columns = ("set", "adapter", "component", "kind", "modules", "rank", "weight")
    lines = [_line(*columns)] if loaded else []
    notes = []
    for variant in variants:
        active = [a for a in variant.adapters if apply.is_active(a.weights)]
        is_fused = apply.is_fused([loaded[a.path].adapter for a in active], fuse, dtype)
        for weighted in variant.adapters:
            for row in loaded[weighted.path].adapter.rows():
                sizes = ", ".join(sorted({"dense" if size is None else str(size) for size in row.sizes}))
                weight = _weights_of(row.component, weighted.weights) + " (fused)" * is_fused
                name = weighted.name
                lines.append(
                    _line(variant.label, name, row.component, row.kind, len(row.sizes), sizes, weight)
                )
        skips = {f"{one.identity.label}: {one.clip_skip}": one.clip_skip for one in _loaded(variant, loaded)}
        if len(set(skips.values())) > 1:
            notes.append(
                f"note: the adapters were trained with different clip_skip ({', '.join(sorted(skips))});"
                f" drawn with {variant.clip_skip}"
            )
    if len({variant.clip_skip for variant in variants}) > 1:
        notes.append(
            "note: the sets are drawn with different clip_skip, as their adapters were trained;"
            " --clip_skip sets one for all"
        )
    return "".join(f"{line.rstrip()}\n" for line in [*lines, *dict.fromkeys(notes)])


def _line(label: str, name: str, component: str, kind: str, modules: Any, sizes: str, weight: str) -> str:
    start = f"{label[:16]:<16} {name[:28]:<28} {component:<16} {kind:<6}"
    return f"{start} {modules:>7}  {sizes[:12]:<12} {weight}"


def _weights_of(component: str, weights: Mapping[str, float]) -> str:
    """The weights that layers of a component can have."""
    items = [(part, w) for part, w in weights.items() if part.partition(".")[0] in ("", component)]
    return ", ".join(f"{part} {w:g}".lstrip() for part, w in items)


def _loaded(variant: Variant, loaded: Loaded) -> list[LoadedAdapter]:
    return [loaded[adapter.path] for adapter in variant.adapters]
