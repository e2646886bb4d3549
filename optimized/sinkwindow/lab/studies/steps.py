"""Time and memory of one token: against tokens streamed, and against the size of the cache (the paper's figure 10)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from sinkwindow.lab.bench import Bench, described, digest_of
from sinkwindow.lab.configurations import Configuration, parse
from sinkwindow.lab.perplexity import BLOCK
from sinkwindow.lab.records import Record
from sinkwindow.lab.sessions import Session, open_session
from sinkwindow.lab.store import code_version
from sinkwindow.lab.study_records import StepsRecord, StepsStudy
from sinkwindow.lab.timing import clock_for

WARM_UP = 1  # untimed tokens before the timed ones; one costs re-computation a whole window
PAST = 64  # tokens beyond a full cache at which a size is timed [tokens]
CODE = ("sessions", "configurations", "timing", "studies.steps")


class Places(Record):
    """One configuration at all its places."""

    steps: list[StepsRecord]


def steps(
    bench: Bench, *, places: Sequence[int], cache: int, sizes: Sequence[int], repeats: int, recompute_repeats: int
) -> StepsStudy:
    """Times single tokens.

    Args:
        bench: model and texts; the first one is fed.
        places: tokens seen when a token is timed [tokens].
        cache: S + W of streaming and W of re-computation there [tokens].
        sizes: S + W for the other picture, each timed when full [tokens].
        repeats: timed tokens at each place.
        recompute_repeats: the same for re-computation.

    Returns:
        All samples.
    """
    along = [parse(name) for name in ("baseline", *_pair(cache))]
    grown = [parse(name) for size in sizes for name in _pair(size)]
    count = {row.name: recompute_repeats if row.kind == "recompute" else repeats for row in (*along, *grown)}
    first = [_measure(bench, row, places, count[row.name]) for row in along]
    second = [_measure(bench, row, (_size(row) + PAST,), count[row.name]) for row in grown]
    known = {row.name: row.record() for row in (*along, *grown)}
    return StepsStudy(
        configurations=list(known.values()),
        along=[step for one in first for step in one.steps],
        sizes=[step for one in second for step in one.steps],
    )


def _pair(size: int) -> tuple[str, str]:
    return f"streaming_4_{size - 4}", f"recompute_{size}"


def _size(row: Configuration) -> int:
    """S + W, or W."""
    return (row.num_sinks or 0) + (row.window or 0)


def _measure(bench: Bench, row: Configuration, places: Sequence[int], repeats: int) -> Places:
    text = bench.text(bench.corpora[0], max(places) + WARM_UP + repeats).ids
    bench.reporter.begin(f"time per token: {row.name}", len(places))
    key = {**bench.origin, **described(row), "text": digest_of(text), "code": code_version(*CODE)}
    key |= {"places": list(places), "repeats": repeats}
    return bench.store.record(f"steps-{row.name}", key, Places, lambda: _run(bench, row, text, places, repeats))


def _run(bench: Bench, row: Configuration, text: torch.Tensor, places: Sequence[int], repeats: int) -> Places:
    session = open_session(row, bench.loaded.model)
    text = _long_enough(text, max(places) + WARM_UP + repeats).to(bench.loaded.model.device)
    found, fed = [], 0
    try:
        for place in places:
            for piece in torch.split(text[:, fed:place], BLOCK, dim=1):
                session.read(piece)
            last = place + WARM_UP + repeats
            times = _time(session, text[:, place:last])
            found.append(_record(row, session, place, times))
            fed = last
            bench.reporter.advance()
    finally:
        session.close()
    return Places(steps=found)


def _long_enough(text: torch.Tensor, count: int) -> torch.Tensor:
    """The text, again from its start where it ends too early: times do not depend on the words."""
    return text.repeat(1, -(-count // text.shape[1]))[:, :count]


def _time(session: Session, ids: torch.Tensor) -> list[float]:
    """Times of the tokens after the warm-up, fed one by one [ms]."""
    clock = clock_for(ids.device)
    marks: list[Any] = []
    for number in range(ids.shape[1]):
        if number >= WARM_UP and not marks:
            marks.append(clock.mark())
        session.feed(ids[:, number : number + 1], last_only=True)
        if number >= WARM_UP:
            marks.append(clock.mark())
    seconds = clock.seconds(marks)
    return [round(1e3 * (after - before), 4) for before, after in itertools.pairwise(seconds)]


def _record(row: Configuration, session: Session, place: int, times: list[float]) -> StepsRecord:
    return StepsRecord(
        configuration=row.name,
        kind=row.kind,
        cache_tokens=_size(row) or None,
        tokens_seen=place,
        cache_bytes=session.cache_bytes,
        step_ms=times,
    )
