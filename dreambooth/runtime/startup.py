"""The seconds in which a script imports its libraries: made fewer, and used. Imports no torch."""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from dreambooth.bases import folders
from dreambooth.errors import UserError
from dreambooth.files import digests
from dreambooth.options.training import BaseOptions, TrainOptions

# peft and transformers import these wherever they are installed, for a second and some lines of warnings, whether they are used or not.
_OPTIONAL = ("bitsandbytes", "torchao")


def imports_begin(packages: Iterable[str] = ()) -> None:
    """To be called before the libraries are imported. They take optional packages that are not among those named for not installed."""
    for package in set(_OPTIONAL).difference(packages):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    gc.disable()  # a million new objects, none of them garbage: looking for it takes a quarter of the time


def imports_end() -> None:
    """To be called after them."""
    gc.enable()
    gc.freeze()  # what was imported stays: it need not be looked through again


def packages_of(options: TrainOptions) -> list[str]:
    """The optional packages that training with these options needs."""
    wanted = (
        {"adamw8bit": "bitsandbytes"}.get(options.optimization.optimizer),
        {"int8": "torchao", "nf4": "bitsandbytes"}.get(options.speed.quantize_base or ""),
    )
    return [package for package in wanted if package]


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
