"""The table of an evaluation: means over subjects, with intervals, of photos, base and methods."""

from collections.abc import Mapping, Sequence
from typing import Any

from dreambooth.evaluation import scores
from dreambooth.evaluation.picture_scores import SCORES, Values
from dreambooth.evaluation.subjects import BASE

Table = list[dict[str, Any]]
_REAL = {
    "excluding_self": "Real photos, without self pairs",
    "including_self": "Real photos, with self pairs",
}
_WIDTH = 9  # columns of a score on the terminal
_OF_READER = "reader "  # how the reader's scores begin


def summary(values: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    """By score, the means over the subjects that have it. `values` are by subject.

    `macro` is the plain mean over subjects, `interval` its 95 % bootstrap interval over subjects (None for
    one subject), `micro` the mean over all terms of all subjects, `subjects` their number.
    """
    result = {}
    for name in SCORES:
        means = {subject: of[name][0] for subject, of in values.items() if name in of}
        if means:
            counts = {subject: values[subject][name][1] for subject in means}
            result[name] = {
                "macro": scores.macro(means),
                "interval": scores.interval(list(means.values())),
                "micro": scores.micro(means, counts),
                "subjects": len(means),
            }
    return result


def over_base(values: Mapping[str, Values], base: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    """By score, the mean over subjects of a method's score minus the base's, with its interval."""
    result = {}
    for name in SCORES:
        differences = [
            of[name][0] - base[subject][name][0]
            for subject, of in values.items()
            if name in of and name in base[subject]
        ]
        if differences:
            mean = sum(differences) / len(differences)
            result[name] = {"macro": mean, "interval": scores.interval(differences)}
    return result


def table(subjects: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> Table:
    """The rows: both Real rows, the base, then the methods.

    Of each subject in `subjects`, "real" has both rows of its photos, "methods" by method the pictures'
    scores ("values") and how many pictures there are and failed ("pictures", "failed").
    """
    rows: Table = []
    for key, title in _REAL.items():
        of_photos = {name: subject["real"][key] for name, subject in subjects.items()}
        rows.append({"row": title, "subjects": len(subjects), "scores": summary(of_photos)})
    base = {name: subject["methods"][BASE]["values"] for name, subject in subjects.items()}
    for method in (BASE, *methods):
        of_method = {
            name: subject["methods"][method]
            for name, subject in subjects.items()
            if method in subject["methods"]
        }
        values = {name: entry["values"] for name, entry in of_method.items()}
        rows.append(
            {
                "row": method,
                "subjects": len(values),
                "pictures": sum(entry["pictures"] for entry in of_method.values()),
                "failed": sum(entry["failed"] for entry in of_method.values()),
                "scores": summary(values),
                **({} if method == BASE else {"over_base": over_base(values, base)}),
            }
        )
    return rows


def not_computed(skipped: Mapping[str, str]) -> list[str]:
    """A line for each reason why scores are missing. `skipped` has the reasons by score."""
    names_of: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names_of.setdefault(reason, []).append(name)
    return [f"not computed: {', '.join(names)} ({reason})" for reason, names in names_of.items()]


def _columns(rows: Table) -> list[str]:
    return [name for name in SCORES if any(name in row["scores"] for row in rows)]


def terminal_text(rows: Table) -> str:
    """The means over subjects, as lines for the terminal. The scores of the reader are a table of their
    own."""
    of_reader = [name for name in _columns(rows) if name.startswith(_OF_READER)]
    others = [name for name in _columns(rows) if name not in of_reader]
    return "\n\n".join(_terminal_table(rows, columns) for columns in (others, of_reader) if columns)


def _terminal_table(rows: Table, columns: Sequence[str]) -> str:
    wide = max(len(row["row"]) for row in rows)
    titles = {name: name.removeprefix(_OF_READER) for name in columns}
    widths = {name: max(_WIDTH, len(title) + 2) for name, title in titles.items()}
    table_title = _OF_READER if any(name.startswith(_OF_READER) for name in columns) else ""
    header = "".join(f"{titles[name]:>{width}}" for name, width in widths.items())
    lines = [f"{table_title:<{wide}}{'subjects':>10}{'failed':>8}{header}"]
    for row in rows:
        cells = "".join(f"{_mean(row, name):>{width}}" for name, width in widths.items())
        lines.append(f"{row['row']:<{wide}}{row['subjects']:>10}{row.get('failed', '-'):>8}{cells}")
    return "\n".join(lines)


def _mean(row: Mapping[str, Any], name: str) -> str:
    return f"{row['scores'][name]['macro']:.3f}" if name in row["scores"] else "-"


def markdown(results: Mapping[str, Any]) -> str:
    """The page of tables: means over subjects with intervals; of several subjects, means over all terms and
    each subject; failed pictures; and how the scores were computed. `results` is the content of
    results.json."""
    rows: Table = results["table"]
    columns = _columns(rows)
    parts = [
        "# Evaluation\n",
        "Means over subjects, each with the same weight; in brackets the 95 % bootstrap interval over"
        " subjects. Figures of other evaluators compare only where the rows of the real photos agree.\n",
        *_grid(columns, rows, _with_interval),
    ]
    # one subject's own tables would be the same
    subjects = results["subjects"] if len(results["subjects"]) > 1 else {}
    if subjects:
        parts.append("\nMeans over all pairs and pictures of all subjects:\n")
        parts += _grid(columns, rows, lambda row, name: _cell(row["scores"].get(name), "micro"))
    if any("over_base" in row for row in rows):
        parts.append("\nDifference from the base, drawn from the same noise:\n")
        differences = [{**row, "scores": row["over_base"]} for row in rows if "over_base" in row]
        parts += _grid(columns, differences, _with_interval)
    for subject, entry in subjects.items():
        parts.append(f"\n{subject} ({entry['class_noun']}):\n")
        of_subject = [
            *({"row": _REAL[key], "scores": values} for key, values in entry["real"].items()),
            *({"row": method, **of, "scores": of["scores"]} for method, of in entry["methods"].items()),
        ]
        parts += _grid(columns, of_subject, lambda row, name: _number(row["scores"].get(name)))
    parts.append("\nScores:\n")
    parts += [f"- {name}: {results['definitions'][name]}" for name in columns]
    parts += [f"- {line}" for line in not_computed(results["skipped"])]
    if results["failures"]:
        rule = "count 0" if results["settings"]["failed_pictures"] == "zero" else "are left out"
        parts.append(f"\nFailed pictures, which {rule}:\n")
        parts += [f"- `{entry['file']}`: {entry['failure']}" for entry in results["failures"]]
    return "\n".join(parts) + "\n"


def _grid(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], cell: Any) -> list[str]:
    """A table in Markdown. `cell` returns the text of a row's score."""
    lines = [
        "| " + " | ".join(["", "subjects", "pictures", "failed", *columns]) + " |",
        "|" + "---|" * (len(columns) + 4),
    ]
    for row in rows:
        counts = [str(row.get(name, "")) for name in ("subjects", "pictures", "failed")]
        lines.append("| " + " | ".join([row["row"], *counts, *(cell(row, name) for name in columns)]) + " |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(entry: Mapping[str, Any] | None, key: str) -> str:
    return _number(entry[key]) if entry else ""


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    entry = row["scores"].get(name)
    text = _cell(entry, "macro")
    return (
        f"{text} ({entry['interval'][0]:.3f} to {entry['interval'][1]:.3f})"
        if entry and entry["interval"]
        else text
    )
