"""Holds DINO, CLIP-I and CLIP-T against the reader of the embedded base: do they say what a picture shows?

    python -m benchmarks.judges --work runs/judges      # trains, draws and scores what is missing
    python -m benchmarks.judges --tables                # writes the section of docs/evidence.md

The DINO and CLIP of the protocol know photos, not drawn pictures. So a small ViTModel and a small CLIPModel
are trained on the drawn world (`benchmarks/judge_models.py`), saved in the formats of the real ones, and used
through the same code. They judge pictures of four subjects, drawn by the base and by adapters after two
numbers of steps. The reader knows what the pictures show.
"""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks import judge_models
from benchmarks.claims_arms import BASELINE, RATE, SUBJECTS, WORD
from benchmarks.claims_runs import (
    Protocol,
    Studio,
    adapter_file,
    adapters_after,
    photos_of,
    subject_prompts,
    training_of,
)
from benchmarks.programs import ROOT, rounded, write_page
from dreambooth.evaluation import judges, scores
from dreambooth.evaluation.judges import Judge
from picturebook import metrics, subjects
from picturebook.read import Reading, read

RESULTS = ROOT / "benchmarks" / "results" / "judges.json"
PAGE = ROOT / "docs" / "evidence.md"
MARKS = ("<!-- judges begin -->", "<!-- judges end -->")
STEPS = (0, 50, 150)  # 0 is the base
SEED = 0
OTHERS = 3
RENDERS = 16  # fresh ones of each subject, for the Real row


@dataclasses.dataclass
class Options:
    """Hold judges against the reader, or write the table."""

    tables: bool = False
    """Write the section of docs/evidence.md from the results, and run nothing."""
    work: Path = Path("runs/judges")
    """Folder for judges, adapters and pictures. What is there is not made again."""
    results: Path = RESULTS
    """File of the results."""


_LIKENESS = {"DINO": "dino", "CLIP-I": "clip"}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures of one subject by one adapter, as they are judged. Arrays have a value for each picture."""

    clip_t: np.ndarray
    """[OTHERS + 1, N]: with its own prompt, and with those of OTHERS other pictures."""
    prompt: np.ndarray
    """PA by the reader with the same prompts, [OTHERS + 1, N]."""
    likeness: dict[str, np.ndarray]
    """By score, DINO and CLIP-I."""
    wrong_likeness: np.ndarray
    """DINO with the photos of the other subjects."""
    identity: np.ndarray
    """ID by the reader."""


# ---- pictures


def pictures_of(subject: str, step: int, work: Path, studio: Studio) -> list[Image.Image]:
    """The pictures of a subject after `step` steps, one of each prompt. They are drawn once."""
    folder = work / "pictures" / f"{subject}-{step:03d}"
    prompts = subject_prompts(subject, WORD, studio.protocol)
    paths = [folder / f"{number:02d}.png" for number in range(len(prompts))]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        training = training_of(BASELINE, RATE, subject, SEED)
        adapters = []
        if step > 0:
            trained = adapters_after(training, studio.protocol, work, max(STEPS))
            adapters = [(adapter_file(trained, step), 1.0)]
        with studio.adapted(adapters):
            for path, image in zip(paths, studio.draw(prompts, range(len(prompts))), strict=True):
                image.save(path)
    return [Image.open(path).convert("RGB") for path in paths]


def renders_of(subject: str) -> list[Image.Image]:
    """Fresh renders of a subject, as its photos were drawn."""
    kind, colour, identity = subjects.load_subject(subjects.FOLDER / subject)
    return metrics.renders(kind, colour, identity, random.Random(f"real row of {subject}"), RENDERS)


# ---- scores


def judged(
    images: Sequence[Image.Image],
    subject: str,
    photo_rows: Mapping[str, Mapping[str, np.ndarray]],
    dino: Judge,
    clip: Judge,
    prompts: list[str],
) -> Drawn:
    """The scores of every picture by the judges and by the reader. `photo_rows` are the embeddings of each
    subject's photos, by judge."""
    kind, _, identity = subjects.load_subject(subjects.FOLDER / subject)
    readings = [read(image) for image in images]
    rows = {"dino": dino.embed_images(images), "clip": clip.embed_images(images)}
    texts = clip.embed_texts([scores.without_words(prompt, (WORD,)) for prompt in prompts])
    # the prompt three places before names another place, and an accessory where the picture's own names none
    shifts = [3 * number for number in range(OTHERS + 1)]
    of_subject = photo_rows[subject]
    wrong = [
        scores.picture_cosines(rows["dino"], photo_rows[other]["dino"])
        for other in SUBJECTS
        if other != subject
    ]
    return Drawn(
        np.stack([scores.text_cosines(rows["clip"], np.roll(texts, shift, axis=0)) for shift in shifts]),
        np.stack([_prompt_shares(readings, prompts, shift) for shift in shifts]),
        {name: scores.picture_cosines(rows[judge], of_subject[judge]) for name, judge in _LIKENESS.items()},
        np.mean(wrong, axis=0),
        np.array([metrics.identity_share(reading, kind, identity) for reading in readings]),
    )


