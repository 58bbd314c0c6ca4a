"""Files that come with the program: the embedded base, its photos and the recipes.

A checkout has `picturebook/` and `configs/` at its root. An installed copy has `picturebook/` beside
`dreambooth/`, and `configs/` beside the scripts.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from dreambooth.io.errors import UserError, shown

_PACKAGE = Path(__file__).parents[1]
_ROOTS = (_PACKAGE.parent, _PACKAGE / "scripts")
_FLAGS = (
    *("--config", "--pretrained_model_name_or_path", "--instance_data_dir"),
    *("--prompts_file", "--adapters_file", "--subjects_file", "--validation_prompts_file", "--judge_reader"),
)
_RENAMED_RECIPES = {"sd15_6gb.yaml": "sd15_4gb.yaml", "sdxl_12gb.yaml": "sdxl_8gb.yaml"}


def located(words: Iterable[str]) -> list[str]:
    """The words, with paths `picturebook/...` and `configs/...` replaced by those of the shipped files.

    A path is replaced if it is the value of a flag of an input file, and the working folder has no such file.
    """
    result: list[str] = []
    for word in words:
        flag, is_joined, value = word.partition("=")
        if is_joined and flag in _FLAGS:
            word = f"{flag}={_path(value)}"
        elif result and result[-1] in _FLAGS:
            word = _path(word)
        result.append(word)
    return result


def _path(value: str) -> str:
    if value.startswith(("picturebook/", "configs/")) and not os.path.exists(value):
        for root in _ROOTS:
            if (root / value).exists():
                return str(root / value)
    return value


def check_recipe(path: Path) -> None:
    """Raise UserError if `path`, of --config, is the former name of a recipe, and no such file exists."""
    if path.name in _RENAMED_RECIPES and not os.path.lexists(path):
        name = f"configs/{_RENAMED_RECIPES[path.name]}"
        raise UserError(f"--config {shown(path)}: this recipe has a new name; give --config {name}")
