"""Adapter files in other programs: each applies every layer, and adds what the adapter adds; the table in
docs/adapters.md says where not."""

import pytest
import torch
from safetensors.torch import load

from dreambooth.adapter_files import deltas, writing
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import LoKr, Lora
from dreambooth.adapters import inject
from dreambooth.options.adapter import AdapterOptions
from tests.adapter_files import programs, readers_table
from tests.adapter_files.programs import PROGRAMS, Family, NotReadError, layers_of


def lora_on(family: Family, preset: str) -> Adapter:
    """A LoRA of rank 1 on every layer of a preset, on UNet and text encoders of full size."""
    base = readers_table.base_of(family)
    options = AdapterOptions(target_preset=preset)  # type: ignore[arg-type]
    components: dict[str, dict[str, deltas.Module]] = {}
    for component, model in {"unet": base.unet, **base.text}.items():
        ends = inject.unet_targets(options) if component == "unet" else inject.text_targets(options)
        for name in layers_of(model):
            if f".{name}".endswith(tuple(f".{end}" for end in ends)):
                outputs, inputs, *kernel = model.get_submodule(name).weight.shape
                module = Lora(torch.zeros(1, inputs, *kernel), torch.zeros(outputs, 1, *[1] * len(kernel)))
                components.setdefault(component, {})[name.removeprefix("text_model.")] = module
    return Adapter(components, {})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["attn", "attn_ff", "full"])
@pytest.mark.parametrize("family", readers_table.FAMILIES)
def test_every_layer_of_a_kohya_file_is_one_that_every_program_patches(family, preset):
    adapter = lora_on(family, preset)
    data = writing.write_kohya(adapter, family, {}, dtype=torch.float16)
    stems = {key.split(".")[0] for key in load(data)}
    expected = {(component, path) for component, modules in adapter.components.items() for path in modules}
    assert len(stems) == len(expected)
    for program, (table_of, _) in PROGRAMS.items():
        table = table_of(readers_table.base_of(family))
        assert stems <= table.keys(), program
        assert {table[stem] for stem in stems} == expected, program


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_programs_compute():
    assert readers_table.in_docs() == readers_table.table()


def lokr(
    *, first: int | None, second: int | None, core: bool = False, sizes: tuple[int, ...] = (4, 5, 8, 10)
) -> LoKr:
    """A LoKr of a 3 x 3 convolution: ranks of its factors (None: dense), and their sides l, m, k, n."""
    draw = torch.Generator().manual_seed(1)
    left, right, outputs, inputs = sizes
    parts = {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    if first is None:
        parts["w1"] = random(left, right)
    else:
        parts |= {"w1a": random(left, first), "w1b": random(first, right)}
    if second is None:
        parts["w2"] = random(outputs, inputs, 3, 3)
    elif core:
        parts |= {"w2a": random(second, outputs), "w2b": random(second, inputs)}
        parts["t2"] = random(second, second, 3, 3)
    else:
        parts |= {"w2a": random(outputs, second), "w2b": random(second, inputs, 3, 3)}
    return LoKr(**parts)


def one_layer(module: deltas.Module) -> Adapter:
    return Adapter({"unet": {"mid_block.resnets.0.conv1": module}}, {})


def tensors_of(module: deltas.Module) -> dict[str, torch.Tensor]:
    """The tensors that a kohya file has of one layer."""
    return {
        key.partition(".")[2]: t for key, t in load(writing.write_kohya(one_layer(module), "sd1", {})).items()
    }


@pytest.mark.parametrize(
    "module",
    [
        lokr(first=None, second=2),
        lokr(first=2, second=2),
        lokr(first=1, second=2),
        lokr(first=2, second=1),
        lokr(first=2, second=None),
        lokr(first=None, second=2, core=True),
        lokr(first=1, second=1, core=True),
        lokr(first=4, second=4),
        lokr(first=None, second=7),
        lokr(first=3, second=3),
        lokr(first=None, second=None),
    ],
)
@pytest.mark.parametrize("program", ["ComfyUI, Forge", "A1111", "InvokeAI", "LyCORIS"])
def test_every_form_of_lokr_is_rebuilt(program, module):
    """Factors of other ranks than each other's, of ranks that are too large, and with a core included."""
    outputs, inputs, *kernel = deltas.shape(module)
    weight = torch.randn(outputs, inputs, *kernel, generator=torch.Generator().manual_seed(2))
    found = PROGRAMS[program][1](tensors_of(module), weight)
    expected = deltas.adapted(module, weight)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("width", [320, 640, 768, 1280, 2048, 36, 37])
@pytest.mark.parametrize("factor", [-1, 2, 6, 7, 16, 20, 37, 64, 320])
def test_a_note_names_the_layers_that_lycoris_cannot_read(factor, width):
    left, right = (writing.divided(side, factor) for side in (width, 640))
    module = LoKr(w1=torch.ones(left, right), w2=torch.ones(width // left, 640 // right))
    try:
        programs.lycoris(tensors_of(module), torch.zeros(width, 640))
        is_read = True
    except NotReadError:
        is_read = False
    notes = writing.kohya_notes(one_layer(module))
    assert [note.startswith("LyCORIS cannot read 1 of 1 layers") for note in notes] == [True] * (not is_read)
