"""Runs a script as python does, and records time and memory at each of its optimizer steps and saved
pictures.

    python benchmarks/speed_probe.py REPORT SCRIPT [FLAGS ...]

Process k of a launcher writes REPORT.k, a single process REPORT.0. The report has `steps` and `pictures`, a
list of [seconds, MiB] each, and `end`, one such pair. Seconds are of the machine's monotonic clock, so that
the parent process can subtract the moment of the start. MiB is the peak of resident memory so far, with the
pages of mapped files. It is VmHWM and not ru_maxrss, which includes the parent's peak.
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

# The operators that torchvision's Python part needs when it is imported.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def moment() -> Moment:
    """The time, and the peak of memory so far."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    return time.monotonic(), int(peak[1]) / 1024


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, list[Moment]]]:
    """Within the block, every optimizer step is added to `steps`, and every picture that Pillow saves to
    `pictures`, but for thumbnails of a run's page (JPEG in memory)."""
    moments: dict[str, list[Moment]] = {"steps": [], "pictures": []}
    save = Image.Image.save

    def saved(image: Image.Image, *arguments: Any, **keywords: Any) -> None:
        save(image, *arguments, **keywords)
        if keywords.get("format") != "JPEG":
            moments["pictures"].append(moment())

    hook = register_optimizer_step_post_hook(lambda *_: moments["steps"].append(moment()))
    Image.Image.save = saved  # type: ignore[assignment, method-assign]
    try:
        yield moments
    finally:
        Image.Image.save = save  # type: ignore[method-assign]
        hook.remove()


def declare_operators() -> torch.library.Library | None:
    """Declare torchvision's operators if the library that has them does not load.

    torchvision cannot be imported without them, and its usual build does not load beside a torch for CPUs.
    Its transforms of pictures use none of them. The caller must keep the result alive."""
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
        library = declare_operators() if "torchvision" in Path(script).read_text(encoding="utf-8") else None
        runpy.run_path(script, run_name="__main__")
        del library
    # not reached if the script fails: then there is nothing to report
    content = {**moments, "end": moment()}
    Path(f"{report}.{os.environ.get('RANK', '0')}").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
