"""The files of a report: JSON, Markdown with its pictures, and one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.files import output_folder, write_text
from sinkwindow_lab.render import tables
from sinkwindow_lab.render.canvas import standalone
from sinkwindow_lab.render.page import Figure
from sinkwindow_lab.reports.report import Report

JSON = "paper_tables.json"
MARKDOWN = "paper_tables.md"
HTML = "report.html"
FIGURES = "figures"


def write_report(report: Report, folder: Path) -> Iterator[Path]:
    """Write all files of a report into an existing folder.

    Yields each file that was written, the JSON first: the others can be made from it.

    Raises:
        OSError: if the folder cannot be written.
    """
    yield _write(folder / JSON, report.model_dump_json(indent=1) + "\n")
    pictures = output_folder(folder / FIGURES)
    for block in tables.page(report):
        if isinstance(block, Figure):
            yield _write(pictures / f"{block.name}.svg", standalone(block.draw()))
    yield _write(folder / MARKDOWN, tables.render(report))
    yield _write(folder / HTML, tables.render_html(report))


def read_report(path: Path) -> Report:
    """Read a report from its JSON.

    Raises:
        LabError: if there is no such file, or it is not a report of this version.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{path} cannot be read: give the {JSON} of an earlier run") from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise LabError(f"{path} is not a report of this version (at {place or 'its start'}): measure again") from error


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path
