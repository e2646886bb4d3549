"""Tables in hand-written pages: each stands between two marks, so that a run can write it again and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sinkwindow.lab.errors import LabError
from sinkwindow.lab.files import write_text


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a place.

    Args:
        name: of the place.

    Returns:
        Two HTML comments.
    """
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def check(page: Path, name: str) -> None:
    """Makes sure, before anything is measured, that there is a page with a place.

    Args:
        page: a Markdown file.
        name: of the place.

    Raises:
        LabError: if the page cannot be read or the place has no beginning or no end.
    """
    begin, end = marks(name)
    if end not in _read(page).partition(begin)[2]:
        message = f"{page} has no {begin} with {end} after it: put both where the table belongs"
        raise LabError(message)


def fill(page: Path, found: Mapping[str, str]) -> None:
    """Writes places of a page again; what the page has no place for is left out.

    Args:
        page: a Markdown file.
        found: Markdown by the place's name.

    Raises:
        LabError: if the page cannot be read or a place does not end; nothing is written then.
    """
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
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{page} cannot be read: give a Markdown file"
        raise LabError(message) from error
