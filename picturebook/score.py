"""Scores of pictures by the reader: the shares that show what their prompts name, and that show the subject.

    python -m picturebook.score --subject picturebook/subjects/dog \\
        --pictures runs/demo/subject --class_pictures runs/demo/class

A picture that the reader cannot read with confidence counts as wrong in every score. ID is the mean share of
the subject's identity attributes that pictures show. On prompts that name only the class it should not rise
over the base's.
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
    if not reading.valid or reading.scene.kind != kind:
        return 0.0
    return sum(
        getattr(reading.scene.identity, name) == getattr(identity, name) for name in IDENTITY_SIZES
    ) / len(IDENTITY_SIZES)


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

    ID is the mean `identity_share`, ID_all the share of pictures with the complete identity, subject_colour
    the share in the subject's colour. The others are those of `prompt_scores`.
    """
    shares = [identity_share(r, kind, identity) for r in readings]
    return {
        "ID": sum(shares) / len(shares),
        "ID_all": sum(share == 1 for share in shares) / len(shares),
        "subject_colour": sum(r.shows_caption and r.scene.colour == colour for r in readings) / len(readings),
        **prompt_scores(readings, prompts),
    }


def read_pictures(folder: Path) -> list[tuple[dict[str, Any], Reading]]:
    """(record in images.json, reading) of every picture that infer.py wrote to a folder."""
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
    """Print the scores and write them to --output. Returns them by prompts and variant."""
    kind, colour, identity = load_subject(options.subject)
    scores: dict[str, Any] = {}
    for title, folder in (("subject", options.pictures), ("class", options.class_pictures)):
        for variant in ("adapter", "base"):
            pictures = [
                (record, reading)
                for record, reading in read_pictures(folder)
                if (record["adapter"] is not None) == (variant == "adapter")
            ]
            if not pictures:
                how = "with an adapter" if variant == "adapter" else "without an adapter"
                sys.exit(f"error: {folder} has no picture drawn {how}; draw them with infer.py --compare")
            readings = [reading for _, reading in pictures]
            prompts = [record["prompt"] for record, _ in pictures]
            scores[f"{title} prompts, {variant}"] = {
                "pictures": len(pictures),
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
    """A table of `main`'s scores for the terminal."""
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
