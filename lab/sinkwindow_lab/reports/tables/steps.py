"""Time and memory of one token: against tokens streamed, and against the size of the cache (the paper's figure 10)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypeAlias

import torch

from sinkwindow_lab.measure.clock import Side, interleave
from sinkwindow_lab.measure.perplexity import BLOCK
from sinkwindow_lab.records import Measurement, measured
from sinkwindow_lab.reports.tables.bench import Bench
from sinkwindow_lab.ways.configurations import Configuration, open_session
from sinkwindow_lab.ways.sessions import Session

WARM_UP = 1  # untimed tokens before the timed ones; for re-computation one takes a whole window
PAST = 64  # tokens beyond a full cache at which a size is timed [tokens]
Row: TypeAlias = tuple[Configuration, Sequence[int], int]  # a way, its places, and how many tokens are timed at each


def pair(cache: int) -> tuple[str, str]:
    """Return streaming and re-computation at one size of cache."""
    return f"streaming_4_{cache - 4}", f"recompute_{cache}"


def size(way: Configuration) -> int:
    """Return S + W, or W."""
    return (way.num_sinks or 0) + (way.window or 0)


def longest(rows: Sequence[Row]) -> int:
    """Return the number of tokens that the rows read."""
    return max(max(places) + WARM_UP + repeats for _, places, repeats in rows)


class _Reader:
    """A session that reads a text, which is repeated if it ends too early: times do not depend on the words."""

    def __init__(self, session: Session, text: torch.Tensor) -> None:
        self.session, self._text, self._seen = session, text, 0

    def go_to(self, place: int) -> None:
        for piece in torch.split(self._text[:, self._seen : place], BLOCK, dim=1):
            self.session.read(piece)
        self._seen = place

    def feed(self) -> None:
        self.session.feed(self._text[:, self._seen : self._seen + 1], last_only=True)
        self._seen += 1


def measure(bench: Bench, part: str, rows: Sequence[Row], text: torch.Tensor) -> list[Measurement]:
    """Time single tokens of all rows, interleaved, at places: tokens streamed, or S + W of `step sizes`."""
    model, count = bench.loaded.model, longest(rows)
    text = text.repeat(1, -(-count // text.shape[1]))[:, :count].to(model.device)
    found = []
    with ExitStack() as stack:
        readers = {}
        for way, _, _ in rows:
            session = open_session(way, model)
            stack.callback(session.close)
            readers[way.name] = _Reader(session, text)
        for stop in zip(*(places for _, places, _ in rows), strict=True):
            sides = {}
            for (way, _, repeats), place in zip(rows, stop, strict=True):
                readers[way.name].go_to(place)
                sides[way.name] = Side(readers[way.name].feed, samples=repeats)
            timed = interleave(sides, 1, model.device, warm_up=WARM_UP, on_sample=lambda _: bench.reporter.advance())
            for (way, _, _), place in zip(rows, stop, strict=True):
                cache = readers[way.name].session.cache_bytes
                figures = {"TPOT": ("ms", timed[way.name].ms), "cache": ("bytes", [float(cache)])}
                at = place if part == "steps" else size(way)
                found += measured(part, bench.loaded.record.name, way.name, at, figures)
    return found
