"""The page of `sinkwindow evaluate`: a pure function of its report."""

from __future__ import annotations

from sinkwindow_lab.records import Report
from sinkwindow_lab.render.markdown import Page, bullets, cell, join, name, table
from sinkwindow_lab.render.origins import head

ERROR = " standard error"  # behind the name of a metric, that of its standard error
WORDS = (
    "**acc**: share of questions answered right, more is better. Lower perplexities and bits are better.",
    "**±**: standard error over documents, as lm-eval computes it.",
    "**baseline** is lm-eval's `HFLM`: it reads texts beyond the model's length in pieces, and the ends of questions.",
    "**Time**: the tasks together, one configuration after the other, each once.",
)


def page(report: Report) -> Page:
    """Return the whole page: a table per task, a row per configuration."""
    values = {(one.subject, one.configuration, one.metric): one.median for one in report.measurements}
    ways, subjects = [one.name for one in report.configurations], dict.fromkeys(one[0] for one in values)
    blocks = ["# lm-evaluation-harness"]
    units = {one.metric: one.unit and f" ({one.unit})" for one in report.measurements}
    limit = report.plan["limit"]
    blocks.append(f"**A quick run**: the first {limit} documents of each task only." if report.quick else "")
    tasks = ("Tasks", f"{name(', '.join(report.plan['tasks']))}; batch size {report.plan['batch_size']}")
    blocks.append(head(report, [("lm-eval", report.notes["lm-eval"]), tasks]))
    for subject in subjects:
        found = dict.fromkeys(metric for task, _, metric in values if task == subject)
        metrics = [metric for metric in found if metric != "documents" and not metric.endswith(ERROR)]
        rows = [[name(way), *(_cell(values, subject, way, metric) for metric in metrics)] for way in ways]
        count = values.get((subject, ways[0], "documents"))
        title = name(subject) + ("" if count is None else f", {count:,.0f} document(s)")
        blocks += [f"## {title}", table(("Configuration", *(f"{name(one)}{units[one]}" for one in metrics)), rows)]
    legend = [one.explained() for one in report.configurations]
    return Page(join([*blocks, "## What the words mean", bullets([*legend, *WORDS])]))


def _cell(values: dict[tuple[str, str, str], float], subject: str, way: str, metric: str) -> str:
    error = values.get((subject, way, f"{metric}{ERROR}"))
    shown = cell(values.get((subject, way, metric)), "{:.4f}".format)
    return shown if error is None else f"{shown} ± {error:.4f}"
