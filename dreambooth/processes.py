"""What several processes of one run must agree on."""

import os
from pathlib import Path

from accelerate import Accelerator

from dreambooth.errors import UserError


def check_world(accelerator: Accelerator) -> None:
    """Raise UserError if the launcher started more processes than accelerate joined: each would do the whole work, into the same folder."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"the launcher started {started} processes and accelerate joined {accelerator.num_processes}; "
            "without a GPU set ACCELERATE_USE_CPU=true for torchrun"
        )


def make_folder(path: Path, flag: str) -> None:
    """Make an output folder at the start, so that one that cannot be made costs no work. Raises UserError if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be made: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag}: {path} cannot be written to")
