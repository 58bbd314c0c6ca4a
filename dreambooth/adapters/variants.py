"""The variants that infer.py draws: for each set of adapters and each factor of --sweep, the weights, prompts
and seeds.

Also reads the adapters, checks that the base can draw the variants, and prints a table of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dreambooth.adapter_files import layer_names, reading, run_info
from dreambooth.adapter_files.reading import AnyAdapter, Identity
from dreambooth.adapters import apply
from dreambooth.bases import families, loading, prompt_syntax, prompt_weights, prompts, schedulers
from dreambooth.io.errors import UserError, few, shown
from dreambooth.options import adapter_sets
from dreambooth.options.adapter_sets import AdapterSet, WeightedAdapter
from dreambooth.options.pictures import DrawingOptions, InferOptions
from dreambooth.options.training import TextOptions


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that has been read. `key` is its name on the models. `clip_skip` is --clip_skip, else that
    of the adapter's training."""

    key: str
    adapter: AnyAdapter
    identity: Identity
    clip_skip: int


Loaded = Mapping[Path, LoadedAdapter]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One column of the contact sheet. `set` holds the adapters with the weights that are drawn; None is the
    base without adapters. `jobs` are the (prompt, seed) of the column's pictures."""

    label: str
    set: AdapterSet | None
    clip_skip: int
    jobs: tuple[tuple[str, int], ...]

    @property
    def adapters(self) -> tuple[WeightedAdapter, ...]:
        return self.set.adapters if self.set else ()

    def weights(self, loaded: Loaded) -> dict[str, apply.Weight]:
        """The weights of the adapters by their names on the models, as `apply.Stack` takes them."""
        return {loaded[adapter.path].key: adapter.weights for adapter in self.adapters}


def read_adapters(
    sets: Sequence[AdapterSet], base: families.Base, clip_skip: int | None
) -> dict[Path, LoadedAdapter]:
    """All adapters of the sets by path, each read once. Raises UserError, naming flag or set and file, if one
    cannot be used with the base."""
    layers = layer_names.plain_layers(base.layers())
    adapter_sets.check_parts(sets, layers)
    loaded: dict[Path, LoadedAdapter] = {}
    for adapter_set in sets:
        for path, hub_id in ((adapter.path, adapter.hub_id) for adapter in adapter_set.adapters):
            if path in loaded:
                continue
            try:
                adapter, identity = reading.read(path, layers), reading.identity(path)
            except UserError as error:
                raise UserError(f"{adapter_set.where}: {error}") from None
            identity = dataclasses.replace(identity, label=hub_id) if hub_id else identity
            trained = run_info.of(adapter.metadata).get("clip_skip", 0)
            key = f"adapter_{len(loaded)}"
            loaded[path] = LoadedAdapter(key, adapter, identity, trained if clip_skip is None else clip_skip)
    return loaded


def plan(
    options: InferOptions, sets: Sequence[AdapterSet], loaded: Loaded, words: Sequence[str]
) -> list[Variant]:
    """The variants in the order of their columns. The first is the base without adapters, if it is drawn.

    `words` are the prompts of the flags, for sets that have none. Raises UserError for a variant without
    prompts.
    """
    all_prompts = dict.fromkeys([*words, *(prompt for each in sets for prompt in each.prompts)])
    all_skips = [loaded[adapter.path].clip_skip for each in sets for adapter in each.adapters]

    def variant(label: str, adapter_set: AdapterSet | None) -> Variant:
        used = list(all_prompts) if adapter_set is None else list(adapter_set.prompts or words)
        if not used:
            where = adapter_set.where if adapter_set else "--prompt"
            raise UserError(f"{where} has no prompts; give it some, or --prompt for all sets")
        skips = [loaded[adapter.path].clip_skip for adapter in adapter_set.adapters] if adapter_set else []
        given = options.drawing.clip_skip
        clip_skip = given if given is not None else next(iter(skips or all_skips), 0)
        jobs = tuple((prompt, seed) for prompt in used for seed in options.seeds)
        return Variant(label, adapter_set, clip_skip, jobs)

    variants = [variant("base", None)] if options.compare or not sets else []
    for adapter_set in sets:
        name = adapter_set.name if options.adapters_file else "adapter"
        for factor in options.factors():
            label = name if options.sweep is None else f"{name} x {factor:g}"
            variants.append(variant(label, adapter_set.scaled(factor)))
    return variants


