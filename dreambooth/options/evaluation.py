"""The flags of measuring an adapter while it is trained. Imports no torch."""

import dataclasses
from typing import Annotated, Literal

from dreambooth.options.paths import FilePath, PathOrId
from dreambooth.options.rules import CountOrZero, Group, Range, require


@dataclasses.dataclass
class MeterOptions(Group):
    """Measurements of the adapter, without a second model: what is learned, and what is lost."""

    meter_steps: CountOrZero = 0
    """Steps between measurements, which need --class_prompt and change nothing of the training; 0 measures
    nothing. The first is at step 0, another follows the last step. With held-out photos each names the best
    step so far, whose adapter is in `best/`."""
    holdout: CountOrZero = 0
    """Number of instance photos that are held out, the last by file name: --meter_steps measures on them, and
    they are not trained on."""
    holdout_data_dir: FilePath | None = None
    """Folder with other photos of the subject, which are not trained on, in place of --holdout. Their
    captions are read as those of the instance photos."""
    stop_when_worse: bool = False
    """End the run, as a finished one, once three measurements in a row show that the adapter damages pictures
    in general: the loss on held-out photos at low noise is over 2.7 times the base's."""

    def _check(self) -> None:
        require(
            not (self.holdout and self.holdout_data_dir),
            "--holdout keeps instance photos back and --holdout_data_dir names others: give one of them",
        )
        require(
            not self.stop_when_worse or self.meter_steps > 0,
            "--stop_when_worse needs measurements: give --meter_steps",
        )
        require(
            not self.stop_when_worse or bool(self.holdout or self.holdout_data_dir),
            "--stop_when_worse needs photos that are not trained on: give --holdout or --holdout_data_dir",
        )


@dataclasses.dataclass
class Judges(Group):
    """Judges: models that compare pictures with photos and prompts."""

    judge_dino: PathOrId | None = None
    """Folder or hub id of a DINO model (ViT), such as facebook/dino-vits16: likeness to the photos. With
    NAME@sha256:HEX its weight file must have that hash."""
    judge_clip: PathOrId | None = None
    """Folder or hub id of a CLIP model, such as openai/clip-vit-base-patch32: likeness to the photos, and to
    the prompts. A hash can follow, as in --judge_dino."""
    judge_reader: FilePath | None = None
    """Folder of a subject of the embedded base's drawn world, with its subject.json: the reader of that world
    reads the pictures."""
    judge_dino_transform: Literal["crop", "squash"] = "crop"
    """How a picture is made to fit DINO: the shorter side resized to 256/224 of the model's side and the
    centre cropped, or both sides resized to the model's side. Published tables differ in it."""

    @property
    def is_given(self) -> bool:
        """Whether there is a judge."""
        return any((self.judge_dino, self.judge_clip, self.judge_reader))


@dataclasses.dataclass
class JudgeOptions(Judges):
    """Judges of the validation pictures: models that compare pictures with photos and prompts."""

    judge_keep_rare_word: bool = False
    """Compare pictures with the prompt as it is. Without this flag the words that name the subject are
    removed first: they mean nothing to CLIP. Published tables differ in it."""
    judge_class_images: Annotated[int, Range(1, 1000)] = 8
    """Number of pictures of --class_prompt that are judged beside the validation pictures: what they show of
    the subject was lost of the class."""
