"""The commands that measure speed and its lower bounds: `floors`, `speed-report` and `gpu-report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkwindow_lab.errors import LabError

if TYPE_CHECKING:
    from sinkwindow_lab.records import Report

Out = Annotated[Path, typer.Option(help="Folder for the report.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny models and few samples; nothing is judged.")]


def floors(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; the embedded one by default.")] = None,
    shape: Annotated[str | None, typer.Option(help="A shape with random weights instead, such as pythia-160m.")] = None,
    context: Annotated[int, typer.Option(help="Keys of the attention, in tokens.")] = 1024,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    device: Annotated[str, typer.Option(help="Torch device: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    megabytes: Annotated[float, typer.Option(help="Tensor for the bandwidth, in MB.")] = 512.0,
) -> None:
    """Measure what no cache can beat here: bare attention, a step with almost no context, memory bandwidth."""
    from sinkwindow_lab.inputs import models
    from sinkwindow_lab.inputs.shapes import random_model
    from sinkwindow_lab.render.markdown import join
    from sinkwindow_lab.reports.speed import floors as measured
    from sinkwindow_lab.reports.speed.compare import places
    from sinkwindow_lab.reports.speed.page import bandwidth_table, floor_table

    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise LabError(f"--{name} {value} must be 1 or more")
    place, kind = models.usable_device(device), models.usable_dtype(dtype)
    if shape is None:
        loaded = models.load_model(model, device=device, dtype=dtype)
        chosen, title = loaded.model, loaded.record.name
    else:
        chosen, title = random_model(shape, device=place, dtype=kind), f"{shape} shape"
    bandwidth = measured.bandwidth(place, megabytes=megabytes)
    found = places([*bandwidth, *measured.floors(chosen, title, context, batch)])
    typer.echo(join([floor_table(found), bandwidth_table(found)]))


def speed_report(
    out: Out = Path("results"),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    docs: Annotated[Path | None, typer.Option(help="A Markdown file with marked tables to rewrite.")] = None,
    *,
    quick: Quick = False,
) -> None:
    """Measure the cache and its lower bounds; fail if a target is missed, naming each with its number."""
    from sinkwindow_lab.render import marked
    from sinkwindow_lab.reports.speed import collect, compare, page

    if docs is not None:
        marked.check(docs, page.VERDICT)
    report = collect.speed(quick=quick, threads=threads, save=_writer(out), say=_say)
    if docs is not None:
        marked.fill(docs, page.sections(report))
    _judge([] if quick else [one.complaint() for one in compare.comparisons(report) if not one.met])


def gpu_report(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Time for everything; what does not fit is skipped and named.")] = 7.5,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU by default if there is one.")] = None,
) -> None:
    """Measure large shapes on a GPU, without network, and check the cache there; without a GPU, tiny shapes."""
    from sinkwindow_lab.reports.speed import collect, page

    if minutes <= 0:
        raise LabError(f"--minutes {minutes} must be above 0")
    report = collect.gpu(minutes=minutes, save=_writer(out), say=_say, device=device)
    _judge(page.broken(report))


def _say(what: str) -> None:
    typer.echo(what, err=True)


def _writer(out: Path) -> Callable[[Report], None]:
    """Return a function that writes a report as JSON and as a page; the folder is made at once."""
    from sinkwindow_lab.files import output_folder
    from sinkwindow_lab.reports.output import write_report

    folder = output_folder(out)

    def write(report: Report) -> None:
        paths = list(write_report(report, folder))
        if report.finished:
            typer.echo(paths[-1].read_text(encoding="utf-8"))
            _say("\n".join(f"wrote {path}" for path in paths))

    return write


def _judge(complaints: Sequence[str]) -> None:
    for one in complaints:
        _say(f"missed: {one}")
    if complaints:
        raise typer.Exit(1)
