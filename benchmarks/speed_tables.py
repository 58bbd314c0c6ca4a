"""The tables of the speed benchmark, in docs/speed.md, from its results. Imports no torch."""

from collections.abc import Callable
from typing import Any

from benchmarks.programs import ROOT, write_page
from benchmarks.speed_cases import CASES, TWICE

PAGE = ROOT / "docs" / "speed.md"
MARKS = ("<!-- speed: written by python -m benchmarks.speed -->", "<!-- speed end -->")
NOT_MEASURED = "Not measured yet."  # stands between the marks while there are no results
Figures = dict[str, float]  # names of seconds end in _s, names of MiB in _mib

HEAD = "| training | seconds a step | seconds to the first step | peak memory, MiB | bare step, seconds |"
DRAWING_HEAD = "| class images | pictures a second | peak memory, MiB |"
TWICE_HEAD = (
    "| photos kept encoded on disk | seconds to the first step | the same, second run "
    "| seconds a step | peak memory, MiB |"
)


def table(report: dict[str, Any]) -> str:
    """The tables of docs/speed.md and the paragraph on how they were measured.

    There is a table each for training, class images and numbers of photos, if the report has cases of it."""
    tables: dict[str, list[str]] = {HEAD: [], DRAWING_HEAD: [], TWICE_HEAD: []}
    for name, record in report["cases"].items():
        case = CASES[name]
        head = DRAWING_HEAD if case.drawn else TWICE_HEAD if case.programs is TWICE else HEAD
        width = head.count("|") - 2
        cells = ["failed", *[""] * (width - 1)] if "failed" in record else _cells(record["medians"], head)
        tables[head].append(f"| {case.title} | {' | '.join(cells)} |")
    lines: list[str] = []
    for head, rows in tables.items():
        if rows:
            lines += [head, "|---" * (head.count("|") - 1) + "|", *rows, ""]
    computer = report["machine"]
    rounds = sorted({record["rounds"] for record in report["cases"].values() if "rounds" in record})
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines.append(
        f"Medians of {' or '.join(map(str, rounds))} runs of each program in turn, every one a process of "
        f"its own (two where it says so), with {computer['threads']} threads on {computer['cores']} cores of "
        f"an {computer['processor']}; {versions}. The same flags for both programs; the larger bases have "
        "random weights. In brackets: diffusers' example, and how many times as much it is (of pictures a "
        "second, as little). Memory is the most that one process had resident until its last step or "
        "picture, pages of mapped files counted. The bare step is forward, backward and AdamW of the UNet "
        "with peft's LoRA in channels_last, and nothing else; in brackets, how many times as long the step "
        "here is."
    )
    return "\n".join(lines)


def seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def per_second(value: float) -> str:
    return f"{1 / value:.3g}"


def mib(value: float) -> str:
    return f"{value:,.0f}"


def _cells(by_program: dict[str, Figures], head: str) -> list[str]:
    """The cells of a case's row after its title, in the table with this head."""
    here, reference = by_program["here"], by_program.get("reference")

    def against(name: str, show: Callable[[float], str]) -> str:
        in_brackets = f" ({show(reference[name])}, {reference[name] / here[name]:.2f} x)" if reference else ""
        return show(here[name]) + in_brackets

    if head is DRAWING_HEAD:
        return [against("picture_s", per_second), against("peak_mib", mib)]
    if head is TWICE_HEAD:
        return [
            seconds(here["first_step_s"]),
            seconds(by_program["again"]["first_step_s"]),
            seconds(here["step_s"]),
            mib(here["peak_mib"]),
        ]
    bare = ""
    if "bare" in by_program:
        bare_step = by_program["bare"]["step_s"]
        bare = f"{seconds(bare_step)} ({here['step_s'] / bare_step:.2f} x)"
    return [against("step_s", seconds), against("first_step_s", seconds), against("peak_mib", mib), bare]


def write(report: dict[str, Any]) -> None:
    """Put the tables between the marks of docs/speed.md."""
    write_page(PAGE, MARKS, table(report))
