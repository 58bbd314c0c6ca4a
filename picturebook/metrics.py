"""Scores of pictures of the drawn world: pure functions of readings, prompts and pixels.

| score | pictures of | what it is |
|---|---|---|
| ID | the subject's prompts | mean share of the subject's identity attributes that a picture shows |
| ID_all | the subject's prompts | share of pictures that show all of them; by chance 1 in 1,152 |
| PA | the subject's prompts | mean share of the attributes named by the prompt that a picture shows |
| PA_all | the subject's prompts | share of pictures that show all that their prompt names |
| JOINT | the subject's prompts | share of pictures that count in ID_all and in PA_all |
| PRES | prompts of the class | ID; to be compared with the base's own |
| LEAK | prompts of other kinds | mean share of the subject's identity attributes, whatever the kind |
| PRIOR_TV | prompts of the class | distance of the identities drawn from those that the base draws |
| DIV | one prompt | mean distance between two pictures |
| COPY | the subject's prompts | share of pictures nearer to a training picture than `copy_limit` |

A picture that the reader cannot read with confidence counts as wrong in every score. No picture is left out.
"""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from picturebook.draw import draw
from picturebook.read import Reading
from picturebook.world import (
    ACCESSORIES,
    ACCESSORY_COLOURS,
    BACKDROPS,
    COLOURS,
    IDENTITY_SIZES,
    KINDS,
    PLACES,
    Identity,
    Scene,
    random_pose,
)

LOW_PASS_SIDE = 16  # pictures are averaged to this side before they are compared pixel by pixel
COPY_PERCENTILE = 1
COPY_RENDERS = 200  # 19,900 pairs


@dataclass(frozen=True)
class Wanted:
    """The attributes that a prompt names; None for those that it does not."""

    kind: str | None
    colour: str | None
    place: str | None
    accessory: str | None
    accessory_colour: str | None


def parse_prompt(prompt: str) -> Wanted:
    """The attributes that a prompt in the form of the world's captions names."""
    text, _, worn = prompt.partition(" wearing ")
    place = next((name for name, phrase in PLACES.items() if phrase in text), None)
    words = text.split()
    kind = next((word for word in words if word in KINDS), None)
    colour = next((word for word in words if word in COLOURS), None)
    accessory = next((word for word in worn.split() if word in ACCESSORIES), None)
    accessory_colour = next((word for word in worn.split() if word in ACCESSORY_COLOURS), None)
    return Wanted(kind, colour, place, accessory, accessory_colour)


def shows(reading: Reading, wanted: Wanted) -> dict[str, bool]:
    """For each attribute that the prompt names, whether the picture shows it.

    An accessory must also have its colour, if the prompt names that.
    """
    scene, right = reading.scene, {}
    for name, read_value, wanted_value in (
        ("class", scene.kind, wanted.kind),
        ("colour", scene.colour, wanted.colour),
        ("place", scene.place, wanted.place),
    ):
        if wanted_value is not None:
            right[name] = reading.shows_caption and read_value == wanted_value
    if wanted.accessory is not None:
        same_colour = wanted.accessory_colour is None or scene.accessory_colour == wanted.accessory_colour
        right["accessory"] = reading.shows_caption and scene.accessory == wanted.accessory and same_colour
    return right


def prompt_share(reading: Reading, prompt: str) -> float:
    """Share of the attributes named by the prompt that a picture shows, 0 to 1; 1 if it names none."""
    shown = shows(reading, parse_prompt(prompt)).values()
    return sum(shown) / len(shown) if shown else 1.0


def prompt_scores(readings: Sequence[Reading], prompts: Sequence[str]) -> dict[str, float]:
    """By attribute, the share of the pictures whose prompt names it that show it; and the share of valid
    pictures."""
    hits: dict[str, list[bool]] = {"valid": [r.valid for r in readings]}
    for reading, prompt in zip(readings, prompts, strict=True):
        for name, right in shows(reading, parse_prompt(prompt)).items():
            hits.setdefault(name, []).append(right)
    return {name: sum(values) / len(values) for name, values in hits.items()}


def identity_share(reading: Reading, kind: str, identity: Identity) -> float:
    """Share of the subject's identity attributes that a picture shows, 0 to 1. An invalid picture, or one of
    another kind, has 0.
    """
    return attribute_share(reading, identity) if reading.scene.kind == kind else 0.0


def attribute_share(reading: Reading, identity: Identity) -> float:
    """Share of the subject's identity attributes that a picture of any kind shows, 0 to 1. An invalid picture
    has 0.
    """
    if not reading.valid:
        return 0.0
    same = [getattr(reading.scene.identity, name) == getattr(identity, name) for name in IDENTITY_SIZES]
    return sum(same) / len(same)


def spread(readings: Sequence[Reading]) -> dict[str, float]:
    """By identity attribute, the total variation distance between the valid pictures and the world's uniform
    prior: 0 for the same distribution, 1 for disjoint ones.
    """
    valid = [r for r in readings if r.valid]
    distances = {}
    for name, size in IDENTITY_SIZES.items():
        counts = Counter(getattr(r.scene.identity, name) for r in valid)
        distances[name] = 0.5 * sum(
            abs(counts[value] / max(1, len(valid)) - 1 / size) for value in range(size)
        )
    return distances


