"""Folders that infer.py and evaluate.py draw into."""

import os
from pathlib import Path

from dreambooth.data import class_images, picture_files
from dreambooth.files.ownership import WrittenFiles, check_apart
from dreambooth.io.errors import UserError, few, shown
from dreambooth.options.training import BaseOptions


def checked_folder(output_dir: str, base: BaseOptions) -> Path:
    """The folder of --output_dir. Raises UserError if it lies in the base or among class images, or is a
    folder of photos: it has pictures, and this program has not written there yet."""
    check_apart({"--output_dir": output_dir}, {}, base.sources())
    folder = Path(output_dir)
    class_images.check_outside(folder, "--output_dir")
    is_users = os.path.isdir(folder) and not WrittenFiles(folder).has_record
    if is_users and (photos := picture_files.list_folder(folder, "--output_dir").pictures):
        raise UserError(
            f"--output_dir: {shown(folder)} holds pictures that this program did not draw,"
            f" {few(photos)}; name another folder"
        )
    return folder
