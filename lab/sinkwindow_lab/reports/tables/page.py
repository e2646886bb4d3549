"""The page of `sinkwindow tables`: a pure function of its report, so that no number is typed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from sinkwindow_lab.measure.generation import TURN
from sinkwindow_lab.records import ConfigurationRecord, Report
from sinkwindow_lab.render.frame import cell, frame
from sinkwindow_lab.render.markdown import NOT_MEASURED, Page, bullets, join, name, numbers, table
from sinkwindow_lab.render.origins import head
from sinkwindow_lab.reports.tables import studies_page

FACTS = ("Total Time (s)", "Avg Attn (ms)", "TTFT (s)", "TPOT (ms)", "Throughput (tok/s)", "Peak Mem (GB)")
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


def page(report: Report) -> Page:
    """Return the whole page, with its pictures."""
    measured, figures = frame(report.measurements), dict[str, str]()
    texts = [corpus.name for corpus in report.corpora]
    ways = {one.name: one for one in report.configurations}
    experiments = [one for one in report.plan["experiments"] if (measured.part == one["name"]).any()]
    prefix = next((f" (token {one.bos_id})" for one in report.texts if one.bos_id is not None), "")
    bos = f"added in front of each text{prefix}" if report.notes["bos"] == "add" else "none added"
    gone = "Evicted text is gone: streaming bounds memory and keeps text fluent, but nothing evicted can be recalled."
    quick = "**A quick run**: the same questions over far fewer tokens, as each title says."
    blocks = ["# Paper tables", gone, quick if report.quick else "", "## What ran", head(report, [("BOS", bos)])]
    for one in experiments:
        own = measured[measured.part == one["name"]]
        blocks += [f"## {_title(one)}", _main_table(own, one, ways, texts), _remarks(own, one)]
    if experiments:
        shown = measured[measured.part.isin([one["name"] for one in experiments])].configuration.unique()
        legend = [studies_page.meaning(ways[name]) for name in ways if name in shown]
        places = report.plan["speed_places"]
        sampled = (
            f"Of a long generation {places} runs of {TURN} steps, spread evenly, are generated and timed up to each "
            "length. Text is read between them, and Total Time counts those tokens at the mean of the timed steps."
        )
        blocks += ["## What the words mean", bullets([*legend, *WORDS, *([sampled] if places else [])])]
    blocks += studies_page.blocks(report, measured, figures)
    if experiments:
        blocks.append("## Behind the tables")
    for one in experiments:
        own = measured[measured.part == one["name"]]
        blocks += [f"### Behind {_title(one)}", _score_table(own, ways), _speed_table(own, ways)]
    return Page(join(blocks), figures)


def _title(experiment: dict[str, Any]) -> str:
    lengths = f"prompt {experiment['prompt_tokens']:,}, generation {experiment['generated_tokens']:,}"
    return f"{experiment['name'].capitalize()}: PPL over {experiment['perplexity_tokens']:,} tokens, {lengths}"


def _main_table(
    own: pd.DataFrame, experiment: dict[str, Any], ways: dict[str, ConfigurationRecord], texts: list[str]
) -> str:
    attention = own[own.metric == "attention"].groupby("configuration").value.mean()
    rest = own[own.metric != "attention"]
    samples = rest.set_index(["configuration", "metric", "subject"]).samples.to_dict()
    generated = {(way, metric): found for (way, metric, _), found in samples.items()}
    whole = set(own[(own.metric == "TPOT") & (own["at"] == experiment["generated_tokens"])].configuration)
    rows = []
    for way in [way for way in ways if way in set(own.configuration)]:
        scores = [cell(samples.get((way, "PPL", text)), lambda found: f"{found[0]:.3f}") for text in texts]

        def shown(metric: str, write: Callable[[list[float]], str], way: str = way) -> str:
            return cell(generated.get((way, metric)), write)

        rows.append(
            [
                studies_page.shown_name(ways[way]),
                *scores,
                shown("total", lambda found: numbers(found, 2)) if way in whole else NOT_MEASURED,
                cell(attention.get(way), lambda found: f"{found:.3f}"),
                shown("TTFT", lambda found: numbers(found, 3)),
                shown("TPOT", lambda found: numbers(found, 2)),
                shown("throughput", lambda found: numbers(found, 2)) if way in whole else NOT_MEASURED,
                shown("peak memory", lambda found: f"{max(found) / 1e9:.3f}"),
            ]
        )
    return table(("Configuration", *(f"PPL {name(text)}" for text in texts), *FACTS), rows)


def _remarks(own: pd.DataFrame, experiment: dict[str, Any]) -> str:
    """Say which rows generated fewer tokens than the title promises, and how many targets were scored."""
    steps, targets = own[own.metric == "TPOT"], own[own.metric == "targets"]
    short = [
        f"{way} generated {count:,} tokens only: its TPOT is per token as everywhere, a total time of so few tokens "
        "would not compare."
        for way, count in zip(steps.configuration, steps["at"].astype(int), strict=True)
        if count < experiment["generated_tokens"]
    ]
    scored = [
        f"{int(count):,} of {name(text)}"
        for text, count in sorted(set(zip(targets.subject, targets.value, strict=True)))
    ]
    return join([*short, f"Targets scored, the same in every row: {', '.join(scored)}." if scored else ""]).strip()


def _score_table(own: pd.DataFrame, ways: dict[str, ConfigurationRecord]) -> str:
    header = (
        "Configuration", "Corpus", "Tokens", "Targets", "NLL", "Std. error", "Bits/byte", "tok/s", "Evictions", "Kept",
    )  # fmt: skip
    rows = []
    for (way, text, tokens), found in _groups(own, ways, "PPL"):
        losses = [f"{found[one]:.4f}" for one in ("NLL", "standard error", "bits per byte")]
        rate = f"{found['targets'] / found['seconds']:.1f}"
        counts = [f"{int(found[one]):,}" for one in ("evictions", "kept")]
        first = [studies_page.shown_name(ways[way]), name(text), f"{int(tokens):,}", f"{int(found['targets']):,}"]
        rows.append([*first, *losses, rate, *counts])
    return table(header, rows) if rows else ""


def _speed_table(own: pd.DataFrame, ways: dict[str, ConfigurationRecord]) -> str:
    header = ("Configuration", "Prompts", "Timed steps", "Mean step (ms)", "Cache (MB)", "Kept", "Evictions")
    samples = own.set_index(["configuration", "metric", "at"]).samples
    rows = []
    for (way, _, new_tokens), found in _groups(own, ways, "TPOT"):
        steps, prompts = samples[way, "TPOT", new_tokens], samples[way, "TTFT", new_tokens]
        kept, cache, evictions = (found[f"generation: {metric}"] for metric in ("kept", "cache", "evictions"))
        counts = [f"{cache / 1e6:.2f}", f"{int(kept):,}", f"{int(evictions):,}"]
        mean = f"{1e3 * (found['total'] - found['TTFT']) / (new_tokens - 1):.2f}"
        rows.append([studies_page.shown_name(ways[way]), str(len(prompts)), f"{len(steps):,}", mean, *counts])
    return table(header, rows) if rows else ""


def _groups(own: pd.DataFrame, ways: dict[str, ConfigurationRecord], metric: str) -> list[tuple[Any, dict[str, float]]]:
    """Return way, subject and place of every group that has a metric, with all values of the group, in page order."""
    groups = own[own.metric != "attention"].groupby(["configuration", "subject", "at"], sort=False)
    found = [(key, dict(zip(rows.metric, rows.value, strict=True))) for key, rows in groups]
    order = list(ways)
    return sorted((one for one in found if metric in one[1]), key=lambda one: order.index(one[0][0]))
