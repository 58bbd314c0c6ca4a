"""The page of a run: one HTML file that shows what was trained, how it went, and which checkpoint to use.

The page is a function of a run's records, its pictures on the disk, and its photos. It has no script, loads
nothing, and needs no network. All text is escaped, and no token of the hub is shown.

A page is smaller than LARGEST: at most MOST_STEPS x MOST_ROWS validation pictures, MOST_PHOTOS photos and a
few more are shown, each as a JPEG of a limited size, and curves have a limited number of points.
"""

import base64
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from dreambooth.evaluation import choice, report_data
from dreambooth.evaluation.report_data import Drawn
from dreambooth.files import pictures
from dreambooth.io import console, reader
from dreambooth.io.errors import UserError, printable

Use = Literal["trained", "held out", "class"]

MOST_STEPS, MOST_ROWS = 12, 12  # of the grid of pictures
MOST_PHOTOS: Mapping[Use, int] = {"trained": 16, "held out": 8, "class": 8}
LARGEST = 5 * 2**20  # bytes of a page
_SIDE, _BYTES = 192, 16 * 2**10  # of a small picture
_LARGE_SIDE, _LARGE_BYTES = 512, 80 * 2**10
_TEMPLATES = ("report", "photos", "runs", "page_head")


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A picture as the page shows it."""

    uri: str
    width: int
    height: int
    prompt: str = ""
    step: int = 0
    """Prompt and step that a validation picture was drawn with."""


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo of the subject, or a class image."""

    name: str
    caption: str
    use: Use
    thumbnail: Thumbnail
    crops: str = ""
    """The shapes that it is cut to, with --buckets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a page is made of."""

    folder: Path
    """The run's output folder, which holds the pictures."""
    flags: Mapping[str, Any]
    """All flags of the run, without the hub token."""
    status: Mapping[str, Any]
    """The content of status.json."""
    records: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    pictures: Sequence[Drawn]
    """The validation pictures."""
    photos: Sequence[Photo] = ()
    """Those to show; see MOST_PHOTOS."""
    counts: Mapping[Use, int] = dataclasses.field(default_factory=dict)
    """Numbers of all photos."""
    prompts: Sequence[tuple[str, str]] = ()
    """(name of the photo, prompt) of the first rows, to show."""
    buckets: Sequence[Sequence[str]] = ()
    """The table of buckets, its headings first; () without buckets."""
    subjects: Sequence[str] = ()
    """The prompts of the subjects, if there are several."""
    rows_per_step: int = 1
    """Photos of the subject that a step takes."""
    max_steps: int | None = None
    about: Sequence[tuple[str, str]] = ()
    """Facts by their names: base, licence, versions, ..."""
    command: str = ""
    draw_command: str = ""


