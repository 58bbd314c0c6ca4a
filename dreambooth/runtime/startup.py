"""What a script does before and during its slow imports. This module imports no torch."""

import contextlib
import gc
import threading
from pathlib import Path

from dreambooth.bases import folders
from dreambooth.errors import UserError
from dreambooth.files import digests
from dreambooth.options.training import BaseOptions


def imports_begin() -> None:
    """Call this before the slow imports."""
    gc.disable()  # imports make a million objects and no garbage: collecting takes a quarter of their time


def imports_end() -> None:
    """Call this after the slow imports."""
    gc.enable()
    gc.freeze()  # imported objects live as long as the process: the collector need not visit them


def hash_ahead(base: BaseOptions) -> None:
    """Begin to hash the weights of a base on disk, in a thread that does not keep the process from ending. Whoever asks for a hash finds it in
    `file_digests`; what is wrong with a file is said by those who check the base."""
    folder = Path(base.pretrained_model_name_or_path)
    own_vae = Path(base.pretrained_vae_model_name_or_path) if base.pretrained_vae_model_name_or_path else None
    parts = [(folder, part, base.variant) for part in ("unet", "text_encoder_2", "text_encoder")]
    parts.append((own_vae.parent, own_vae.name, None) if own_vae else (folder, "vae", base.variant))

    def work() -> None:
        for where, part, variant in parts:
            with contextlib.suppress(UserError, OSError, ValueError):
                for path in folders.weight_files(
                    where, part, variant, kind=None if part.startswith("text_encoder") else "unet"
                ):
                    digests.of(path)

    threading.Thread(target=work, name="hash_ahead", daemon=True).start()
