"""What a call evicted, told row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sinkwindow.lanes import LaneCall
    from sinkwindow.retention import Retention

__all__ = ["Eviction", "evictions"]


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


def evictions(rule: Retention, lane: LaneCall, before: int, after: int, rows: range) -> Iterator[Eviction]:
    """List the evictions of a lane that evicted in a call, in the order in which they happened.

    Args:
        rule: The retention rule.
        lane: The call.
        before: Tokens evicted before the call.
        after: Tokens evicted after it, more than before.
        rows: Rows of the batch that the lane stands for.
    """
    by_token = rule.evict == "token"
    step = rule.buffer + 1 if by_token else after - before
    length = rule.capacity if by_token else lane.seen_after - before
    for gone in range(before, after, step):
        tokens = range(rule.first(gone), rule.first(gone + step))
        for row in rows:
            yield Eviction(row, tokens, length, length - step)
