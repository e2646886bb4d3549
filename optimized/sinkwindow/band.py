"""Who sees whom in a call that crosses evictions or holds padding: index arithmetic, laid out once per call."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sinkwindow.lanes import LaneCall
    from sinkwindow.retention import Retention

__all__ = ["Band", "Block", "band_of", "evicted_before"]

BLOCK = 128  # queries per block: a band of W keys is read as W + BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A run of queries, the columns that any of them can see, and who sees whom among them.

    Attributes:
        queries: Of the call's columns.
        columns: Of the cached columns followed by the call's.
        hidden: ``[lanes, 1, 1, queries, sinks + columns]`` bool, True where a query must not look.
        key_shift: Positions to move the keys by, ``[lanes, 1, columns]``; ``None`` where they stand right already.
    """

    queries: slice
    columns: slice
    hidden: Tensor
    key_shift: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Who sees whom in one call, for the layers of one pool on one device.

    Attributes:
        rank_shift: Positions from where the model rotated each query to its rank, ``[lanes, 1, queries]``.
        num_sinks: Sinks present, those of the call included.
        sink_columns: Where each sink stands among the cached columns followed by the call's, ``[lanes, sinks]``.
        blocks: The blocks, covering all queries.
    """

    rank_shift: Tensor
    num_sinks: int
    sink_columns: Tensor
    blocks: list[Block]


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """The index arithmetic behind a ``Band``, one lane a row; natural indices are -1 where there is none."""

    naturals: Tensor  # [lanes, queries]
    first: Tensor  # [lanes, queries]: oldest window token that a query sees
    offsets: Tensor  # [lanes, queries]
    key_naturals: Tensor  # [lanes, columns]: window keys only
    key_offsets: Tensor  # [lanes, columns]
    held: int
    padded: bool

    def hidden(self, queries: slice, columns: slice, num_sinks: int) -> Tensor:
        """Say which of the sinks and columns each query must not see, ``[lanes, 1, 1, queries, sinks + columns]``."""
        naturals = self.naturals[:, queries, None]
        keys = self.key_naturals[:, None, columns]
        window = (keys >= self.first[:, queries, None]) & (keys <= naturals) & (keys >= 0)
        if self.padded:  # a padding query looks at itself: a softmax needs somebody to look at
            column = torch.arange(columns.start, columns.stop, device=keys.device)
            itself = torch.arange(queries.start, queries.stop, device=keys.device)[:, None] + self.held
            window |= (naturals < 0) & (column == itself)
        sinks = torch.arange(num_sinks, device=keys.device) <= naturals
        return ~torch.cat((sinks, window), dim=-1)[:, None, None]

    def key_shift(self, queries: slice, columns: slice) -> Tensor | None:
        """Give the distance of each key from where the block's queries' segment would have rotated it."""
        naturals, offsets = self.naturals[:, queries], self.offsets[:, queries]
        segment = torch.where(naturals >= 0, offsets, 0).amax(dim=1, keepdim=True)
        keys = self.key_naturals[:, columns]
        shift = torch.where(keys >= 0, self.key_offsets[:, columns] - segment, 0)
        return shift[:, None] if bool(shift.any()) else None


def band_of(
    lanes: list[LaneCall],
    evicted: list[int],
    retention: Retention,
    held: int,
    device: torch.device,
    *,
    ranked: bool = True,
) -> Band:
    """Lay out a call.

    Args:
        lanes: The call, lane by lane.
        evicted: Tokens that each lane had evicted before the call.
        retention: The pool's rule.
        held: Cached columns in front of the call's columns.
        device: Where the layers' queries are.
        ranked: Whether a query's position is its rank; otherwise its natural index.
    """
    naturals = torch.stack([lane.naturals(device) for lane in lanes])
    gone = torch.stack([evicted_before(naturals[r], evicted[r], retention) for r in range(len(lanes))])
    past = torch.stack([torch.arange(lane.seen - held, lane.seen, device=device) for lane in lanes])
    oldest = torch.tensor([retention.first(count) for count in evicted], device=device)[:, None]
    keys = torch.cat((torch.where(past >= oldest, past, -1), naturals), dim=1)
    layout = _Layout(
        naturals=naturals,
        first=retention.num_sinks + gone,
        offsets=torch.stack([lane.offsets(row) for lane, row in zip(lanes, naturals, strict=True)]),
        key_naturals=torch.where(keys >= retention.num_sinks, keys, -1),
        key_offsets=torch.stack([lane.offsets(row) for lane, row in zip(lanes, keys, strict=True)]),
        held=held,
        padded=any(lane.padded for lane in lanes),
    )
    num_sinks = max(retention.sinks(lane.seen_after) for lane in lanes)
    segmented = any(len(lane.segments) > 1 for lane in lanes)
    return Band(
        rank_shift=torch.where(naturals >= 0, layout.offsets - (gone if ranked else 0), 0)[:, None],
        num_sinks=num_sinks,
        sink_columns=torch.tensor(
            [
                [_sink_column(lane, gone, held, sink) for sink in range(num_sinks)]
                for lane, gone in zip(lanes, evicted, strict=True)
            ],
            dtype=torch.long,
            device=device,
        ),
        blocks=[
            Block(
                queries,
                columns,
                layout.hidden(queries, columns, num_sinks),
                layout.key_shift(queries, columns) if segmented else None,
            )
            for queries, columns in _blocks(lanes, evicted, retention, held)
        ],
    )


def _sink_column(lane: LaneCall, evicted: int, held: int, sink: int) -> int:
    """Give a sink's column: the head of the row's list, or where the call brings it; 0 for one that is yet to come."""
    if sink < lane.seen:
        return held - (lane.seen - evicted) + sink
    return lane.column(sink, held) if sink < lane.seen_after else 0


def evicted_before(naturals: Tensor, evicted: int, retention: Retention) -> Tensor:
    """Count the tokens evicted before each query attends: ``Retention.evicted_before``, elementwise.

    Args:
        naturals: Natural indices of the queries, int64.
        evicted: Tokens that the lane had evicted before the call; counts only when evicting by call.
        retention: The rule.
    """
    if retention.evict == "call":
        return torch.full_like(naturals, evicted)
    step = retention.buffer + 1
    overflow = (naturals - retention.limit - retention.buffer).clamp(min=0)
    return (overflow + step - 1) // step * step


def _blocks(
    lanes: list[LaneCall], evicted: list[int], retention: Retention, held: int
) -> Iterator[tuple[slice, slice]]:
    """Cut the call into runs of queries within which every lane stays in one segment, with the columns they see."""
    cuts = {*range(0, lanes[0].columns, BLOCK), lanes[0].columns}
    for lane in lanes:
        cuts.update(lane.column(segment.first, 0) for segment in lane.segments[1:])
    for start, stop in pairwise(sorted(cuts)):
        low = min(_oldest_column(lane, gone, retention, held, start) for lane, gone in zip(lanes, evicted, strict=True))
        yield slice(start, stop), slice(low, held + stop)


def _oldest_column(lane: LaneCall, evicted: int, retention: Retention, held: int, start: int) -> int:
    """Give the oldest column that a lane's queries from column ``start`` on can see (padding sees itself)."""
    natural = lane.natural_at(start)
    if natural >= lane.seen_after:
        return held + start
    gone = evicted if retention.evict == "call" else retention.evicted_before(natural)
    oldest = min(max(retention.first(gone), lane.seen - held), natural)
    return max(0, min(lane.column(oldest, held), held + start))