def check(
    drawing: DrawingOptions,
    steps: int,
    variants: Sequence[Variant],
    loaded: Loaded,
    base: families.Base,
    *,
    has_weights: bool = False,
) -> None:
    """Raise UserError if a prompt, a clip_skip or a weight of a variant does not work with the base and the
    adapters, or the base has fewer timesteps than sampling steps. `has_weights` is --prompt_weights."""
    schedulers.check_steps("--num_inference_steps", steps, base)
    texts = {f"the prompt {prompt!r}": prompt for variant in variants for prompt, _ in variant.jobs}
    texts["--negative_prompt"] = drawing.negative_prompt
    if has_weights:
        prompt_weights.check_base(base.family.encode, base.family.name)
        prompt_weights.check(texts.values())
    else:
        prompts.check(loading.load_tokenizers(base), texts, families.max_tokens(base))
    for variant in {variant.clip_skip: variant for variant in variants}.values():
        _check_clip_skip(drawing, variant, loaded, base)
    for adapter_set in filter(None, (variant.set for variant in variants)):
        for weighted in adapter_set.adapters:
            adapter = loaded[weighted.path].adapter
            if adapter.is_additive:
                continue
            what = f"{adapter_set.where}: {shown(weighted.path)} is {', '.join(adapter.kinds).upper()}"
            if odd := [weight for weight in weighted.weights.values() if weight not in (0, 1)]:
                raise UserError(
                    f"{what}, which rotates weights: its own weight must be 0 or 1, got {odd[0]:g}"
                )
            if drawing.fuse == "no":
                raise UserError(f"{what}, which is always fused; leave --fuse no out")


def _check_clip_skip(drawing: DrawingOptions, variant: Variant, loaded: Loaded, base: families.Base) -> None:
    """Raise UserError unless the base has the layers that a variant skips."""
    try:
        families.check_text(base, TextOptions(clip_skip=variant.clip_skip))
    except UserError as error:
        if drawing.clip_skip is not None:
            raise
        trained = [each.identity.label for each in loaded.values() if each.clip_skip == variant.clip_skip]
        raise UserError(
            f"{error}, the value in the metadata of {few(trained)}; give --clip_skip for this base"
        ) from None


def notes(
    drawing: DrawingOptions,
    variants: Sequence[Variant],
    loaded: Loaded,
    base: families.Base,
    *,
    has_weights: bool = False,
) -> list[str]:
    """Notes on syntax of other programs in the prompts, if they are plain words, and on adapters whose
    metadata speak against the base. `has_weights` is --prompt_weights."""
    texts = [prompt for variant in variants for prompt, _ in variant.jobs]
    syntax_notes = [] if has_weights else prompt_syntax.notes([*texts, drawing.negative_prompt])
    paths = dict.fromkeys(adapter.path for variant in variants for adapter in variant.adapters)
    adapters = [loaded[path] for path in paths]
    metadata = {each.identity.label: each.adapter.metadata for each in adapters}
    return [
        *syntax_notes,
        *(note for label, fields in metadata.items() for note in run_info.notes(label, fields, base)),
    ]


def table(variants: Sequence[Variant], loaded: Loaded, fuse: apply.Fusing, dtype: torch.dtype) -> str:
    """A table for the terminal: a line for each component and kind of each adapter of each variant, then
    notes on clip_skip and on what was left out of an adapter.

    `dtype` is the models'. Without variants and notes the text is "".
    """
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
        adapters = [loaded[adapter.path] for adapter in variant.adapters]
        notes += [f"note: {note}" for each in adapters for note in each.adapter.notes]
        skips = {f"{each.identity.label}: {each.clip_skip}": each.clip_skip for each in adapters}
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
    return "\n".join(line.rstrip() for line in [*lines, *dict.fromkeys(notes)])


def _line(label: str, name: str, component: str, kind: str, modules: Any, sizes: str, weight: str) -> str:
    start = f"{label[:16]:<16} {name[:28]:<28} {component:<16} {kind:<6}"
    return f"{start} {modules:>7}  {sizes[:12]:<12} {weight}"


def _weights_of(component: str, weights: Mapping[str, float]) -> str:
    """The weights that apply to layers of a component, with the parts that they are for."""
    items = [(part, w) for part, w in weights.items() if part.partition(".")[0] in ("", component)]
    return ", ".join(f"{part} {w:g}".lstrip() for part, w in items)
