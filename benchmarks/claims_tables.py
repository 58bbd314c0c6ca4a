"""Verdicts, tables and plots of benchmarks/claims.py, from its results."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.claims_arms import BASE, BY_NAME, CLAIMS, SEEDS, SUBJECTS, Claim, Part
from benchmarks.claims_mask_arms import LABELS as MASK_LABELS
from benchmarks.claims_pair_arms import LABELS
from picturebook.metrics import bootstrap_interval

Scores = Mapping[str, float]
Table = Mapping[tuple[str, int], Mapping[tuple[str, int], Scores]]
"""(arm, step) -> (subject, seed) -> scores. The base has the same scores for every seed."""

EXPECTED = len(SUBJECTS) * len(SEEDS)
FEWEST_SUBJECTS = 3  # of a verdict that can still change
MARKS = ("<!-- claims {} begin -->", "<!-- claims {} end -->")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a part of a claim came out."""

    mean: float
    low: float
    high: float
    """Bootstrap interval over subjects, 95 %."""
    on_side: int
    """Number of (subject, seed) whose own value is within the limit."""
    count: int
    """Number of (subject, seed) with all terms."""
    word: str
    """`held`, `failed` or `not decided`, with `so far` while runs are missing; `unfinished` with runs of one
    or two subjects only."""


def values_of(part: Part, table: Table) -> dict[str, list[float]]:
    """By subject, the sum of the part's terms for each seed for which all are there."""
    rows = [table.get((term.arm, term.step), {}) for term in part.terms]
    pairs = set(rows[0]).intersection(*rows[1:])
    values: dict[str, list[float]] = {}
    for subject, seed in sorted(pairs):
        scores = [row[subject, seed][part.score] for row in rows]
        total = sum(term.factor * score for term, score in zip(part.terms, scores, strict=True))
        values.setdefault(subject, []).append(total)
    return values


def verdict_of(part: Part, values: Mapping[str, Sequence[float]], expected: int = EXPECTED) -> Verdict | None:
    """The verdict on a part; None without values.

    It held if the complete interval is within the limit, and failed if none of it is. Otherwise it is not
    decided.
    """
    if not values:
        return None
    # scores are rounded to four digits; a difference of rounding is none
    sign, near = (1 if part.is_least else -1), 1e-6
    low, high = bootstrap_interval(values)
    worst, best = sorted((sign * low, sign * high))
    limit = sign * part.limit
    word = "held" if worst >= limit - near else "failed" if best < limit - near else "not decided"
    flat = [value for of_subject in values.values() for value in of_subject]
    on_side = sum(sign * value >= limit - near for value in flat)
    mean = fmean(fmean(of_subject) for of_subject in values.values())
    if len(values) < FEWEST_SUBJECTS:
        word = "unfinished"
    elif len(flat) < expected:
        word += " so far"
    return Verdict(mean, low, high, on_side, len(flat), word)


# ---- tables


def mean_of(rows: Mapping[tuple[str, int], Scores], score: str) -> float | None:
    """Mean over subjects of the means over seeds; None if no run has the score."""
    by_subject: dict[str, list[float]] = {}
    for (subject, _), scores in rows.items():
        if score in scores:
            by_subject.setdefault(subject, []).append(scores[score])
    return fmean(map(fmean, by_subject.values())) if by_subject else None


def label_of(arm: str, step: int) -> str:
    """The name of a row. Arms with two subjects, and those with masks, are drawn after a fixed number of
    steps, and have step 0."""
    labels = {"base": "base, no adapter"} | LABELS | MASK_LABELS
    return labels[arm] if step == 0 else f"{BY_NAME[arm].label}, {step} steps"


