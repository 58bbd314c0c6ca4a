"""How the six scripts start and end. This module imports no torch.

Importing torch and diffusers takes seconds. A script therefore calls `begin` and parses its command line
under `if __name__ == "__main__":` before these imports: --help and messages about wrong flags are printed at
once. The last line of a script calls `run`.
"""

import gc
import os
from collections.abc import Callable
from typing import TypeVar

from dreambooth.io import console
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import fail
from dreambooth.runtime import stops

Options = TypeVar("Options")


def begin() -> None:
    """Call this first: during the slow imports a signal ends the process at once, without a traceback."""
    console.protect()
    stops.default_signals()
    fix_cublas_workspace()
    gc.disable()  # imports make a million objects and no garbage: collecting takes a quarter of their time


def fix_cublas_workspace() -> None:
    """Choose a size of cuBLAS' workspace with which it gives the same bits at every call. It is read once, at
    the first product of matrices: a run that finds its prompts encoded has that later than another run."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def run(main: Callable[[Options], None], options: Options) -> None:
    """Call this after the slow imports. Runs `main`; a UserError becomes its message and exit status 2."""
    gc.enable()
    gc.freeze()  # imported objects live as long as the process: the collector need not visit them
    try:
        main(options)
    except UserError as error:
        fail(error)
