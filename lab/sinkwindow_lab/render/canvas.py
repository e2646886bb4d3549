"""One picture as SVG, with the same bytes every time.

Text and axes use the color of the page around them (`currentColor`), so that one picture works in light and dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

INK = "#010203"  # replaced by the page's color when the picture is written
GREY = "#828288"
COLOURS = ("#2a78d6", "#d9622b", "#1a9a6c", "#8a63d2", "#b8860b")  # each readable on white and on near-black
MARKERS = ("o", "s", "^", "D", "v")
SIZE = (4.8, 3.2)  # with the font size below it needs no zoom on a phone [inch]
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
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
STANDALONE = (
    "<style>:root { color: #1d1d1f } @media (prefers-color-scheme: dark) { :root { color: #e8e8ea } }</style>\n"
)


class Canvas:
    """One pair of axes."""

    def __init__(self, name: str, title: str, height: float = SIZE[1]) -> None:
        """Create the axes; `height` is in inches, `title` is the text alternative of the picture."""
        from matplotlib.figure import Figure

        self.name, self.title = name, title
        self.figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        self.axes = self.figure.subplots()
        self.svg = ""

    def labels(self, x: str, y: str) -> None:
        """Name both axes."""
        self.axes.set_xlabel(x)
        self.axes.set_ylabel(y)

    def log_ticks(self, axis: str, values: Sequence[float]) -> None:
        """Make an axis logarithmic, with plain numbers at these places."""
        getattr(self.axes, f"set_{axis}scale")("log")
        getattr(self.axes, f"set_{axis}ticks")(values, [f"{value:,.10g}" for value in values])
        getattr(self.axes, f"set_{axis}ticks")([], minor=True)

    def legend(self, columns: int = 2) -> None:
        """Add a legend below the axes."""
        handles, _ = self.axes.get_legend_handles_labels()
        if handles:
            self.figure.legend(loc="outside lower center", ncols=columns)


@contextmanager
def canvas(name: str, title: str, height: float = SIZE[1]) -> Iterator[Canvas]:
    """Yield the axes of a picture; its `svg` is available after the block. `height` is in inches."""
    import matplotlib as mpl

    with mpl.rc_context(cast("Any", SETTINGS)):
        one = Canvas(name, title, height)
        yield one
        stream = io.StringIO()
        one.figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
        one.svg = tidy(stream.getvalue(), name, title)


def tidy(svg: str, name: str, title: str) -> str:
    """Turn matplotlib's SVG into an element of a page: no prolog, ids that start with `name`, the page's color."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return "\n".join(line.rstrip() for line in svg.replace(INK, "currentColor").splitlines())


def standalone(svg: str) -> str:
    """Turn an `svg` element into a file of its own, with its own colors."""
    start = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:start]}\n{STANDALONE}{svg[start:]}\n"


def nice_ticks(values: Sequence[float]) -> list[float]:
    """Return ticks for a logarithmic axis: 1, 2, 5 times powers of ten that enclose the (positive) values."""
    low, high = min(values), max(values)
    start, stop = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [factor * 10.0**power for power in range(start, stop) for factor in (1, 2, 5)]
    below = max((step for step in steps if step <= low), default=steps[0])
    above = min((step for step in steps if step >= high), default=steps[-1])
    found = [step for step in steps if below <= step <= above]
    return found if len(found) > 1 else [below, 2 * below]
