"""The flags of captions beside the photos. Imports no torch."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

from dreambooth.options.paths import FilePath
from dreambooth.options.rules import CountOrZero, Group, Name, Probability, Range, is_default, require

# A folder as kohya's scripts name it: "10_sks dog" is 10 repeats of photos with the prompt "sks dog".
_KOHYA_FOLDER = re.compile(r"([1-9][0-9]{0,5})_(.*\S.*)", re.DOTALL)


@dataclasses.dataclass
class CaptionFileOptions(Group):
    """Captions in files of other programs."""

    caption_extension: Literal[".txt", ".caption"] | None = None
    """Read the caption of each photo from the file beside it with this ending. A photo without such a file
    gets --instance_prompt."""
    in_json: FilePath | None = None
    """Read captions from a metadata file of kohya's scripts, as meta_cap.json or meta_lat.json. The tags of a
    photo follow its caption."""
    trigger_word: Name | None = None
    """Put this before every caption that lacks it, with a comma: "sks dog, a dog on grass"."""


@dataclasses.dataclass
class CaptionOptions(CaptionFileOptions):
    """Captions in files of other programs, and captions of tags."""

    shuffle_caption: bool = False
    """Shuffle the tags of an instance prompt, the parts between commas, at each visit."""
    keep_tokens: CountOrZero = 0
    """Number of tags at the beginning that keep their place and are not dropped. A tag with --trigger_word
    is put behind them, and is not dropped either."""
    caption_tag_dropout_rate: Probability = 0.0
    """Probability of dropping a tag, at each visit."""
    caption_variants: Annotated[int, Range(1, 10_000)] = 16
    """Number of different orders and selections of a prompt's tags. Each visit draws one of them. All are
    encoded before the first step."""

    @property
    def varies(self) -> bool:
        """Whether the prompt of a photo changes from visit to visit."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0

    def _check(self) -> None:
        for name in ("keep_tokens", "caption_variants"):
            require(
                self.varies or is_default(self, name),
                f"--{name} is for shuffled or dropped tags: give --shuffle_caption or "
                "--caption_tag_dropout_rate, or leave it out",
            )


def kohya_folder(folder: str | None) -> tuple[int, str] | None:
    """(repeats, prompt) in the name of a folder like "10_sks dog"; None if it has another form."""
    match = _KOHYA_FOLDER.fullmatch(Path(folder).name) if folder else None
    return (int(match[1]), match[2].strip()) if match else None
