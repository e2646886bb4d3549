"""The bookkeeping of one call: which token stands in which column, and at which position it is rotated.

A *lane* is one row of the batch, or all rows at once while they agree (no padding): then every operation is one slice
over the batch. Columns are what the caller passes, padding included; natural indices count a row's real tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Lane", "LaneCall", "Segment", "batch_slice", "segments_for"]


@dataclass(frozen=True, slots=True)
class Lane:
    """What a row has seen.

    Attributes:
        seen: Real tokens fed so far.
        offset: Natural index minus rotation position of the next token. It grows when the cache is rebased, so that
            positions stay bounded for ever.
    """

    seen: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a call's tokens that share one offset: ``position = natural index - offset``."""

    first: int
    offset: int


@dataclass(frozen=True, slots=True)
class LaneCall:
    """One lane's part in a call.

    Attributes:
        seen: Real tokens before the call.
        columns: Columns of the call.
        real: Columns that hold real tokens, ascending; ``None`` when all do.
        segments: Ascending; more than one only when a call is longer than the positions allow.
        offset: The lane's offset before the call.
    """

    seen: int
    columns: int
    real: list[int] | None
    segments: list[Segment]
    offset: int

    @property
    def fresh(self) -> int:
        """Count the real tokens of the call."""
        return self.columns if self.real is None else len(self.real)

    @property
    def seen_after(self) -> int:
        """Count the real tokens once the call has ended."""
        return self.seen + self.fresh

    @property
    def after(self) -> Lane:
        """Give the lane as it is once the call has ended."""
        return Lane(self.seen_after, self.segments[-1].offset)

    @property
    def padded(self) -> bool:
        """Whether some column of the call holds no real token."""
        return self.real is not None and len(self.real) < self.columns

    def column(self, natural: int, held: int) -> int:
        """Give the column of a token among ``held`` cached columns followed by the call's columns."""
        if natural < self.seen:
            return held - (self.seen - natural)
        return held + (natural - self.seen if self.real is None else self.real[natural - self.seen])

    def natural_at(self, column: int) -> int:
        """Give the natural index of the first real token at or after a column of the call."""
        if self.real is None:
            return self.seen + column
        return self.seen + sum(1 for real in self.real if real < column)

    def naturals(self, device: torch.device) -> Tensor:
        """Give the natural index of each column, ``[columns]`` int64, -1 for padding."""
        if self.real is None:
            return torch.arange(self.seen, self.seen + self.columns, device=device)
        naturals = torch.full((self.columns,), -1, dtype=torch.long)
        naturals[self.real] = torch.arange(self.seen, self.seen_after)
        return naturals.to(device)

    def offsets(self, naturals: Tensor) -> Tensor:
        """Give the offset at which each token is rotated, cached tokens included, same shape as ``naturals``."""
        offsets = torch.full_like(naturals, self.offset)
        for segment in self.segments:
            offsets = torch.where(naturals >= segment.first, segment.offset, offsets)
        return offsets

    def positions(self, device: torch.device) -> Tensor:
        """Give the rotation position of each column, ``[columns]`` int64, 0 for padding."""
        if self.real is None and len(self.segments) == 1:
            first = self.seen - self.segments[0].offset
            return torch.arange(first, first + self.columns, device=device)
        naturals = self.naturals(device)
        return torch.where(naturals >= 0, naturals - self.offsets(naturals), 0)


def batch_slice(index: int, lanes: int) -> slice:
    """Give the rows of the batch that a lane stands for."""
    return slice(None) if lanes == 1 else slice(index, index + 1)


def segments_for(lane: Lane, fresh: int, bound: int, restart: int) -> list[Segment]:
    """Cut a call's tokens so that no position reaches ``bound``.

    Args:
        lane: The row before the call.
        fresh: Real tokens of the call.
        bound: Positions stay below it.
        restart: Position at which each further segment begins; below ``bound``.

    Returns:
        At least one segment.
    """
    segments = [Segment(lane.seen, lane.offset)]
    end = lane.seen + fresh
    while end - segments[-1].offset > bound:
        first = segments[-1].offset + bound
        segments.append(Segment(first, first - restart))
    return segments
