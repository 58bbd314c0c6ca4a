"""How the four scripts start and end. This module imports no torch.

Importing torch and diffusers takes seconds. A script therefore calls `begin` and parses its command line
under `if __name__ == "__main__":` before these imports: --help and messages about wrong flags are printed at
once. The last line of a script calls `run`.
"""

import gc
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
    gc.disable()  # imports make a million objects and no garbage: collecting takes a quarter of their time


def run(main: Callable[[Options], None], options: Options) -> None:
    """Call this after the slow imports. Runs `main`; a UserError becomes its message and exit status 2."""
    gc.enable()
    gc.freeze()  # imported objects live as long as the process: the collector need not visit them
    try:
        main(options)
    except UserError as error:
        fail(error)
