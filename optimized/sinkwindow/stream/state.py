"""Everything that a stream knows, as one value that never changes.

A call, a roll-back or a reordering makes another ``State``, and one assignment puts it in the place of the old one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sinkwindow.lanes import Lane

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sinkwindow.storage.bank import Bank
    from sinkwindow.storage.slots import Slots
    from sinkwindow.storage.states import States


@dataclass(frozen=True, slots=True)
class CallRecord:
    """The stream before a call that counting alone cannot undo: it had padding, or its rule evicts by call.

    Attributes:
        start: Columns before the call.
        columns: Columns of the call.
        real: Columns of each lane that held real tokens; ``None`` for all.
        lanes: What each lane had seen, and its evictions.
        evicted: Tokens that each lane had evicted, pool by pool.
    """

    start: int
    columns: int
    real: tuple[Sequence[int] | None, ...]
    lanes: tuple[Lane, ...]
    evicted: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a stream has been fed and what it holds.

    Attributes:
        pools: What each pool holds.
        lanes: One for all rows while they agree, else one per row.
        columns: Columns fed and not cropped, padding included.
        batch: Rows, ``None`` before the first call.
        forwarded: Columns ever fed, cropped ones included.
        past: Calls that a roll-back may cross and cannot undo by counting.
        forgot: Whether older ones of them were dropped.
        recording: Whether evicted tokens are kept for a roll-back.
        states: What layers that keep a state remember; unlike those of the pools, these tensors are never written.
        note: What ``Chat`` says of these tokens, as JSON; ``None`` after a call or a roll-back.
    """

    pools: tuple[Slots, ...]
    lanes: tuple[Lane, ...] = (Lane(),)
    columns: int = 0
    batch: int | None = None
    forwarded: int = 0
    past: tuple[CallRecord, ...] = ()
    forgot: bool = False
    recording: bool = False
    states: States = field(default_factory=dict)
    note: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        """All keys and values in use, always in the same order."""
        return [tensor for slots in self.pools for bank in slots.banks for tensor in bank.tensors]

    @property
    def num_evictions(self) -> int:
        """Evictions so far, all rows together."""
        return sum(lane.evictions for lane in self.lanes) * ((self.batch or 1) // len(self.lanes))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in use."""
        return sum(tensor.nbytes for tensor in (*self.tensors, *self.states.values()))

    def by_row(self, batch: int) -> State:
        """Return the same with a lane for every row."""
        if len(self.lanes) == batch:
            return self
        pools = tuple(replace(slots, lanes=slots.lanes * batch) for slots in self.pools)
        return replace(self, lanes=self.lanes * batch, pools=pools)

    def cloned(self) -> State:
        """Return the same in tensors of its own, where they are ever written."""
        return self.with_banks([tuple(bank.map(torch.clone) for bank in slots.banks) for slots in self.pools])

    def with_banks(self, banks: Sequence[tuple[Bank, ...]]) -> State:
        """Return the same with other tensors in each pool."""
        pools = (replace(slots, banks=own, spare=()) for slots, own in zip(self.pools, banks, strict=True))
        return replace(self, pools=tuple(pools))


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A copy of a cache's content, for ``StreamingCache.restore``; opaque.

    Attributes:
        settings: Arguments of the cache by name: its rule, ``positions``, ``on_overflow`` and ``static``.
        model: The fingerprint of its model.
        state: What it held.
    """

    settings: dict[str, Any]
    model: dict[str, str]
    state: State = field(repr=False)

    def check(self, settings: dict[str, Any], model: dict[str, str]) -> None:
        """Refuse a cache that cannot go on from here.

        Args:
            settings: Of that cache.
            model: Of that cache.

        Raises:
            ValueError: The two caches differ; the message names the first difference.
        """
        for what, own, other in (("cache", self.settings, settings), ("model", self.model, model)):
            for name, value in other.items():
                if own.get(name) == value or name == "on_overflow":  # which changes no number
                    continue
                if what == "model" and "unknown" in (own.get(name), value):  # weights that are off-loaded
                    continue
                digests = what == "model" and len(str(value)) > 32  # noqa: PLR2004
                values = f"with {name}={own.get(name)!r}, this one has {name}={value!r}"
                differs = f"with other {name}" if digests else values
                raise ValueError(
                    f"The snapshot is of a {what} {differs}: a cache that goes on from it must have the same sizes, "
                    "and its model the same weights and dtype."
                )


@dataclass(frozen=True, slots=True)
class DebugState:
    """Where a cache is, for measuring and for bug reports.

    Attributes:
        evictions: Evictions so far, all rows together.
        end: Slot after the newest token; without meaning in a static cache.
        size: Slots per row, 0 before the first call.
        offsets: Natural index minus position of each lane's next token.
        bound: Positions stay below it.
        recording: Whether evicted tokens are kept for a roll-back.
    """

    evictions: int
    end: int
    size: int
    offsets: tuple[int, ...]
    bound: int
    recording: bool
