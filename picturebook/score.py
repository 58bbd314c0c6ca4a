"""Scores of pictures by the reader: the shares that show what their prompts name, and that show the subject.

    python -m picturebook.score --subject picturebook/subjects/dog \\
        --pictures runs/demo/subject --class_pictures runs/demo/class

A picture that the reader cannot read with confidence counts as wrong in every score. ID is the mean share of
the subject's identity attributes that pictures show. On prompts that name only the class it should not rise
over the base's.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from picturebook.metrics import spread, subject_scores
from picturebook.read import Reading, read
from picturebook.subjects import load_subject


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
