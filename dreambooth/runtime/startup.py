"""How the four scripts start and end. This module imports no torch.

A script parses its command line and calls `begin` under `if __name__ == "__main__":` before it imports torch
and diffusers, which takes seconds: so --help and mistakes are answered at once. Its last line is `run`.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

from dreambooth.errors import UserError
from dreambooth.options.command_line import fail
from dreambooth.runtime import stops

Options = TypeVar("Options")


def begin() -> None:
    """Call this before the slow imports. During them a signal ends the process at once, without a
    traceback."""
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
