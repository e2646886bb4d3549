"""Where the loss occurs: by the distance to the last occurrence of the target's 4-gram.

For nearly every token, streaming equals the dense model; it loses where the text repeats something from beyond its
window. A 4-gram that occurred before can be copied by a model that still sees it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.reports.bench import Bench
from sinkwindow_lab.reports.study_records import DistanceBin, WhereCurve, WhereStudy
from sinkwindow_lab.ways.configurations import Configuration, parse

NGRAM = 4
EDGES = (64, 256, 1024)  # last distances of the bins; one more bin takes everything farther [tokens]


def where(bench: Bench, names: Sequence[str], tokens: int) -> WhereStudy:
    """Compare streaming with the dense model, target by target; return differences by distance."""
    rows = [parse(name) for name in names]
    curves = [_curve(bench, row, corpus, tokens) for row in rows for corpus in bench.corpora]
    return WhereStudy(ngram=NGRAM, tokens=tokens, configurations=[row.record() for row in rows], curves=curves)


def _curve(bench: Bench, row: Configuration, corpus: Corpus, tokens: int) -> WhereCurve:
    text = bench.text(corpus, tokens)
    dense = bench.losses("where", parse("baseline"), text).nll
    streaming = bench.losses("where", row, text).nll
    first = sum(row.limits) + 1  # the query of token S + W + B still attends to all; target i follows token i
    difference = (streaming - dense)[first:]
    distances = last_occurrence(text.ids[0].tolist(), NGRAM)[1:][first:]
    return WhereCurve(
        configuration=row.name,
        corpus=corpus.name,
        mean_difference=float(difference.mean()) if len(difference) else 0.0,
        bins=distance_bins(difference, distances),
    )


def last_occurrence(ids: Sequence[int], ngram: int) -> list[int | None]:
    """Return how long ago each token's n-gram occurred last; None if it never did.

    An n-gram ends with the token itself; distances are between the two last tokens.
    """
    seen: dict[tuple[int, ...], int] = {}
    found: list[int | None] = []
    for place in range(len(ids)):
        gram = tuple(ids[place + 1 - ngram : place + 1]) if place + 1 >= ngram else ()
        last = seen.get(gram) if gram else None
        found.append(None if last is None else place - last)
        if gram:
            seen[gram] = place
    return found


def distance_bins(difference: torch.Tensor, distances: Sequence[int | None]) -> list[DistanceBin]:
    """Return mean differences by distance, from near to far, then for what never occurred; empty bins are left out.

    `difference` [targets] is the loss of one configuration minus another's; `distances` has one value per target.
    """
    bounds: list[tuple[int | None, int | None]] = [(1, EDGES[0])]
    bounds += [(low + 1, high) for low, high in itertools.pairwise(EDGES)]
    bounds += [(EDGES[-1] + 1, None), (None, None)]
    made = [_bin(difference, distances, nearest, farthest) for nearest, farthest in bounds]
    return [one for one in made if one is not None]


def _bin(
    difference: torch.Tensor, distances: Sequence[int | None], nearest: int | None, farthest: int | None
) -> DistanceBin | None:
    chosen = torch.tensor([_inside(one, nearest, farthest) for one in distances], dtype=torch.bool)
    values = difference[chosen]
    if not len(values):
        return None
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return DistanceBin(
        nearest=nearest,
        farthest=farthest,
        targets=len(values),
        mean_difference=float(values.mean()),
        standard_error=error,
    )


def _inside(distance: int | None, nearest: int | None, farthest: int | None) -> bool:
    if distance is None or nearest is None:
        return distance is None and nearest is None
    return nearest <= distance and (farthest is None or distance <= farthest)
