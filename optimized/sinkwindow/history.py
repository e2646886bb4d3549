"""Going back: what every row had seen and evicted some columns ago."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinkwindow.lanes import LaneCall
    from sinkwindow.retention import Retention
    from sinkwindow.storage import SlotPool

__all__ = ["History", "Past"]


@dataclass(frozen=True, slots=True)
class Past:
    """A call that cannot be undone by counting alone: it had padding, or its rule evicts by call.

    Attributes:
        start: Columns before the call.
        columns: Columns of the call.
        real: Columns of each lane that held real tokens; ``None`` for all.
        evicted: Tokens that each lane had evicted before the call, pool by pool.
        num_evictions: Evictions before the call, all rows together.
    """

    start: int
    columns: int
    real: list[list[int] | None]
    evicted: list[list[int]]
    num_evictions: int


class History:
    """The calls that a roll-back may cross.

    Args:
        rules: Of the pools. As many calls are remembered as the longest list has tokens: no roll-back crosses more.
    """

    def __init__(self, rules: Sequence[Retention]) -> None:
        self._rules = rules
        self._evicts_by_call = any(rule.evict == "call" for rule in rules)
        self._calls: deque[Past] = deque(maxlen=max(rule.capacity for rule in rules))

    def needs(self, lanes: Sequence[LaneCall]) -> bool:
        """Say whether counting alone cannot undo a call, so that it must be recorded."""
        return self._evicts_by_call or any(lane.real is not None for lane in lanes)

    def record(self, call: Past) -> None:
        """Remember a call."""
        self._calls.append(call)

    def copy(self) -> History:
        """Copy the record; its entries never change."""
        twin = History(self._rules)
        twin._calls.extend(self._calls)
        return twin

    def select(self, rows: Sequence[int]) -> None:
        """Follow a reordering of rows that have a lane each."""
        calls = [
            replace(c, real=[c.real[r] for r in rows], evicted=[[pool[r] for r in rows] for pool in c.evicted])
            if len(c.real) > 1
            else c
            for c in self._calls
        ]
        self._calls = deque(calls, maxlen=self._calls.maxlen)

    def forget_from(self, column: int) -> None:
        """Drop the part of the past that was rolled back."""
        while self._calls and self._calls[-1].start >= column:
            self._calls.pop()
        if self._calls and self._calls[-1].start + self._calls[-1].columns > column:
            call = self._calls.pop()
            columns = column - call.start
            real = [None if r is None else [c for c in r if c < columns] for r in call.real]
            self._calls.append(replace(call, columns=columns, real=real))

    def removed(self, column: int, end: int, lanes: int) -> list[int]:
        """Count the real tokens that each lane loses when the columns from ``column`` to ``end`` go."""
        removed = [end - column] * lanes
        for call in self._calls:
            for r in range(lanes):
                real = call.real[r if len(call.real) > 1 else 0]
                if real is not None:
                    cut = range(max(0, column - call.start), call.columns)
                    removed[r] -= len(cut) - sum(1 for c in real if c in cut)
        return removed

    def evicted_at(self, column: int, seen: int, r: int, index: int, pool: SlotPool) -> int | None:
        """Give what a lane of a pool had evicted at a column, ``None`` when that is not remembered."""
        rule = pool.retention
        if rule.evict == "token":
            return rule.evicted_before(seen)
        for call in reversed(self._calls):
            before = call.evicted[index][r if len(call.real) > 1 else 0]
            if call.start == column:
                return before
            if call.start < column <= call.start + call.columns:
                return rule.evicted_after(seen, before)
        return 0 if column == 0 else None

    def num_evictions_at(self, column: int, counted: int | None, after: list[int], rows: int) -> int:
        """Give the evictions up to a column, all rows together.

        Args:
            column: Where the roll-back goes.
            counted: What counting alone gives, ``None`` when it cannot.
            after: Tokens that each lane will have evicted there.
            rows: Rows per lane.
        """
        if counted is not None:
            return counted
        for call in reversed(self._calls):
            if call.start <= column <= call.start + call.columns:
                before = call.evicted[0] if len(call.real) > 1 else call.evicted[0] * len(after)
                return call.num_evictions + rows * sum(b != a for b, a in zip(before, after, strict=True))
        return 0
