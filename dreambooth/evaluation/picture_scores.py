"""Scores of the pictures of an evaluation: one record for each picture, and the means of a subject.

The scores are those of `scores` and, for the drawn world, of `reader_judge`. Names of the latter begin with
"reader".
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dreambooth.evaluation import reader_judge, scores
from dreambooth.evaluation.judges import Judge
from dreambooth.evaluation.plan import Picture
from dreambooth.evaluation.reader_judge import Reader

Values = dict[str, tuple[float, int]]
"""By score, its mean over a subject's pictures and the number of terms of that mean."""

# What each score is made of, and the judge that it needs. The order is that of the columns.
SCORES = {
    "DINO": ("dino", "cosine of a picture with a photo, mean over all pairs"),
    "CLIP-I": ("clip", "cosine of a picture with a photo, mean over all pairs"),
    "CLIP-T": ("clip", "cosine of a picture with its prompt without the rare word"),
    "CLIP-T word": ("clip", "cosine of a picture with its prompt, the rare word kept"),
    "PRES": ("dino", "DINO of pictures of the class prompt; compare with the base's"),
    "DIV": ("dino", "1 - DINO cosine of two pictures of a prompt, mean over pairs, then over prompts"),
    "nearest_trained": ("dino", "DINO cosine of a picture with the nearest photo that was trained on"),
    "nearest_held_out": ("dino", "DINO cosine of a picture with the nearest photo that was not trained on"),
    "copies": ("dino", "share of pictures nearer to a trained photo than those photos are to each other"),
    "reader ID": ("reader", "share of the subject's identity attributes that a picture shows"),
    "reader ID_all": ("reader", "share of pictures that show all of them"),
    "reader PA": ("reader", "share of the attributes named by the prompt that a picture shows"),
    "reader JOINT": ("reader", "share of pictures that show all of both"),
    "reader PRES": ("reader", "reader ID of pictures of the class prompt; compare with the base's"),
    "reader PRIOR_TV": ("reader", "distance of the identities of class pictures from the base's"),
    "reader DIV": ("reader", "distance of two pictures of a prompt, low-passed"),
    "reader COPY": ("reader", "share of pictures nearer to a photo than renders are to each other"),
}
_OF_READER = ("ID", "ID_all", "PA", "JOINT", "COPY")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The embeddings of a set of pictures by one judge each; None for a judge that was not given."""

    failures: list[str | None]
    """For each picture why it failed, as `scores.failure` says, or because a judge found no finite embedding;
    None if it did not."""
    dino: np.ndarray | None
    clip: np.ndarray | None
    texts: np.ndarray | None
    """CLIP's of the prompts without the rare word, a row for each picture."""
    texts_with_word: np.ndarray | None


def embedded(
    pictures: Sequence[Picture],
    images: Iterable[Image.Image | None],
    dino: Judge | None,
    clip: Judge | None,
    check: Callable[[], None] = lambda: None,
) -> Embedded:
    """The embeddings of pictures whose `images` are read one by one. `check` is called before each."""
    failures: list[str | None] = []
    rows: dict[str, list[np.ndarray]] = {"dino": [], "clip": []}
    for image in images:
        check()
        failure: str | None = scores.failure(image)
        given = [judge for judge in (dino, clip) if judge is not None]
        try:
            of_image = [judge.embed_images([image])[0] for judge in given]
        except FloatingPointError:
            failure, of_image = "no finite embedding", [judge.embed_images([None])[0] for judge in given]
        failures.append(failure)
        for judge, row in zip(given, of_image, strict=True):
            rows[judge.name].append(row)

    def of_texts(texts: list[str]) -> np.ndarray | None:
        if clip is None:
            return None
        different = list(dict.fromkeys(texts))
        by_text = dict(zip(different, clip.embed_texts(different), strict=True))
        return np.stack([by_text[text] for text in texts])

    return Embedded(
        failures,
        np.stack(rows["dino"]) if dino else None,
        np.stack(rows["clip"]) if clip else None,
        of_texts([picture.text for picture in pictures]),
        of_texts([picture.prompt for picture in pictures]),
    )


def of_photos(images: Sequence[Image.Image], dino: Judge | None, clip: Judge | None) -> Embedded:
    """The embeddings of a subject's photos."""
    return Embedded(
        [None] * len(images),
        dino.embed_images(images) if dino else None,
        clip.embed_images(images) if clip else None,
        None,
        None,
    )


def of_pictures(
    pictures: Sequence[Picture], drawn: Embedded, photos: Embedded, trained: Embedded | None
) -> list[dict[str, float]]:
    """For each picture its scores by the judges that embedded it. A failed picture has 0 in each.

    `trained` are the photos that were trained on; None if they are `photos`.
    """
    columns: dict[str, np.ndarray] = {}
    of_class: dict[str, np.ndarray] = {}
    if drawn.dino is not None and photos.dino is not None:
        columns["DINO"] = of_class["PRES"] = scores.picture_cosines(drawn.dino, photos.dino)
        of_training = photos.dino if trained is None or trained.dino is None else trained.dino
        columns["nearest_trained"] = nearest = scores.nearest_cosines(drawn.dino, of_training)
        if trained is not None:
            columns["nearest_held_out"] = scores.nearest_cosines(drawn.dino, photos.dino)
        limit = scores.nearest_other(of_training)
        if limit is not None:
            columns["copies"] = (nearest > limit).astype(np.float64)
    if drawn.clip is not None and photos.clip is not None:
        assert drawn.texts is not None
        assert drawn.texts_with_word is not None
        columns["CLIP-I"] = scores.picture_cosines(drawn.clip, photos.clip)
        columns["CLIP-T"] = scores.text_cosines(drawn.clip, drawn.texts)
        columns["CLIP-T word"] = scores.text_cosines(drawn.clip, drawn.texts_with_word)
    return [
        {name: float(column[n]) for name, column in (of_class if picture.is_class else columns).items()}
        for n, picture in enumerate(pictures)
    ]


