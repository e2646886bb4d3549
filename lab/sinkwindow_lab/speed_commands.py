"""The commands that measure speed and its lower bounds: `floors`, `speed-report` and `gpu-report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinkwindow_lab.errors import LabError

JSON, MARKDOWN = "speed.json", "speed.md"
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
    from sinkwindow_lab.render.page import markdown
    from sinkwindow_lab.reports.pace import floors as measured
    from sinkwindow_lab.reports.pace.speed_page import bandwidth_table, floor_table

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
    found = measured.floors(chosen, title, context, batch)
    typer.echo(markdown([floor_table([found], bandwidth), bandwidth_table(bandwidth)]))


def speed_report(
    out: Out = Path("results"),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    docs: Annotated[Path | None, typer.Option(help="A Markdown file with marked tables to rewrite.")] = None,
    *,
    quick: Quick = False,
) -> None:
    """Measure the cache and its lower bounds; fail if a bar is missed, naming each with its number."""
    from sinkwindow_lab import files
    from sinkwindow_lab.render import marked
    from sinkwindow_lab.reports.pace import collect, speed_page

    folder = files.output_folder(out)
    if docs is not None:
        marked.check(docs, speed_page.VERDICT)
    report = collect.collect(quick=quick, threads=threads, say=lambda what: typer.echo(what, err=True))
    files.write_text(folder / JSON, report.model_dump_json(indent=1) + "\n")
    rendered = speed_page.render(report)
    files.write_text(folder / MARKDOWN, rendered)
    if docs is not None:
        marked.fill(docs, speed_page.sections(report))
    typer.echo(rendered)
    typer.echo(f"wrote {folder / JSON}\nwrote {folder / MARKDOWN}", err=True)
    _judge([] if quick else [speed_page.complaint(one) for one in report.missed])


def _judge(complaints: list[str]) -> None:
    for one in complaints:
        typer.echo(f"missed: {one}", err=True)
    if complaints:
        raise typer.Exit(1)


def gpu_report(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Time for everything; what does not fit is skipped and named.")] = 7.5,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU by default if there is one.")] = None,
) -> None:
    """Measure large shapes on a GPU, without network, and check the cache there; without a GPU, tiny shapes."""
    from sinkwindow_lab import files
    from sinkwindow_lab.reports.pace import gpu_collect, gpu_page
    from sinkwindow_lab.reports.pace.gpu_records import GpuReport

    folder = files.output_folder(out)

    def save(report: GpuReport) -> None:
        files.write_text(folder / "gpu_report.json", report.model_dump_json(indent=1) + "\n")
        files.write_text(folder / "gpu_report.md", gpu_page.render(report))

    if minutes <= 0:
        raise LabError(f"--minutes {minutes} must be above 0")
    report = gpu_collect.collect(minutes=minutes, save=save, say=lambda what: typer.echo(what, err=True), device=device)
    typer.echo(gpu_page.render(report))
    _judge([f"law {one.law!r}, {one.shape}, {one.dtype}: {one.error:.2e}" for one in report.laws if not one.holds])
