"""The sections of the studies; published numbers are in tables of their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd

from sinkwindow_lab.records import Configuration, Report, ppl
from sinkwindow_lab.render import chart
from sinkwindow_lab.render.markdown import NOT_MEASURED, bullets, cell, figure, name, quote, table
from sinkwindow_lab.reports.tables import published
from sinkwindow_lab.reports.tables.where import FIRST, NGRAM

MEAN = "NLL minus dense"
Blocks = Iterator[str | tuple[str, str, str]]  # Markdown, or a picture: its file, its content and its caption


def blocks(report: Report, measured: pd.DataFrame, figures: dict[str, str]) -> Iterator[str]:
    """Yield the sections of all studies that were run; their pictures are added to `figures`."""
    for section in (mistakes, sinks, sizes, along, steps, where, recall):
        part = section.__name__
        own = measured[measured.part.isin([part, "step sizes"] if part == "steps" else [part])]
        for block in section(report, own) if part in report.plan["parts"] else ():
            if isinstance(block, str):
                yield block
            else:
                file, figures[file], caption = block
                yield figure(file, caption)


def _ways(report: Report, own: pd.DataFrame) -> list[Configuration]:
    known = {one.name: one for one in report.configurations}
    return [known[way] for way in own.configuration.unique()]


def _drawn(report: Report, own: pd.DataFrame, series: str = "configuration") -> pd.DataFrame:
    """Return rows to draw, with the kind of each configuration, and its series: the values of this column."""
    kinds = {one.name: one.kind for one in report.configurations}
    return own.assign(kind=own.configuration.map(kinds), series=own[series])


def _source(what: str, where_from: str = published.PAPER) -> str:
    return f"{what}: {where_from}. Another model and text: only the pattern compares."


def score_table(report: Report, own: pd.DataFrame) -> str:
    """Return PPL of each way on each text, with its ratio to the dense model and the losses."""
    texts = list(own.subject.unique())
    found = own.set_index(["configuration", "subject", "metric"]).value.to_dict()
    rows = []
    for way in _ways(report, own):
        cells = [way.title]
        for text in texts:
            ppl, dense = found.get((way.name, text, "PPL")), found.get(("baseline", text, "PPL"))
            ratio = "" if ppl is None or dense is None or way.kind == "baseline" else f" ({ppl / dense:.2f}x)"
            cells.append(cell(ppl, lambda one, ratio=ratio: f"{one:.3f}{ratio}"))  # type: ignore[misc]
            cells += [cell(found.get((way.name, text, one)), "{:.4f}".format) for one in ("NLL", "standard error")]
        rows.append(cells)
    header = [title for text in map(name, texts) for title in (f"PPL {text}", f"NLL {text}", "Std. error")]
    return table(("Configuration", *header), rows)


def mistakes(report: Report, own: pd.DataFrame) -> Blocks:
    """Compare the right rule with each mistake."""
    yield f"## Right and wrong rules: PPL over {report.plan['mistakes']['tokens']:,} tokens"
    yield (
        "The same tokens are kept by `streaming`, `stale_ranks` and `absolute` with the same numbers: only the "
        "positions of their keys differ. In brackets the ratio to the dense model."
    )
    yield score_table(report, own)
    svg = chart.points(_drawn(report, own[own.metric == "PPL"], "subject"), "value", "configuration", label="PPL")
    yield "mistakes", svg, "PPL of each rule, a mark per text."
    yield bullets([one.explained() for one in _ways(report, own)])
    yield _source("Published for Pythia-2.8B, 2,000 tokens, before and after its author's repair", published.REPAIR)
    yield table(("Text", *published.REPAIR_COLUMNS), published.REPAIRED)
    texts = [line for text in own.subject.unique() for line in _split_of_loss(report, own, text)]
    if texts:
        yield from ("### What went wrong in that measurement", _diagnosis(), bullets(texts))


def _diagnosis() -> str:
    """Return the cause of the published jump."""
    _, dense, broken, _ = published.REPAIRED[0]
    _, dense_after, repaired, _ = published.REPAIRED[1]
    jump, rest = float(broken) / float(dense), float(repaired) / float(dense_after)
    return (
        f"A jump from {dense} to {broken} ({jump:.1f}x) was put down to the small window. Its author later found "
        f"positions that disagreed with the compressed cache; repaired, {rest:.2f}x was left. `stale_ranks` makes "
        "a mistake of that kind on purpose: keys keep the rotation of the rank at which they were inserted, so "
        "that after an eviction older keys appear to be at later positions than a new query. `streaming` keeps the "
        "very same tokens at their true ranks: the difference of the two is due to the mistake alone:"
    )


def _split_of_loss(report: Report, own: pd.DataFrame, text: str) -> Iterator[str]:
    """Split the loss over dense into the window's and the positions' part, for each pair on this text."""
    nll = own[(own.subject == text) & (own.metric == "NLL")].set_index("configuration").value.to_dict()
    for way in _ways(report, own):
        stale = way.name.replace("streaming", "stale_ranks")
        if way.kind != "streaming" or not {"baseline", way.name, stale} <= set(nll):
            continue
        dense, right, wrong = nll["baseline"], nll[way.name], nll[stale]
        yield (
            f"**{name(text)}**: PPL {ppl(dense):.3f} dense, {ppl(right):.3f} with {way.name} "
            f"({right - dense:+.3f} nats a token: what was evicted), {ppl(wrong):.3f} with stale ranks "
            f"({wrong - right:+.3f} more: their positions)."
        )


def sinks(report: Report, own: pd.DataFrame) -> Blocks:
    """Show the number of sinks."""
    cache = _ways(report, own)[-1].size
    yield f"## Number of sinks, cache of {cache:,}: PPL over {report.plan['sinks']['tokens']:,} tokens"
    yield score_table(report, own)
    svg = _against(report, own, "sinks S (tokens)", lambda one: one.num_sinks or 0, logarithmic="y")
    yield "sinks", svg, "PPL against the number of sinks."
    yield _source("Published, sinks at a cache of 2,048 (Llama-2: 4,096), 400,000 tokens of PG-19")
    yield table(("Model", "0", "1", "2", "4", "8"), (*published.SINKS, published.SINKS_LLAMA))


def sizes(report: Report, own: pd.DataFrame) -> Blocks:
    """Show the size of the cache."""
    yield f"## Size of the cache, four sinks: PPL over {report.plan['sizes']['tokens']:,} tokens"
    yield score_table(report, own)
    svg = _against(report, own, "cache S + W (tokens)", lambda one: one.size, logarithmic="xy")
    yield "sizes", svg, "PPL against the size of the cache."
    yield _source("Published, four sinks, cache of 256 to 2,048, 400,000 tokens of PG-19")
    yield table(("Model", "4 + 252", "4 + 508", "4 + 1020", "4 + 2044"), published.SIZES)


def _against(report: Report, own: pd.DataFrame, below: str, number: Callable[[Configuration], int], **how: Any) -> str:
    """Draw PPL against a number of the configurations, for each text; that of the dense model is the same at all."""
    places = {one.name: number(one) for one in _ways(report, own) if one.window is not None}
    rows = _drawn(report, own[own.metric == "PPL"])
    rows = rows.assign(place=rows.configuration.map(lambda way: [places[way]] if way in places else [*places.values()]))
    rows = rows.assign(series=rows.kind.replace("baseline", "dense") + ", " + rows.subject)
    rows = (
        rows.sort_values("subject", key=_order(own.subject.unique()), kind="stable")
        .explode("place")
        .astype({"place": float})
    )
    return chart.lines(rows, "place", "value", labels=(below, "PPL"), **how)


def along(report: Report, own: pd.DataFrame) -> Blocks:
    """Show the loss along a text."""
    size, trained = report.plan["along_bin"], report.models[0].max_positions
    scores = own.set_index(["configuration", "metric"]).value
    rows = []
    for way in _ways(report, own):
        ends = [f"{ppl(one):.3f}" for one in ends_of(own, way.name, size)] or [NOT_MEASURED] * 2
        counts = [f"{scores[way.name, one]:,.0f}" for one in ("evictions", "kept")]
        rows.append([way.title, *ends, f"{scores[way.name, 'PPL']:.3f}", *counts])
    tokens = int(own[own.metric == "PPL"]["at"].max())
    yield f"## Along a text: PPL over {tokens:,} tokens of {name(own.subject.iloc[0])}"
    words = "" if trained is None else f" The model was trained on {trained:,} positions."
    yield f"Each point of [the picture](#findings) is the PPL of {size:,} consecutive tokens.{words}"
    yield table(("Configuration", f"First {size:,}", f"Last {size:,}", "All", "Evictions", "Kept"), rows)


def ends_of(own: pd.DataFrame, way: str, size: int) -> list[float]:
    """Return the mean loss of the first and of the last whole bin along a text, or nothing if it has no whole bin."""
    whole = own[(own.metric == "NLL of a bin") & (own.configuration == way) & (own["at"] % size == 0)].value
    return [whole.iloc[0], whole.iloc[-1]] if len(whole) else []


def picture(report: Report, measured: pd.DataFrame) -> str:
    """Return the picture of PPL along a text, or nothing if none was read for it."""
    own = measured[measured.part == "along"]
    bins = _drawn(report, own[own.metric == "NLL of a bin"])
    if bins.empty:
        return ""
    size, trained, tokens = report.plan["along_bin"], report.models[0].max_positions, int(bins["at"].max()) + 1
    starts = (bins["at"] - 1) // size * size  # the last bin may be shorter
    curves = bins.assign(ppl=bins.value.map(ppl), middle=(starts + bins["at"]) / 2)
    notes = {"trained length": trained} if trained is not None and trained < tokens else {}
    how: dict[str, Any] = {"logarithmic": "y", "marks": False, "notes": notes}
    return chart.lines(curves, "middle", "ppl", labels=("text read (tokens)", f"PPL of {size:,} tokens"), **how)


def steps(report: Report, own: pd.DataFrame) -> Blocks:
    """Show time and memory of one token."""
    titles = {one.name: one.title for one in report.configurations}
    own = own.sort_values("at").sort_values("configuration", key=_order(titles), kind="stable")
    cache = own[own.metric == "cache"].set_index(["part", "configuration", "at"]).value / 1e6
    timed = _drawn(report, own[own.metric == "TPOT"]).assign(n=lambda one: one.samples.map(len))
    timed = timed.assign(mb=[cache[key] for key in zip(timed.part, timed.configuration, timed["at"], strict=True)])
    streamed, grown = (timed[timed.part == part] for part in ("steps", "step sizes"))
    yield "## Time and memory of one token"
    yield (
        "Median time of single tokens, fed one by one after the given number of tokens; memory is that of keys and "
        "values (1 MB = 10^6 bytes). Re-computation stores none and runs its whole window for every token."
    )
    columns = (streamed[one] for one in ("configuration", "at", "value", "mb", "n"))
    yield table(
        ("Configuration", "Tokens streamed", "ms per token", "Cache (MB)", "Tokens timed"),
        [
            (titles[way], f"{place:,.0f}", f"{took:.2f}", f"{mb:.2f}", f"{n}")
            for way, place, took, mb, n in zip(*columns, strict=True)
        ],
    )
    svg = chart.lines(streamed, "at", "value", labels=("text streamed (tokens)", "ms per token"), logarithmic="xy")
    yield "step-time", svg, "Time per token against tokens streamed."
    labels = "text streamed (tokens)", "keys and values (MB)"
    svg = chart.lines(streamed.drop(columns="n"), "at", "mb", labels=labels, logarithmic="x")
    yield "step-memory", svg, "Keys and values against tokens streamed."
    grown = grown.assign(series=grown.kind).sort_values("at")
    counts = grown.groupby("kind", sort=False).n.agg(span)
    yield "### Against the size of the cache"
    yield f"Medians of single tokens: {', '.join(f'{kind} n = {count}' for kind, count in counts.items())}."
    ratios = grown.pivot_table(index="at", columns="kind", values="value")
    yield table(
        ("Cache", "Streaming (ms)", "Re-computation (ms)", "Ratio"),
        [
            (f"{size:,.0f}", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}x")
            for size, ours, theirs in zip(ratios.index, ratios.streaming, ratios.recompute, strict=True)
        ],
    )
    labels = ("cache S + W, or window (tokens)", "ms per token")
    svg = chart.lines(grown, "at", "value", labels=labels, logarithmic="xy")
    yield "step-sizes", svg, "Time per token against the size of the cache."
    yield _source("Published, ms per token on one A6000; 2355 / 106 is the 22.2x")
    yield table(("Model", "256", "512", "1024", "2048", "4096"), published.STEPS)


def span(values: Iterable[float]) -> str:
    """Return the least and the greatest of some whole numbers, or the only one."""
    found = [*values]
    return "-".join(f"{one:,.0f}" for one in dict.fromkeys((min(found), max(found))))


def _order(names: Iterable[str]) -> Callable[[pd.Series], pd.Series]:
    """Return a sort key for a column of these names."""
    order = {one: number for number, one in enumerate(names)}
    return lambda column: column.map(order)


def distance_name(nearest: float) -> str:
    """Return the label of a bin of distances that starts here; NaN: never."""
    if math.isnan(nearest):
        return "never"
    ends = dict(itertools.pairwise(FIRST))
    return f"{nearest:,.0f}-{ends[int(nearest)] - 1:,}" if nearest in ends else f"> {nearest - 1:,.0f}"


def where(report: Report, own: pd.DataFrame) -> Blocks:
    """Show where the loss occurs."""
    own = own.assign(label=own["at"].map(distance_name))
    known = own.set_index(["configuration", "subject", "label", "metric"]).value.to_dict()
    order = [distance_name(one) for one in (*map(float, FIRST), math.nan)]
    bins = own[own.metric == MEAN].sort_values("label", key=_order(order), kind="stable")
    names = list(bins.label.unique())

    def shown(*key: str) -> str:
        mean, error, targets = (known.get((*key, MEAN + more)) for more in ("", ": standard error", ": targets"))
        return cell(mean, lambda one: f"{one:+.3f} ± {error:.3f} ({targets:,.0f})")

    rows = [
        [f"{way}, {name(text)}", f"{whole:+.4f}", *(shown(way, text, label) for label in names)]
        for (way, text, _, metric), whole in known.items()
        if metric == f"{MEAN}, all"
    ]
    yield f"## Where the loss sits: NLL minus dense over {report.plan['where']['tokens']:,} tokens"
    yield (
        f"Targets by how many tokens ago the same {NGRAM}-gram, the target its last token, occurred before; "
        "mean ± standard error (number of targets). Targets before the first eviction are left out: nothing is "
        "lost there. A model that still sees an earlier occurrence can copy it."
    )
    yield table(("Configuration, text", "All", *names), rows)
    keys = list(zip(bins.configuration, bins.subject, bins.label, strict=True))
    bins = bins.assign(error=[known[(*key, f"{MEAN}: standard error")] for key in keys])
    targets = span(known[(*key, f"{MEAN}: targets")] for key in keys)
    bins = _drawn(report, bins).assign(series=bins.configuration + ", " + bins.subject)
    labels = ("tokens since the same 4-gram", f"{MEAN} (nat)")
    svg = chart.bars(bins, "label", "value", "error", labels=labels)
    yield "where", svg, f"NLL minus dense, by distance to the same 4-gram; n = {targets} targets a point."


def recall(report: Report, own: pd.DataFrame) -> Blocks:
    """Show facts found and facts lost."""
    ways = _ways(report, own)
    found = own.set_index(["configuration", "metric", "at"]).samples
    rows = []
    for back in sorted(own["at"].unique()):
        hits = [found[way.name, "answered", back] for way in ways]
        cells = [f"{100 * sum(one) / len(one):.0f}% ({sum(one):.0f}/{len(one)})" for one in hits]
        rows.append([f"{int(back):,}", span(found[ways[0].name, "tokens back", back]), *cells])
    seeds, text = report.plan["recall_seeds"], name(own.subject.iloc[0])
    yield f"## Recall: facts asked for later, {len(seeds)} texts, {report.notes['recall tokens']} tokens"
    yield (
        f"Facts strewn over ordinary lines of {text}, each asked for once; answered means right to the "
        "last digit. What was evicted cannot be answered. This is our own test after StreamEval, whose data was "
        f"never published. Facts and lines are drawn by Python's `random`, seeded with {', '.join(map(str, seeds))}: a "
        "number per text. A small model fails now and then on facts it still sees: the dense column is its ceiling."
    )
    yield quote(report.notes["recall example"])
    yield table(("Lines back", "Tokens back", *(way.title for way in ways)), rows)
    asked = _drawn(report, own[own.metric == "answered"])
    spans = [found[way, "tokens back", back] for way, back in zip(asked.configuration, asked["at"], strict=True)]
    asked = asked.assign(
        share=asked.samples.map(lambda one: 100 * sum(one) / len(one)),
        distance=[(min(one) + max(one)) / 2 for one in spans],
        n=asked.samples.map(len),
    )
    svg = chart.lines(
        asked,
        "distance",
        "share",
        labels=("fact to question (tokens)", "answered (%)"),
        logarithmic="x",
        dodge=1.06,
        notes={f"W = {way.window:,}": way.window for way in ways if way.window is not None},
    )
    yield "recall", svg, "Questions answered, by distance to the fact; dashed: windows."
    yield _source("Published, StreamEval, Llama-2-7B-32K-Instruct at 4 + 2044")
    yield table(("Lines back", "Answered (%)"), published.RECALL)
