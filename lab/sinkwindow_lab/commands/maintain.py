"""Commands for those who change sinkwindow, or this machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sinkwindow_lab.commands.options import Buffer, Device, Dtype, Model, Out, Sinks, Trust, Window, app
from sinkwindow_lab.errors import LabError, check_number, say

command = functools.partial(app.command, rich_help_panel="Maintain")
MOST_THREADS = 1024  # beyond some thousands systems refuse them, and the process ends


@command()
def mechanics(
    sinks: Sinks = 8,
    window: Window = 256,
    buffer: Buffer = 64,
    evictions: Annotated[int, typer.Option(help="Stop after this many.")] = 3,
) -> None:
    """Show the cache step by step.

    A tiny random model shows its shape, and each eviction.
    """
    from sinkwindow_lab.measure.mechanics import log

    for line in log(sinks, window, buffer, evictions=evictions):
        typer.echo(line)


@command()
def configs() -> None:
    """List forms of configuration names.

    Each is shown with its meaning.
    """
    from sinkwindow_lab.ways.configurations import MEANINGS, SHAPES

    width = max(len(shape.example) for shape in SHAPES)
    for shape in SHAPES:
        typer.echo(f"{shape.example:<{width}}  {MEANINGS[shape.kind]}")


@command()
def floors(
    model: Model = None,
    shape: Annotated[str | None, typer.Option(help="A shape with random weights instead, such as pythia-160m.")] = None,
    context: Annotated[int, typer.Option(help="Keys of the attention, in tokens.")] = 1024,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    megabytes: Annotated[float, typer.Option(help="Tensor for the bandwidth, in MB.")] = 512.0,
    *,
    trust_remote_code: Trust = False,
) -> None:
    """Measure what no cache can beat here.

    That is bare attention, a step with almost no context, and memory bandwidth.
    """
    from sinkwindow_lab.inputs import models
    from sinkwindow_lab.inputs.shapes import random_model
    from sinkwindow_lab.measure.requirements import check_memory, memory
    from sinkwindow_lab.reports.speed import compare, page
    from sinkwindow_lab.reports.speed import floors as measured

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
    found = measured.bandwidth(place, megabytes=megabytes) + measured.floors(chosen, title, context, batch)
    typer.echo(page.floor_tables(compare.places(found)))


@command()
def speed_report(
    out: Out = Path("results"),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    docs: Annotated[Path | None, typer.Option(help="A Markdown file with marked tables to rewrite.")] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and few samples; nothing is judged.")] = False,
) -> None:
    """Compare the cache with its lower bounds.

    Fails if a target is missed, and names each with its number.
    """
    from sinkwindow_lab.files import output_file
    from sinkwindow_lab.render import marked
    from sinkwindow_lab.reports.output import writer
    from sinkwindow_lab.reports.speed import collect, compare, page

    check_number("--threads ", threads, 1, MOST_THREADS)
    if docs is not None:
        output_file("--docs", docs)
        marked.check(docs, page.VERDICT)
    with writer("speed", out) as save:
        report = collect.speed(quick=quick, threads=threads, save=save)
    if docs is not None:
        marked.fill(docs, page.sections(report))
    _judge([] if quick else [one.complaint() for one in compare.comparisons(report) if not one.met])


@command()
def gpu_report(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Time for everything; what does not fit is skipped and named.")] = 7.5,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU by default if there is one.")] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes on a GPU too: everything runs once.")] = False,
) -> None:
    """Measure large shapes on a GPU, offline.

    The cache is checked there first. Without a GPU, shapes are tiny.
    """
    from sinkwindow_lab.reports.output import writer
    from sinkwindow_lab.reports.speed import collect, page

    if not minutes > 0:
        raise LabError(f"--minutes {minutes} must be above 0")
    with writer("gpu", out) as save:
        report = collect.gpu(minutes=minutes, save=save, device=device, quick=quick)
    _judge(page.broken(report))


def _judge(complaints: Sequence[str]) -> None:
    if complaints:
        say("\n".join(f"missed: {one}" for one in complaints))
        raise typer.Exit(1)