def _prompt_shares(readings: Sequence[Reading], prompts: Sequence[str], shift: int) -> np.ndarray:
    """PA of each picture with the prompt `shift` places before its own."""
    shifted = [prompts[number - shift] for number in range(len(prompts))]
    return np.array([metrics.prompt_share(r, prompt) for r, prompt in zip(readings, shifted, strict=True)])


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's r; None if one of them is constant."""
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def correlations(drawn: Mapping[tuple[str, int], Drawn]) -> dict[str, Any]:
    """Pearson's r of each judge's score with the reader's: of single pictures, `pictures`, with the interval
    over subjects of r within a subject; and of the means of adapters, `adapters`."""
    pairs = {
        "CLIP-T and PA, own prompts": lambda one: (one.clip_t[0], one.prompt[0]),
        "CLIP-T and PA, own and others' prompts": lambda one: (one.clip_t.ravel(), one.prompt.ravel()),
        "DINO and ID": lambda one: (one.likeness["DINO"], one.identity),
        "CLIP-I and ID": lambda one: (one.likeness["CLIP-I"], one.identity),
    }
    result = {}
    for name, values in pairs.items():
        all_pairs = [values(one) for one in drawn.values()]
        within = []
        for subject in SUBJECTS:
            of_subject = [values(one) for (other, _), one in drawn.items() if other == subject]
            within.append(correlation(*map(np.concatenate, zip(*of_subject, strict=True))))
        usable = [value for value in within if value is not None]
        means = np.array([(one.mean(), other.mean()) for one, other in all_pairs])
        result[name] = {
            "pictures": correlation(*map(np.concatenate, zip(*all_pairs, strict=True))),
            "within_subjects": dict(zip(SUBJECTS, within, strict=True)),
            "interval": scores.interval(usable) if len(usable) == len(SUBJECTS) else None,
            "adapters": correlation(means[:, 0], means[:, 1]),
        }
    return result


def invariants(drawn: Mapping[tuple[str, int], Drawn], real: Mapping[str, float]) -> dict[str, Any]:
    """For each order that must hold, the values of every subject, largest first, and whether it holds."""
    last = max(STEPS)
    rows = {
        "DINO: real, tuned, base": lambda s: (
            real[s], drawn[s, last].likeness["DINO"].mean(), drawn[s, 0].likeness["DINO"].mean()
        ),
        "DINO of tuned: own photos, other subjects'": lambda s: (
            drawn[s, last].likeness["DINO"].mean(), drawn[s, last].wrong_likeness.mean()
        ),
        "CLIP-T of tuned: own prompts, others'": lambda s: (
            drawn[s, last].clip_t[0].mean(), drawn[s, last].clip_t[1:].mean()
        ),
        "CLIP-T of base: own prompts, others'": lambda s: (
            drawn[s, 0].clip_t[0].mean(), drawn[s, 0].clip_t[1:].mean()
        ),
    }  # fmt: skip
    result = {}
    for name, row in rows.items():
        values = {subject: [float(value) for value in row(subject)] for subject in SUBJECTS}
        holds = {subject: list(v) == sorted(set(v), reverse=True) for subject, v in values.items()}
        result[name] = {"values": values, "holds_for": sum(holds.values()), "of": len(holds)}
    return result


