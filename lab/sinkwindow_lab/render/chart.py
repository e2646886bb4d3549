"""Pictures as SVG files with the same bytes every time, for light and dark pages.

Every picture is of a table in long form: `x` and `y` name its columns, and each value of `hue` is a series.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from sinkwindow_lab.errors import printable

INK = "#010203"  # replaced by a color that follows the reader's setting
GREY = "#828288"
COLOURS = ("#2a78d6", "#d9622b", "#1a9a6c", "#8a63d2", "#b8860b")  # each readable on white and on near-black
MARKERS = ("o", "s", "^", "D", "v")
WIDTH, HEIGHT = 4.8, 3.2  # with the font size below they need no zoom on a phone [inch]
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "sinkwindow",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
STYLE = "<style>:root { color: #1d1d1f } @media (prefers-color-scheme: dark) { :root { color: #e8e8ea } }</style>"


def _look(number: int) -> tuple[str, str]:
    """Return the color and the marker of a series."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _shown(name: object) -> str:
    """Return a label that matplotlib shows: it hides those that begin with an underscore."""
    words = printable(str(name))
    return f" {words}" if words.startswith("_") else words


class Picture:
    """One pair of axes; `svg` is there after the block of `picture`."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.axes = self.figure.subplots()
        self.svg = ""

    def logarithmic(self, axis: str, ticks: Sequence[float] | None = None) -> None:
        """Make an axis logarithmic, with plain numbers at 1, 2, 5 times powers of ten, or at `ticks`."""
        getattr(self.axes, f"set_{axis}scale")("log")
        one = getattr(self.axes, f"{axis}axis")
        one.set_major_locator(FixedLocator(list(ticks)) if ticks else LogLocator(subs=(1, 2, 5)))
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        if not ticks:  # ends at ticks, so that two at least are shown
            low, high = one.get_data_interval()
            found = sorted(LogLocator(subs=(1, 2, 5)).tick_values(low / 5, high * 5))
            below, above = max(tick for tick in found if tick <= low), min(tick for tick in found if tick >= high)
            getattr(self.axes, f"set_{axis}lim")(below, above if above > below else 2 * below)


@contextmanager
def picture(labels: tuple[str, str], height: float = HEIGHT, columns: int = 1) -> Iterator[Picture]:
    """Yield a picture to draw on, with these labels of x and y and a legend of so many columns below it."""
    with mpl.rc_context(cast("Any", SETTINGS)):
        one = Picture(height)
        yield one
        one.axes.set(xlabel=labels[0], ylabel=labels[1])
        if one.axes.get_legend_handles_labels()[0]:
            one.figure.legend(loc="outside lower center", ncols=columns)
        stream = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        one.figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", stream.getvalue(), flags=re.DOTALL).replace(INK, "currentColor")
    start = svg.index(">", svg.index("<svg")) + 1
    lines = f"{svg[:start]}\n{STYLE}{svg[start:]}".splitlines()
    one.svg = "\n".join(line.rstrip() for line in lines) + "\n"


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    labels: tuple[str, str],
    logarithmic: str = "",
    marks: bool = True,
    levels: Mapping[str, float] | None = None,
    verticals: Mapping[str, float] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    note: tuple[float, str] | None = None,
    columns: int = 1,
) -> str:
    """Draw a line per value of `hue`; return the picture, an SVG file.

    `logarithmic` are the axes that are, of `xy`; a logarithmic x is numbered at all its values.
    `levels` are dashed horizontal lines by series, `verticals` dotted vertical ones, in the color of the series.
    `limits` are the ends of an axis; `note` is a place on x with its name, a dashed vertical line.
    """
    with picture(labels, columns=columns) as one:
        for number, (series, rows) in enumerate(frame.groupby(hue, sort=False)):
            color, marker = _look(number)
            one.axes.plot(rows[x], rows[y], label=_shown(series), color=color, marker=marker if marks else None)
            if levels and series in levels:
                label = f"{_shown(series)}, dense"
                one.axes.axhline(levels[str(series)], color=color, linewidth=1, linestyle="--", label=label)
            if verticals and series in verticals:
                one.axes.axvline(verticals[str(series)], color=color, linewidth=0.8, linestyle=":")
        if "x" in logarithmic:
            one.logarithmic("x", sorted(set(frame[x])))
        if "y" in logarithmic:
            one.logarithmic("y")
        one.axes.set(**{f"{axis}lim": ends for axis, ends in (limits or {}).items()})
        if note is not None:
            one.axes.axvline(note[0], color=GREY, linewidth=0.8, linestyle="--")
            top = one.axes.get_xaxis_transform()
            one.axes.text(note[0], 1.0, f" {note[1]}", transform=top, va="top", fontsize=8, color=INK)
    return one.svg


def points(frame: pd.DataFrame, x: str, y: str, hue: str, *, label: str) -> str:
    """Draw a mark per point, the values of `y` one below the other as words, `x` logarithmic."""
    names = list(dict.fromkeys(frame[y]))
    with picture((label, ""), height=0.6 + 0.3 * len(names), columns=2) as one:
        for number, (series, rows) in enumerate(frame.groupby(hue, sort=False)):
            color, marker = _look(number)
            one.axes.plot(rows[x], rows[y].map(names.index), marker, color=color, label=_shown(series))
        one.axes.set_yticks(range(len(names)), names)
        one.axes.invert_yaxis()
        one.axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.5)
        one.logarithmic("x")
    return one.svg


def bars(frame: pd.DataFrame, x: str, y: str, error: str, color: str, marker: str, *, labels: tuple[str, str]) -> str:
    """Draw points with error bars, the values of `x` side by side as words, around a line at zero."""
    names, colors, markers = (list(dict.fromkeys(frame[column])) for column in (x, color, marker))
    groups = list(frame.groupby([marker, color], sort=False))
    with picture(labels) as one:
        for number, ((way, text), rows) in enumerate(groups):
            places = rows[x].map(names.index) + 0.16 * (number - (len(groups) - 1) / 2)
            options: dict[str, Any] = {"fmt": _look(markers.index(way))[1], "color": _look(colors.index(text))[0]}
            one.axes.errorbar(places, rows[y], yerr=rows[error], label=_shown(f"{way}, {text}"), linewidth=1, **options)
        one.axes.axhline(0, color=GREY, linewidth=0.8)
        one.axes.set_xticks(range(len(names)), names)
    return one.svg
