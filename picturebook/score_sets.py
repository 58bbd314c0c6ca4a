"""Scores of sets of adapters: for every set and subject, how much of the subject's identity pictures show
whose prompts name its kind.

    python -m picturebook.score_sets --pictures runs/two_subjects/pictures \\
        --subjects picturebook/subjects/dog picturebook/subjects/cat
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from picturebook.metrics import parse_prompt, subject_scores
from picturebook.score import read_pictures
from picturebook.subjects import load_subject


@dataclass
class Options:
    """Score what infer.py --adapters_file drew."""

    pictures: Path
    """Pictures, each of one of the subjects' kinds."""
    subjects: tuple[Path, ...]
    """Folders of the subjects, with their subject.json."""
    output: Path | None = None
    """JSON file for the scores."""


def main(options: Options) -> dict[str, dict[str, dict[str, float]]]:
    """Print and write the scores. Returns those of `subject_scores` by set and kind."""
    pictures = read_pictures(options.pictures)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(record["set"] for record, _ in pictures):
        for folder in options.subjects:
            kind, colour, identity = load_subject(folder)
            selected = [
                (record, reading)
                for record, reading in pictures
                if record["set"] == name and parse_prompt(record["prompt"]).kind == kind
            ]
            prompts = [record["prompt"] for record, _ in selected]
            readings = [reading for _, reading in selected]
            values = {"pictures": len(selected), **subject_scores(readings, prompts, kind, colour, identity)}
            scores.setdefault(name, {})[kind] = values
            print(
                f"{name:<12} {kind:<8} {len(selected):>4} pictures   identity {values['ID']:.3f}   "
                f"whole identity {values['ID_all']:.3f}"
            )
    if options.output:
        options.output.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
