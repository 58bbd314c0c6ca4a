"""Run a script as python does, and write down when its optimizer stepped and when it saved pictures, with its memory.

    python benchmarks/speed_probe.py REPORT SCRIPT [FLAGS ...]

Process k of a launcher writes REPORT.k, one process alone REPORT.0: `steps` and `pictures`, a list of [seconds, MiB] each, and `end`, one such
pair. Seconds are those of the machine's monotonic clock, so that who started this process can take off the moment when it did. MiB is the
highest resident memory so far, in which the pages of mapped files count. It is VmHWM, not ru_maxrss: that one has the parent's in it.
"""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

Moment = tuple[float, float]  # seconds, MiB

# What torchvision's Python part asks torch for when it is imported.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def moment() -> Moment:
    """Now, and the peak until now."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return time.monotonic(), int(found[1]) / 1024


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, list[Moment]]]:
    """Within the block every step of any optimizer is added to `steps`, and every picture that Pillow has saved to `pictures`."""
    moments: dict[str, list[Moment]] = {"steps": [], "pictures": []}
    save = Image.Image.save

    def saved(image: Image.Image, *arguments: Any, **others: Any) -> None:
        save(image, *arguments, **others)
        moments["pictures"].append(moment())

    hook = register_optimizer_step_post_hook(lambda *_: moments["steps"].append(moment()))
    Image.Image.save = saved  # type: ignore[assignment, method-assign]
    try:
        yield moments
    finally:
        Image.Image.save = save  # type: ignore[method-assign]
        hook.remove()


def declare_operators() -> torch.library.Library | None:
    """Declares torchvision's operators, without which it cannot be imported, where the library that has them does not load: its usual build
    does not beside a torch for CPUs. Its transforms of pictures need none of them. What is returned must be kept."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return None
    try:
        for path in Path(package.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        return library
    return None


def main() -> None:
    report, script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).resolve().parent)
    with recorded() as moments:
        kept = declare_operators() if "torchvision" in Path(script).read_text(encoding="utf-8") else None
        runpy.run_path(script, run_name="__main__")
        del kept
    # not reached where the script fails: there is nothing to report then
    content = {**moments, "end": moment()}
    Path(f"{report}.{os.environ.get('RANK', '0')}").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
