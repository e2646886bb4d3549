"""The files of a report: JSON, Markdown with its pictures, and of the tables one HTML page."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sinkwindow_lab.errors import LabError, keeping, say
from sinkwindow_lab.files import alone_in, output_file, output_folder, read_text, write_text
from sinkwindow_lab.records import Report
from sinkwindow_lab.render.markdown import Page

NAMES = {"tables": "paper_tables", "speed": "speed", "gpu": "gpu_report", "lm-eval": "lm_eval", "sinks": "sinks"}
PAGES = {"tables": "tables.page", "speed": "speed.page", "gpu": "speed.page", "lm-eval": "evaluation", "sinks": "sinks"}
HTML, FIGURES = "report.html", "figures"


def as_json(report: Report) -> str:
    """Return a report as JSON, a measurement per line."""
    content = report.model_dump(mode="json")
    rows = ",\n".join(f"  {json.dumps(one)}" for one in content.pop("measurements"))
    return f'{json.dumps(content, indent=1)[:-2]},\n "measurements": [\n{rows}\n ]\n}}\n'


def prepare(kind: str, folder: Path) -> Path:
    """Return the folder for a report, checked before it is measured: files can be written, and pages be made."""
    _pages(kind)
    output_folder(folder)
    if kind == "tables":
        importlib.import_module("sinkwindow_lab.render.html")
        output_folder(folder / FIGURES)
    for file in (f"{NAMES[kind]}.json", f"{NAMES[kind]}.md", HTML):
        output_file("--out", folder / file)
    return folder


def write_report(report: Report, folder: Path) -> Iterator[Path]:
    """Write all files of a report into a folder; yield each, the JSON first: the others can be made from it."""
    yield write_text(folder / f"{NAMES[report.kind]}.json", as_json(report))
    made: Page = _pages(report.kind).page(report)
    for name, svg in made.figures.items():
        yield write_text(output_folder(folder / FIGURES) / f"{name}.svg", svg)
    yield write_text(folder / f"{NAMES[report.kind]}.md", made.markdown)
    if report.kind == "tables":
        from sinkwindow_lab.render.html import html_page  # the other pages need neither Jinja2 nor a Markdown parser

        yield write_text(folder / HTML, html_page(made))


@contextmanager
def writer(kind: str, out: Path) -> Iterator[Callable[[Report], None]]:
    """Yield a function that writes a report, and shows its page at last; no other run writes there meanwhile."""
    paths: list[Path] = []

    def write(report: Report) -> None:
        paths[:] = write_report(report, out)
        if report.finished:
            print(paths[-1].read_text(encoding="utf-8"))  # noqa: T201
            say("\n".join(f"wrote {path}" for path in paths))

    def kept() -> str:
        return f"the parts that are finished are in {paths[-1]}" if paths else "nothing is written"

    with alone_in(prepare(kind, out), say), keeping(kept):
        yield write


def read_report(path: Path) -> Report:
    """Read a report from its JSON."""
    try:
        return Report.model_validate_json(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{path} cannot be read: give the JSON of an earlier run, such as paper_tables.json") from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise LabError(f"{path} is not a report of this version (at {place or 'its start'}): measure again") from error


def _pages(kind: str) -> Any:
    return importlib.import_module(f"sinkwindow_lab.reports.{PAGES[kind]}")
