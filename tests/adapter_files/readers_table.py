"""What each program makes of each kind of adapter: `python -m tests.adapter_files.readers_table` writes the
table of docs/adapters.md.

Every adapter is made as training makes it, on layers of Stable Diffusion 1.5 and XL at an eighth of
their width, and written in both layouts; the programs are those of `programs.py`.
"""

import dataclasses
import functools
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.kept import BASES
from dreambooth.adapter_files import bake, native, reading, writing
from dreambooth.adapters import inject
from dreambooth.bases import folders
from dreambooth.bases.weights import of_files
from dreambooth.options.adapter import AdapterOptions
from tests.adapter_files.programs import PROGRAMS, Base, Family, NotReadError

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
MARK = "<!-- made: python -m tests.adapter_files.readers_table -->"

NARROWER = 8
FAMILIES: tuple[Family, ...] = ("sd1", "sdxl")

ROWS: dict[str, AdapterOptions] = {
    "LoRA": AdapterOptions(rank=2, lora_alpha=3, target_preset="full"),
    "LoRA, `--rank_pattern`": AdapterOptions(rank=2, target_preset="full", rank_pattern="to_k=1,conv1=3"),
    "DoRA": AdapterOptions(rank=2, lora_alpha=3, use_dora=True, target_preset="full"),
    "DoRA, converted with `--rank`": AdapterOptions(rank=2, use_dora=True, target_preset="full"),
    "LoHa": AdapterOptions(adapter="loha", rank=2, lora_alpha=3, target_preset="full"),
    "LoHa, `--use_effective_conv2d`": AdapterOptions(
        adapter="loha", rank=2, lora_alpha=3, use_effective_conv2d=True, target_preset="full"
    ),
    "LoKr": AdapterOptions(adapter="lokr", rank=2, lora_alpha=3, target_preset="full"),
    "LoKr, `--decompose_both`": AdapterOptions(
        adapter="lokr", rank=2, lora_alpha=3, decompose_both=True, target_preset="full"
    ),
    "LoKr, `--use_effective_conv2d`": AdapterOptions(
        adapter="lokr", rank=2, lora_alpha=3, use_effective_conv2d=True, target_preset="full"
    ),
    "LoKr, `--decompose_factor` over the root of a width": AdapterOptions(
        adapter="lokr", rank=2, lora_alpha=3, decompose_factor=10, target_preset="full"
    ),
    "OFT, BOFT, HRA": AdapterOptions(adapter="hra", rank=2, target_preset="full"),
}

# One layer of each sort, of the narrowest blocks that have it.
_UNET_LAYERS = (
    *("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj"),
    *("down_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv"),
    *("down_blocks.1.attentions.0.proj_in",),
    *(
        f"down_blocks.1.attentions.0.transformer_blocks.0.{end}"
        for end in ("attn1.to_q", "attn2.to_k", "attn1.to_out.0")
    ),
)
_TEXT_LAYERS = tuple(f"encoder.layers.0.{end}" for end in ("self_attn.q_proj", "self_attn.out_proj"))


