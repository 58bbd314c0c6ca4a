"""Judges the named checkpoint: is it as good as the best one in hindsight, and better than the last?

    python -m benchmarks.choice --work FOLDER

Trains runs far into over-training on the embedded base. Each is measured every 50 steps, on a photo that is
held out. The reader then scores every checkpoint, on prompts and seeds that nothing else uses, in two halves:
one finds the best step in hindsight, the other judges it, the named step and the last one. Takes hours on two
cores. A second start goes on where the first one ended, and after every run the table of what is finished is
written: `benchmarks/results/choice.json`, and docs/evidence.md.
"""

import dataclasses
import json
import os
import random
import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from benchmarks import choice_tables, programs
from benchmarks.claims_runs import Protocol, Studio, train
from dreambooth.adapter_files import native
from picturebook import metrics
from picturebook.read import read
from picturebook.subjects import FOLDER, load_subject
from picturebook.world import ACCESSORIES, ACCESSORY_COLOURS, PLACES, describe, with_article

RESULTS = Path(__file__).parent / "results" / "choice.json"
BASE = programs.ROOT / "picturebook" / "model"
STEPS, EVERY = 800, 100
HALVES = ("hindsight", "judged")
PICTURES = 24  # of each half, for each checkpoint
PROTOCOL = Protocol(base=BASE)  # how pictures are drawn
HELD_OUT = 1  # photos of a subject's five


@dataclasses.dataclass(frozen=True)
class Case:
    """One run. Settings that are no field are those of the demo."""

    subject: str
    rate: str
    prior: bool
    text_encoder: bool
    seed: int

    @property
    def name(self) -> str:
        parts = ("prior" if self.prior else "alone", "text" if self.text_encoder else "unet")
        return f"{self.subject}-{self.rate}-{'-'.join(parts)}-seed{self.seed}"

    def words(self, work: Path) -> list[str]:
        """The command line of the run."""
        prior_words = [
            *("--with_prior_preservation", "--class_data_dir", str(work / f"class-{self.subject}")),
            *("--num_class_images", "64"),
            *("--sample_batch_size", "16", "--class_guidance_scale", "3.0", "--class_scheduler", "base"),
            *("--prior_generation_precision", "fp32", "--class_inference_steps", "25"),
        ]
        return [
            *("--pretrained_model_name_or_path", str(BASE)),
            *("--instance_data_dir", str(FOLDER / self.subject), "--holdout", str(HELD_OUT)),
            *("--instance_prompt", f"a photo of a sks {self.subject}"),
            *("--class_prompt", f"a photo of a {self.subject}", "--output_dir", str(work / self.name)),
            *("--resolution", "64", "--rank", "8", "--train_batch_size", "4", "--report_to", "none"),
            *("--learning_rate", self.rate, "--lr_scheduler", "constant", "--lr_warmup_steps", "20"),
            *("--max_train_steps", str(STEPS), "--checkpointing_steps", str(EVERY)),
            *("--meter_steps", str(EVERY), "--seed", str(self.seed), "--num_threads", "1"),
            *("--resume_from_checkpoint", "latest"),
            *(["--train_text_encoder"] if self.text_encoder else []),
            *(prior_words if self.prior else []),
        ]


def cases() -> list[Case]:
    """All runs. The first ones are of all subjects, so that a part of them is a table already."""
    arms = (("2e-3", False, True), ("1e-3", True, True), ("2e-3", False, False))
    subjects = ("car", "bird", "dog", "cat")
    return [
        Case(subject, *arm, seed=number)
        for number, arm in enumerate(arms)
        for subject in subjects
    ]  # fmt: skip


def prompts_of(kind: str) -> dict[str, list[tuple[str, int]]]:
    """For each half, the prompts with their seeds. A third of the prompts name a place, a third an accessory,
    a third both. No prompt has the words of the demo's prompts."""
    jobs: dict[str, list[tuple[str, int]]] = {}
    for half in HALVES:
        rng, drawn = random.Random(f"{half} half of choice"), []
        for number in range(PICTURES):
            place = rng.choice(tuple(PLACES)) if number % 3 != 1 else None
            worn = (rng.choice(ACCESSORIES), rng.choice(tuple(ACCESSORY_COLOURS))) if number % 3 else ()
            prompt = f"a picture of {with_article(f'sks {describe(kind, None, place, *worn)}')}"
            drawn.append((prompt, zlib.crc32(f"{half} {number}".encode())))
        jobs[half] = drawn
    return jobs


