"""Where keys and values live: preallocated slots with travelling sinks.

A pool holds the layers that share one retention rule. Its rows end at the same slot ``end``; a row's retained list
stands in the slots just before it, sinks first, so that attention reads one contiguous slice::

    slots   0 ....... end-length ............ end ........ size
            (free)    [ sinks | window      ] (free)

A new token is written at ``end``. An eviction moves nothing but the sinks: they are rotated forward by the number of
evicted tokens, always from the pristine copy, and written over the youngest evicted tokens' slots, just before the
window. When ``end`` reaches the last slot, the window is moved to the front once.

While a model call is under way nothing is written where a retained token stands, so a call that fails is undone by
forgetting it. Moves within the slots first copy all they will write (a journal), so that an interrupted move can be
repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sinkwindow.lanes import Lane, LaneCall
    from sinkwindow.retention import Retention
    from sinkwindow.rotation import Rotary

__all__ = ["Bank", "KeyValue", "Row", "SlotPool"]

SLACK_SHARE = 16  # one sixteenth of the list as free slots: 6% of memory buys a move per many tokens, not per token
MIN_SLACK = 8  # [tokens], for tiny caches


class KeyValue(NamedTuple):
    """Keys ``[batch, kv_heads, tokens, head_dim]`` and values ``[batch, kv_heads, tokens, value_dim]`` of one layer."""

    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class Row:
    """What a pool knows of a lane.

    Attributes:
        evicted: Tokens evicted so far.
        floor: Lowest natural index whose window key still stands in its slot.
        placed: Value of ``evicted`` for which the sinks stand in front of the window; -1 when they do not.
    """

    evicted: int = 0
    floor: int = 0
    placed: int = -1


@dataclass(slots=True, eq=False)
class Bank:
    """Tensors of the layers that share shape, dtype and device, so that one operation serves them all.

    Attributes:
        layers: The model's layer indices, in order.
        slots: Keys ``[layers, batch, kv_heads, slots, head_dim]`` and values likewise.
        sinks: Sinks as first rotated, ``[layers, batch, kv_heads, num_sinks, head_dim]``, never moved.
    """

    layers: list[int]
    slots: KeyValue
    sinks: KeyValue

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in (*self.slots, *self.sinks))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what ``change`` makes of it."""
        self.slots = KeyValue(*map(change, self.slots))
        self.sinks = KeyValue(*map(change, self.sinks))


@dataclass(slots=True, eq=False)
class _Journal:
    """A move under way: what goes where, copied before the first write, and where the rows will end."""

    writes: list[tuple[Tensor, Tensor]]
    end: int


