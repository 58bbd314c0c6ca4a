"""Runs another program's training script as python does, and measures its steps on a GPU.

    python -m benchmarks.gpu_probe REPORT FIRST LAST SCRIPT [FLAGS ...]

The device is synchronised after step 1, step FIRST and step LAST, and not in between. Then the process
ends: what the script does after its last step is not measured. REPORT is a JSON file with `first_step_at`
(of the machine's monotonic clock, so that the parent process can subtract the moment of the start),
`step_s` (the mean from FIRST to LAST), `peak_gib` and `reserved_gib`.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.speed_probe import declare_operators

GIB = 2**30


def main() -> None:
    report, first, last, script, *flags = sys.argv[1:]
    times: dict[int, float] = {}
    steps = 0

    def stepped(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps not in (1, int(first), int(last)):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times[steps] = time.monotonic()
        if steps == int(last):
            _write(Path(report), times, int(first), int(last))
            os._exit(0)

    register_optimizer_step_post_hook(stepped)
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).resolve().parent)
    library = declare_operators() if "torchvision" in Path(script).read_text(encoding="utf-8") else None
    runpy.run_path(script, run_name="__main__")
    del library
    sys.exit(f"{script} took {steps} steps; {last} were expected")


def _write(report: Path, times: dict[int, float], first: int, last: int) -> None:
    figures = {"first_step_at": times[1], "step_s": (times[last] - times[first]) / (last - first)}
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    report.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