@dataclasses.dataclass(frozen=True)
class ByReader:
    """What the reader says of a set of pictures."""

    records: list[dict[str, float]]
    """For each picture its scores; a failed picture has 0 in each."""
    identities: reader_judge.Identities
    """Of the pictures of the class."""
    diversity: float | None
    """DIV of the pictures that did not fail; None if no prompt has two of them."""


def by_reader(pictures: Sequence[Picture], images: Sequence[Image.Image | None], reader: Reader) -> ByReader:
    """The scores of pictures by the reader."""
    records: list[dict[str, float]] = []
    identities: reader_judge.Identities = []
    drawn: list[tuple[Image.Image, str]] = []
    for picture, image in zip(pictures, images, strict=True):
        usable = None if image is None or scores.failure(image) else image
        if picture.is_class:
            pres, identity = reader.of_class([usable]) if usable else (0.0, [None])
            identities += identity
            records.append({"reader PRES": pres})
            continue
        values = reader.of_subject([usable], [picture.prompt]) if usable else {}
        records.append({f"reader {name}": values.get(name, 0.0) for name in _OF_READER})
        drawn += [(usable, picture.prompt)] if usable else []
    return ByReader(records, identities, reader.diversity(*zip(*drawn, strict=True)) if drawn else None)


def means(
    pictures: Sequence[Picture],
    records: Sequence[dict[str, float]],
    drawn: Embedded,
    photos: int,
    *,
    skip_failed: bool,
) -> Values:
    """The mean of each score over a subject's pictures, and DIV.

    Counts are numbers of pictures; for DINO, CLIP-I and PRES of pairs with one of the `photos`; for DIV of
    prompts. With `skip_failed` failed pictures are left out.
    """
    kept = [n for n, failure in enumerate(drawn.failures) if failure is None or not skip_failed]
    terms: dict[str, list[float]] = {}
    for n in kept:
        for name, value in records[n].items():
            terms.setdefault(name, []).append(value)
    values: Values = {
        name: (float(np.mean(list_)), len(list_) * (photos if name in ("DINO", "CLIP-I", "PRES") else 1))
        for name, list_ in terms.items()
    }
    of_subject = [n for n in kept if not pictures[n].is_class]
    if drawn.dino is not None and of_subject:
        prompts = [pictures[n].prompt for n in of_subject]
        diversity = scores.diversity(drawn.dino[of_subject], prompts)
        if diversity is not None:
            values["DIV"] = diversity, sum(prompts.count(prompt) > 1 for prompt in set(prompts))
    return values


def of_reader_sets(drawn: ByReader, of_base: ByReader) -> Values:
    """The reader's scores of a whole set of pictures: DIV, and PRIOR_TV against the base's pictures."""
    values: Values = {}
    if drawn.diversity is not None:
        values["reader DIV"] = drawn.diversity, 1
    if drawn.identities:
        distance = reader_judge.prior_tv(drawn.identities, of_base.identities)
        values["reader PRIOR_TV"] = distance, len(drawn.identities)
    return values


def real_rows(
    photos: Embedded, trained: Embedded | None, reader: Reader | None, images: Sequence[Image.Image]
) -> dict[str, Values]:
    """The scores of the photos among themselves: `excluding_self` leaves the pairs of a photo with itself
    out, `including_self` counts them."""
    rows: dict[str, Values] = {"excluding_self": {}, "including_self": {}}
    count = len(images)
    for name, embeddings in (("DINO", photos.dino), ("CLIP-I", photos.clip)):
        if embeddings is None:
            continue
        for row, value in scores.real_row(embeddings).items():
            if value is not None:
                rows[row][name] = value, count * (count - 1) if row == "excluding_self" else count**2
    if photos.dino is not None:
        of_training = photos.dino if trained is None or trained.dino is None else trained.dino
        nearest = scores.nearest_other(of_training)
        if nearest is not None:
            rows["excluding_self"]["nearest_trained"] = nearest, len(of_training)
    if reader is not None:
        share = reader.of_class(images)[0]
        for values in rows.values():
            values["reader ID"] = share, count
    return rows


def skipped(given: dict[str, Any], num_class_images: int, *, has_held_out: bool) -> dict[str, str]:
    """By score that is not computed, why. `given` has the judges by name, None for one that was not given."""
    reasons = {}
    for name, (judge, _) in SCORES.items():
        if given[judge] is None:
            reasons[name] = f"--judge_{judge} is not given"
        elif name == "nearest_held_out" and not has_held_out:
            reasons[name] = "--trained_photos is not given, so that --photos were trained on"
        elif not num_class_images and name in ("PRES", "reader PRES", "reader PRIOR_TV"):
            reasons[name] = "--num_class_images is 0"
    return reasons
