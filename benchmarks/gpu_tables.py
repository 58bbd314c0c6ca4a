"""The tables of the GPU benchmark, in README.md and docs/speed.md, from its results. Imports no torch.

    python -m benchmarks.gpu_tables

writes them anew from benchmarks/results/gpu.json, which may have been measured on another machine.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu_cases import (
    BARE,
    BARE_REPLAYED,
    CASES,
    COMPILED,
    CORE_CASES,
    DRAWING,
    EXAMPLE,
    HASHES,
    LAUNCHED,
    PLAIN,
    REPLAYED,
    RESULTS,
    TRAINING,
)
from benchmarks.programs import ROOT, write_page

README, PAGE = ROOT / "README.md", ROOT / "docs" / "speed.md"
MARKS = ("<!-- gpu: written by python -m benchmarks.gpu -->", "<!-- gpu end -->")
NOT_MEASURED = (
    "Replayed steps have not been measured on a card yet."  # stands there while there are no results
)
COLUMNS = (*TRAINING, *BARE)
MEASURED = "card, day"
Rows = Mapping[str, Mapping[str, Any]]  # the figures of a case, by program


def number(value: float) -> str:
    """Four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def milliseconds(figures: Mapping[str, Any]) -> str:
    return number(1000 * figures["step_s"])


def cell(rows: Rows, program: str, show: Callable[[Mapping[str, Any]], str]) -> str:
    """A figure of a program; "" if it was not measured."""
    figures = rows.get(program, {})
    if "failed" in figures:
        return "failed"
    try:
        text = show(figures)
    except KeyError:
        return ""
    # a run that should have replayed its steps and did not
    is_launched = program in (REPLAYED, COMPILED) and figures.get("graph", "").startswith("launched")
    return f"{text} (launched)" if is_launched else text


def ratio(rows: Rows, of: str, to: str, key: str = "step_s") -> str:
    """How many times as large a figure of `of` is as that of `to`; "" if one is missing."""
    above, below = (rows.get(program, {}).get(key) for program in (of, to))
    return f"{above / below:.2f}" if above and below else ""


def equal(rows: Rows, one: str, other: str, *keys: str) -> str:
    """Whether the hashes of two programs are equal; "" if one is missing."""
    values = [[rows.get(program, {}).get(key) for key in keys] for program in (one, other)]
    return "" if None in (*values[0], *values[1]) else "equal" if values[0] == values[1] else "**different**"


def origin(rows: Rows, card: str) -> str:
    """The card, and the day or days of the figures."""
    days = sorted({figures["date"] for figures in rows.values()})
    return f"{card.removeprefix('NVIDIA ')}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one; [] if it has no rows."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows, ""] if rows else []


def tables(report: Mapping[str, Any]) -> str:
    """The tables of docs/speed.md, and the sentences on how they were measured."""
    cases: Mapping[str, Rows] = report["cases"]
    card = report["card"]

    def measuring(what: str) -> dict[str, Rows]:
        return {name: rows for name, rows in cases.items() if CASES[name].measures == what}

    training = measuring("steps")
    lines = [
        *_of_training(training, card, "milliseconds a step", milliseconds),
        *_of_ratios(training),
        *_of_training(
            training, card, "seconds to the first step", lambda figures: number(figures["first_step_s"])
        ),
        *_of_training(
            training,
            card,
            "GiB allocated, reserved",
            lambda figures: f"{figures['peak_gib']:.2f}, {figures['reserved_gib']:.2f}",
        ),
        *_of_drawing(measuring("pictures"), card),
        *_of_hashes(measuring("hashes"), card),
        *_of_whole(measuring("whole run"), card),
    ]
    return "\n".join([*lines, _how(report)])


