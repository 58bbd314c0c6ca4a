"""Scores of pictures from unit embeddings: pure functions of numbers, the same for every model that embeds.

An embedding is a row of length 1. A picture that failed (see `failure`) has the row of zeros, so that its
cosine with everything is 0: it counts in every mean, and raises none. Sums are in float64.
The metrics are those of DreamBooth (arXiv 2208.12242, section 4.2).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

Rows = np.ndarray
"""Embeddings, [N, D]: rows of length 1, or of zeros for failed pictures."""

# --- failures


def failure(image: Image.Image | None) -> Literal["unreadable", "all black"] | None:
    """Why a picture counts as failed; None if it does not. `image` is None for a file that cannot be read.

    Safety checkers blacken pictures, and values that are not finite become black when they are drawn.
    """
    if image is None:
        return "unreadable"
    return None if np.asarray(image.convert("RGB")).any() else "all black"


def has_failed(pictures: Rows) -> np.ndarray:
    """Whether each picture has the row of zeros, bool [N]."""
    failed: np.ndarray = np.abs(pictures).max(axis=1) == 0
    return failed


# --- cosines


def picture_cosines(pictures: Rows, references: Rows) -> np.ndarray:
    """Mean cosine of each picture with all references, float64 [N].

    DINO and CLIP-I of one picture, by the model that embedded it. With rows of length 1 the mean over all
    pairs is the dot product with the mean of the references.
    """
    return _wide(pictures) @ _wide(references).mean(axis=0)


def mean_cosine(pictures: Rows, references: Rows) -> float:
    """Mean cosine over all pairs of a picture and a reference: DINO, CLIP-I, or PRES if the pictures are of
    prompts that name only the class."""
    return float(_wide(pictures).mean(axis=0) @ _wide(references).mean(axis=0))


def real_row(photos: Rows) -> dict[str, float | None]:
    """Mean cosine of the real photos among themselves: `excluding_self` over pairs of different photos, None
    for one photo, and `including_self` over all pairs. Published tables differ in which one they print."""
    rows = _wide(photos)
    count, total = len(rows), rows.sum(axis=0)
    all_pairs, self_pairs = float(total @ total), float((rows * rows).sum())
    return {
        "excluding_self": (all_pairs - self_pairs) / (count * (count - 1)) if count > 1 else None,
        "including_self": all_pairs / count**2,
    }


def text_cosines(pictures: Rows, texts: Rows) -> np.ndarray:
    """Cosine of each picture with the text of the same row, float64 [N]: CLIP-T, neither scaled nor cut at
    0."""
    return (_wide(pictures) * _wide(texts)).sum(axis=1)


def nearest_cosines(pictures: Rows, references: Rows) -> np.ndarray:
    """Cosine of each picture with the nearest reference, float64 [N]."""
    return (_wide(pictures) @ _wide(references).T).max(axis=1)


def nearest_other(photos: Rows) -> float | None:
    """Mean over photos of the cosine with the nearest other photo; None for fewer than two photos."""
    if len(photos) < 2:
        return None
    cosines = _wide(photos) @ _wide(photos).T
    np.fill_diagonal(cosines, -np.inf)
    return float(cosines.max(axis=1).mean())


def copying(pictures: Rows, trained: Rows, held_out: Rows | None = None) -> dict[str, float | None]:
    """How near pictures are to single photos.

    `nearest_trained` is the mean cosine with the nearest photo that was trained on, `nearest_held_out` with
    the nearest one that was not, None without such photos. `copies` is the share of pictures that
    are nearer to a trained photo than trained photos are to each other (`nearest_other`), None for one photo.
    """
    nearest, real = nearest_cosines(pictures, trained), nearest_other(trained)
    kept_back = None
    if held_out is not None and len(held_out) > 0:
        kept_back = float(nearest_cosines(pictures, held_out).mean())
    return {
        "nearest_trained": float(nearest.mean()),
        "nearest_held_out": kept_back,
        "copies": None if real is None else float((nearest > real).mean()),
    }


def diversity(pictures: Rows, prompts: Sequence[object]) -> float | None:
    """DIV: 1 - cosine over pairs of different pictures of one prompt, meaned over pairs, then over prompts.

    A pair with a failed picture counts 0. None if no prompt has two pictures. The paper has LPIPS in place of
    the cosine: its network is downloaded when it is first used, which no run here does.
    """
    rows, failed, means = _wide(pictures), has_failed(pictures), []
    for prompt in dict.fromkeys(prompts):
        numbers = [number for number, other in enumerate(prompts) if other == prompt]
        if len(numbers) > 1:
            distances = 1 - rows[numbers] @ rows[numbers].T
            distances[failed[numbers]] = distances[:, failed[numbers]] = 0
            means.append(distances[np.triu_indices(len(numbers), k=1)].mean())
    return float(np.mean(means)) if means else None


def likeness_scores(
    name: str,
    pictures: Rows,
    prompts: Sequence[object],
    trained: Rows,
    held_out: Rows | None = None,
) -> dict[str, float]:
    """The scores of pictures of the subject that need no text, by names that begin with `name`.

    `name` itself (DINO or CLIP-I) is the mean cosine of pictures and trained photos. `_real` is that of the
    photos among themselves without self pairs, `_DIV` the diversity. The others are those of `copying`. A
    score that is not defined, for example of one photo, is left out.
    """
    values = {
        "": mean_cosine(pictures, trained),
        "_real": real_row(trained)["excluding_self"],
        "_DIV": diversity(pictures, prompts),
        **{f"_{key}": value for key, value in copying(pictures, trained, held_out).items()},
    }
    return {f"{name}{key}": value for key, value in values.items() if value is not None}


def _wide(rows: Rows) -> np.ndarray:
    return np.asarray(rows, dtype=np.float64)


# --- over subjects


def macro(values: Mapping[str, float]) -> float:
    """The plain mean over subjects: each subject has the same weight."""
    return float(np.mean(list(values.values())))


def micro(values: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """The mean over all terms of all subjects. `values` are the subjects' means, `counts` the numbers of
    terms that they are made of: pictures times photos for DINO and CLIP-I, pictures for CLIP-T."""
    weights = [counts[subject] for subject in values]
    return float(np.average(list(values.values()), weights=weights))


def interval(
    values: Sequence[float], *, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of `values`, one for each subject: subjects are drawn again,
    not pictures. None for fewer than two values. The same seed gives the same interval."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- prompts


def subject_words(instance_prompt: str, class_prompt: str) -> tuple[str, ...]:
    """The words that name the subject: those of the instance prompt that the class prompt lacks, in order.

    "a photo of sks dog" and "a photo of dog" give ("sks",). Words are compared without case and without
    punctuation around them.
    """
    of_class = {_bare(word) for word in class_prompt.split()}
    words = [_bare(word) for word in instance_prompt.split()]
    return tuple(dict.fromkeys(word for word in words if word not in of_class))


def names_subject(prompt: str, words: Sequence[str]) -> bool:
    """Whether a prompt has all words of the subject."""
    return set(words) <= {_bare(word) for word in prompt.split()}


def without_words(prompt: str, words: Sequence[str]) -> str:
    """The prompt without the words of the subject: the text that CLIP-T compares with, since a rare word
    means nothing to CLIP. Spaces between the other words become single."""
    return " ".join(word for word in prompt.split() if _bare(word) not in words)


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()[]").casefold()