def subject_scores(
    readings: Sequence[Reading], prompts: Sequence[str], kind: str, colour: str, identity: Identity
) -> dict[str, float]:
    """The scores of pictures of a subject, each from 0 to 1.

    ID, ID_all, PA, PA_all and JOINT are those of the module's table. subject_colour is the share of pictures
    in the subject's colour. The others are those of `prompt_scores`.
    """
    shares = [identity_share(r, kind, identity) for r in readings]
    shown = [prompt_share(r, prompt) for r, prompt in zip(readings, prompts, strict=True)]
    return {
        "ID": sum(shares) / len(shares),
        "ID_all": sum(share == 1 for share in shares) / len(shares),
        "PA": sum(shown) / len(shown),
        "PA_all": sum(share == 1 for share in shown) / len(shown),
        "JOINT": sum(a == b == 1 for a, b in zip(shares, shown, strict=True)) / len(shares),
        "subject_colour": sum(r.shows_caption and r.scene.colour == colour for r in readings) / len(readings),
        **prompt_scores(readings, prompts),
    }


def leak(readings: Sequence[Reading], identity: Identity) -> float:
    """LEAK, 0 to 1. Of pictures with random identities it is 0.177, the mean of 1/6, 1/8, 1/6 and 1/4."""
    return sum(attribute_share(reading, identity) for reading in readings) / len(readings)


def prior_tv(readings: Sequence[Reading], base_readings: Sequence[Reading]) -> float:
    """PRIOR_TV, 0 to 1: the mean over identity attributes of the total variation distance between two
    histograms.

    An invalid picture counts as one more value of the attribute.
    """
    changes = []
    for name in IDENTITY_SIZES:
        first, second = (_histogram(of, name) for of in (readings, base_readings))
        changes.append(sum(abs(first[value] - second[value]) for value in first) / 2)
    return sum(changes) / len(changes)


def _histogram(readings: Sequence[Reading], name: str) -> dict[int, float]:
    """Shares of the pictures by the value of an identity attribute; -1 stands for invalid pictures."""
    values = Counter(getattr(r.scene.identity, name) if r.valid else -1 for r in readings)
    return {value: values[value] / len(readings) for value in range(-1, IDENTITY_SIZES[name])}


# ---- pixels


def low_passed(images: Sequence[Image.Image]) -> np.ndarray:
    """The pictures averaged to 16 x 16 pixels, values from 0 to 1, float64 [N, 768]."""
    size = (LOW_PASS_SIDE, LOW_PASS_SIDE)
    small = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)) for image in images]
    return np.stack(small).reshape(len(small), -1) / 255


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Root mean square differences, 0 to 1, between the rows of [N, D] and of [M, D]: [N, M]."""
    return np.sqrt(np.square(first[:, None] - second[None]).mean(axis=-1))


def diversity(images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """DIV: the mean distance of two low-passed pictures of the same prompt, averaged over prompts.

    Raises ValueError if a prompt has only one picture.
    """
    vectors = low_passed(images)
    means = []
    for prompt in dict.fromkeys(prompts):
        rows = vectors[[number for number, other in enumerate(prompts) if other == prompt]]
        if len(rows) < 2:
            raise ValueError(f"diversity needs two pictures of {prompt!r}")
        means.append(distances(rows, rows)[np.triu_indices(len(rows), 1)].mean())
    return float(np.mean(means))


def renders(kind: str, colour: str, identity: Identity, rng: random.Random, count: int) -> list[Image.Image]:
    """Renders of a subject in random places, backdrops and poses, without an accessory: the distribution that
    its training pictures were drawn from."""
    scenes = [
        Scene(
            kind,
            colour,
            rng.choice(tuple(PLACES)),
            identity,
            pose=random_pose(rng),
            backdrop=rng.randrange(BACKDROPS),
        )
        for _ in range(count)
    ]
    return [draw(scene) for scene in scenes]


def copy_limit(kind: str, colour: str, identity: Identity) -> float:
    """The 1st percentile of the distances between independent renders of a subject, low-passed.

    They are those of `renders`.
    """
    rng = random.Random(f"renders of {kind} {colour} {identity}")
    vectors = low_passed(renders(kind, colour, identity, rng, COPY_RENDERS))
    pairs = [distances(vectors[n : n + 1], vectors[n + 1 :])[0] for n in range(COPY_RENDERS - 1)]
    return float(np.percentile(np.concatenate(pairs), COPY_PERCENTILE))


def copied(images: Sequence[Image.Image], training: Sequence[Image.Image], limit: float) -> float:
    """COPY, 0 to 1: the share of pictures whose nearest training picture is nearer than `limit`."""
    nearest = distances(low_passed(images), low_passed(training)).min(axis=1)
    return float((nearest < limit).mean())


# ---- intervals


def bootstrap_interval(
    values: Mapping[str, Sequence[float]], *, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over subjects, from the values of every subject.

    Subjects are drawn with replacement, so the interval is of other subjects of the same world, not of other
    pictures of these. It is exact, over all combinations, with up to five subjects; otherwise `draws` random
    ones with a fixed seed are taken. Raises ValueError without values.
    """
    means = np.array([np.mean(of_subject) for of_subject in values.values() if len(of_subject)])
    if not len(means):
        raise ValueError("an interval needs values")
    if len(means) <= 5:
        picks = np.array(list(itertools.product(range(len(means)), repeat=len(means))))
    else:
        picks = np.random.default_rng(0).integers(0, len(means), (draws, len(means)))
    edges = (100 * (1 - level) / 2, 100 * (1 + level) / 2)
    low, high = np.percentile(means[picks].mean(axis=1), edges, method="inverted_cdf")
    return float(low), float(high)
