"""What the tables found: five sentences, all numbers computed; one whose measurements are missing is left out."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from sinkwindow_lab.records import Configuration, Report, ppl
from sinkwindow_lab.render.markdown import name
from sinkwindow_lab.reports.tables.studies_page import MEAN, distance_name, ends_of
from sinkwindow_lab.reports.tables.where import NGRAM


def findings(report: Report, measured: pd.DataFrame) -> list[str]:
    """Return the findings of a run."""
    return [sentence for one in (_perplexity, _along, _step, _recall, _cost) for sentence in one(report, measured)]


def _ways(report: Report, own: pd.DataFrame, kind: str) -> list[Configuration]:
    return [one for one in report.configurations if one.kind == kind and one.name in set(own.configuration)]


def _perplexity(report: Report, measured: pd.DataFrame) -> Iterator[str]:
    """Compare the first streaming way with a window of its size, with its tokens at stale ranks, and with dense."""
    for part in (*(one["name"] for one in reversed(report.plan["experiments"])), "mistakes", "sinks", "sizes"):
        own = measured[(measured.part == part) & (measured.metric == "PPL")]
        for way in _ways(report, own, "streaming")[:1]:
            windows = [one.name for one in _ways(report, own, "window") if one.size == way.size]
            words = {way.name: "", **dict.fromkeys(windows[:1], " (as many tokens, no sinks)")}
            words |= {way.name.replace("streaming", "stale_ranks"): " (the same tokens at stale positions)"}
            found = own.pivot_table(index="subject", columns="configuration", values="value", sort=False)
            shown = [one for one in words if one in found]
            found = found.reindex(columns=["baseline", *shown]).dropna()
            if found.empty:
                continue
            ratios = found[shown].div(found.baseline, axis=0)
            first = [f"{one}{words[one]} {found[one].iloc[0]:.3f} ({ratios[one].iloc[0]:.2f}x)" for one in shown]
            rest = [
                f"; on {name(text)} {', '.join(f'{one:.2f}x' for one in row)}" for text, *row in ratios[1:].itertuples()
            ]
            read = own[own.subject == found.index[0]]["at"].max()
            yield (
                f"**Perplexity**: over {read:,.0f} tokens of {name(found.index[0])} the dense model has PPL "
                f"{found.baseline.iloc[0]:.3f}, {', '.join(first)}{''.join(rest)}."
            )
            return


def _along(report: Report, measured: pd.DataFrame) -> Iterator[str]:
    """Tell how each way ends a long text."""
    own, size, trained = measured[measured.part == "along"], report.plan["along_bin"], report.models[0].max_positions
    ends = {way: ends_of(own, way, size)[1:] for way in own.configuration.unique()}
    shown = [f"{'dense' if way == 'baseline' else way} {ppl(one):.3f}" for way, last in ends.items() for one in last]
    if shown:
        last = own[(own.metric == "NLL of a bin") & (own["at"] % size == 0)]["at"].max()
        beyond = trained is not None and last - size >= trained
        words = f", beyond the {trained:,} positions that the model was trained on" if beyond else ""
        yield (
            f"**A long text**: PPL of tokens {last - size + 1:,.0f} to {last:,.0f} of {name(own.subject.iloc[0])}"
            f"{words}: {', '.join(shown)}."
        )


def _step(report: Report, measured: pd.DataFrame) -> Iterator[str]:
    """Compare time and memory of a token late in a text with dense."""
    own = measured[measured.part == "steps"]
    for way in _ways(report, own, "streaming")[:1]:
        columns = [(metric, one) for metric in ("TPOT", "cache") for one in ("baseline", way.name)]
        found = own.pivot_table(index="at", columns=["metric", "configuration"], values="value")
        found = found.reindex(columns=columns).dropna()
        if len(found):
            dense, ours, stored, kept = found.iloc[-1]
            *_, more, less = (found.iloc[-1] - found.iloc[0]) / max(1, found.index[-1] - found.index[0]) / 1e3
            grow = f", and grow by {less:.1f} kB a token, the dense model's by {more:.1f} kB" if len(found) > 1 else ""
            yield (
                f"**Time and memory**: after {found.index[-1]:,.0f} tokens a token takes {ours:.2f} ms with "
                f"{way.name}, {ours / dense:.2f}x of the dense model's {dense:.2f} ms; keys and values take "
                f"{kept / 1e6:.2f} MB, {kept / stored:.2f}x of the dense model's {stored / 1e6:.2f} MB{grow}."
            )


def _recall(report: Report, measured: pd.DataFrame) -> Iterator[str]:
    """Count answers about facts inside and beyond the window of the first streaming way."""
    own = measured[measured.part == "recall"]
    for way in _ways(report, own, "streaming")[:1] if _ways(report, own, "baseline") else ():
        table = own.pivot_table(index="at", columns=["configuration", "metric"], values="samples", aggfunc="first")
        rows = {"back": (way.name, "tokens back"), "ours": (way.name, "answered"), "dense": ("baseline", "answered")}
        asked = pd.DataFrame({column: table[place].explode() for column, place in rows.items()})
        kept = (way.window or 0) + (way.buffer or 0)
        near, far = asked[asked.back <= kept], asked[asked.back > kept]
        if len(near) and len(far):
            gone = "" if far.ours.sum() else "what is evicted is gone: "
            yield (
                f"**Recall**: {gone}{way.name} answered {near.ours.sum():.0f} of {len(near)} questions about facts at "
                f"most {kept:,} tokens back, its window{' and buffer' if way.buffer else ''}, and {far.ours.sum():.0f} "
                f"of {len(far)} about older ones, the dense model {far.dense.sum():.0f} of them."
            )


def _cost(report: Report, measured: pd.DataFrame) -> Iterator[str]:
    """Tell where the first streaming way loses most against dense, on the first text."""
    own = measured[measured.part == "where"]
    for way in _ways(report, own, "streaming")[:1]:
        rows = own[own.configuration == way.name].assign(label=own["at"].map(distance_name))
        known = rows.set_index(["subject", "label", "metric"]).value.to_dict()
        means = [(text, one) for (text, _, metric), one in known.items() if metric == f"{MEAN}, all"]
        if not means:
            continue
        (text, whole), *others = means
        by_label = {label: one for (subject, label, metric), one in known.items() if (subject, metric) == (text, MEAN)}
        most = sorted(by_label.keys() - {"never"}, key=by_label.__getitem__)[-1:]
        told = {one: f"where the same {NGRAM}-gram was last seen {one} tokens ago" for one in most}
        shown = ""
        for label, words in (told | {"never": "where it never was"}).items():
            if label in by_label:
                error, targets = (known[text, label, f"{MEAN}: {one}"] for one in ("standard error", "targets"))
                shown += f", {by_label[label]:+.3f} ± {error:.3f} (n = {targets:,.0f}) {words}"
        rest = "".join(f"; on {name(other)} {one:+.4f}" for other, one in others)
        loss = f"{way.name} has a loss of {whole:+.4f} nat a token over dense"
        yield f"**Cost**: on {name(text)} {loss}{shown}{rest}."
