"""The commands that measure speed and its lower bounds: `floors`, `speed-report` and `gpu-report`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkwindow_lab.errors import LabError, check_number, printable

if TYPE_CHECKING:
    from sinkwindow_lab.records import Report

Out = Annotated[Path, typer.Option(help="Folder for the report.")]
MOST_THREADS = 1024  # beyond some thousands systems refuse them, and the process ends
Quick = Annotated[bool, typer.Option("--quick", help="Tiny models and few samples; nothing is judged.")]


def floors(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; the embedded one by default.")] = None,
    shape: Annotated[str | None, typer.Option(help="A shape with random weights instead, such as pythia-160m.")] = None,
    context: Annotated[int, typer.Option(help="Keys of the attention, in tokens.")] = 1024,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    device: Annotated[str, typer.Option(help="Torch device: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    megabytes: Annotated[float, typer.Option(help="Tensor for the bandwidth, in MB.")] = 512.0,
    *,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")
    ] = False,
) -> None:
    """Measure what no cache can beat here: bare attention, a step with almost no context, memory bandwidth."""
    from sinkwindow_lab.inputs import models
    from sinkwindow_lab.inputs.shapes import random_model
    from sinkwindow_lab.measure.requirements import check_memory, memory
    from sinkwindow_lab.render.markdown import join
    from sinkwindow_lab.reports.speed import floors as measured
    from sinkwindow_lab.reports.speed.compare import places
    from sinkwindow_lab.reports.speed.page import bandwidth_table, floor_table

    for name, value in (("context", context), ("batch", batch)):
        check_number(f"--{name} ", value, 1)
    place, kind = models.check_place(device, dtype)
    check_number("--megabytes ", megabytes, 0, memory(place) // 2_000_000)  # read and written
    if shape is None:
        loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        chosen, title = loaded.model, loaded.record.name
    else:
        chosen, title = random_model(shape, device=place, dtype=kind), f"{shape} shape"
    check_memory(chosen, context * batch, f"--context {context} --batch {batch}")
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
    from sinkwindow_lab.files import output_file
    from sinkwindow_lab.render import marked
    from sinkwindow_lab.reports.speed import collect, compare, page

    check_number("--threads ", threads, 1, MOST_THREADS)
    if docs is not None:
        output_file("--docs", docs)
        marked.check(docs, page.VERDICT)
    with _writer("speed", out) as save:
        report = collect.speed(quick=quick, threads=threads, save=save, say=say)
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

    if not minutes > 0:
        raise LabError(f"--minutes {minutes} must be above 0")
    with _writer("gpu", out) as save:
        report = collect.gpu(minutes=minutes, save=save, say=say, device=device)
    _judge(page.broken(report))


def say(what: str, *, err: bool = True) -> None:
    """Show lines, on standard error unless they are results; no name in them acts."""
    typer.echo("\n".join(map(printable, what.splitlines())), err=err)


@contextmanager
def _writer(kind: str, out: Path) -> Iterator[Callable[[Report], None]]:
    """Yield a function that writes a report as JSON and as a page; no other run writes into the folder meanwhile."""
    from sinkwindow_lab.files import alone_in
    from sinkwindow_lab.reports.output import prepare, write_report

    def write(report: Report) -> None:
        paths = list(write_report(report, out))
        if report.finished:
            typer.echo(paths[-1].read_text(encoding="utf-8"))
            say("\n".join(f"wrote {path}" for path in paths))

    with alone_in(prepare(kind, out), say):
        yield write


def _judge(complaints: Sequence[str]) -> None:
    for one in complaints:
        say(f"missed: {one}")
    if complaints:
        raise typer.Exit(1)