@dataclass(slots=True, eq=False)
class SlotPool:
    """The slots of the layers that share one retention rule.

    Attributes:
        retention: The rule.
        rotary: How the layers rotate.
        layers: The model's layer indices.
        rows: One per lane of the cache.
        banks: Allocated when the first call commits.
        end: Slot after the newest token, the same for all rows.
    """

    retention: Retention
    rotary: Rotary
    layers: list[int]
    rows: list[Row] = field(default_factory=lambda: [Row()])
    banks: list[Bank] = field(default_factory=list)
    end: int = 0
    _journal: _Journal | None = None

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.retention.capacity + max(MIN_SLACK, self.retention.capacity // SLACK_SHARE)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(bank.nbytes for bank in self.banks)

    def length(self, lane: Lane, row: Row) -> int:
        """Count a row's retained tokens."""
        return self.retention.length(lane.seen, row.evicted)

    def held(self, lanes: list[Lane]) -> int:
        """Count the cached columns that a call gets to see: those of the longest row."""
        return max(self.length(lane, row) for lane, row in zip(lanes, self.rows, strict=True))

    def fits(self, lanes: list[Lane], fresh: int) -> bool:
        """Whether ``fresh`` more tokens find slots, after a move if need be."""
        return bool(self.banks) and self.held(lanes) + fresh <= self.size

    def clear(self) -> None:
        """Forget everything."""
        self.rows, self.end, self._journal = [Row()], 0, None
        self.banks = []

    # -- before a call ------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Repeat a move that was interrupted."""
        if self._journal is not None:
            self._replay(self._journal)

    def make_ready(self, lanes: list[Lane], fresh: int) -> None:
        """Bring the slots in order for a call: room for ``fresh`` tokens (0: none is needed), sinks before windows."""
        if self.end + fresh > self.size:
            self.relocate(lanes, [lane.offset for lane in lanes])
        self._place_sinks(lanes)

    def relocate(self, lanes: list[Lane], offsets: list[int]) -> None:
        """Move the windows to the front, rotated to new offsets where these differ."""
        if not self.banks:
            return
        end = self.held(lanes)
        writes: list[tuple[Tensor, Tensor]] = []
        for index, lane, row, offset in self._each(lanes, offsets):
            count = self.retention.window_length(lane.seen, row.evicted)
            for bank in self.banks:
                keys, values = (tensor[:, index, :, self.end - count : self.end] for tensor in bank.slots)
                keys = keys.clone() if offset == lane.offset else self.rotary.move(keys, lane.offset - offset)
                to = (slice(None), index, slice(None), slice(end - count, end))
                writes += [(bank.slots.keys[to], keys), (bank.slots.values[to], values.clone())]
        self._commit_move(lanes, writes, end)

    def _commit_move(self, lanes: list[Lane], writes: list[tuple[Tensor, Tensor]], end: int) -> None:
        """Write a complete journal; from its first write on, ``recover`` can finish it."""
        for _, row in zip(lanes, self.rows, strict=True):
            row.floor, row.placed = self.retention.first(row.evicted), -1
        self._journal = _Journal(writes, end)
        self._replay(self._journal)

    def _replay(self, journal: _Journal) -> None:
        for target, source in journal.writes:
            target.copy_(source)
        self.end = journal.end
        self._journal = None

    def _place_sinks(self, lanes: list[Lane]) -> None:
        """Write the sinks just before each row's window, rotated to where the next query expects them."""
        for index, lane, row, offset in self._each(lanes, [lane.offset for lane in lanes]):
            sinks = self.retention.sinks(lane.seen)
            if row.placed == row.evicted or not sinks:
                continue
            start = self.end - self.length(lane, row)
            for bank in self.banks:
                keys, values = (tensor[:, index, :, :sinks] for tensor in bank.sinks)
                to = (slice(None), index, slice(None), slice(start, start + sinks))
                bank.slots.keys[to] = self.rotary.move(keys, row.evicted - offset)
                bank.slots.values[to] = values
            row.placed, row.floor = row.evicted, self.retention.first(row.evicted)

    def _each(self, lanes: list[Lane], offsets: list[int]) -> Iterator[tuple[slice, Lane, Row, int]]:
        """Pair lanes with rows, and with the slice of the batch that they stand for."""
        for r, (lane, row, offset) in enumerate(zip(lanes, self.rows, offsets, strict=True)):
            yield (slice(None) if len(lanes) == 1 else slice(r, r + 1)), lane, row, offset

    # -- after a call -------------------------------------------------------------------------------------------------

    def advance(self, lanes: list[LaneCall], evicted: list[int]) -> None:
        """Take over a call whose tokens were written at ``end``."""
        self.end += lanes[0].fresh
        for row, count in zip(self.rows, evicted, strict=True):
            row.evicted = count

    def absorb(
        self, lanes: list[Lane], evicted: list[int], windows: dict[int, KeyValue], sinks: dict[int, KeyValue]
    ) -> None:
        """Take over a call whose tokens were kept aside.

        Args:
            lanes: The lanes as they are after the call.
            evicted: Tokens that each lane has evicted after the call.
            windows: For each layer the last ``count`` tokens of every row, right-aligned, at the lanes' new offsets.
            sinks: For each layer the pristine sinks, those of the call included.
        """
        banks = self.banks or self._allocate(windows)
        after = [Row(count, self.retention.first(count)) for count in evicted]
        end = max(self.length(lane, row) for lane, row in zip(lanes, after, strict=True))
        writes: list[tuple[Tensor, Tensor]] = []
        for bank in banks:
            for position, layer in enumerate(bank.layers):
                for target, source in zip(bank.slots, windows[layer], strict=True):
                    writes.append((target[position, :, :, end - source.shape[2] : end], source))
                for target, source in zip(bank.sinks, sinks[layer], strict=True):
                    writes.append((target[position, :, :, : source.shape[2]], source))
        self.banks, self.rows = banks, after
        self._commit_move(lanes, writes, end)

    def _allocate(self, windows: dict[int, KeyValue]) -> list[Bank]:
        """Make room for every layer, one bank for all layers of one shape, dtype and device."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for layer in self.layers:
            keys, values = windows[layer]
            groups.setdefault((keys.device, keys.dtype, keys.shape[:2], keys.shape[3], values.shape[3]), []).append(
                layer
            )
        with torch.inference_mode(mode=False):  # tensors made in inference mode could not be written outside it
            return [self._bank(layers, windows[layers[0]]) for layers in groups.values()]

    def _bank(self, layers: list[int], like: KeyValue) -> Bank:
        """Allocate zeros: a slot that a mask hides is still multiplied by a weight of zero, so it must be finite."""

        def empty(tensor: Tensor, tokens: int) -> Tensor:
            batch, heads, _, width = tensor.shape
            return tensor.new_zeros((len(layers), batch, heads, tokens, width))

        return Bank(
            layers,
            KeyValue(*(empty(tensor, self.size) for tensor in like)),
            KeyValue(*(empty(tensor, self.retention.num_sinks) for tensor in like)),
        )
