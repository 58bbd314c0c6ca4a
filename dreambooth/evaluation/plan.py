"""Which pictures an evaluation needs: prompts x pictures of each subject, with each adapter and with the base
alone, and pictures of the class. Imports no torch."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence

from dreambooth.evaluation import protocol
from dreambooth.evaluation.subjects import BASE, Case
from dreambooth.options.adapter_sets import AdapterSet


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to draw and to score."""

    file: str
    """Relative to the output folder."""
    prompt: str
    text: str
    """The prompt without the rare word."""
    seed: int
    is_class: bool
    """Whether the prompt names the class only."""


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures that are drawn with one adapter, or with the base alone."""

    folder: str
    adapters: AdapterSet | None
    pictures: tuple[Picture, ...]
    """The pictures of a prompt follow each other."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The pictures of a subject by one method, which may be `BASE`."""

    method: str
    case: Case
    """For `BASE` the subject's first case."""
    pictures: PictureSet


def rows_of(
    cases: Sequence[Case],
    prompts: Sequence[str] | None,
    num_images: int,
    class_prompt: str,
    num_class_images: int,
    seed_of: Callable[[str, int], int],
) -> list[Row]:
    """The rows of each subject, its base first, in the order of `cases`.

    `prompts` are templates for all subjects; None stands for those of the paper. `class_prompt` is a
    template, too. `seed_of` returns the seed of a template's picture number k: it is the same for the base,
    for every adapter and for every subject. Subjects with the same prompts share the base's pictures.
    """

    def pictures(folder: str, case: Case) -> tuple[Picture, ...]:
        paper = protocol.LIVE_PROMPTS if case.is_live else protocol.OBJECT_PROMPTS
        jobs = [
            (f"{number:02d}-{k:02d}.png", template, k, False)
            for number, template in enumerate(prompts if prompts is not None else paper)
            for k in range(num_images)
        ]
        jobs += [(f"class-{k:03d}.png", class_prompt, k, True) for k in range(num_class_images)]
        return tuple(
            Picture(
                f"{folder}/{name}",
                protocol.filled(template, case.rare_word, case.class_noun),
                protocol.without_rare_word(template, case.class_noun),
                seed_of(template, k),
                is_class,
            )
            for name, template, k, is_class in jobs
        )

    rows: list[Row] = []
    subjects: set[str] = set()
    for case in cases:
        if case.subject not in subjects:
            subjects.add(case.subject)
            folder = _base_folder(case.rare_word, case.class_noun, case.is_live and prompts is None)
            rows.append(Row(BASE, case, PictureSet(folder, None, pictures(folder, case))))
        folder = f"pictures/{case.method}/{case.subject}"
        rows.append(Row(case.method, case, PictureSet(folder, case.adapter_set, pictures(folder, case))))
    return rows


def _base_folder(rare_word: str, class_noun: str, is_live: bool) -> str:
    """The folder of the base's pictures for these words, whatever the other subjects are."""
    words = f"{rare_word} {class_noun}" + " live" * is_live
    # other words may have the same letters
    digest = hashlib.sha256(repr((rare_word, class_noun, is_live)).encode()).hexdigest()[:6]
    return f"pictures/{BASE}/{re.sub(r'[^A-Za-z0-9]+', '_', words)[:80]}-{digest}"


def sets_of(rows: Sequence[Row]) -> list[PictureSet]:
    """The sets of pictures of all rows, each once."""
    return list({row.pictures.folder: row.pictures for row in rows}.values())


def chunks_of(pictures: Sequence[Picture], batch_size: int) -> list[tuple[Picture, ...]]:
    """The pictures in the batches in which they are drawn. A batch has pictures of one prompt only: the last
    bits of a picture depend on its batch, so they do not depend on the other prompts."""
    chunks = []
    for prompt in dict.fromkeys(picture.prompt for picture in pictures):
        of_prompt = [picture for picture in pictures if picture.prompt == prompt]
        chunks += [
            tuple(of_prompt[first : first + batch_size]) for first in range(0, len(of_prompt), batch_size)
        ]
    return chunks
