"""The page of `sinkwindow tables`: a pure function of its report, so that no number is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from sinkwindow_lab.measure.generation import TURN
from sinkwindow_lab.records import Configuration, Measurement, Report
from sinkwindow_lab.render.markdown import NOT_MEASURED, Page, bullets, cell, figure, join, name, numbers, table
from sinkwindow_lab.render.origins import head, machine_line
from sinkwindow_lab.reports.tables import studies_page
from sinkwindow_lab.reports.tables.findings import findings

# Columns after the perplexities: the metric of each, and how its samples are written.
FACTS: dict[str, tuple[str, Callable[[list[float]], str]]] = {
    "Total Time (s)": ("total", lambda found: numbers(found, 2)),
    "Avg Attn (ms)": ("attention", lambda found: f"{found[0]:.3f}"),
    "TTFT (s)": ("TTFT", lambda found: numbers(found, 3)),
    "TPOT (ms)": ("TPOT", lambda found: numbers(found, 2)),
    "Throughput (tok/s)": ("throughput", lambda found: numbers(found, 2)),
    "Peak Mem (GB)": ("peak memory", lambda found: f"{max(found) / 1e9:.3f}"),
}
SCORES = (
    "Configuration", "Corpus", "Tokens", "Targets", "NLL", "Std. error", "Bits/byte", "tok/s", "Evictions", "Kept",
)  # fmt: skip
SPEEDS = ("Configuration", "Prompts", "Timed steps", "Mean step (ms)", "Cache (MB)", "Kept", "Evictions")
WORDS = (
    "**PPL**: exp of the mean loss over all targets, each scored once, the text read once from its start.",
    "**Total Time**: prefill and generation. **Throughput**: new tokens over that time.",
    "**Avg Attn**: cache work plus attention of one token, all layers, averaged over a generation of its own.",
    "**TTFT**: prefill and the first token; **TPOT**: one token after it. Medians, quartiles in brackets.",
    "The median TPOT is that of a step without an eviction; Total Time and the mean step include evictions.",
    "Rows are interleaved, a prompt or a token each: a slow minute of the machine affects all of them equally.",
    f"**{NOT_MEASURED}**: not measured. The speed of a mistake is of no interest, re-computation is slow to score.",
    "Generations from one prompt are one: a shorter one is the start of a longer one.",
    "**Peak Mem**: weights plus the most that a generation's tensors take at once, counted; 1 GB = 10^9 bytes.",
)


def frame(measurements: Sequence[Measurement]) -> pd.DataFrame:
    """Return a row per measurement: its fields, and `value`, the median of its samples."""
    rows = [{**one.model_dump(), "value": one.median} for one in measurements]
    return pd.DataFrame(rows, columns=[*Measurement.model_fields, "value"]).astype({"at": float})  # NaN for no place


def page(report: Report) -> Page:
    """Return the whole page, with its pictures."""
    measured = frame(report.measurements)
    texts = [corpus.name for corpus in report.corpora]
    ways = {one.name: one for one in report.configurations}
    gone = "Evicted text is gone: streaming bounds memory and keeps text fluent, but nothing evicted can be recalled."
    quick = "**A quick run**: the same questions over far fewer tokens, as each title says."
    found, along = findings(report, measured), studies_page.picture(report, measured)
    figures = {"along": along} if along else {}
    blocks = ["# Paper tables", gone, quick if report.quick else "", machine_line(report.machine)]
    blocks += (
        ["## Findings", bullets(found), figure("along", "PPL along the text.") if along else ""]
        if found or along
        else []
    )
    blocks += ["## What ran", head(report)]
    behind, shown = ["## Behind the tables"], set[str]()
    for one in report.plan["experiments"]:
        own = measured[measured.part == one["name"]]
        if len(own):
            blocks += [f"## {_title(one)}", _main_table(own, one, ways, texts), _remarks(own, one)]
            behind += [f"### Behind {_title(one)}", _score_table(own, ways), _speed_table(own, ways)]
            shown |= set(own.configuration)
    if shown:
        legend = [way.explained() for name, way in ways.items() if name in shown]
        places = report.plan["speed_places"]
        sampled = (
            f"Of a long generation {places} runs of {TURN} steps, spread evenly, are generated and timed up to each "
            "length. Text is read between them, and Total Time counts those tokens at the mean of the timed steps."
        )
        blocks += ["## What the words mean", bullets([*legend, *WORDS, *([sampled] if places else [])])]
    blocks += studies_page.blocks(report, measured, figures)
    return Page(join([*blocks, *(behind if shown else [])]), figures)


def _title(experiment: dict[str, Any]) -> str:
    lengths = f"prompt {experiment['prompt_tokens']:,}, generation {experiment['generated_tokens']:,}"
    return f"{experiment['name'].capitalize()}: PPL over {experiment['perplexity_tokens']:,} tokens, {lengths}"


def _main_table(
    own: pd.DataFrame, experiment: dict[str, Any], ways: Mapping[str, Configuration], texts: Sequence[str]
) -> str:
    scores = own.set_index(["configuration", "metric", "subject"]).value.to_dict()
    found = own.drop_duplicates(["configuration", "metric"]).set_index(["configuration", "metric"]).samples.to_dict()
    means = own[own.metric == "attention"].groupby("configuration").value.mean()
    found |= {(way, "attention"): [mean] for way, mean in means.items()}
    for way in own[(own.metric == "TPOT") & (own["at"] < experiment["generated_tokens"])].configuration:
        found |= {(way, "total"): None, (way, "throughput"): None}
    rows = []
    for way in [ways[way] for way in ways if way in set(own.configuration)]:
        losses = [cell(scores.get((way.name, "PPL", text)), "{:.3f}".format) for text in texts]
        facts = [cell(found.get((way.name, metric)), write) for metric, write in FACTS.values()]
        rows.append([way.title, *losses, *facts])
    return table(("Configuration", *(f"PPL {name(text)}" for text in texts), *FACTS), rows)


def _remarks(own: pd.DataFrame, experiment: dict[str, Any]) -> str:
    """Say which rows generated fewer tokens than the title promises, and how many targets were scored."""
    steps, targets = own[own.metric == "TPOT"], own[own.metric == "targets"]
    short = [
        f"{way} generated {count:,.0f} tokens only: its TPOT is per token as everywhere, a total time of so few tokens "
        "would not compare."
        for way, count in zip(steps.configuration, steps["at"], strict=True)
        if count < experiment["generated_tokens"]
    ]
    counts = sorted(set(zip(targets.subject, targets.value, strict=True)))
    scored = ", ".join(f"{count:,.0f} of {name(text)}" for text, count in counts)
    return join([*short, f"Targets scored, the same in every row: {scored}." if scored else ""]).strip()


def _score_table(own: pd.DataFrame, ways: Mapping[str, Configuration]) -> str:
    rows = []
    for way, text, tokens, found in _groups(own, ways, "PPL"):
        losses = [f"{found[one]:.4f}" for one in ("NLL", "standard error", "bits per byte")]
        rate = f"{found['targets'] / found['seconds']:.1f}" if "seconds" in found else NOT_MEASURED
        counts = [f"{found[one]:,.0f}" for one in ("evictions", "kept")]
        rows.append([way.title, name(text), f"{tokens:,.0f}", f"{found['targets']:,.0f}", *losses, rate, *counts])
    return table(SCORES, rows) if rows else ""


def _speed_table(own: pd.DataFrame, ways: Mapping[str, Configuration]) -> str:
    samples = own.set_index(["configuration", "metric", "at"]).samples
    rows = []
    for way, _, new_tokens, found in _groups(own, ways, "TPOT"):
        prompts, steps = (f"{len(samples[way.name, one, new_tokens]):,}" for one in ("TTFT", "TPOT"))
        mean = f"{1e3 * (found['total'] - found['TTFT']) / (new_tokens - 1):.2f}"
        kept, cache, evictions = (found[f"generation: {metric}"] for metric in ("kept", "cache", "evictions"))
        rows.append([way.title, prompts, steps, mean, f"{cache / 1e6:.2f}", f"{kept:,.0f}", f"{evictions:,.0f}"])
    return table(SPEEDS, rows) if rows else ""


def _groups(
    own: pd.DataFrame, ways: Mapping[str, Configuration], metric: str
) -> list[tuple[Configuration, str, float, dict[str, float]]]:
    """Return way, subject and place of every group that has a metric, with all values of the group, in page order."""
    groups = own[own.metric != "attention"].groupby(["configuration", "subject", "at"], sort=False)
    found = [(ways[key[0]], *key[1:], dict(zip(rows.metric, rows.value, strict=True))) for key, rows in groups]
    return sorted((one for one in found if metric in one[3]), key=lambda one: list(ways).index(one[0].name))