class Scorer:
    """Draws with checkpoints of runs of one subject, and reads the pictures."""

    def __init__(self, studio: Studio, subject: str):
        self.studio = studio
        self.kind, self.colour, self.identity = load_subject(FOLDER / subject)
        self.jobs = prompts_of(self.kind)
        photos = sorted((FOLDER / subject).glob("*.png"))[:-HELD_OUT]
        self.trained = [Image.open(path).convert("RGB") for path in photos]
        self.limit = metrics.copy_limit(self.kind, self.colour, self.identity)

    def scores(self, adapter: Path) -> dict[str, dict[str, float]]:
        """The scores of each half, with an adapter file."""
        with self.studio.adapted([(adapter, 1.0)]):
            return {half: self._scores(jobs) for half, jobs in self.jobs.items()}

    def _scores(self, jobs: Sequence[tuple[str, int]]) -> dict[str, float]:
        prompts, seeds = zip(*jobs, strict=True)
        images = self.studio.draw(prompts, seeds)
        readings = list(map(read, images))
        scores = metrics.subject_scores(readings, prompts, self.kind, self.colour, self.identity)
        copied = metrics.copied(images, self.trained, self.limit)
        return {name: scores[name] for name in ("ID", "PA", "JOINT", "valid")} | {"COPY": copied}


def measured(case: Case, studio: Studio, work: Path) -> dict[str, Any]:
    """The record of a run: meter records by step and scores by step. What an earlier start has scored is kept
    in the run's folder; adapters are removed when all are scored."""
    done = work / f"{case.name}.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    folder, partial = work / case.name, work / f"{case.name}.scores.json"
    train(case.words(work))
    scores = json.loads(partial.read_text()) if partial.exists() else {}
    scorer = Scorer(studio, case.subject)
    for step in range(EVERY, STEPS + 1, EVERY):
        if str(step) not in scores:
            scores[str(step)] = scorer.scores(folder / f"checkpoint-{step}" / native.ADAPTER_NAME)
            _write(partial, scores)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    meter = [bands_of(record) for record in map(json.loads, lines) if "meter" in record]
    record = {"case": dataclasses.asdict(case), "meter": meter, "scores": scores}
    _write(done, record)
    shutil.rmtree(folder)
    partial.unlink()
    return record


def bands_of(record: dict[str, Any]) -> dict[str, Any]:
    """A meter record with the bands of each measure alone."""
    measures = {name: value for name, value in record["meter"].items() if isinstance(value, dict)}
    bands = {name: [programs.rounded(band) for band in value["bands"]] for name, value in measures.items()}
    return {"step": record["step"], "meter": {name: {"bands": values} for name, values in bands.items()}}


def _write(path: Path, value: object) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value) + "\n")
    os.replace(beside, path)


@dataclasses.dataclass
class Options:
    """Where to work."""

    work: Path
    """Folder for runs, and for what was measured of them."""
    minutes: float | None = None
    """Begin no further run after this time."""
    only: str | None = None
    """Measure the runs whose names contain this text alone."""


def main(options: Options) -> None:
    """Measure all runs, and write the table after each."""
    studio = Studio(PROTOCOL)
    options.work.mkdir(parents=True, exist_ok=True)
    start, records = time.monotonic(), []
    for case in cases():
        late = options.minutes is not None and time.monotonic() - start > 60 * options.minutes
        skipped = late or (options.only is not None and options.only not in case.name)
        if skipped and not (options.work / f"{case.name}.json").exists():
            continue
        records.append(measured(case, studio, options.work))
        report = {
            "device": studio.device_name,
            "versions": programs.versions(),
            "settings": {
                "steps": STEPS,
                "pictures_of_a_half": PICTURES,
                "inference_steps": PROTOCOL.sampling_steps,
                "guidance_scale": PROTOCOL.guidance_scale,
            },
            "runs_in_all": len(cases()),
            "runs": records,
        }
        RESULTS.write_text(json.dumps(report) + "\n")
        choice_tables.write(records, len(cases()))
        print(case.name, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
