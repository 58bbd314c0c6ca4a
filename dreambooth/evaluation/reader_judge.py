"""The reader of the embedded base's drawn world as a judge: it reads from a picture what is in it.

`picturebook/metrics.py` defines the scores. picturebook is imported when a reader is made, not before.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dreambooth.io import reader
from dreambooth.io.errors import UserError, shortened, shown

if TYPE_CHECKING:
    from picturebook.read import Reading

FLAG = "--judge_reader"
FILE = "subject.json"
Identities = list[list[int] | None]
"""The identity attributes of each picture; None for one that the reader cannot read with confidence."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A subject of the drawn world, from its subject.json."""

    kind: str
    colour: str
    identity: Mapping[str, int]
    sha256: str
    """Of subject.json."""


def find(given: str) -> Subject:
    """The subject in the folder `given`. Raises UserError if its subject.json is missing or describes no
    subject of the drawn world."""
    from picturebook.world import COLOURS, IDENTITY_SIZES, KINDS

    path = Path(given) / FILE
    if not path.is_file():
        rule = "name the folder of a subject of the drawn world, such as picturebook/subjects/dog"
        raise UserError(f"{FLAG}: {shown(given)} has no {FILE}; {rule}")
    where = f"{FLAG}: {shown(path)}"
    data = reader.read_bytes(path, where)
    record = reader.parsed_json_table(data, where)
    for name, known in (("kind", KINDS), ("colour", tuple(COLOURS))):
        if record.get(name) not in known:
            rule = f"{name} must be one of {', '.join(known)}"
            raise UserError(f"{where}: {rule}, got {shortened(record.get(name))}")
    identity = record.get("identity")
    identity = identity if isinstance(identity, dict) else {}
    for name, size in IDENTITY_SIZES.items():
        value = identity.get(name)
        if type(value) is not int or not 0 <= value < size:
            rule = f"identity.{name} must be a number from 0 to {size - 1}"
            raise UserError(f"{where}: {rule}, got {shortened(value)}")
    numbers = {name: identity[name] for name in IDENTITY_SIZES}
    return Subject(record["kind"], record["colour"], numbers, hashlib.sha256(data).hexdigest())


def check_side(side: int) -> None:
    """Raise UserError unless pictures of `side` pixels are of the drawn world's size."""
    from picturebook.draw import SIDE

    if side != SIDE:
        rule = f"the reader knows pictures of {SIDE} x {SIDE} pixels, those of the embedded base"
        raise UserError(f"{FLAG}: {rule}; this run draws {side} x {side} (--resolution)")


def check_photos(flag: str, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError, naming `flag`, unless photos are of the drawn world's size. `sizes` has width and
    height by name."""
    from picturebook.draw import SIDE

    for name, (width, height) in sizes.items():
        if (width, height) != (SIDE, SIDE):
            rule = f"the reader knows pictures of {SIDE} x {SIDE} pixels"
            raise UserError(f"{flag}: {shown(name)} has {width} x {height}; {rule}: leave it out")


def prompts_of_other_kinds(class_prompt: str, kind: str) -> list[str]:
    """The class prompt with each other kind of the drawn world in place of the subject's. Raises UserError if
    the prompt does not name the subject's kind."""
    from picturebook.world import KINDS

    words = class_prompt.split()
    if kind not in words:
        rule = f"must name the kind of the subject of {FLAG}, {kind}"
        raise UserError(f"--class_prompt {rule}, got {shortened(class_prompt)}")
    others = [other for other in KINDS if other != kind]
    return [" ".join(other if word == kind else word for word in words) for other in others]


class Reader:
    """Reads pictures of one subject, and of its class and other kinds."""

    name = "reader"

    def __init__(self, subject: Subject, trained: Sequence[Image.Image]):
        """`trained` are the photos that are trained on. Pictures drawn nearer to one of them than renders of
        the subject are to each other count as copies."""
        from picturebook import metrics
        from picturebook.read import CAPTION_CONFIDENCE, VALID_CONFIDENCE
        from picturebook.world import Identity

        self.subject, self.identity = subject, Identity(**subject.identity)
        self.trained = [photo.convert("RGB") for photo in trained]
        self.copy_limit = metrics.copy_limit(subject.kind, subject.colour, self.identity)
        self.settings = {
            "subject": {"kind": subject.kind, "colour": subject.colour, "identity": dict(subject.identity)},
            "sha256": subject.sha256,
            "confidence": [CAPTION_CONFIDENCE, VALID_CONFIDENCE],
            "copy_limit": self.copy_limit,
        }

    def read(self, images: Sequence[Image.Image]) -> "list[Reading]":
        """The reading of each picture."""
        from picturebook.read import read

        return [read(image) for image in images]

    def of_subject(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
        """ID, ID_all, PA, PA_all, JOINT and COPY of pictures of the subject, each drawn with its prompt; DIV
        if a prompt has several pictures."""
        from picturebook import metrics

        kind, colour = self.subject.kind, self.subject.colour
        scores = metrics.subject_scores(self.read(images), prompts, kind, colour, self.identity)
        kept = {name: scores[name] for name in ("ID", "ID_all", "PA", "PA_all", "JOINT")}
        kept["COPY"] = metrics.copied(images, self.trained, self.copy_limit)
        diversity = self.diversity(images, prompts)
        return kept if diversity is None else {**kept, "DIV": diversity}

    def diversity(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> float | None:
        """DIV of the prompts with several pictures; None if there is no such prompt."""
        from picturebook import metrics

        repeated = [number for number, prompt in enumerate(prompts) if list(prompts).count(prompt) > 1]
        if not repeated:
            return None
        return metrics.diversity([images[n] for n in repeated], [prompts[n] for n in repeated])

    def of_class(self, images: Sequence[Image.Image]) -> tuple[float, Identities]:
        """(PRES, identities) of pictures drawn with the class prompt."""
        from picturebook import metrics
        from picturebook.world import IDENTITY_SIZES

        readings = self.read(images)
        shares = [metrics.identity_share(r, self.subject.kind, self.identity) for r in readings]
        identities: Identities = [
            [getattr(r.scene.identity, name) for name in IDENTITY_SIZES] if r.valid else None
            for r in readings
        ]
        return sum(shares) / len(shares), identities

    def of_others(self, images: Sequence[Image.Image]) -> float:
        """LEAK of pictures drawn with prompts of other kinds."""
        from picturebook import metrics

        return metrics.leak(self.read(images), self.identity)


def prior_tv(identities: Identities, of_base: Identities) -> float:
    """PRIOR_TV, 0 to 1: how far the identities of class pictures are from those that the base draws. With few
    pictures much of it is chance: two sets of 8 renders of random scenes have 0.44 on average."""
    from picturebook import metrics

    return metrics.prior_tv(_readings(identities), _readings(of_base))


def _readings(identities: Identities) -> "list[Reading]":
    """Readings with these identities, for the scores that depend on nothing else."""
    from picturebook.read import Reading
    from picturebook.world import Identity, Scene

    unread = Identity(0, 0, 0, 0)
    return [
        Reading(
            Scene("dog", "red", "snow", unread if values is None else Identity(*values)), values is not None
        )
        for values in identities
    ]
