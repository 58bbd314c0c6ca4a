"""What changes last bits is asked of one module: the names of encodings and the records of checkpoints hold
its answers."""

import os
from typing import Any

import pytest
import torch
import torch.utils.deterministic

from dreambooth.runtime.environment import deterministic, environment, processor


def test_a_gpu_is_told_nothing_of_the_cpu(monkeypatch):
    """Else another thread count, or another version of a CPU's kernels, would throw away what a GPU has
    encoded."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    assert processor(torch.device("cuda")) == {"name": "a card", "tf32": tf32}


def test_a_cpu_is_told_by_its_threads_and_instructions(monkeypatch):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx2": True, "bf16": False}
    )
    instructions = [torch.backends.cpu.get_cpu_capability(), "amx_bf16"]
    assert processor(torch.device("cpu")) == {
        "threads": torch.get_num_threads(),
        "instructions": instructions,
    }


def test_settings_and_versions_stand_beside_the_kind_of_device():
    record = environment(torch.device("cpu"), ["torch"], threads=3)
    assert set(record) == {"threads", "device", "torch"}
    assert (record["threads"], record["device"]) == (3, "cpu")


@pytest.mark.parametrize("given", [None, ":0:0", ":16:8"])
def test_kernels_on_cuda_are_deterministic_within_the_block_only(given, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    settings: Any = torch.utils.deterministic
    with deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not settings.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (":16:8" if given == ":16:8" else ":4096:8")
    assert not torch.are_deterministic_algorithms_enabled()
    assert settings.fill_uninitialized_memory
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