class Thumbnails:
    """Makes thumbnails of picture files, and keeps them: a page that is written again reads new files
    only."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Path, bool, int, int], Thumbnail] = {}

    def of(self, path: Path, *, is_large: bool = False) -> Thumbnail | None:
        """The thumbnail of a file; None if the file is gone, or is no picture."""
        try:
            stat = os.stat(path)
            key = (path, is_large, stat.st_mtime_ns, stat.st_size)
            if key not in self._kept:
                image, settings = pictures.read(reader.read_bytes(path, path.name))
                image = pictures.pixels(image)
                if image is None:
                    return None
                self._kept[key] = thumbnail(image, settings, is_large=is_large)
        except (OSError, UserError):  # its cell stays empty
            return None
        return self._kept[key]


def thumbnail(
    image: Image.Image, settings: Mapping[str, Any] | None = None, *, is_large: bool = False
) -> Thumbnail:
    """The picture as a data URI, shrunk and compressed to a limited number of bytes. `settings` are those
    stored in its file."""
    side, most = (_LARGE_SIDE, _LARGE_BYTES) if is_large else (_SIDE, _BYTES)
    data = pictures.jpeg(image, side, most)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    step = (settings or {}).get("step")
    prompt = str((settings or {}).get("prompt", ""))
    return Thumbnail(uri, *image.size, prompt, step if isinstance(step, int) else 0)


def page(run: Run, thumbnails: Thumbnails, written_at: str) -> str:
    """The HTML. `written_at` is the time that the page shows."""
    template = environment().get_template("report")
    run = dataclasses.replace(run, pictures=list(_with_steps(run, thumbnails)))
    measured = report_data.Measured.of(run.records)
    last = max((record["step"] for record in run.records), default=0)
    chosen = measured.best["step"] if measured.best else None
    return str(
        template.render(
            run=run,
            name=run.folder.absolute().name,
            state=report_data.state(run.status, last, run.max_steps),
            answer=report_data.answer(run.status, measured, last),
            chosen=chosen,
            last=last,
            hero=_hero(run, thumbnails, chosen),
            grid=_grid(run, thumbnails, chosen),
            sweep=_sweep(run, thumbnails),
            plots=_plots(run, measured),
            scores=report_data.scores(measured),
            bleeding=report_data.bleeding(measured, len(run.subjects), chosen),
            photos=_photo_groups(run),
            phases=report_data.phases(run.records),
            speed=report_data.speed(run.records),
            settings=sorted((name, report_data.text_of(value)) for name, value in run.flags.items()),
            written_at=written_at,
        )
    )


@functools.cache
def environment() -> Any:
    """The templates of pages, by name. All text in them is escaped."""
    import jinja2
    import markupsafe

    def finalize(value: Any) -> Any:
        is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
        return console.without_tokens(printable(value)) if is_text else value

    files = {name: Path(__file__).with_name(f"{name}.html.jinja") for name in _TEMPLATES}
    texts = {name: reader.read_text(file, file.name) for name, file in files.items()}
    return jinja2.Environment(
        loader=jinja2.DictLoader(texts),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


# --- pictures


def _with_steps(run: Run, thumbnails: Thumbnails) -> Iterator[Drawn]:
    """The validation pictures in order of steps; those of the finished adapter with the step that their files
    name."""
    for drawn in run.pictures:
        if not drawn.is_finished:
            yield drawn
        elif picture := thumbnails.of(run.folder / drawn.name):
            yield dataclasses.replace(drawn, step=picture.step)


def _grid(run: Run, thumbnails: Thumbnails, chosen: int | None) -> dict[str, Any]:
    """Columns (steps) and rows (pictures of a prompt), of at most MOST_STEPS and MOST_ROWS."""
    of_steps = [drawn for drawn in run.pictures if drawn.weight is None]
    steps = report_data.spread({drawn.step for drawn in of_steps}, MOST_STEPS, chosen)
    keys = sorted({(drawn.number, drawn.prompt) for drawn in of_steps})
    kept = sorted((prompt, number) for number, prompt in keys[:MOST_ROWS])
    of_steps.sort(key=lambda drawn: drawn.is_finished)  # the finished adapter's is shown if a step has two
    by_place = {(drawn.prompt, drawn.number, drawn.step): drawn for drawn in of_steps}
    rows: list[dict[str, Any]] = []
    for prompt, number in kept:
        cells = []
        for step in steps:
            drawn = by_place.get((prompt, number, step))
            cells.append(thumbnails.of(run.folder / drawn.name) if drawn else None)
        text = next((cell.prompt for cell in reversed(cells) if cell), "")
        # the prompts of a run that was resumed may have been edited in between
        cells = [cell if cell and cell.prompt == text else None for cell in cells]
        if not rows or rows[-1]["prompt"] != text:
            rows.append({"prompt": text, "lines": []})
        rows[-1]["lines"].append(cells)
    left_out = len({drawn.step for drawn in of_steps}) - len(steps), len(keys) - len(kept)
    return {"steps": steps, "rows": rows, "left_out": left_out}


def _hero(run: Run, thumbnails: Thumbnails, chosen: int | None) -> list[tuple[str, Thumbnail]]:
    """The first picture before the first step, and after the chosen or else the last one."""
    drawn = [d for d in run.pictures if d.weight is None and (d.prompt, d.number) == (0, 0)]
    if not drawn:
        return []
    by_step = {d.step: d for d in drawn}
    target = max(by_step) if chosen is None else min(by_step, key=lambda step: (abs(step - chosen), step))
    shown = []
    for step in dict.fromkeys((min(by_step), target)):
        if picture := thumbnails.of(run.folder / by_step[step].name, is_large=True):
            shown.append((f"step {step}", picture))
    return shown


def _sweep(run: Run, thumbnails: Thumbnails) -> list[tuple[float, Thumbnail]]:
    """The first picture at several weights of the finished adapter; [] if it was not drawn so."""
    files = {drawn.weight: drawn.name for drawn in run.pictures if drawn.weight is not None}
    if not files:
        return []
    for drawn in run.pictures:
        if drawn.weight is None and (drawn.prompt, drawn.number) == (0, 0):
            if drawn.is_finished:
                files[1.0] = drawn.name
            elif drawn.step == 0:  # the base: a run that starts from an adapter draws weight 0 at its end
                files.setdefault(0.0, drawn.name)
    shown = [(weight, thumbnails.of(run.folder / name)) for weight, name in sorted(files.items())]
    return [(weight, picture) for weight, picture in shown if picture]


def _photo_groups(run: Run) -> list[dict[str, Any]]:
    titles: dict[Use, str] = {"trained": "Photos", "held out": "Held out", "class": "Class images"}
    groups = []
    for use, title in titles.items():
        shown = [photo for photo in run.photos if photo.use == use]
        captions = {photo.caption for photo in shown}
        groups.append(
            {
                "title": title,
                "use": use,
                "photos": shown,
                "count": run.counts.get(use, len(shown)),
                "caption": captions.pop() if len(captions) == 1 else None,
            }
        )
    return [group for group in groups if group["photos"]]


# --- plots


def _plots(run: Run, measured: report_data.Measured) -> dict[str, list[dict[str, Any]]]:
    """The plots of each section, with title and text."""
    sections: dict[str, list[dict[str, Any]]] = {"loss": [], "meter": [], "bands": [], "judge": []}
    losses = report_data.losses(run.records)
    if not (losses or measured.meters or measured.judges):
        return sections
    # only now: the first page, before the first step, need not wait for matplotlib
    import markupsafe

    from dreambooth.evaluation import report_plots
    from dreambooth.evaluation.report_plots import Curve

    chosen = measured.best["step"] if measured.best else None

    def add(section: str, title: str, text: str, svg: str) -> None:
        sections[section].append({"title": title, "text": text, "svg": markupsafe.Markup(svg)})

    # loss
    if losses:
        steps = len(next(iter(losses.values())).steps)
        window = report_data.window(steps, run.rows_per_step)
        curves = [
            Curve(name, series.steps, report_data.smoothed(series.values, window))
            for name, series in losses.items()
        ]
        if len(losses) == 1 and steps <= 600:
            (series,) = losses.values()
            curves.insert(0, Curve("", series.steps, series.values, is_faint=True))
        means = f"Means of {window} steps, {window * run.rows_per_step} rows." if window > 1 else ""
        about = "The loss says little about likeness: noise level and photo of a step are random."
        add("loss", "Loss", f"{means} {about}".strip(), report_plots.over_steps(curves, chosen=chosen))

    # the harm that names a step, and the meters
    if by_step := choice.harms(run.records):
        by_step = {0: 0.0, **by_step}
        svg = report_plots.over_steps(
            [Curve("harm", list(by_step), list(by_step.values()))], chosen=chosen, zero=True
        )
        add("meter", "Harm", report_data.HARM, svg)
    for name, (title, text) in report_data.METERS.items():
        if values := measured.meter(name):
            spread = values.noise if any(values.noise) else None
            curve = Curve(title, values.steps, values.values, spread)
            add("meter", title, text, report_plots.over_steps([curve], chosen=chosen, zero=True))
    for name, (title, text) in report_data.BANDS.items():
        if bands := measured.bands(name, report_plots.MOST_SERIES, chosen):
            add("bands", title, text, report_plots.over_bands(*bands))

    # judges
    series_by_score = report_data.score_series(measured, report_plots.MOST_SERIES)
    if series_by_score:
        curves = [Curve(name[:24], series.steps, series.values) for name, series in series_by_score.items()]
        svg = report_plots.over_steps(curves, chosen=chosen)
        add("judge", "Scores of the validation pictures", "", svg)
    return sections
