"""Time and memory of one token: against tokens streamed, and against the size of the cache (the paper's figure 10)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from sinkwindow_lab.measure.perplexity import BLOCK
from sinkwindow_lab.measure.timing import Clock, Laps, clock_for, waiter
from sinkwindow_lab.records import Record
from sinkwindow_lab.reports.bench import Bench, described, digest_of
from sinkwindow_lab.reports.study_records import StepsRecord, StepsStudy
from sinkwindow_lab.store import code_version
from sinkwindow_lab.ways.configurations import Configuration, parse
from sinkwindow_lab.ways.sessions import Session, open_session

WARM_UP = 1  # untimed tokens before the timed ones; for re-computation one takes a whole window
PAST = 64  # tokens beyond a full cache at which a size is timed [tokens]
CODE = ("ways.sessions", "ways.configurations", "measure.timing", "reports.studies.steps")


class Steps(Record):
    """Steps of several configurations, interleaved."""

    steps: list[StepsRecord]


@dataclass
class _Reader:
    """A configuration that reads a text and is timed on the way."""

    configuration: Configuration
    places: Sequence[int]
    repeats: int
    session: Session
    text: torch.Tensor
    laps: Laps
    seen: int = 0

    def go_to(self, place: int) -> None:
        for piece in torch.split(self.text[:, self.seen : place], BLOCK, dim=1):
            self.session.read(piece)
        self.seen = place

    def feed(self) -> None:
        token = self.text[:, self.seen : self.seen + 1]
        self.laps.lap(lambda: self.session.feed(token, last_only=True))
        self.seen += 1

    def take_record(self, place: int, clock: Clock) -> StepsRecord:
        """Return what was timed at a place, without the warm-up."""
        times = self.laps.seconds()[WARM_UP:]
        self.laps = Laps(clock, waiter(self.text.device))
        return StepsRecord(
            configuration=self.configuration.name,
            kind=self.configuration.kind,
            cache_tokens=_size(self.configuration) or None,
            tokens_seen=place,
            cache_bytes=self.session.cache_bytes,
            step_ms=[round(1e3 * time, 4) for time in times],
        )


def steps(
    bench: Bench, *, places: Sequence[int], cache: int, sizes: Sequence[int], repeats: int, recompute_repeats: int
) -> StepsStudy:
    """Time single tokens, against tokens streamed (`places`) and against the size of a full cache (`sizes`).

    `cache` is S + W of streaming and W of re-computation at the places; `repeats` counts timed tokens at each place.
    """
    along = [parse(name) for name in ("baseline", *_pair(cache))]
    grown = [parse(name) for size in sizes for name in _pair(size)]

    def repeated(row: Configuration) -> int:
        return recompute_repeats if row.kind == "recompute" else repeats

    first = _measure(bench, "tokens streamed", [(row, places, repeated(row)) for row in along])
    second = _measure(bench, "size", [(row, (_size(row) + PAST,), repeated(row)) for row in grown])
    known = {row.name: row.record() for row in (*along, *grown)}
    return StepsStudy(
        configurations=list(known.values()),
        along=first.steps,
        sizes=second.steps,
    )


def _pair(size: int) -> tuple[str, str]:
    return f"streaming_4_{size - 4}", f"recompute_{size}"


def _size(row: Configuration) -> int:
    """Return S + W, or W."""
    return (row.num_sinks or 0) + (row.window or 0)


def _measure(bench: Bench, against: str, rows: Sequence[tuple[Configuration, Sequence[int], int]]) -> Steps:
    """Time rows, each at its places and so many times, interleaved."""
    longest = max(max(places) + WARM_UP + repeats for _, places, repeats in rows)
    text = bench.text(bench.corpora[0], longest).ids
    bench.reporter.begin(f"time per token against {against}, interleaved", sum(len(places) for _, places, _ in rows))
    key = {**bench.origin, "text": digest_of(text), "code": code_version(*CODE)}
    key |= {"rows": [[described(row), list(places), repeats] for row, places, repeats in rows]}
    text = _long_enough(text, longest).to(bench.loaded.model.device)
    return bench.store.record("steps", key, Steps, lambda: _run(bench, rows, text))


def _run(bench: Bench, rows: Sequence[tuple[Configuration, Sequence[int], int]], text: torch.Tensor) -> Steps:
    clock, wait = clock_for(text.device), waiter(text.device)
    found: dict[str, list[StepsRecord]] = {}
    with ExitStack() as stack:
        readers = []
        for row, places, repeats in rows:
            session = open_session(row, bench.loaded.model)
            stack.callback(session.close)
            readers.append(_Reader(row, places, repeats, session, text, Laps(clock, wait)))
        for stop in zip(*(reader.places for reader in readers), strict=True):
            for reader, place in zip(readers, stop, strict=True):
                reader.go_to(place)
            _take_turns(readers)
            for reader, place in zip(readers, stop, strict=True):
                found.setdefault(reader.configuration.name, []).append(reader.take_record(place, clock))
                bench.reporter.advance()
    return Steps(steps=[step for own in found.values() for step in own])


def _take_turns(readers: Sequence[_Reader]) -> None:
    """Feed a token of each reader in turn, until all have had theirs."""
    for number in range(WARM_UP + max(reader.repeats for reader in readers)):
        for reader in readers:
            if number < WARM_UP + reader.repeats:
                reader.feed()


def _long_enough(text: torch.Tensor, count: int) -> torch.Tensor:
    """Return the text, repeated if it ends too early: times do not depend on the words."""
    return text.repeat(1, -(-count // text.shape[1]))[:, :count]
