"""Scores by the reader: do pictures show what their prompts say, and do they show the subject?

    python -m picturebook.score --subject picturebook/subjects/dog \\
        --pictures runs/demo/subject --class_pictures runs/demo/class

A picture that the reader cannot read with confidence counts as wrong in every score. Names follow the
DreamBooth protocol's: ID is how much of the subject's identity shows, PRES how much of it shows where it
should not, on prompts that name only the class.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from picturebook.read import Reading, read
from picturebook.subjects import load_subject
from picturebook.world import ACCESSORIES, ACCESSORY_COLOURS, COLOURS, IDENTITY_SIZES, KINDS, PLACES, Identity

BASE_TARGETS = {"class": 0.95, "place": 0.95, "colour": 0.90, "accessory": 0.85, "valid": 0.90}


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for; None where it says nothing."""

    kind: str | None
    colour: str | None
    place: str | None
    accessory: str | None
    accessory_colour: str | None


def parse_prompt(prompt: str) -> Wanted:
    """The attributes that a prompt of the drawn world names, in the order its captions name them."""
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

    An accessory counts with its colour if that is named.
    """
    scene, right = reading.scene, {}
    for name, found, asked in (
        ("class", scene.kind, wanted.kind),
        ("colour", scene.colour, wanted.colour),
        ("place", scene.place, wanted.place),
    ):
        if asked is not None:
            right[name] = reading.shows_caption and found == asked
    if wanted.accessory is not None:
        same_colour = wanted.accessory_colour is None or scene.accessory_colour == wanted.accessory_colour
        right["accessory"] = reading.shows_caption and scene.accessory == wanted.accessory and same_colour
    return right


def prompt_scores(readings: Sequence[Reading], prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures that show each attribute their prompt names, and the share of valid ones."""
    hits: dict[str, list[bool]] = {"valid": [r.valid for r in readings]}
    for reading, prompt in zip(readings, prompts, strict=True):
        for name, right in shows(reading, parse_prompt(prompt)).items():
            hits.setdefault(name, []).append(right)
    return {name: sum(values) / len(values) for name, values in hits.items()}


def identity_share(reading: Reading, kind: str, identity: Identity) -> float:
    """Share of the subject's identity attributes that a picture shows, 0 to 1; 0 if it is invalid or of
    another kind.
    """
    if not reading.valid or reading.scene.kind != kind:
        return 0.0
    return sum(
        getattr(reading.scene.identity, name) == getattr(identity, name) for name in IDENTITY_SIZES
    ) / len(IDENTITY_SIZES)


def spread(readings: Sequence[Reading]) -> dict[str, float]:
    """Total variation distance, per identity attribute, between the valid pictures and the world's uniform
    prior: 0 is the same, 1 disjoint.
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
    """ID (mean share of identity shown), ID_all (share of pictures with all of it), the subject's colour,
    and what the prompts name.
    """
    shares = [identity_share(r, kind, identity) for r in readings]
    return {
        "ID": sum(shares) / len(shares),
        "ID_all": sum(share == 1 for share in shares) / len(shares),
        "subject_colour": sum(r.shows_caption and r.scene.colour == colour for r in readings) / len(readings),
        **prompt_scores(readings, prompts),
    }


def read_pictures(folder: Path) -> list[tuple[dict[str, Any], Reading]]:
    """(record of images.json, reading) for every picture that infer.py left in a folder."""
    records = json.loads((folder / "images.json").read_text(encoding="utf-8"))
    return [(record, read(Image.open(folder / record["file"]))) for record in records]


@dataclass
class Options:
    """Score what infer.py --compare drew with a subject's adapter and with the base."""

    subject: Path
    """Folder of the subject, with its subject.json."""
    pictures: Path
    """Pictures of prompts that name the subject."""
    class_pictures: Path
    """Pictures of prompts that name its class only."""
    output: Path | None = None
    """JSON file for the scores."""


def main(options: Options) -> dict[str, Any]:
    kind, colour, identity = load_subject(options.subject)
    scores: dict[str, Any] = {}
    for title, folder in (("subject", options.pictures), ("class", options.class_pictures)):
        for arm in ("adapter", "base"):
            found = [
                (record, reading)
                for record, reading in read_pictures(folder)
                if (record["adapter"] is not None) == (arm == "adapter")
            ]
            if not found:
                wanted = "with an adapter" if arm == "adapter" else "without an adapter"
                sys.exit(f"error: {folder} has no picture drawn {wanted}; draw them with infer.py --compare")
            readings = [reading for _, reading in found]
            prompts = [record["prompt"] for record, _ in found]
            scores[f"{title} prompts, {arm}"] = {
                "pictures": len(found),
                **subject_scores(readings, prompts, kind, colour, identity),
                **{f"spread_{name}": distance for name, distance in spread(readings).items()},
            }
    scores["rise of ID on class prompts"] = (
        scores["class prompts, adapter"]["ID"] - scores["class prompts, base"]["ID"]
    )
    print(table(scores))
    if options.output:
        options.output.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def table(scores: dict[str, Any]) -> str:
    names = ("pictures", "valid", "ID", "ID_all", "subject_colour", "class", "place")
    lines = [f"{'':<26}" + "".join(f"{name:>15}" for name in names)]
    for row, values in scores.items():
        if isinstance(values, dict):
            cells = [values.get(name) for name in names]
            lines.append(
                f"{row:<26}"
                + "".join(
                    f"{'-' if c is None else c if isinstance(c, int) else format(c, '.3f'):>15}"
                    for c in cells
                )
            )
    lines.append(f"rise of ID on class prompts: {scores['rise of ID on class prompts']:+.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
