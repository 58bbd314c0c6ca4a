"""Holds claims about the method against the embedded base: docs/evidence.md (hours of CPU).

    python -m benchmarks.claims --work runs/claims      # trains, draws and scores what is missing
    python -m benchmarks.claims --tables                # writes docs/evidence.md from the results

Every scored adapter is one line of the results, under a key of its whole configuration. What is there is not
run again, so that the command may be stopped at any time. Processes may share the work by --subjects, but
each subject belongs to one of them.
"""

import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tyro

from benchmarks import claims_arms, claims_masks, claims_pairs, claims_tables
from benchmarks.claims_arms import (
    ARMS,
    BY_NAME,
    CURVE,
    KIND_FLAGS,
    SEARCH_RATES,
    SEARCH_SEED,
    SEARCH_STEP,
    SEARCH_SUBJECTS,
    WORD,
    Arm,
)
from benchmarks.claims_mask_arms import MASK_ARMS, MASK_CLAIM
from benchmarks.claims_pair_arms import PAIR_ARMS, PAIR_CLAIM, PAIRS
from benchmarks.claims_runs import (
    Protocol,
    Results,
    Studio,
    adapters_after,
    base_key,
    score_arm,
    score_base,
    training_of,
)
from benchmarks.programs import ROOT, write_page

RESULTS = ROOT / "benchmarks" / "results" / "claims.jsonl"
PAGE = ROOT / "docs" / "evidence.md"


@dataclasses.dataclass
class Options:
    """Run what is missing of the claims, or write their tables."""

    tables: bool = False
    """Write docs/evidence.md from the results, and run nothing."""
    work: Path = Path("runs/claims")
    """Folder for photos, class images and adapters."""
    results: Path = RESULTS
    """File of the results."""
    subjects: tuple[str, ...] = claims_arms.SUBJECTS
    """Subjects that this process runs."""
    seeds: tuple[int, ...] = claims_arms.SEEDS
    """Seeds of training."""
    arms: tuple[str, ...] = ()
    """Names of the arms to run; none means all."""


@dataclasses.dataclass(frozen=True)
class Job:
    """An arm with one subject and seed."""

    arm: Arm
    rate: float
    subject: str
    seed: int


def search_arm(kind: str, rate: float) -> Arm:
    return Arm(f"search-{kind}", kind, KIND_FLAGS[kind], (SEARCH_STEP,), rate=rate)


def best_rate(kind: str, protocol: Protocol, results: Results) -> float | None:
    """The rate of the search with the highest mean JOINT (then ID); None while runs are missing."""
    means = {}
    for rate in SEARCH_RATES[kind]:
        trainings = [
            training_of(search_arm(kind, rate), rate, subject, SEARCH_SEED) for subject in SEARCH_SUBJECTS
        ]
        keys = [training.result_key(protocol, SEARCH_STEP, WORD) for training in trainings]
        if not results.records.keys() >= set(keys):
            return None
        scores = [results.records[key]["scores"] for key in keys]
        means[rate] = tuple(sum(s[name] for s in scores) / len(scores) for name in ("JOINT", "ID"))
    return max(means, key=means.__getitem__)


def rate_of(arm: Arm, protocol: Protocol, results: Results) -> float | None:
    """The arm's rate; None if it is one that the search has not chosen yet."""
    return arm.rate or best_rate(arm.name.removeprefix("best-"), protocol, results)


def sharing(job: Job) -> list[Arm]:
    """The arms, the job's own among them, that draw with the adapters of the job's training."""
    settings = (job.arm.flags, job.arm.class_images, job.arm.init, job.rate)
    shared = [arm for arm in ARMS if (arm.flags, arm.class_images, arm.init, arm.rate) == settings]
    return [job.arm, *(arm for arm in shared if arm != job.arm and job.seed in claims_arms.SEEDS)]


def search_jobs(subject: str) -> Iterator[Job]:
    """The runs that choose the rate of each kind of adapter."""
    for kind, rates in SEARCH_RATES.items():
        for rate in rates:
            yield Job(search_arm(kind, rate), rate, subject, SEARCH_SEED)


def jobs(options: Options, protocol: Protocol, results: Results) -> Iterator[Job]:
    """The runs in order of worth: for each seed the long ones and those that draw with their adapters, of all
    subjects; then the others by subject.

    Arms whose rate is not chosen yet are left out.
    """
    long = [arm for arm in ARMS if max(arm.steps) == max(CURVE) or arm.name in ("other-word", "no-word")]
    short = [arm for arm in ARMS if arm not in long]
    for seed in options.seeds:
        for arm in long:
            yield from (Job(arm, arm.rate or 0, subject, seed) for subject in options.subjects)
        for subject in options.subjects:
            if seed == options.seeds[0] and subject in SEARCH_SUBJECTS:
                yield from search_jobs(subject)
            for arm in short:
                rate = rate_of(arm, protocol, results)
                if rate is not None:
                    yield Job(arm, rate, subject, seed)


