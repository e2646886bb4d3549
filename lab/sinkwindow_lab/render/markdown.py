"""Markdown, the only source of a page. Everything named by a user goes through `name`, so that it is shown as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sinkwindow_lab.errors import printable
from sinkwindow_lab.measure.clock import quartiles

NOT_MEASURED = "-"
SPECIAL = re.compile(r"([\\`*\[\]<>|~&#!$])|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class Page:
    """A page: its Markdown, and its pictures by name, each an SVG file."""

    markdown: str
    figures: dict[str, str] = field(default_factory=dict)


def name(words: str) -> str:
    """Return text that shows as it is on one line: nothing in it is Markdown or HTML."""
    safe = SPECIAL.sub(lambda found: "\\" + found[0], printable(" ".join(words.split())))
    return re.sub(r"^(\d+(?=[.)])|(?=[-+=]))", r"\1\\", safe)  # would start a list or a rule at the start of a block


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool | Collection[str] = False) -> str:
    """Return a table; numbers are aligned right, the first column and columns of `words` (all, or by title) left."""
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row needs {len(header)} cells, one per title")
    prose = header if words is True else [*header[:1], *(words or ())]
    rule = ["---" if title in prose else "---:" for title in header]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def cell(value: Any, write: Callable[[Any], str]) -> str:
    """Return a value as words, or the mark of what was not measured."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return NOT_MEASURED if missing else write(value)


def bullets(items: Sequence[str]) -> str:
    """Return a list."""
    return "\n".join(f"- {item}" for item in items)


def quote(text: str) -> str:
    """Return a sample of text, shown verbatim."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}text\n{text}\n{fence}"


def figure(file: str, caption: str) -> str:
    """Return a picture of the folder `figures`."""
    return f"![{caption}](figures/{file}.svg)"


def join(blocks: Sequence[str]) -> str:
    """Return blocks as one text, an empty line between them."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def numbers(samples: Sequence[float], digits: int, unit: str = "") -> str:
    """Return the median, and the quartiles in brackets if there are several samples."""
    lower, median, upper = quartiles(samples)
    between = f" [{lower:.{digits}f},\N{NO-BREAK SPACE}{upper:.{digits}f}]" if len(samples) > 1 else ""
    return f"{median:.{digits}f}{between}{unit and f' {unit}'}"
