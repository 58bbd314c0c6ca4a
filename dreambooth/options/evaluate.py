"""The options of evaluate.py. Imports no torch."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from dreambooth.io.errors import shortened
from dreambooth.options.evaluation import Judges
from dreambooth.options.paths import FilePath
from dreambooth.options.pictures import DrawingOptions
from dreambooth.options.rules import CountOrZero, Group, Name, Range, Seed, Threads, require
from dreambooth.options.speed import GraphOptions
from dreambooth.options.training import BaseOptions

NO_JUDGE = "give a judge: --judge_dino, --judge_clip, --judge_reader, or several of them"
_OF_ONE_SUBJECT = ("adapter", "photos", "class_noun", "rare_word")


@dataclasses.dataclass
class SubjectOptions(Group):
    """Subjects: one, with one adapter or several, or a table of them."""

    adapter: tuple[FilePath, ...] = ()
    """Adapter files, or output folders of training runs, of one subject, each with an optional weight:
    my_dog:0.8. Each is evaluated on its own."""
    photos: FilePath | None = None
    """Folder with the photos of the subject."""
    trained_photos: FilePath | None = None
    """Folder with the photos that the adapters were trained on, where --photos has others: copying is
    measured against these. Default: --photos."""
    class_noun: Name | None = None
    """Class noun of the subject: dog, stuffed animal."""
    rare_word: Name | None = None
    """The word that stands for the subject in the training captions: sks."""
    live: Literal["yes", "no"] | None = None
    """Whether the subject has the prompts of live subjects (outfits) or those of objects. Default: yes for
    the class nouns dog and cat."""
    subjects_file: FilePath | None = None
    """YAML or CSV file with a row for each subject and adapter, in place of the flags above. A row has
    subject, adapter, photos, class_noun, rare_word and, optionally, trained_photos, live, method and reader.
    Means are over the subjects of a method."""
    subjects: tuple[str, ...] = ()
    """Names of the subjects of --subjects_file that are evaluated. Default: all."""

    def _check(self) -> None:
        given = [f"--{name}" for name in (*_OF_ONE_SUBJECT, "trained_photos", "live") if getattr(self, name)]
        if self.subjects_file:
            require(
                not given,
                f"--subjects_file has a column for each of {', '.join(given)}: give the flags or the file",
            )
            return
        missing = [f"--{name}" for name in _OF_ONE_SUBJECT if not getattr(self, name)]
        require(not missing, f"{', '.join(missing)}: missing; give them, or --subjects_file")
        require(not self.subjects, "--subjects selects rows of --subjects_file, which is missing")


@dataclasses.dataclass
class EvaluateOptions(Group):
    """All flags of evaluate.py."""

    COMMON_FLAGS: ClassVar = (
        *("pretrained_model_name_or_path", "adapter", "photos", "class_noun", "rare_word", "subjects_file"),
        *("subjects", "prompts_file", "num_images", "num_class_images", "seed", "output_dir"),
        *("judge_dino", "judge_clip", "judge_reader", "tables_only"),
        *("num_inference_steps", "guidance_scale", "resolution", "batch_size", "mixed_precision"),
    )

    base: BaseOptions
    subject: SubjectOptions
    judges: Judges = dataclasses.field(default_factory=Judges)
    prompts_file: FilePath | None = None
    """Text file with a prompt on each line, in which {0} is the rare word and {1} the class noun: "a {0} {1}
    in the snow". Empty lines and lines that start with # are skipped. Default: the 25 prompts of the
    DreamBooth paper for objects, or for live subjects."""
    num_images: Annotated[int, Range(1, 10_000)] = 4
    """Pictures of each prompt."""
    num_class_images: CountOrZero = 100
    """Pictures of the class prompt, drawn with each adapter and with the base, for PRES."""
    class_prompt: Name = "a {1}"
    """The class prompt: {1} is the class noun."""
    seed: Seed = 0
    """The noise of a picture depends on this seed, its prompt before words are put in, and its number: base
    and adapters draw from the same noise."""
    failed_pictures: Literal["zero", "skip"] = "zero"
    """What a picture that is black or cannot be read counts as in DINO, CLIP-I and CLIP-T: 0, or nothing.
    Their number is always printed."""
    tables_only: bool = False
    """Score the pictures that are in the output folder. Nothing is drawn; base and adapters are not read."""
    output_dir: FilePath = "evaluation"
    """Folder for the pictures, a line of scores for each (pictures.jsonl), results.json and tables.md. An
    evaluation that ended before its time goes on there."""
    num_threads: Threads | None = None
    """CPU threads. Default: torch's choice."""
    drawing: DrawingOptions = dataclasses.field(default_factory=DrawingOptions)
    speed: GraphOptions = dataclasses.field(default_factory=GraphOptions)

    def _check(self) -> None:
        require(
            "{1}" in self.class_prompt and "{0}" not in self.class_prompt,
            "--class_prompt must have {1}, where the class noun goes, and not {0}, the rare word; got"
            f" {shortened(self.class_prompt)!r}",
        )
        # the rows of a table may have readers
        require(self.judges.is_given or self.subject.subjects_file is not None, NO_JUDGE)
