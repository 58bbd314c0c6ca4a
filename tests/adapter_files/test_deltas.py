"""The arithmetic of adapters: the update of each kind, and its change into LoRA."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lokr.layer import factorization

from dreambooth.adapter_files import deltas, reading, tables, writing
from dreambooth.adapter_files.adapter import to_lora
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora
from dreambooth.files import safetensors_files
from dreambooth.io.errors import UserError
from tests.adapter_files.files_made import peft_file, tuner_layers

# ---- arithmetic


def random_lora(rank: int, shape: tuple[int, ...], seed: int = 0) -> Lora:
    draw = torch.Generator().manual_seed(seed)
    ones = [1] * (len(shape) - 2)
    return Lora(
        torch.randn(rank, *shape[1:], generator=draw), torch.randn(shape[0], rank, *ones, generator=draw)
    )


@pytest.mark.parametrize("shape", [(24, 17), (12, 5, 3, 3)])
def test_shrinking_is_as_good_as_a_full_decomposition(shape):
    lora = random_lora(8, shape)
    small, kept = deltas.shrink(lora, 3)
    dense = deltas.delta(lora)
    values = torch.linalg.svdvals(dense.flatten(1).double())
    best = float(values[:3].square().sum() / values.square().sum())
    assert small.rank == 3
    assert kept == pytest.approx(best, rel=1e-6)
    residual = (dense - deltas.delta(small)).norm() / dense.norm()
    assert float(residual) == pytest.approx((1 - best) ** 0.5, rel=1e-5)
    assert deltas.shrink(lora, 8) == (lora, 1.0)


@pytest.mark.parametrize("shape", [(24, 17), (17, 24), (12, 5, 3, 3)])
def test_extraction_finds_a_low_rank_and_the_best_of_a_high_one(shape):
    dense = deltas.delta(random_lora(4, shape))
    found, kept = deltas.extract(dense, 4)
    assert kept == pytest.approx(1)
    assert (deltas.delta(found) - dense).norm() <= 1e-6 * dense.norm()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(noise.flatten(1).double())
    found, kept = deltas.extract(noise, 5)
    assert kept == pytest.approx(float(values[:5].square().sum() / values.square().sum()), rel=1e-6)
    assert float((deltas.delta(found) - noise).norm()) == pytest.approx(
        float(values[5:].square().sum().sqrt()), rel=1e-5
    )
    assert deltas.extract(torch.zeros(shape), 2)[1] == 1.0
    assert not deltas.delta(deltas.extract(torch.zeros(shape), 2)[0]).any()


def test_padding_and_concatenating_are_exact():
    shape = (12, 5, 3, 3)
    one, other = random_lora(3, shape), random_lora(2, shape, seed=1)
    assert torch.equal(deltas.delta(deltas.pad(one, 7)), deltas.delta(one))
    both = deltas.concatenate([one, other], [0.5, -2.0])
    assert both.rank == 5
    assert torch.allclose(deltas.delta(both), 0.5 * deltas.delta(one) - 2 * deltas.delta(other), atol=1e-5)


def test_ranks_of_exact_loras_are_products():
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    loha = LoHa(tensor(40, 3), tensor(3, 50), tensor(40, 4), tensor(4, 50))
    assert deltas.as_lora(loha).rank == 12
    lokr = LoKr(w1a=tensor(4, 2), w1b=tensor(2, 5), w2a=tensor(10, 3), w2b=tensor(3, 10))
    assert deltas.as_lora(lokr).rank == 6
    wide = LoHa(tensor(20, 8), tensor(8, 50), tensor(20, 8), tensor(8, 50))
    assert deltas.as_lora(wide).rank == 20  # never more than the layer has
    for module in (loha, lokr, wide):
        assert (deltas.delta(deltas.as_lora(module)) - deltas.delta(module)).norm() <= 1e-6 * deltas.delta(
            module
        ).norm()


def test_no_step_of_an_exact_lora_is_larger_than_the_layer(monkeypatch):
    """A LoHa of rank 64 on a wide convolution has 4096 products of ranks; written out, each with its kernel,
    they are gigabytes."""
    draw = torch.Generator().manual_seed(0)
    sizes: list[int] = []
    for name in ("qr", "svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, measured(getattr(torch.linalg, name), sizes))
    w1a, w2a = (torch.randn(20, 9, generator=draw) for _ in range(2))
    w1b, w2b = (torch.randn(9, 10, 3, 3, generator=draw) for _ in range(2))
    loha = LoHa(w1a, w1b, w2a, w2b, magnitude=torch.arange(20.0))
    found = deltas.as_lora(loha)
    assert found.rank == 20
    assert found.magnitude is loha.magnitude
    assert (deltas.delta(found) - deltas.delta(loha)).norm() <= 1e-6 * deltas.delta(loha).norm()
    assert max(sizes) <= 20 * 10 * 9


def measured(function: Callable[..., object], sizes: list[int]) -> Callable[..., object]:
    def wrapped(tensor: torch.Tensor, *args: object, **others: object) -> object:
        sizes.append(tensor.numel())
        return function(tensor, *args, **others)

    return wrapped


def test_a_module_that_does_nothing_becomes_a_lora_that_does_nothing():
    lokr = LoKr(w1=torch.zeros(4, 5), w2=torch.ones(10, 10))
    assert not deltas.delta(deltas.as_lora(lokr)).any()


def test_sides_are_divided_as_peft_divides_them():
    for width in (1, 7, 12, 320, 640, 768, 1024, 1280, 2816, 5120):
        for factor in (-1, 1, 4, 5, 8, 16, 100):
            assert writing.divided(width, factor) == factorization(width, factor)[0]


def test_a_shrunk_adapter_says_what_it_keeps(adapted, base, tmp_path):
    adapter = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("loha")), base)
    small, kept = to_lora(adapter, rank=2)
    assert {module.rank for modules in small.components.values() for module in modules.values()} == {2}
    assert all(0.3 < share < 1 for share in kept.values())
    expected = len(tuner_layers({"unet": adapted("loha")["unet"]}))
    assert tables.table(small).splitlines()[1].split() == ["unet", "lora", str(expected), "2"]


def test_settings_that_are_a_pipe_or_too_many_or_overflow_are_refused(base, tmp_path):
    def written(up: float, **fields: Any) -> Path:
        path = tmp_path / "a.safetensors"
        tensors = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 64, 1, 1)}
        tensors["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.full((64, 2, 1, 1), up)
        about = {f"unet.{name}": value for name, value in fields.items()}
        path.write_bytes(
            safetensors_files.stable_bytes(tensors, {"lora_adapter_metadata": json.dumps(about)})
        )
        return path

    assert reading.read_additive(written(1.0, r=2), base)
    with pytest.raises(UserError, match="not finite after multiplication by its scale"):
        reading.read_additive(written(1e35, r=2, lora_alpha=1e6), base)
    with pytest.raises(UserError, match="at most 5,000 names"):
        reading.read_additive(written(1.0, r=2, rank_pattern={f"layer{n}": 2 for n in range(5001)}), base)
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(written(1.0).read_bytes())
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(UserError, match="not a regular file"):
        reading.read_additive(folder, base)
