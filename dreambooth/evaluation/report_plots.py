"""The plots of a run's page, as inline SVG.

Colours are CSS variables of the page, so that a plot fits the light and the dark theme. The same numbers give
the same bytes. matplotlib is imported with this module, about half a second: import it where a page is
written.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SIZE = (4.5, 2.6)  # inches of 72 pixels: a phone shows it unscaled
# Colours that matplotlib writes, and the variables that take their place.
_INK, _MUTED, _LINE = "#000001", "#000002", "#000003"
_SERIES = tuple(f"#0000a{number}" for number in range(6))
_STEPS = tuple(f"#0000b{number}" for number in range(6))
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    **{color: f"--series-{number}" for number, color in enumerate(_SERIES)},
    **{color: f"--shade-{number}" for number, color in enumerate(_STEPS)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dreambooth",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
_MOST_POINTS = 300  # of a curve
MOST_SERIES = len(_SERIES)


class Curve(NamedTuple):
    """A line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    """Half the height of a band around the line at each point."""
    is_faint: bool = False
    """Whether the line is the background of another."""


def over_steps(curves: Sequence[Curve], *, chosen: int | None = None, zero: bool = False) -> str:
    """The SVG of at most MOST_SERIES lines over steps. `chosen` is a step to mark; with `zero` the axis of
    values has a line at 0."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("step")
        strong = [curve for curve in curves if not curve.is_faint]
        colors = dict(zip([curve.label for curve in strong], _SERIES, strict=False))
        for curve in curves:
            color = colors.get(curve.label, _MUTED)
            x, y = _thinned(curve.x, curve.y)
            if curve.spread is not None:
                low, high = np.subtract(curve.y, curve.spread), np.add(curve.y, curve.spread)
                axes.fill_between(curve.x, low, high, color=color, alpha=0.16, linewidth=0)
            if curve.is_faint:
                axes.plot(x, y, color=_MUTED, alpha=0.35, linewidth=0.8)
            else:
                axes.plot(x, y, color=color, label=curve.label, marker="o" if len(x) <= 40 else None)
        if zero:
            axes.axhline(0, color=_MUTED, linewidth=0.8)
        if chosen is not None:
            axes.axvline(chosen, color=_INK, linewidth=1, linestyle=(0, (3, 3)))
        return _svg(figure, axes, has_legend=len(strong) > 1)


def over_bands(steps: Sequence[int], values: Sequence[Sequence[float]]) -> str:
    """The SVG of one line for each of `steps`: `values` by band of timesteps, from low noise to high."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("band of timesteps, from low noise to high")
        shades = _STEPS if len(steps) > 1 else _STEPS[-1:]
        places = np.linspace(0, len(shades) - 1, len(steps)).round().astype(int)
        for step, bands, place in zip(steps, values, places, strict=True):
            numbers = range(1, len(bands) + 1)
            axes.plot(numbers, bands, color=shades[place], marker="o", label=f"step {step}")
        axes.axhline(0, color=_MUTED, linewidth=0.8)
        return _svg(figure, axes, has_legend=True)


def _axes(label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.135, 0.185, 0.845, 0.78))
    axes.set_xlabel(label, loc="right", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)
    return figure, axes


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most _MOST_POINTS points of a curve, the first and the last among them."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int))
    return np.asarray(x)[kept], np.asarray(y)[kept]


def _svg(figure: Figure, axes: Any, *, has_legend: bool) -> str:
    """The figure as an element for HTML, without ids that several plots would share."""
    if has_legend:
        axes.set_position((0.135, 0.185, 0.845, 0.65))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=3 if len(axes.get_legend_handles_labels()[1]) > 2 else 2,
            borderaxespad=0,
            columnspacing=1.2,
            handlelength=1.2,
            fontsize=9,
        )
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = text.replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return re.sub(r"\s*\n\s*", " ", text)