def scores_table(claim: Claim, table: Table, notes: Mapping[str, str]) -> str:
    """A row for each arm and step of the claim that has runs, with the mean of every score. `notes` are added
    to labels."""
    lines = [f"| | runs | {' | '.join(claim.columns)} |", "|---|---|" + "---|" * len(claim.columns)]
    for arm, step in claim.rows:
        rows = table.get((arm, step))
        if not rows:
            continue
        means = [mean_of(rows, name) for name in claim.columns]
        cells = ["-" if mean is None else f"{mean:.2f}" for mean in means]
        count = len({subject for subject, _ in rows}) if arm == "base" else len(rows)
        lines.append(f"| {label_of(arm, step)}{notes.get(arm, '')} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts_table(claim: Claim, table: Table) -> str:
    """A row for each part of the claim: limit, difference, interval, sign count and verdict."""
    lines = [
        "| stated before | score | limit | measured [95 % interval over subjects] | within | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for part in claim.parts:
        verdict = verdict_of(part, values_of(part, table))
        limit = f"{'>=' if part.is_least else '<='} {part.limit:+.2f}"
        if verdict is None:
            lines.append(f"| {part.sentence} | {part.score} | {limit} | no runs yet | 0/0 | unfinished |")
            continue
        measured = f"{verdict.mean:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}]"
        count = f"{verdict.on_side}/{verdict.count}"
        lines.append(
            f"| {part.sentence} | {part.score} | {limit} | {measured} | {count} | **{verdict.word}** |"
        )
    return "\n".join(lines)


def summary_table(table: Table) -> str:
    """One row for each claim: how many of its parts held, failed, and are not decided."""
    lines = ["| claim | held | failed | not decided | pairs of runs |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        verdicts = [verdict_of(part, values_of(part, table)) for part in claim.parts]
        words = [v.word.removesuffix(" so far") if v else "none" for v in verdicts]
        fewest = min(v.count if v else 0 for v in verdicts)
        state = f"{fewest} of {EXPECTED}" + ("" if fewest >= EXPECTED else " (unfinished)")
        counts = [str(words.count(word)) for word in ("held", "failed", "not decided")]
        lines.append(
            f"| [({claim.letter})](#claim-{claim.letter}) {claim.title} | {' | '.join(counts)} | {state} |"
        )
    return "\n".join(lines)


def has_runs(claim: Claim, table: Table) -> bool:
    """Whether an arm of the claim has a run."""
    return any(row in table for row in claim.rows if row != BASE)


def section(claim: Claim, table: Table, notes: Mapping[str, str], plot: Path | None) -> str:
    """The text of one claim in the page: what is known of it so far."""
    parts = [verdicts_table(claim, table)]
    if plot:
        parts.append(f"![Plot of claim {claim.letter}]({plot.name})")
    if has_runs(claim, table):
        parts.append(scores_table(claim, table, notes))
    return "\n\n".join(parts)


# ---- plots


def plot(claim: Claim, table: Table, path: Path) -> None:
    """An SVG file with one panel a score: curves over steps if an arm has three of them, otherwise a point
    with its interval for each arm. The same results give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options: dict[Any, Any] = {"svg.hashsalt": claim.letter, "svg.fonttype": "none", "font.size": 9}
    steps = [step for arm, step in claim.rows if arm == claim.rows[0][0]]
    with matplotlib.rc_context(options):
        width = 3.1 * len(claim.plotted)
        height = 3.2 if len(steps) > 2 else 0.9 + 0.28 * len(claim.rows)
        figure, axes = pyplot.subplots(1, len(claim.plotted), figsize=(width, height), sharey=len(steps) <= 2)
        for axis, score in zip(axes, claim.plotted, strict=True):
            (_curves if len(steps) > 2 else _points)(axis, claim, table, score)
            axis.set_title(score)
            axis.grid(alpha=0.3)
        if len(steps) > 2:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
            figure.subplots_adjust(bottom=0.34, top=0.9, left=0.06, right=0.98)
        else:
            figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _curves(axis: Any, claim: Claim, table: Table, score: str) -> None:
    """Means over subjects against steps, one line an arm, with the base's mean dotted."""
    for arm in dict.fromkeys(arm for arm, _ in claim.rows):
        points = [(step, mean_of(table.get((arm, step), {}), score)) for step in BY_NAME[arm].steps]
        known = [(step, mean) for step, mean in points if mean is not None]
        if known:
            axis.plot(*zip(*known, strict=True), marker="o", markersize=3, label=BY_NAME[arm].label)
    base = mean_of(table.get(BASE, {}), score)
    if base is not None:
        axis.axhline(base, color="grey", linestyle=":", label="base, no adapter")
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("steps")


def _points(axis: Any, claim: Claim, table: Table, score: str) -> None:
    """Mean and interval over subjects for each row of the claim's table."""
    labels = [label_of(arm, step) for arm, step in claim.rows]
    for height, (arm, step) in enumerate(claim.rows):
        by_subject: dict[str, list[float]] = {}
        for (subject, _), scores in table.get((arm, step), {}).items():
            by_subject.setdefault(subject, []).append(scores.get(score, math.nan))
        if by_subject and not any(math.isnan(v) for values in by_subject.values() for v in values):
            low, high = bootstrap_interval(by_subject)
            mean = fmean(map(fmean, by_subject.values()))
            axis.plot([low, high], [height, height], color="tab:blue")
            axis.plot([mean], [height], "o", color="tab:blue", markersize=4)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
