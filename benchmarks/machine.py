"""The machine that figures are measured on."""

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """Name, family and model of the processor. Generations of one name differ twofold in speed."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    matches = [
        re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE) for key in ("model name", "cpu family", "model")
    ]
    if not all(matches):
        return platform.processor() or platform.machine()
    name, family, model = (match[1] for match in matches if match)
    return f"{name} (family {family}, model {model})"


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
