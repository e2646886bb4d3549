"""What is counted: tokens that each row has seen, and which of a call's columns hold tokens.

A *lane* is one row of the batch, or all rows at once while they agree (no padding): then every operation is one slice
over the batch. *Columns* are what the caller passes, padding included. A *natural index* counts a row's real tokens
only. A *position* is what RoPE rotates by: the natural index minus the lane's offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a call brings.

    Attributes:
        batch: Rows.
        columns: Columns of the call, padding included.
        device: Where positions and masks are wanted.
        real: Columns of each row that hold real tokens, ascending; ``None`` when all columns of all rows do.
    """

    batch: int
    columns: int
    device: torch.device
    real: list[list[int]] | None

    def counts(self, lanes: int) -> list[int]:
        """Return how many tokens each lane gets."""
        return [self.columns] * lanes if self.real is None else [len(row) for row in self.real]


@dataclass(frozen=True, slots=True)
class Lane:
    """What a row has seen.

    Attributes:
        seen: Real tokens fed so far.
        offset: Natural index minus position of the next token. It grows when the cache is rebased, so that positions
            stay bounded.
        evictions: Evictions so far.
    """

    seen: int = 0
    offset: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class LaneCall:
    """One lane's part in a call.

    Attributes:
        before: The lane before the call, at the offset that the call uses.
        after: The lane after it, at the same offset.
        columns: Columns of the call.
        real: Columns that hold real tokens, ascending; ``None`` when all do.
    """

    before: Lane
    after: Lane
    columns: int
    real: list[int] | None

    @property
    def padded(self) -> bool:
        """Whether some column of the call holds no real token."""
        return self.real is not None and len(self.real) < self.columns

    def column(self, natural: int, held: int) -> int:
        """Return the column of a token among ``held`` cached columns followed by the call's columns."""
        ahead = natural - self.before.seen
        return held + (ahead if ahead < 0 or self.real is None else self.real[ahead])

    def naturals(self, device: torch.device, offset: int = 0, padding: int = -1) -> Tensor:
        """Return the natural index of each column, minus an offset, ``[columns]`` int64."""
        first, last = self.before.seen - offset, self.after.seen - offset
        if self.real is None:
            return torch.arange(first, last, device=device)
        naturals = torch.full((self.columns,), padding, device="cpu")
        naturals[self.real] = torch.arange(first, last, device="cpu")
        return naturals.to(device)

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of each column, ``[columns]`` int64, 0 for padding."""
        return self.naturals(device, self.after.offset, padding=0)


def batch_slice(index: int, lanes: int) -> slice:
    """Return the rows of the batch that belong to a lane."""
    return slice(None) if lanes == 1 else slice(index, index + 1)
