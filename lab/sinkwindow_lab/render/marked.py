"""Tables in hand-written pages: each is between two marks, so that a run can rewrite it and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.files import read_text, write_text


def marks(name: str) -> tuple[str, str]:
    """Return the two HTML comments before and after a named place."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def check(page: Path, name: str) -> None:
    """Check before measuring that a Markdown page has a named place."""
    begin, end = marks(name)
    if end not in _read(page).partition(begin)[2]:
        raise LabError(f"{page} has no {begin} with {end} after it: put both where the table belongs")


def fill(page: Path, found: Mapping[str, str]) -> None:
    """Rewrite the named places of a Markdown page; Markdown without a place in it is left out."""
    text = _read(page)
    for name, content in found.items():
        begin, end = marks(name)
        if begin in text:
            check(page, name)
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}\n\n{content.strip()}\n\n{end}{rest.partition(end)[2]}"
    write_text(page, text)


def _read(page: Path) -> str:
    try:
        return read_text(page)
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{page} cannot be read: give a Markdown file") from error