@functools.cache
def base_of(family: Family) -> Base:
    """Stable Diffusion 1.5 or XL, without weights."""
    config = next(c for name, (c, _) in BASES.items() if name.startswith("SDXL") == (family == "sdxl"))
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    small = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    with torch.device("meta"):
        text: dict[str, CLIPTextModel | CLIPTextModelWithProjection] = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**small))
        }
        if family == "sdxl":
            text["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**large))
        return Base(family, UNet2DConditionModel(**config), text)


class _Layers(nn.Module, PeftAdapterMixin):
    """A model of a few layers of another one, narrower, at their paths, with random weights."""

    def __init__(self, source: nn.Module, paths: tuple[str, ...], draw: torch.Generator) -> None:
        super().__init__()
        for path in paths:
            outputs, inputs, *kernel = inject.shapes_of(source)[path]
            outputs, inputs = outputs // NARROWER, inputs // NARROWER
            layer = (
                nn.Conv2d(inputs, outputs, (kernel[0], kernel[1])) if kernel else nn.Linear(inputs, outputs)
            )
            layer.weight.data = torch.randn(layer.weight.shape, generator=draw) / inputs**0.5
            *parents, last = path.split(".")
            parent: nn.Module = self
            for name in parents:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            parent.add_module(last, layer)


@dataclasses.dataclass(frozen=True)
class Made:
    """The files of an adapter by layout, and by component and layer the base's weight without it and with
    it."""

    files: dict[str, bytes]
    weights: dict[tuple[str, str], Tensor]
    adapted: dict[tuple[str, str], Tensor]  # empty for an adapter that rotates weights


def make(family: Family, options: AdapterOptions, rank: int | None = None) -> Made:
    """An adapter with random tensors, as training packs it and `--output_kohya_format` writes it.

    With `rank` it is converted to the nearest LoRA of that rank first.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _make(family, options, rank, Path(folder))


def _make(family: Family, options: AdapterOptions, rank: int | None, folder: Path) -> Made:
    """`make`, with a folder for the base of the few layers and for the adapter."""
    base, draw = base_of(family), torch.Generator().manual_seed(0)
    state: dict[str, dict[str, Tensor]] = {}
    configs: dict[str, dict[str, object]] = {}
    weights: dict[tuple[str, str], Tensor] = {}
    for component, model in {"unet": base.unet, **base.text}.items():
        is_unet = component == "unet"
        prefix = "text_model." if hasattr(model, "text_model") else ""
        source = model if is_unet or not prefix else model.text_model
        layers = _Layers(source, _UNET_LAYERS if is_unet else _TEXT_LAYERS, draw)
        own = {
            path: module.weight.detach().clone()
            for path, module in layers.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        (folder / component).mkdir(exist_ok=True)
        save_file(
            {f"{path}.weight": weight for path, weight in own.items()},
            folder / component / f"{'diffusion_pytorch_' if is_unet else ''}model.safetensors",
        )
        weights |= {(component, path): weight for path, weight in own.items()}
        targets = inject.unet_targets(options) if is_unet else inject.text_targets(options)
        added = inject.inject(component, layers, options, targets, seed=0)
        for name, parameter in added.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else 0.1 * noise
        state[component], configs[component] = added.state_dict(), inject.metadata(added)
    files = {"native": native.pack(state, configs, {})}
    if options.adapter in ("oft", "boft", "hra"):
        return Made(files, weights, {})
    (folder / "adapter.safetensors").write_bytes(files["native"])
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for (component, path), weight in weights.items():
        shapes[component][path] = tuple(weight.shape)
    adapter = reading.read_additive(folder / "adapter.safetensors", shapes)
    if rank:
        adapter = bake.ranked_lora(
            adapter, lambda part: of_files(folders.weight_files(folder, part, None)), rank
        )[0]
        files = {"native": writing.write_native(adapter, {})}
    adapted = {(part, path): adapter.adapted(part, path, w) for (part, path), w in weights.items()}
    return Made(files | {"kohya": writing.write_kohya(adapter, family, {})}, weights, adapted)


def stems_of(data: bytes) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by the part of the key that names the layer, then by the rest."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")
    for key, tensor in load(data).items():
        if key.startswith("lora_"):
            stem, _, end = key.partition(".")
        elif any(key.endswith(end) for end in ends):
            end = next(end for end in ends if key.endswith(end))
            stem = key.removesuffix(f".{end}")
        else:
            stem, _, end = key.rpartition(".")
        groups[stem][end] = tensor
    return groups


def outcomes(made: Made, layout: str, program: str, base: Base) -> Iterator[str]:
    """For each layer of the file: exact, wrong, or absent if the program does not apply it."""
    table_of, rebuild = PROGRAMS[program]
    table = table_of(base)
    for stem, tensors in stems_of(made.files[layout]).items():
        place = table.get(stem)
        if place is None:
            yield "absent"
            continue
        weight = made.weights[place]
        try:
            rebuilt = rebuild(tensors, weight)
        except NotReadError:
            yield "absent"
            continue
        expected = made.adapted[place]
        close = (rebuilt - expected).norm() <= 1e-5 * (expected - weight).norm() + 1e-6 * weight.norm()
        yield "exact" if close else "wrong"


def cell(made: dict[Family, Made], program: str) -> str:
    """Which file the program reads exactly, on both bases; else what it makes of kohya's."""
    seen = {
        layout: {
            outcome
            for family, one in made.items()
            if layout in one.files
            for outcome in outcomes(one, layout, program, base_of(family))
        }
        for layout in ("native", "kohya")
    }
    exact = [layout for layout, found in seen.items() if found == {"exact"}]
    if len(exact) == 2:
        return "both files"
    if exact:
        return f"{exact[0]} file"
    if "wrong" in seen["kohya"]:
        return "**misread**"
    return "partly" if "exact" in seen["kohya"] else "-"


def table() -> str:
    """The table of docs/adapters.md, in Markdown."""
    lines = ["| adapter | " + " | ".join(PROGRAMS) + " |", "|---" * (len(PROGRAMS) + 1) + "|"]
    for name, options in ROWS.items():
        rank = 16 if "converted" in name else None
        made = {family: make(family, options, rank) for family in FAMILIES}
        lines.append(f"| {name} | " + " | ".join(cell(made, program) for program in PROGRAMS) + " |")
    return "\n".join(lines)


def in_docs() -> str:
    """The table as docs/adapters.md has it."""
    return DOCS.read_text(encoding="utf-8").split(MARK)[1].strip()


if __name__ == "__main__":
    made_table = table()
    before, _, after = DOCS.read_text(encoding="utf-8").split(MARK)
    DOCS.write_text(f"{before}{MARK}\n{made_table}\n{MARK}{after}", encoding="utf-8")
    print(made_table)
