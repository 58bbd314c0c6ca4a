"""The page of a table of runs: one HTML file that compares them and links to the page of each."""

import dataclasses
from collections.abc import Mapping, Sequence

from dreambooth.evaluation import report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What the page shows of one run."""

    name: str
    state: str
    """finished, failed, stopped, interrupted or not begun."""
    why: str = ""
    """Why it failed or ended early."""
    step: int = 0
    """Its last step."""
    chosen: int | None = None
    """The step that the run names as its best."""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the judges found, of the named step if they judged it, else of the last one."""
    seconds: float | None = None
    """Of its last start."""
    report: str | None = None
    """Path of its page, relative to this page."""


def page(name: str, rows: Sequence[Row], written_at: str) -> str:
    """The HTML. `name` is that of the table's folder, and `written_at` the time that the page shows."""
    names = list(dict.fromkeys(score for row in rows for score in row.scores))
    counts = {
        state: sum(row.state == state for row in rows) for state in dict.fromkeys(r.state for r in rows)
    }
    return str(
        report.environment()
        .get_template("runs")
        .render(
            name=name,
            headline=", ".join(f"{count} {state}" for state, count in counts.items()),
            rows=rows,
            scores=names,
            written_at=written_at,
        )
    )
