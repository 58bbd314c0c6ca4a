"""The page of check_photos.py: findings about a folder of photos, the most important first, with small
pictures. As the page of a run it has no script and loads nothing, and all text is escaped."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from dreambooth.evaluation import report
from dreambooth.evaluation.report import Thumbnail
from dreambooth.io.errors import shortened

MOST_PHOTOS = 12  # of a finding
_RANKS = {1: "change first", 2: "worth a look", 3: "for your information"}


class Entry(Protocol):
    """One finding, as `data.photo_findings.Finding`."""

    @property
    def rank(self) -> int: ...
    @property
    def title(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def advice(self) -> str: ...
    @property
    def is_of_captions(self) -> bool:
        """Whether the captions are shown below the photos."""

    @property
    def photos(self) -> Sequence[str]:
        """File names; the first MOST_PHOTOS are shown."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table below the findings."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page is made of."""

    name: str
    """Of the folder."""
    facts: str
    entries: Sequence[Entry]
    notes: Sequence[str]
    captions: Mapping[str, str]
    """By file name, for the photos that have one."""
    tables: Sequence[Table] = ()


def text_of(table: Table) -> str:
    """The table for a terminal."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    cells = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([table.title, table.text, *(line.rstrip() for line in cells)])


def headline(entries: Sequence[Entry]) -> str:
    """What was found, in a few words."""
    if not entries:
        return "No finding"
    return f"{len(entries)} finding{'' if len(entries) == 1 else 's'}"


def html(page: Page, thumbnails: Mapping[str, Thumbnail], written_at: str) -> str:
    """The HTML. `thumbnails` are by file name; `written_at` is the time that the page shows."""
    why = "The most important comes first. You decide what to change."
    return str(
        report.environment()
        .get_template("photos")
        .render(
            name=page.name,
            headline=headline(page.entries),
            facts=page.facts,
            why=why if page.entries else "Nothing that is checked looks wrong.",
            notes=page.notes,
            entries=[_entry(entry, page, thumbnails) for entry in page.entries],
            tables=page.tables,
            written_at=written_at,
        )
    )


def _entry(entry: Entry, page: Page, thumbnails: Mapping[str, Thumbnail]) -> dict[str, object]:
    shown = [name for name in entry.photos if name in thumbnails][:MOST_PHOTOS]
    captions = page.captions if entry.is_of_captions else {}
    return {
        "rank": _RANKS[entry.rank],
        "title": entry.title,
        "text": entry.text[0].upper() + entry.text[1:],
        "advice": entry.advice,
        "photos": [
            {"name": name, "thumbnail": thumbnails[name], "text": shortened(captions.get(name, ""), 120)}
            for name in shown
        ],
        "left_out": len(entry.photos) - len(shown),
    }
