"""What a call evicted, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    part, events = call.parts[0], list[Eviction]()
    rule = part.pool.retention
    for r, (lane, row, after) in enumerate(zip(call.lanes, part.slots.lanes, part.evicted, strict=True)):
        if row.evicted == after:
            continue
        step, length = after - row.evicted, lane.after.seen - row.evicted
        if rule.evict == "token":
            step, length = rule.buffer + 1, rule.capacity
        rows = range(r, r + 1) if len(call.lanes) > 1 else range(call.batch)
        for gone in range(row.evicted, after, step):
            tokens = range(rule.first(gone), rule.first(gone + step))
            events += [Eviction(index, tokens, length, length - step) for index in rows]
    return events
