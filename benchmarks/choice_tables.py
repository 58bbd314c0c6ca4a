"""The tables of benchmarks/choice.py: pure functions of its records. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import programs
from dreambooth.evaluation import choice
from picturebook.metrics import bootstrap_interval

MARKS = ("<!-- choice: begin -->", "<!-- choice: end -->")
PAGE = programs.ROOT / "docs" / "evidence.md"
SCORES = ("JOINT", "ID", "PA", "COPY")
# A run counts as over-trained if its last step loses this share of its best step's JOINT.
OVER_TRAINED = 0.15
MIDDLE = slice(3, 7)  # of the ten bands of timesteps
# The limit of the rule was chosen when the runs of these settings had been measured for these two subjects.
SEEN = {"rate": "2e-3", "prior": False, "text_encoder": True}
SEEN_SUBJECTS = ("car", "bird")
Record = Mapping[str, Any]


def ranks(values: Sequence[float]) -> np.ndarray:
    """The ranks of values, from 0; equal values share their mean rank."""
    array = np.asarray(values, dtype=float)
    order = np.argsort(np.argsort(array, kind="stable"), kind="stable").astype(float)
    return np.array([order[array == value].mean() for value in array])


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The rank correlation, -1 to 1; None if one of the two is constant."""
    a, b = ranks(first), ranks(second)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def steps_of(record: Record) -> list[int]:
    """The steps of a run that were scored."""
    return sorted(map(int, record["scores"]))


def score(record: Record, step: int, half: str, name: str = "JOINT") -> float:
    return float(record["scores"][str(step)][half][name])


def best_in_hindsight(record: Record, half: str) -> int:
    """The step with the highest JOINT of one half; the first of several."""
    return max(steps_of(record), key=lambda step: (score(record, step, half), -step))


def named(record: Record) -> choice.Choice:
    """What the rule of `best/` names, from all meter records of the run."""
    return choice.choose(record["meter"])


def judged(record: Record) -> dict[str, Any]:
    """JOINT at the named step, the best in hindsight and the last. The steps are found by one half of the
    pictures and judged by the other, both ways round; the two results are averaged."""
    steps, name = steps_of(record), named(record)
    row: dict[str, Any] = {"run": record["case"], "named": name.step, "why": name.why}
    row["worse_at"] = next((s for s in steps if choice.choose(_until(record, s)).worse), None)
    best = {half: best_in_hindsight(record, half) for half in ("hindsight", "judged")}
    row["best"] = [best["hindsight"], best["judged"]]
    if name.step is not None:
        row["JOINT_named"] = _mean(score(record, name.step, half) for half in best)
    row["JOINT_last"] = _mean(score(record, steps[-1], half) for half in best)
    row["JOINT_best"] = _mean(
        [score(record, best["hindsight"], "judged"), score(record, best["judged"], "hindsight")]
    )
    row["JOINT_best_same_pictures"] = max(_mean(score(record, s, half) for half in best) for s in steps)
    row["over_trained"] = row["JOINT_last"] < (1 - OVER_TRAINED) * row["JOINT_best"]
    return row


def _until(record: Record, step: int) -> list[Mapping[str, Any]]:
    return [meter for meter in record["meter"] if meter["step"] <= step]


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


# --- rank correlations


def meters(record: Record) -> dict[str, dict[int, list[float]]]:
    """By meter, the values of each band at each scored step. The losses are relative to step 0."""
    by_step = {meter["step"]: meter["meter"] for meter in record["meter"]}
    steps, start = steps_of(record), by_step[0]
    series: dict[str, dict[int, list[float]]] = {}
    for name in start:
        if isinstance(start[name], dict):
            series[name] = {step: list(by_step[step][name]["bands"]) for step in steps}
    for name in [name for name in series if name.startswith("loss")]:
        before = start[name]["bands"]
        series[f"{name}, lower than at step 0"] = {
            step: [1 - value / first for value, first in zip(values, before, strict=True)]
            for step, values in series.pop(name).items()
        }
    return series


