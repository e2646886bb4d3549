"""Numbers in a hand-written page: each marked place gets its table from a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sinkwindow.lab.errors import LabError
from sinkwindow.lab.files import write_text
from sinkwindow.lab.pace import speed_page
from sinkwindow.lab.pace.records import SpeedReport
from sinkwindow.lab.page import Text, markdown


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a place."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def sections(report: SpeedReport) -> dict[str, str]:
    """What a report has for each place.

    Args:
        report: of a run.

    Returns:
        Markdown by the place's name.
    """
    machine = dict(speed_page.machine_rows(report.machine))
    where = f"Measured on {machine['Machine']}; {machine['Software']}; commit {machine['Commit']}; {machine['Date']}."
    found = {"speed-verdict": markdown([Text(speed_page.verdict(report)), Text(where)])}
    found["speed-floors"] = markdown(
        [
            speed_page.floor_table(report.floors, report.bandwidth),
            speed_page.bandwidth_table(report.bandwidth),
        ]
    )
    for part in speed_page.PARTS:
        rows = [one for one in report.comparisons if one.part == part]
        if rows:
            found[f"speed-{part}"] = markdown([speed_page.comparison_table(rows, judged=not report.quick)])
    return found


def check(path: Path) -> None:
    """Makes sure, before anything is measured, that there is a page with places.

    Args:
        path: the page.

    Raises:
        LabError: if it cannot be read or has no marked place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"--docs {path} cannot be read: give a Markdown file"
        raise LabError(message) from error
    if markers("speed-verdict")[0] not in text:
        message = f"--docs {path} has no {markers('speed-verdict')[0]}: mark the places where tables belong"
        raise LabError(message)


def write(path: Path, found: Mapping[str, str]) -> None:
    """Fills the marked places of a page; a place without a measurement stays as it is.

    Args:
        path: the page.
        found: Markdown by the place's name.

    Raises:
        LabError: if a place begins and does not end.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in found.items():
        begin, end = markers(name)
        head, marked, rest = text.partition(begin)
        if not marked:
            continue
        if end not in rest:
            message = f"{path} has {begin} without {end}"
            raise LabError(message)
        text = f"{head}{begin}\n\n{content.rstrip()}\n\n{end}{rest.partition(end)[2]}"
    write_text(path, text)
