"""What a call evicted, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sinkwindow.lanes import LaneCall
    from sinkwindow.retention import Retention
    from sinkwindow.stream.call import StreamCall


@dataclass(frozen=True, slots=True)
class Eviction:
    """One eviction in one row.

    Attributes:
        row: Index in the batch.
        tokens: Natural indices of the evicted tokens.
        length_before: Retained tokens before it.
        length_after: Retained tokens after it.
    """

    row: int
    tokens: range
    length_before: int
    length_after: int


def evictions_of(call: StreamCall) -> list[Eviction]:
    """Return the evictions of a call, row by row, in the order in which they happened."""
    part = call.parts[0]
    events: list[Eviction] = []
    for r, (lane, row, after) in enumerate(zip(call.lanes, part.slots.lanes, part.evicted, strict=True)):
        if row.evicted != after:
            rows = range(r, r + 1) if len(call.lanes) > 1 else range(call.batch)
            events += _evictions(part.pool.retention, lane, row.evicted, after, rows)
    return events


def _evictions(rule: Retention, lane: LaneCall, before: int, after: int, rows: range) -> Iterator[Eviction]:
    by_token = rule.evict == "token"
    step = rule.buffer + 1 if by_token else after - before
    length = rule.capacity if by_token else lane.after.seen - before
    for gone in range(before, after, step):
        tokens = range(rule.first(gone), rule.first(gone + step))
        for row in rows:
            yield Eviction(row, tokens, length, length - step)
