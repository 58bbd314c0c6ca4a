"""The flags of masks. Imports no torch."""

import dataclasses
from typing import Literal

from dreambooth.options.paths import FilePath
from dreambooth.options.rules import Group, Probability, is_default, require


@dataclasses.dataclass
class MaskOptions(Group):
    """Masks: where in the photos the subject is."""

    mask_dir: FilePath | None = None
    """Folder with a mask for each instance photo: a picture with the name and the size of the photo, white
    where the subject is and black elsewhere. Grey counts in part."""
    alpha_mask: bool = False
    """Take the mask of each instance photo from its transparency: the subject is where it is opaque."""
    unmasked_weight: Probability | None = None
    """Weight of the loss outside the subject, which has the weight 1. Default: 0; with --unmasked_target
    base 1."""
    unmasked_target: Literal["photo", "base"] = "photo"
    """What is learned outside the subject: the photo, or what the base alone predicts there, so that the
    base's backgrounds stay as they are. The second takes one more forward pass."""

    @property
    def is_given(self) -> bool:
        """Whether photos have masks."""
        return self.mask_dir is not None or self.alpha_mask

    @property
    def outside_weight(self) -> float:
        """--unmasked_weight with its default."""
        if self.unmasked_weight is not None:
            return self.unmasked_weight
        return 1.0 if self.unmasked_target == "base" else 0.0

    @property
    def has_base_targets(self) -> bool:
        """Whether the base's own prediction is the target outside the subject."""
        return self.unmasked_target == "base"

    def given_for_masks(self) -> list[str]:
        """The flags that were given and have no effect without masks."""
        names = ("unmasked_weight", "unmasked_target")
        return [f"--{name}" for name in names if not is_default(self, name)]

    def _check(self) -> None:
        require(
            not (self.mask_dir and self.alpha_mask),
            "--mask_dir and --alpha_mask both give the masks of photos: give one of them",
        )
        require(
            self.unmasked_target == "photo" or self.unmasked_weight != 0,
            "--unmasked_target base has no effect with --unmasked_weight 0: leave one of them out",
        )
