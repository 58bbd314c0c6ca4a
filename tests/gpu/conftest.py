"""Tests that need a CUDA GPU: `python -m pytest tests/gpu`. Other tests hide the GPU, and skip these."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "no CUDA GPU is visible; these tests run as `python -m pytest tests/gpu`"
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