def run(options: Options) -> dict[str, Any]:
    """Train judges, draw and score what is missing. Returns the results."""
    torch.set_num_threads(1)
    folders = {kind: judge_models.trained(kind, options.work) for kind in judges.FLAGS}
    dino, clip = (judges.load(judges.find(kind, str(folder))) for kind, folder in folders.items())
    protocol = Protocol(base=ROOT / "picturebook" / "model", seeds=1)
    studio = Studio(protocol)
    photo_rows = {}
    for subject in SUBJECTS:
        photos = [Image.open(path).convert("RGB") for path in photos_of(subject, options.work)[1]]
        photo_rows[subject] = {"dino": dino.embed_images(photos), "clip": clip.embed_images(photos)}
    drawn = {}
    for subject in SUBJECTS:
        prompts = subject_prompts(subject, WORD, protocol)
        for step in STEPS:
            images = pictures_of(subject, step, options.work, studio)
            drawn[subject, step] = judged(images, subject, photo_rows, dino, clip, prompts)
            print(subject, step, len(images), "pictures judged", flush=True)
    real = {
        subject: scores.mean_cosine(dino.embed_images(renders_of(subject)), photo_rows[subject]["dino"])
        for subject in SUBJECTS
    }
    means = {
        f"{subject} {step}": {
            "ID": one.identity.mean(), "PA": one.prompt[0].mean(), "DINO": one.likeness["DINO"].mean(),
            "CLIP-I": one.likeness["CLIP-I"].mean(), "CLIP-T": one.clip_t[0].mean(),
        }
        for (subject, step), one in drawn.items()
    }  # fmt: skip
    return {
        "pictures": sum(len(one.identity) for one in drawn.values()),
        "judges": {judge.name: judge.settings for judge in (dino, clip)},
        "training": {
            kind: json.loads((folder / "training.json").read_text()) for kind, folder in folders.items()
        },
        "correlations": correlations(drawn),
        "invariants": invariants(drawn, real),
        "means": {name: {k: rounded(float(v)) for k, v in row.items()} for name, row in means.items()},
    }


# ---- the page


def table(results: Mapping[str, Any]) -> str:
    """The section of docs/evidence.md."""
    seconds = {kind: about["cpu_seconds"] for kind, about in results["training"].items()}
    lines = [
        "DINO and CLIP know photos. For the drawn world `benchmarks/judge_models.py` trained stand-ins:"
        f" a ViTModel in {seconds['dino']:.0f} seconds of a thread and a CLIPModel in {seconds['clip']:.0f},",
        f"saved in the formats of the real ones. They judged {results['pictures']} pictures of"
        f" {len(SUBJECTS)} subjects, drawn by the base and by adapters after"
        f" {', '.join(map(str, STEPS[1:]))} steps.",
        "",
        "| judge and reader | r, single pictures | r within a subject, mean [interval over subjects]"
        " | r, means of adapters |",
        "|---|---|---|---|",
    ]
    for name, row in results["correlations"].items():
        lines.append(f"| {name} | {_shown(row['pictures'])} | {_within(row)} | {_shown(row['adapters'])} |")
    lines += [
        "",
        "| must fall from left to right | holds for | values, mean over subjects |",
        "|---|---|---|",
    ]
    for name, row in results["invariants"].items():
        means = np.mean(list(row["values"].values()), axis=0)
        falling = " > ".join(f"{value:.3f}" for value in means)
        lines.append(f"| {name} | {row['holds_for']} of {row['of']} subjects | {falling} |")
    prompt_mean = np.mean([row["PA"] for row in results["means"].values()])
    lines += [
        "",
        "r is Pearson's; `-` where a score has one value for all pictures of a subject. Real pictures are",
        "fresh renders of a subject: pictures that are nearer to the photos than these copy them. The base",
        f"follows its prompts (PA is {prompt_mean:.2f} on average), and CLIP-T does not tell which pictures",
        f"fail. So each picture was also compared with {OTHERS} other prompts, of which it shows a part.",
        "",
        "    .venv/bin/python -m benchmarks.judges --work runs/judges",
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _within(row: Mapping[str, Any]) -> str:
    """The mean over subjects of r within a subject, and its interval."""
    if row["interval"] is None:
        return "-"
    low, high = row["interval"]
    return f"{np.mean(list(row['within_subjects'].values())):.2f} [{low:.2f}, {high:.2f}]"


def main(options: Options) -> None:
    if not options.tables:
        options.results.write_text(json.dumps(run(options), indent=1) + "\n", encoding="utf-8")
    write_page(PAGE, MARKS, table(json.loads(options.results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
