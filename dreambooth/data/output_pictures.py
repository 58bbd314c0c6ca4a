"""The folder that infer.py or evaluate.py draws into."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.data import class_images, picture_files
from dreambooth.files import locks, pictures
from dreambooth.files.ownership import WrittenFiles, check_apart
from dreambooth.io import writer
from dreambooth.io.errors import UserError, few, shown
from dreambooth.options.training import BaseOptions
from dreambooth.runtime.processes import Peers

_FLAG = "--output_dir"


def checked_folder(
    output_dir: str, base: BaseOptions, inputs: Mapping[str, str | None] | None = None
) -> Path:
    """The folder of --output_dir. `inputs` are folders that are read, by flag.

    Raises UserError if the folder is, holds or lies in the base or an input, lies among class images, or is a
    folder of photos: it has pictures, and this program has not written there yet.
    """
    check_apart({_FLAG: output_dir}, inputs or {}, base.sources())
    folder = Path(output_dir)
    class_images.check_outside(folder, _FLAG)
    is_users = os.path.isdir(folder) and not WrittenFiles(folder).has_record
    if is_users and (photos := picture_files.list_folder(folder, _FLAG).pictures):
        raise UserError(
            f"{_FLAG}: {shown(folder)} holds pictures that this program did not draw,"
            f" {few(photos)}; name another folder"
        )
    return folder


@contextlib.contextmanager
def held(folder: Path, names: Sequence[str], peers: Peers) -> Iterator[WrittenFiles]:
    """The files of this program in the folder, which is made, and locked until the block ends.

    Raises UserError if the folder cannot be written to or locked, or if one of `names`, which will be
    written, is taken by a file that this program did not write.
    """
    writer.make_output_folder(folder, _FLAG)
    with contextlib.ExitStack() as stack:
        peers.say_notes(locks.hold_for(peers, stack, folder, _FLAG))
        files = WrittenFiles(folder, peers.rank)
        peers.on_main(lambda: _check_names(files, names))
        yield files


def _check_names(files: WrittenFiles, names: Sequence[str]) -> None:
    files.check_free(names, _FLAG)
    files.sweep()


def save(files: WrittenFiles, name: str, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write a picture with its settings, and the folders above it. Raises OSError."""
    writer.make_folder((files.folder / name).parent, parents=True)
    files.write(name, pictures.png(image, settings))
