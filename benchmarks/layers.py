"""The layers of dreambooth/bases/onednn.py and torch's own, in turn: how many times as fast they are on this processor.

    python -m benchmarks.layers

Shapes are those of Stable Diffusion 1.5 at 512 pixels, and of the benchmarks' UNet of 35 M parameters at 256; batch 1, forward and the backward
pass to the input. Medians. Writes `benchmarks/results/layers.json`, which keeps what other processors gave, and the table in docs/speed.md.
A minute or two.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from dreambooth.bases import onednn
from dreambooth.runtime import memory

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "layers.json"
DOCS = ROOT / "docs" / "speed.md"
MARKS = ("<!-- layers: written by python -m benchmarks.layers -->", "<!-- layers end -->")
ROUNDS, SECONDS = 7, 0.2  # in turn, and how long each is timed in one
SIDE = 2048  # of the matrices whose product is timed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Layer = Callable[..., Tensor]
# name: (what torch has, shape of each input, how many inputs)
CASES: dict[str, tuple[Callable[[], Layer], tuple[int, ...], int]] = {
    "Linear, 320 to 320, 4,096 tokens": (lambda: nn.Linear(320, 320), (1, 4096, 320), 1),
    "Linear, 640 to 5,120, 1,024 tokens": (lambda: nn.Linear(640, 5120), (1, 1024, 640), 1),
    "Linear, 1,280 to 10,240, 256 tokens": (lambda: nn.Linear(1280, 10240), (1, 256, 1280), 1),
    "convolution 1 x 1, 640 channels, 32 x 32 pixels": (lambda: nn.Conv2d(640, 640, 1), (1, 640, 32, 32), 1),
    "convolution 3 x 3, 1,280 channels, 8 x 8 pixels": (
        lambda: nn.Conv2d(1280, 1280, 3, 1, 1),
        (1, 1280, 8, 8),
        1,
    ),
    "convolution 3 x 3, 1,280 channels, 16 x 16 pixels": (
        lambda: nn.Conv2d(1280, 1280, 3, 1, 1),
        (1, 1280, 16, 16),
        1,
    ),
    "convolution 3 x 3, 256 channels, 8 x 8 pixels": (
        lambda: nn.Conv2d(256, 256, 3, 1, 1),
        (1, 256, 8, 8),
        1,
    ),
    "attention, 4,096 tokens, 8 heads of 40": (lambda: F.scaled_dot_product_attention, (1, 8, 4096, 40), 3),
    "attention, 1,024 tokens, 8 heads of 80": (lambda: F.scaled_dot_product_attention, (1, 8, 1024, 80), 3),
    "attention, 1,024 tokens, 8 heads of 8": (lambda: F.scaled_dot_product_attention, (1, 8, 1024, 8), 3),
}


def both(layer: Layer, dtype: torch.dtype) -> dict[str, Layer]:
    """torch's layer, and the same as it is computed here."""
    if not isinstance(layer, nn.Module):
        return {"torch": layer, "here": onednn.attention_in_blocks}
    layer.to(dtype=dtype).to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    here = nn.Sequential(copy.deepcopy(layer))
    onednn.use_onednn(here)
    return {"torch": layer, "here": here}


def once(layer: Layer, inputs: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of forward and of backward."""
    started = time.perf_counter()
    found = layer(*inputs)
    between = time.perf_counter()
    torch.autograd.grad(found, inputs, torch.ones_like(found))
    return 1000 * (between - started), 1000 * (time.perf_counter() - between)


def measure(
    make: Callable[[], Layer], shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Milliseconds of forward and backward, torch's and those here, and how many times as long torch takes for both."""
    torch.manual_seed(0)
    layers = both(make(), dtype)
    inputs = [torch.randn(shape).to(dtype) for _ in range(count)]
    if isinstance(layers["torch"], nn.Conv2d):
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    for x in inputs:
        x.requires_grad_()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for layer in layers.values():
        once(layer, inputs)
    for _ in range(ROUNDS):
        for name, layer in layers.items():
            until = time.perf_counter() + SECONDS
            while time.perf_counter() < until:
                times[name].append(once(layer, inputs))
    found = {
        name: [statistics.median(part) for part in zip(*of_layer, strict=True)]
        for name, of_layer in times.items()
    }
    ratio = sum(found["torch"]) / sum(found["here"])
    return {
        **{name: [float(f"{ms:.3g}") for ms in pair] for name, pair in found.items()},
        "times": round(ratio, 2),
    }


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two large matrices by oneDNN, the most that any layer here can come to."""
    x, weight = torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, SIDE).to(dtype)
    times = []
    with torch.no_grad():
        for _ in range(10 * ROUNDS):
            started = time.perf_counter()
            onednn.product(x, weight)
            times.append(time.perf_counter() - started)
    return round(2 * SIDE**3 / statistics.median(times) / 1e9)


def table(results: dict[str, Any]) -> str:
    """The table of docs/speed.md: a column for each processor and precision."""
    columns = [(name, dtype) for name in results for dtype in DTYPES]
    lines = [
        f"| times as fast as torch's own | {' | '.join(f'{name}, {dtype}' for name, dtype in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for case in CASES:
        cells = [results[name]["cases"].get(case, {}).get(dtype) for name, dtype in columns]
        lines.append(
            f"| {case} | {' | '.join('' if cell is None else format(cell['times'], '.2f') for cell in cells)} |"
        )
    said = []
    for name, found in results.items():
        rates = " and ".join(f"{rate} in {dtype}" for dtype, rate in found["gflop_per_s"].items())
        said.append(
            f"{name}: torch {found['torch']}, {found['threads']} threads; a product of {SIDE:,} x {SIDE:,} matrices {rates} GFLOP/s"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Forward and backward together, medians of {ROUNDS} rounds in turn, `python -m benchmarks.layers`. {'; '.join(said)}.",
        ]
    )


def main() -> None:
    threads = machine.cores()
    torch.set_num_threads(threads)
    memory.keep_freed(torch.device("cpu"))
    cases: dict[str, Any] = {}
    for name, (make, shape, count) in CASES.items():
        cases[name] = {kind: measure(make, shape, count, dtype) for kind, dtype in DTYPES.items()}
        print(name, {kind: found["times"] for kind, found in cases[name].items()}, flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rates = {kind: product_rate(dtype) for kind, dtype in DTYPES.items()}
    results[machine.processor()] = {
        "torch": torch.__version__,
        "threads": threads,
        "gflop_per_s": rates,
        "cases": cases,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    DOCS.write_text(
        f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
