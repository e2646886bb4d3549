"""Pictures as SVG files with the same bytes every time, for light and dark pages.

Every picture is of a table in long form: `x` and `y` name its columns. Its column `kind`, that of a configuration,
chooses color and line; each value of its column `series` has a name in the legend, and a mark.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections import Counter
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
# Color, line and marks of each kind, the same in every picture: readable on white and on black, and by the color-blind.
LOOKS: dict[str, tuple[str, Any, str]] = {
    "baseline": ("#75818a", "--", "Dv<"),
    "streaming": ("#2a78d6", "-", "os^>PX*"),
    "window": ("#d9622b", ":", "^P>"),
    "recompute": ("#7a3cff", "-.", "X*s"),
    "text": (GREY, "", "os^DvPX"),  # a mark in the legend, where a text is in the colors of several kinds
}
OTHER = ("#c2457e", (0, (5, 1, 1, 1, 1, 1)), "os^DvPX")
FEW = 5  # a series with a point of fewer samples is not joined by lines
APART = 1.5  # of neighbors on a logarithmic axis that are both numbered [ratio]
SHORT = 24  # letters of names that fit side by side in a legend
ROWS, ROW = 4, 0.18  # of a legend for which there is place; what one more needs [inch]
WIDTH, HEIGHT = 4.8, 3.2  # with the font size below they need no zoom on a phone [inch]
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "sinkwindow",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
}
# Letters and their edge, which shows where a page does not follow the reader's setting.
LIGHT, DARK = ("#1d1d1f", "#ffffff"), ("#e8e8ea", "#0d1117")
STYLE = (
    f"<style>:root {{ color: {LIGHT[0]}; --edge: {LIGHT[1]} }} "
    f"@media (prefers-color-scheme: dark) {{ :root {{ color: {DARK[0]}; --edge: {DARK[1]} }} }} "
    "[id^=text_] { stroke: var(--edge); stroke-width: 1600; stroke-linejoin: round; paint-order: stroke }</style>"
)


def _look(kind: str, number: int) -> dict[str, Any]:
    """Return color, line and mark of the series of a kind with this number; every second mark is hollow."""
    color, line, marks = LOOKS.get(kind, OTHER)
    face = "none" if number % 2 else color
    return {"color": color, "linestyle": line, "marker": marks[number % len(marks)], "markerfacecolor": face}


def _series(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Yield name, rows and look of each series; where samples (column `n`) are few, no line, and their number."""
    known = Counter[str]()
    for (kind, series), rows in frame.groupby(["kind", "series"], sort=False):
        look = _look(kind, known[kind])
        known[kind] += 1
        name = _shown(series)
        if "n" in rows and rows.n.min() < FEW:
            name, look["linestyle"] = f"{name} (n = {rows.n.min()})", ""
        yield name, rows, look


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
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            below, above = max(tick for tick in found if tick <= low), min(tick for tick in found if tick >= high)
            getattr(self.axes, f"set_{axis}lim")(below, above if above > below else 2 * below)


@contextmanager
def picture(labels: tuple[str, str], height: float = HEIGHT) -> Iterator[Picture]:
    """Yield a picture to draw on, with these labels of x and y and a legend below it."""
    with mpl.rc_context(cast("Any", SETTINGS)):
        one = Picture(height)
        yield one
        for axis, label in zip("xy", labels, strict=True):
            logarithmic = getattr(one.axes, f"get_{axis}scale")() == "log"
            one.axes.set(**{f"{axis}label": f"{label}, logarithmic" if logarithmic else label})
        names = one.axes.get_legend_handles_labels()[1]
        if names:
            columns = 1 if len(names) % 2 or max(map(len, names)) > SHORT else 2
            one.figure.legend(loc="outside lower center", ncols=columns)
            one.figure.set_figheight(height + ROW * max(0, len(names) // columns - ROWS))
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
    *,
    labels: tuple[str, str],
    logarithmic: str = "",
    marks: bool = True,
    dodge: float = 1.0,
    notes: Mapping[str, float] | None = None,
) -> str:
    """Draw a line per series; return the picture, an SVG file.

    `logarithmic` are the axes that are, of `xy`; such an x is numbered at all its values if they are far apart.
    `dodge` moves each series aside by this factor on x, so that equal points are seen. `notes` are places on x by name,
    dashed vertical lines.
    """
    with picture(labels) as one:
        found = list(_series(frame))
        for number, (series, rows, look) in enumerate(found):
            aside = dodge ** (number - (len(found) - 1) / 2)
            one.axes.plot(rows[x] * aside, rows[y], label=series, **look | ({} if marks else {"marker": ""}))
        if "x" in logarithmic:
            places = sorted(set(frame[x]))
            apart = all(after >= APART * before for before, after in itertools.pairwise(places))
            one.logarithmic("x", places if apart else None)
        else:
            one.axes.locator_params(axis="x", nbins=6)
            one.axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        if "y" in logarithmic:
            one.logarithmic("y")
        for words, place in (notes or {}).items():
            one.axes.axvline(place, color=GREY, linewidth=0.8, linestyle="--")
            one.axes.text(
                place, 1.0, words, transform=one.axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8
            )
    return one.svg


def points(frame: pd.DataFrame, x: str, y: str, *, label: str) -> str:
    """Draw a mark per point in the color of its kind, `x` logarithmic, values of `y` one below the other as words."""
    names = list(dict.fromkeys(frame[y]))
    with picture((label, ""), height=0.6 + 0.3 * len(names)) as one:
        for number, (series, rows) in enumerate(frame.groupby("series", sort=False)):
            mark = _look("text", number)
            one.axes.plot([], [], label=_shown(series), **mark)
            for place, value, kind in zip(rows[y], rows[x], rows.kind, strict=True):
                one.axes.plot(value, names.index(place), **_look(kind, number) | {"marker": mark["marker"]})
        one.axes.set_yticks(range(len(names)), names)
        one.axes.invert_yaxis()
        one.axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.5)
        one.logarithmic("x")
    return one.svg


def bars(frame: pd.DataFrame, x: str, y: str, error: str, *, labels: tuple[str, str]) -> str:
    """Draw points with error bars, the values of `x` side by side as words, around a line at zero."""
    names, found = list(dict.fromkeys(frame[x])), list(_series(frame))
    with picture(labels) as one:
        for number, (series, rows, look) in enumerate(found):
            places = rows[x].map(names.index) + 0.16 * (number - (len(found) - 1) / 2)
            one.axes.errorbar(places, rows[y], yerr=rows[error], label=series, elinewidth=1, **look | {"linestyle": ""})
        one.axes.axhline(0, color=GREY, linewidth=0.8)
        one.axes.set_xticks(range(len(names)), names)
    return one.svg
