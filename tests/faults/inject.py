"""Run a script of the product with a fault built in.

    python -m tests.faults.inject '{"slow": 0.1, "kill": [2, 1]}' SCRIPT words...

`slow` is seconds added to every micro-step. The other faults take [step, rank], counted from 1 and 0. In that
step the process of that rank is killed (`kill`), raises (`raise`), sleeps for ever (`hang`), exits with 0
(`leave`), gets a loss that is not a number (`nan`), or runs out of memory (`memory`). The product has no
hooks for this: its functions are replaced from outside.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any


def strike(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ZeroDivisionError("a fault")
    if what == "hang":
        time.sleep(3600)
    if what == "leave":
        os._exit(0)
    if what == "memory":
        raise MemoryError


def install(faults: dict[str, Any], training: Any) -> None:
    """Replace the micro-step of a `Training` class by one with the faults."""
    real, rank = training.micro_step, int(os.environ.get("RANK", "0"))

    def micro_step(self: Any, batch: Any) -> Any:
        time.sleep(faults.get("slow", 0))
        for what in ("kill", "raise", "hang", "leave", "memory"):
            if faults.get(what) == [batch.step + 1, rank]:
                strike(what)
        result = real(self, batch)
        if faults.get("nan") == [batch.step + 1, rank]:
            result["loss"] = result["loss"] * float("nan")
        return result

    training.micro_step = micro_step


def main() -> None:
    faults, script = json.loads(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    root = str(Path(script).resolve().parent)
    sys.path.insert(0, root)
    if faults:
        # the script runs as __main__, where its classes are made anew: they are caught when the run starts
        from dreambooth.training import prepare as preparation

        real = preparation.prepare

        def prepare(*args: Any) -> Any:
            install(faults, sys.modules["__main__"].Training)
            return real(*args)

        preparation.prepare = prepare  # type: ignore[assignment]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
