"""Studies that are tables of perplexities: mistakes, numbers of sinks, sizes of cache; and the loss along a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.reports.bench import Bench
from sinkwindow_lab.reports.study_records import AlongStudy, Curve, ScoreStudy
from sinkwindow_lab.ways.configurations import Configuration, parse


def mistakes(bench: Bench, names: Sequence[str], tokens: int) -> ScoreStudy:
    """Compare the right rule with what others measured: stale positions, eager evictions, whole calls, no sinks."""
    return score_study(bench, "mistakes", [parse(name) for name in names], tokens)


def sinks(bench: Bench, counts: Sequence[int], cache: int, tokens: int) -> ScoreStudy:
    """Score numbers of sinks at one size S + W of cache (the paper's table 2), evicting at every token."""
    return score_study(bench, "sinks", sink_rows(counts, cache), tokens)


def sizes(bench: Bench, caches: Sequence[int], tokens: int) -> ScoreStudy:
    """Score sizes S + W of cache with four sinks (the paper's table 6), evicting at every token."""
    return score_study(bench, "sizes", size_rows(caches), tokens)


def sink_rows(counts: Sequence[int], cache: int) -> list[Configuration]:
    """Return the configurations of `sinks`."""
    return [parse("baseline"), *(_streaming(count, cache) for count in counts)]


def size_rows(caches: Sequence[int]) -> list[Configuration]:
    """Return the configurations of `sizes`."""
    return [parse("baseline"), *(_streaming(4, cache) for cache in caches)]


def score_study(bench: Bench, label: str, rows: Sequence[Configuration], tokens: int) -> ScoreStudy:
    """Score each configuration on each text; `label` is for the progress bar."""
    scores = [bench.score(label, row, corpus, tokens) for corpus in bench.corpora for row in rows]
    return ScoreStudy(tokens=tokens, configurations=[row.record() for row in rows], scores=scores)


def along(bench: Bench, names: Sequence[str], tokens: int, bin_tokens: int) -> AlongStudy:
    """Measure the loss along the first text, far past the trained length if the text allows (the paper's figure 5).

    Returns one curve per configuration, with `bin_tokens` targets per point.

    Raises:
        LabError: if a point would have no target.
    """
    text = bench.text(bench.corpora[0], tokens)
    rows = [parse(name) for name in names]
    found = [bench.losses("along the text", row, text) for row in rows]
    return AlongStudy(
        corpus=text.corpus,
        tokens=text.ids.shape[1],
        bin_tokens=bin_tokens,
        trained_length=bench.loaded.record.max_positions,
        configurations=[row.record() for row in rows],
        curves=[
            Curve(configuration=row.name, mean_nll=bin_means(one.nll, bin_tokens))
            for row, one in zip(rows, found, strict=True)
        ],
        scores=[one.record for one in found],
    )


def bin_means(nll: torch.Tensor, bin_tokens: int) -> list[float]:
    """Return the means of consecutive bins of `nll` [targets]; the last bin may be shorter.

    Raises:
        LabError: if `bin_tokens` is below 1.
    """
    if bin_tokens < 1:
        raise LabError(f"bin_tokens={bin_tokens} must be 1 or more")
    return [float(part.mean()) for part in torch.split(nll, bin_tokens)]


def _streaming(sinks: int, cache: int) -> Configuration:
    """Return S sinks in a cache of S + W with B = 0; without sinks it is a window with its own name."""
    return parse(f"streaming_{sinks}_{cache - sinks}_0" if sinks else f"window_0_{cache}")