def correlations(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each meter, and the number of the step, the rank correlation with each score over the steps of a
    run, averaged over runs: by band, over the middle bands and over all."""
    rows = []
    names = list(dict.fromkeys(name for record in records for name in meters(record)))
    parts = {"all bands": slice(0, 10), "middle bands": MIDDLE, "low bands": choice.LOW}
    parts |= {f"band {number}": slice(number, number + 1) for number in range(10)}
    for name in names:
        series = [(r, meters(r)[name]) for r in records if name in meters(r)]
        for part, bands in parts.items():
            means = [(r, [_mean(values[bands]) for values in by_step.values()]) for r, by_step in series]
            rows.append({"meter": name, "bands": part, **_correlation(means)})
    by_number = _correlation([(r, steps_of(r)) for r in records])
    return [
        {"meter": "number of the step", "bands": "", **by_number},
        *rows,
    ]


def _correlation(series: Sequence[tuple[Record, Sequence[float]]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in SCORES:
        values = [
            spearman(
                values,
                [_mean(score(r, s, half, name) for half in ("hindsight", "judged")) for s in steps_of(r)],
            )
            for r, values in series
        ]
        known = [value for value in values if value is not None]
        means[name] = round(_mean(known), 3) if known else None
    return means


# --- tables


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The figures over all runs, with 95 % intervals over subjects."""
    rows = [row for row in map(judged, records) if row["named"] is not None]
    over = [row for row in rows if row["over_trained"]]
    shares = [row for row in rows if row["JOINT_best"] > 0]
    unseen = [row for row in shares if not _is_seen(row["run"])]
    return {
        "runs": len(rows),
        "share_of_best": _over_subjects(shares, lambda row: row["JOINT_named"] / row["JOINT_best"]),
        "share_of_best_unseen": _over_subjects(unseen, lambda row: row["JOINT_named"] / row["JOINT_best"]),
        "last_share_of_best": _over_subjects(shares, lambda row: row["JOINT_last"] / row["JOINT_best"]),
        "over_trained": len(over),
        "named_minus_last_over_trained": _over_subjects(
            over, lambda row: row["JOINT_named"] - row["JOINT_last"]
        ),
        "named_minus_last": _over_subjects(rows, lambda row: row["JOINT_named"] - row["JOINT_last"]),
    }


def _is_seen(case: Mapping[str, Any]) -> bool:
    return case["subject"] in SEEN_SUBJECTS and all(case[name] == value for name, value in SEEN.items())


def _over_subjects(
    rows: Sequence[Mapping[str, Any]], value_of: Callable[[Mapping[str, Any]], float]
) -> dict[str, float] | None:
    by_subject: dict[str, list[float]] = {}
    for row in rows:
        by_subject.setdefault(row["run"]["subject"], []).append(value_of(row))
    if not by_subject:
        return None
    low, high = bootstrap_interval(by_subject)
    mean = _mean(_mean(values) for values in by_subject.values())
    return {"mean": round(mean, 3), "low": round(low, 3), "high": round(high, 3), "subjects": len(by_subject)}


def table(records: Sequence[Record], runs_in_all: int) -> str:
    """The text of the page."""
    lines = [
        f"{len(records)} of {runs_in_all} runs are measured.",
        "",
        "| run | named | best in hindsight | JOINT named | best | last | worse from |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in map(judged, records):
        case = row["run"]
        title = f"{case['subject']}, {case['rate']}, {'prior' if case['prior'] else 'no prior'}, "
        title += f"{'UNet and text' if case['text_encoder'] else 'UNet'}"
        best = " / ".join(map(str, dict.fromkeys(row["best"])))
        cells = [
            *(title, row["named"] or "none", best, _cell(row.get("JOINT_named")), _cell(row["JOINT_best"])),
            *(_cell(row["JOINT_last"]), row["worse_at"] or "never"),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    figures = summary(records)
    lines += ["", "| over all runs | mean | 95 % interval over subjects |", "|---|---|---|"]
    for title, key in (
        ("JOINT at the named step, as a share of the best step's", "share_of_best"),
        ("the same, runs that the limit of the rule was not chosen on", "share_of_best_unseen"),
        ("JOINT at the last step, as a share of the best step's", "last_share_of_best"),
        ("JOINT at the named step less that at the last, all runs", "named_minus_last"),
        (f"the same, {figures['over_trained']} over-trained runs", "named_minus_last_over_trained"),
    ):
        if value := figures[key]:
            interval = f"{value['low']:.2f} to {value['high']:.2f}, {value['subjects']} subjects"
            lines.append(f"| {title} | {value['mean']:.2f} | {interval} |")
    lines += ["", "Rank correlation with the reader's scores over the steps of a run, mean over runs:", ""]
    lines += ["| meter | bands | JOINT | ID | PA | COPY |", "|---|---|---|---|---|---|"]
    for row in correlations(records):
        if not row["bands"].startswith("band "):
            values = " | ".join(_cell(row[name]) for name in SCORES)
            lines.append(f"| {row['meter']} | {row['bands']} | {values} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write(records: Sequence[Record], runs_in_all: int) -> None:
    """Write the table between its marks in docs/evidence.md."""
    programs.write_page(PAGE, MARKS, table(records, runs_in_all))
