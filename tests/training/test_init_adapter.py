"""--init_adapter and ranks that differ by layer: what the message advises can be done."""

import re
from pathlib import Path

import pytest
import torch

from dreambooth.adapter_files import layer_names, reading, writing
from dreambooth.adapter_files.adapter import Adapter, to_lora
from dreambooth.adapter_files.deltas import Lora, Module
from dreambooth.adapters import inject
from dreambooth.bases import families
from dreambooth.io.errors import UserError
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.training import BaseOptions, TextOptions
from dreambooth.training import checks

# rank of the layer number N with a name; some can be said in a word for each kind of layer, some cannot
RANKS = {
    "by kind of layer": lambda n, path: {"to_q": 1, "to_k": 2, "to_v": 4}.get(path[-4:], 6),
    "by block": lambda n, path: 2 if path.startswith("mid_block") else 4,
    "of every layer": lambda n, path: 1 + n,
    "one other": lambda n, path: 3 if n == 5 else 4,
}


def start(base: families.Base, path: Path, **options: object) -> checks.InitAdapter:
    return checks.read_init_adapter(
        AdapterOptions(init_adapter=str(path), **options),  # type: ignore[arg-type]
        TextOptions(),
        base,
    )


@pytest.mark.parametrize("case", RANKS)
def test_advice_on_ranks_that_differ_by_layer_can_be_followed(case, tiny_base, tmp_path):
    base = families.find(BaseOptions(str(tiny_base)))
    shapes = layer_names.plain_layers(base.layers())["unet"]
    modules: dict[str, Module] = {}
    for n, path in enumerate(inject.layers_at(inject.UNET_TARGETS, shapes)):
        (outputs, inputs), rank = shapes[path], RANKS[case](n, path)
        modules[path] = Lora(torch.randn(rank, inputs), torch.randn(outputs, rank))
    path = tmp_path / "a.safetensors"
    path.write_bytes(writing.write_native(Adapter({"unet": modules}, {}), {}))
    for rank in (4, 32):
        with pytest.raises(UserError, match=r"has layers of ranks \d+ to \d+; unet\.\S+ has ") as refused:
            start(base, path, rank=rank)
        message = str(refused.value)
        if pattern := re.search(r"give --rank_pattern (\S+), or ", message):
            started = start(base, path, rank=rank, rank_pattern=pattern[1])
            assert len(started.state["unet"]) == 2 * len(modules)
        else:
            assert case == "of every layer"  # a pattern of all layers is too long for a message
    lowest = re.search(r"convert_adapter\.py resize --rank (\d+)`", message)
    assert lowest is not None
    small, _ = to_lora(reading.read_additive(path, base.layers()), int(lowest[1]))
    (tmp_path / "b.safetensors").write_bytes(writing.write_native(small, {}))
    assert start(base, tmp_path / "b.safetensors", rank=int(lowest[1])).state