def run(job: Job, studio: Studio, results: Results, work: Path) -> int:
    """Train, draw and score what the results lack of a job. Returns how many adapters were scored."""
    protocol, training = studio.protocol, training_of(job.arm, job.rate, job.subject, job.seed)
    missing = [
        step
        for step in job.arm.steps
        if training.result_key(protocol, step, job.arm.word, job.arm.averaged) not in results.records
    ]
    if not missing:
        return 0
    arms = sharing(job)
    steps = max(step for arm in arms for step in arm.steps)
    folder = adapters_after(training, protocol, work, steps)
    for step in missing:
        started = time.monotonic()
        results.add(score_arm(studio, job.arm, training, step, folder, work))
        print(
            f"{time.strftime('%H:%M:%S')} {job.arm.name} {job.subject} seed {job.seed} step {step}: "
            f"scored in {time.monotonic() - started:.0f} s",
            flush=True,
        )
    if len(arms) == 1 and steps < max(CURVE):  # adapters of long runs are kept for other experiments
        shutil.rmtree(folder)
    return len(missing)


def run_all(options: Options, protocol: Protocol) -> None:
    """Run all jobs, and once more those whose rate was chosen meanwhile."""
    results = Results(options.results)
    studio = Studio(protocol)
    for subject in options.subjects:
        if base_key(protocol, subject) not in results.records:
            results.add(score_base(studio, subject, options.work))
    count = 1
    while count:
        count = 0
        for job in jobs(options, protocol, results):
            if not options.arms or job.arm.name in options.arms:
                count += run(job, studio, results, options.work)
                results.read()
    run_pairs(options, studio, results)
    run_masks(options, studio, results)


def run_pairs(options: Options, studio: Studio, results: Results) -> None:
    """Run the ways to draw two subjects, for the pairs whose first subject this process runs."""
    pairs = [pair for pair in PAIRS if pair[0] in options.subjects]
    for seed, pair, arm in itertools.product(options.seeds, pairs, PAIR_ARMS):
        is_chosen = not options.arms or arm.name in options.arms
        if is_chosen and claims_pairs.result_key(arm, pair, seed, studio.protocol) not in results.records:
            results.add(claims_pairs.score_pair(studio, arm, pair, seed, options.work))
            print(f"{time.strftime('%H:%M:%S')} {arm.name} {'+'.join(pair)} seed {seed}", flush=True)


def run_masks(options: Options, studio: Studio, results: Results) -> None:
    """Run what is missing of the subjects that stand before one background."""
    for seed, subject, arm in itertools.product(options.seeds, options.subjects, MASK_ARMS):
        is_chosen = not options.arms or arm.name in options.arms
        if is_chosen and claims_masks.result_key(arm, subject, seed, studio.protocol) not in results.records:
            results.add(claims_masks.score_mask_arm(studio, arm, subject, seed, options.work))
            print(f"{time.strftime('%H:%M:%S')} {arm.name} {subject} seed {seed}", flush=True)


# ---- tables


def table_of(protocol: Protocol, results: Results) -> claims_tables.Table:
    """The scores by arm and step, then by subject and seed, found by the keys of their configurations."""
    table: dict[tuple[str, int], dict[tuple[str, int], dict[str, float]]] = {}
    pairs = list(itertools.product(claims_arms.SUBJECTS, claims_arms.SEEDS))
    for subject, seed in pairs:
        if record := results.records.get(base_key(protocol, subject)):
            table.setdefault(claims_arms.BASE, {})[subject, seed] = record["scores"]
    for arm in ARMS:
        rate = rate_of(arm, protocol, results)
        for (subject, seed), step in itertools.product(pairs, arm.steps if rate else ()):
            training = training_of(arm, rate or 0, subject, seed)
            if record := results.records.get(training.result_key(protocol, step, arm.word, arm.averaged)):
                table.setdefault((arm.name, step), {})[subject, seed] = record["scores"]
    for pair, seed, way in itertools.product(PAIRS, claims_arms.SEEDS, PAIR_ARMS):
        if record := results.records.get(claims_pairs.result_key(way, pair, seed, protocol)):
            table.setdefault((way.name, 0), {})["+".join(pair), seed] = record["scores"]
    for (subject, seed), masked in itertools.product(pairs, MASK_ARMS):
        if record := results.records.get(claims_masks.result_key(masked, subject, seed, protocol)):
            table.setdefault((masked.name, 0), {})[subject, seed] = record["scores"]
    return table


def write_tables(protocol: Protocol, results: Results, page: Path) -> None:
    """Write the tables of a page between its marks, and the plots beside it."""
    table = table_of(protocol, results)
    notes = {}
    for kind in SEARCH_RATES:
        rate = best_rate(kind, protocol, results)
        notes[f"best-{kind}"] = f", rate {rate:g}" if rate else ", rate not chosen yet"
    begin, end = claims_tables.MARKS
    write_page(page, (begin.format("summary"), end.format("summary")), claims_tables.summary_table(table))
    for claim in (*claims_arms.CLAIMS, PAIR_CLAIM, MASK_CLAIM):
        plot = (
            page.with_name(f"evidence_{claim.letter}.svg") if claims_tables.has_runs(claim, table) else None
        )
        if plot:
            claims_tables.plot(claim, table, plot)
        text = claims_tables.section(claim, table, notes, plot)
        write_page(page, (begin.format(claim.letter), end.format(claim.letter)), text)


def main(options: Options) -> None:
    names = [
        *BY_NAME,
        *(f"search-{kind}" for kind in SEARCH_RATES),
        *(arm.name for arm in (*PAIR_ARMS, *MASK_ARMS)),
    ]
    if unknown := sorted(set(options.arms) - set(names)):
        sys.exit(f"error: --arms: no arm is called {', '.join(unknown)}; there are {', '.join(names)}")
    protocol = Protocol(base=ROOT / "picturebook" / "model")
    if options.tables:
        write_tables(protocol, Results(options.results), PAGE)
    else:
        run_all(options, protocol)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