def _of_training(
    cases: Mapping[str, Rows], card: str, head: str, show: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """A table of one figure of every program that trains."""
    lines = (
        [CASES[name].title, *(cell(rows, program, show) for program in COLUMNS), origin(rows, card)]
        for name, rows in cases.items()
        if any(cell(rows, program, show) for program in COLUMNS)
    )
    return table([head, *COLUMNS, MEASURED], lines)


def _of_ratios(cases: Mapping[str, Rows]) -> list[str]:
    lines = (
        [
            CASES[name].title,
            *(ratio(rows, EXAMPLE, program) for program in (LAUNCHED, REPLAYED, COMPILED)),
            ratio(rows, REPLAYED, BARE_REPLAYED),
        ]
        for name, rows in cases.items()
        if ratio(rows, EXAMPLE, REPLAYED) or ratio(rows, REPLAYED, BARE_REPLAYED)
    )
    faster = [f"{EXAMPLE} to {program}" for program in (LAUNCHED, REPLAYED, COMPILED)]
    return table(["ratio of seconds a step", *faster, f"{REPLAYED} to {BARE_REPLAYED}"], lines)


def _of_drawing(cases: Mapping[str, Rows], card: str) -> list[str]:
    lines = (
        [
            CASES[name].title,
            *(cell(rows, program, lambda figures: number(1 / figures["picture_s"])) for program in DRAWING),
            ratio(rows, PLAIN, REPLAYED, "picture_s"),
            equal(rows, LAUNCHED, REPLAYED, "pixels"),
            origin(rows, card),
        ]
        for name, rows in cases.items()
    )
    compared = [f"seconds, {PLAIN} to {REPLAYED}", f"pixels, {REPLAYED} and {LAUNCHED}"]
    return table(["pictures a second", *DRAWING, *compared, MEASURED], lines)


def _of_hashes(cases: Mapping[str, Rows], card: str) -> list[str]:
    lines = (
        [
            CASES[name].title,
            *(equal(rows, LAUNCHED, program, "adapter", "optimizer") for program in HASHES[1:]),
            origin(rows, card),
        ]
        for name, rows in cases.items()
    )
    compared = [f"{program} and {LAUNCHED}" for program in HASHES[1:]]
    return table(["SHA-256 of adapter and optimizer after 24 steps", *compared, MEASURED], lines)


def _of_whole(cases: Mapping[str, Rows], card: str) -> list[str]:
    lines = (
        [
            CASES[name].title,
            *(
                cell(rows, program, lambda figures: number(figures["seconds"]))
                for program in (LAUNCHED, REPLAYED)
            ),
            origin(rows, card),
        ]
        for name, rows in cases.items()
    )
    return table(["seconds of a whole run", LAUNCHED, REPLAYED, MEASURED], lines)


def _how(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"One run of each program, in turn, every one a process of its own, on one {report['card']} with "
        f"{report['cores']} cores; {versions}. The bases have random weights. Where a row names no other "
        "settings, LoRA of rank 4 is on the attention layers, in bf16. "
        "Launched: `--cuda_graph off`; replayed: `--cuda_graph auto`; compiled: "
        "`--compile` too. The bare step is forward, backward and fused AdamW of the UNet with peft's LoRA, "
        "and nothing else. Steps are timed with the GPU synchronised at both ends, after a warm-up. The "
        "first step is counted from the command. Memory is torch's maximum of all phases. Pictures have 25 "
        "sampling steps; the first and the last batch are not timed."
    )


def short_table(report: Mapping[str, Any]) -> str:
    """The table of README.md: the core."""
    programs = (EXAMPLE, LAUNCHED, REPLAYED, COMPILED, BARE_REPLAYED)
    rows = {name: report["cases"][name] for name in CORE_CASES if name in report["cases"]}
    lines = (
        [
            CASES[name].title,
            *(cell(of_case, program, milliseconds) for program in programs),
            origin(of_case, report["card"]),
        ]
        for name, of_case in rows.items()
    )
    return "\n".join(table(["milliseconds a step", *programs, MEASURED], lines)).rstrip("\n")


def write_pages(report: Mapping[str, Any]) -> None:
    """Put the tables between the marks of README.md and docs/speed.md."""
    write_page(README, MARKS, short_table(report) or NOT_MEASURED)
    write_page(PAGE, MARKS, tables(report))


if __name__ == "__main__":
    write_pages(json.loads(RESULTS.read_text(encoding="utf-8")))
