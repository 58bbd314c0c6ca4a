"""The options of check_photos.py. Imports no torch."""

import dataclasses
from typing import Annotated, ClassVar

from dreambooth.options.captions import CaptionFileOptions, CaptionOptions, kohya_folder
from dreambooth.options.masks import MaskOptions
from dreambooth.options.paths import FilePath, PathOrId
from dreambooth.options.photos import MOST_PIXELS, InstanceOptions
from dreambooth.options.rules import Group, Name, Range, Side, is_default, require

# Flags that have no effect without photos.
_OF_PHOTOS = ("class_data_dir", "mask_dir", "alpha_mask", "caption_column", "resolution", "buckets")


@dataclasses.dataclass
class PhotoCheckOptions(Group):
    """All flags of check_photos.py."""

    COMMON_FLAGS: ClassVar = (
        *("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir", "mask_dir", "resolution"),
        *("caption_column", "caption_extension", "pretrained_model_name_or_path", "output_dir"),
        "find_rare_word",
    )

    instance_data_dir: FilePath | None = None
    """Folder with the photos of the subject. Needed without --find_rare_word."""
    instance_prompt: Name | None = None
    """Prompt of the photos, as for training. Its words that --class_prompt lacks name the subject: every
    caption should hold one of them, and with --find_rare_word they are judged."""
    class_prompt: Name | None = None
    """Prompt of the class: the instance prompt without the rare word, "a photo of dog"."""
    class_data_dir: FilePath | None = None
    """Folder of class images. None of them should be a photo of the subject."""
    mask_dir: FilePath | None = None
    """Folder with a mask for each photo, as for training. With masks it is known whether the crop cuts the
    subject off, and whether it is small."""
    alpha_mask: bool = False
    """Take the mask of each photo from its transparency."""
    caption_column: Name | None = None
    """Column with the captions in metadata.jsonl (or .csv) beside the photos, as for training."""
    image_column: Name = "image"
    """Column with the names of the photos; `image` is the column `file_name` of metadata.jsonl."""
    captions: CaptionFileOptions = dataclasses.field(default_factory=CaptionFileOptions)
    resolution: Side | None = None
    """Side of the square training crop, in pixels. Default: that of the base; 512 without a base."""
    buckets: bool = False
    """Photos are trained on in shapes near their own, as with --buckets of training: no crop is a square."""
    pretrained_model_name_or_path: PathOrId | None = None
    """Folder, single file or hub id of the base: its tokenizer tells which captions are too long."""
    max_image_pixels: Annotated[int, Range(4096, MOST_PIXELS)] = 64_000_000
    """Largest accepted picture, in pixels."""
    follow_symlinks: bool = False
    """Accept links to pictures outside the folder."""
    find_rare_word: bool = False
    """Print a table of words that could stand for the subject: those that mean least to the base. The word in
    --trigger_word, or else --instance_prompt, is judged with them. Needs --pretrained_model_name_or_path and
    --class_prompt, and takes some 80 passes of the UNet."""
    output_dir: FilePath = "photo_check"
    """Folder for the page, photos.html. Nothing is written into a folder of photos."""

    def _check(self) -> None:
        require(
            self.instance_data_dir is not None or self.find_rare_word,
            "--instance_data_dir is required: the folder with the photos of the subject",
        )
        for name in ("pretrained_model_name_or_path", "class_prompt"):
            require(
                not self.find_rare_word or getattr(self, name) is not None,
                f"--find_rare_word needs --{name}",
            )
        if self.instance_data_dir is None:
            of_photos: list[tuple[Group, str]] = [(self, name) for name in _OF_PHOTOS]
            of_photos += [(self.captions, name) for name in ("caption_extension", "in_json")]
            for group, name in of_photos:
                require(is_default(group, name), f"--{name} is about photos: give --instance_data_dir")
            return
        self.instance()  # its rules, and those of the masks

    def masks(self) -> MaskOptions:
        """The flags of masks."""
        return MaskOptions(mask_dir=self.mask_dir, alpha_mask=self.alpha_mask)

    def instance(self) -> InstanceOptions:
        """The flags that training takes too, as training takes them."""
        named = kohya_folder(self.instance_data_dir)
        return InstanceOptions(
            instance_prompt=self.instance_prompt or (named[1] if named else "a photo"),
            instance_data_dir=self.instance_data_dir,
            caption_column=self.caption_column,
            image_column=self.image_column,
            captions=CaptionOptions(**vars(self.captions)),
            buckets=self.buckets,
            masks=self.masks(),
            resolution=self.resolution,
            max_image_pixels=self.max_image_pixels,
            allow_odd_photos=True,
            follow_symlinks=self.follow_symlinks,
        )
