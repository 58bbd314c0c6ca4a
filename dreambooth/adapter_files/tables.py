"""Reports about an adapter for the terminal: tables of its modules, scales and norms, and its metadata."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from dreambooth.adapter_files import deltas, run_info
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.reading import AnyAdapter
from dreambooth.io.errors import shortened, shown

_BLOCK = re.compile(r"((?:down|up)_blocks[._]\d+|mid_block|(?:input|output)_blocks_\d+|middle_block)[._]")


def table(adapter: AnyAdapter) -> str:
    """A title line, and a line for each component and kind: the number of modules, and their sizes with the
    count of each."""
    lines = [f"{'component':<16} {'kind':<6} {'modules':>8}  {adapter.size_title}"]
    for row in adapter.rows():
        counts = sorted(Counter(row.sizes).items(), key=lambda item: item[0] or 0)
        sizes = [
            ("dense" if size is None else f"{size}") + f" ({count}x)" * (len(counts) > 1)
            for size, count in counts
        ]
        lines.append(f"{row.component:<16} {row.kind:<6} {len(row.sizes):>8}  {', '.join(sizes)}")
    return "\n".join(lines)


def report(adapter: AnyAdapter) -> str:
    """`table`, the metadata and notes; for an additive adapter, also its scales and norms."""
    sections = [table(adapter)]
    if isinstance(adapter, Adapter):
        sections += [_scales(adapter.scales), _norms(adapter)]
    notes = "".join(f"\nnote: {note}" for note in adapter.notes)
    return "\n\n".join([*sections, _training(adapter.metadata), _metadata(adapter.metadata)]) + notes


def _scales(scales: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the scales by component, the most frequent first, at most 6."""
    lines = [f"{'component':<16} scale"]
    for component, by_layer in scales.items():
        counts = Counter(f"{scale:.6g}" for scale in by_layer.values()).most_common(6)
        texts = [scale + f" ({count}x)" * (len(counts) > 1) for scale, count in counts]
        lines.append(f"{component:<16} {', '.join(texts)}")
    return "\n".join(lines)


def _norms(adapter: Adapter) -> str:
    """A table of the update's Frobenius norms, with the scale, by block of the UNet and by text encoder."""
    blocks: dict[str, list[float]] = defaultdict(list)
    for component, modules in adapter.components.items():
        for layer, module in modules.items():
            blocks[_block(component, layer)].append(deltas.norm(module))
    lines = [f"{'block':<24} {'layers':>6} {'norm of the update':>20} {'largest of a layer':>20}"]
    for name, block_norms in blocks.items():
        total = sum(norm * norm for norm in block_norms) ** 0.5
        lines.append(f"{name:<24} {len(block_norms):>6} {total:>20.6g} {max(block_norms):>20.6g}")
    if any(kind.startswith("d") for kind in adapter.kinds):
        lines.append("(without the magnitudes of DoRA)")
    return "\n".join(lines)


def _block(component: str, layer: str) -> str:
    """The name of a layer's line in the table: the UNet's block, or the text encoder."""
    if component != "unet":
        return component
    match = _BLOCK.search(f"{layer}.")
    return f"unet {match[1]}" if match else "unet, other"


def _training(metadata: Mapping[str, str]) -> str:
    """What the metadata say on how to draw the adapter, as infer.py understands them."""
    info = run_info.of(metadata)
    return (
        f"clip_skip        {info.get('clip_skip', 0)} (final layers of the text encoder to skip)\n"
        f"prediction_type  {shortened(info.get('prediction_type', 'not stated'))}"
    )


def _metadata(metadata: Mapping[str, str]) -> str:
    """A line for each field of the metadata; long texts are cut."""
    if not metadata:
        return "no metadata"
    lines = ["metadata"]
    for name, text in sorted(metadata.items()):
        cut = text if len(text) <= 300 else f"{text[:300]} ... ({len(text)} characters)"
        lines.append(f"  {shown(name)}: {shown(cut)}")
    return "\n".join(lines)
