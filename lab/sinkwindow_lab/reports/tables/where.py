"""Where the loss occurs: along a text, and by the distance to the last occurrence of the target's 4-gram.

For nearly every token, streaming equals the dense model; it loses where the text repeats something from beyond its
window. A 4-gram that occurred before can be copied by a model that still sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sinkwindow_lab.measure.perplexity import Score
from sinkwindow_lab.records import Measurement, measured

NGRAM = 4
FIRST = (1, 65, 257, 1025)  # first distance of each bin; each ends before the next, the last one never [tokens]


def along(score: Score, bin_tokens: int) -> list[Measurement]:
    """Return the mean loss of consecutive bins of targets, each at its last token; the last bin may be shorter."""
    found = []
    for start in range(0, len(score.nll), bin_tokens):
        losses = score.nll[start : start + bin_tokens]
        figures = {"NLL of a bin": ("nat", [float(losses.mean())])}
        found += measured("along", score.text.corpus, score.configuration, start + len(losses), figures)
    return found


def where(streaming: Score, dense: Score, *, evicts_at: int) -> list[Measurement]:
    """Compare two scores of one text, target by target, by distance, from near to far, then what never occurred.

    Targets before the first eviction, after `evicts_at` tokens, are left out, since nothing was lost there: target i
    follows token i. Empty bins are left out.
    """
    difference = (streaming.nll - dense.nll)[evicts_at:]
    distances = last_occurrence(dense.text.ids[0].tolist(), NGRAM)[1:][evicts_at:]
    everything = [("NLL minus dense, all", None, difference)] if len(difference) else []
    bins = [("NLL minus dense", *one) for one in distance_bins(difference, distances)]
    found = []
    for metric, nearest, values in [*everything, *bins]:
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        figures = {metric: ("nat", [float(values.mean())]), f"{metric}: standard error": ("nat", [error])}
        figures[f"{metric}: targets"] = ("tokens", [float(len(values))])
        found += measured("where", streaming.text.corpus, streaming.configuration, nearest, figures)
    return found


def last_occurrence(ids: Sequence[int], ngram: int) -> list[int | None]:
    """Return how long ago each token's n-gram, which ends with it, occurred last; None if it never did."""
    seen: dict[tuple[int, ...], int] = {}
    found: list[int | None] = [None] * min(ngram - 1, len(ids))
    for place in range(ngram - 1, len(ids)):
        gram = tuple(ids[place + 1 - ngram : place + 1])
        found.append(place - seen[gram] if gram in seen else None)
        seen[gram] = place
    return found


def distance_bins(difference: torch.Tensor, distances: Sequence[int | None]) -> list[tuple[int | None, torch.Tensor]]:
    """Return the nearest distance and the `difference` [targets] of each bin that has any; None: never before."""
    starts = [None if one is None else max(first for first in FIRST if first <= one) for one in distances]
    bins = ((nearest, difference[torch.tensor([one == nearest for one in starts])]) for nearest in (*FIRST, None))
    return [(nearest, values) for nearest, values in bins if len(values)]
