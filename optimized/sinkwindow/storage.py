"""Where keys and values live: preallocated slots with travelling sinks.

A pool holds the layers that share one retention rule. Its rows end at the same slot ``end``; a row's retained list
stands in the slots just before it, sinks first, so that attention reads one contiguous slice::

    slots   0 ....... end-length ............ end ........ size
            (free)    [ sinks | window      ] (free)

A new token is written at ``end``. An eviction moves nothing but the sinks: they are rotated forward by the number of
evicted tokens, always from the pristine copy, and written over the youngest evicted tokens' slots, just before the
window. When ``end`` reaches the last slot, the window is moved to the front once; when positions start again, its keys
are rotated where they stand.

While a model call is under way nothing is written where a retained token stands, so a call that fails is undone by
forgetting it. Every other change is a ``Move``: it knows which of its writes are done, so that an interrupted one is
finished and not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sinkwindow.lanes import batch_slice
from sinkwindow.moves import Write, Writes, from_aside, in_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from sinkwindow.lanes import Lane, LaneCall
    from sinkwindow.retention import Retention
    from sinkwindow.rotation import Rotary

__all__ = ["Bank", "KeyValue", "Move", "Row", "SlotPool"]

SLACK_SHARE = 16  # one sixteenth of the list as free slots: 6% of memory buys a move per many tokens, not per token
MIN_SLACK = 8  # [tokens], for tiny caches
RECORDED = 128  # [tokens] kept beyond the rule while a roll-back may ask for them: drafts are shorter than this


class KeyValue(NamedTuple):
    """Keys ``[batch, kv_heads, tokens, head_dim]`` and values ``[batch, kv_heads, tokens, value_dim]`` of one layer."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """What a pool knows of a lane.

    Attributes:
        evicted: Tokens evicted so far.
        offset: Natural index minus rotation position of the window keys in the slots.
        floor: Lowest natural index whose window key still stands in its slot.
        placed: Value of ``evicted`` for which the sinks stand in front of the window; -1 when they do not.
        mark: Lowest natural index that a roll-back may ask for while the past is recorded.
    """

    evicted: int = 0
    offset: int = 0
    floor: int = 0
    placed: int = -1
    mark: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Tensors of the layers that share shape, dtype and device, so that one operation serves them all.

    Attributes:
        layers: The place of each of the model's layer indices, in order.
        slots: Keys ``[layers, batch, kv_heads, slots, head_dim]`` and values likewise.
        sinks: Sinks as first rotated, ``[layers, batch, kv_heads, num_sinks, head_dim]``, never moved.
    """

    layers: dict[int, int]
    slots: KeyValue
    sinks: KeyValue

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in (*self.slots, *self.sinks))

    def map(self, change: Callable[[Tensor], Tensor]) -> Bank:
        """Give the bank that ``change`` makes of every tensor; the layers stay."""
        return Bank(self.layers, KeyValue(*map(change, self.slots)), KeyValue(*map(change, self.sinks)))


@dataclass(slots=True, eq=False)
class Move:
    """A change of a pool: what is written, and what holds afterwards."""

    writes: Writes
    banks: list[Bank]
    rows: list[Row]
    end: int
    laid: bool = False


@dataclass(slots=True, eq=False)
class SlotPool:
    """The slots of the layers that share one retention rule.

    Attributes:
        retention: The rule.
        rotary: How the layers rotate.
        ranked: Whether a token's position is its rank; otherwise its natural index.
        layers: The model's layer indices.
        rows: One per lane of the cache.
        banks: Allocated when the first call commits.
        end: Slot after the newest token, the same for all rows.
        recording: Whether evicted tokens are kept for a roll-back, up to ``RECORDED``.
        ring: Whether steps at fixed shapes use the slots: then a bank for each layer, as a graph wants its tensors.
        laid: Whether the slots stand as ``ring.py`` says, not as above.
    """

    retention: Retention
    rotary: Rotary
    layers: list[int]
    ranked: bool = True
    rows: list[Row] = field(default_factory=lambda: [Row()])
    banks: list[Bank] = field(default_factory=list)
    end: int = 0
    recording: bool = False
    ring: bool = False
    laid: bool = False
    _overwritten: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _floors: list[int] = field(default_factory=list)
    _under_way: Move | None = None

    @property
    def size(self) -> int:
        """Slots per row."""
        if self.banks:
            return self.banks[0].slots.keys.shape[3]
        capacity = self.retention.capacity
        slack = MIN_SLACK if self.ring else max(MIN_SLACK, capacity // SLACK_SHARE)  # nothing moves in a ring
        return capacity + slack + (RECORDED if self.recording else 0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(bank.nbytes for bank in self.banks)

    def length(self, lane: Lane, row: Row) -> int:
        """Count a row's retained tokens."""
        return self.retention.length(lane.seen, row.evicted)

    def shift(self, evicted: int) -> int:
        """Give natural index minus position of a query, ``evicted`` tokens having left."""
        return evicted if self.ranked else 0

    def held(self, lanes: Sequence[Lane]) -> int:
        """Count the cached columns that a call gets to see: those of the longest row."""
        return max(self.length(lane, row) for lane, row in zip(lanes, self.rows, strict=True))

    def apply(self, move: Move) -> None:
        """Carry a move out; carrying it out again changes nothing, so an interrupted one is finished by ``recover``."""
        self._under_way = move
        move.writes.carry_on()
        if move.writes.parts:
            self.forget_overwritten()
        self.banks, self.rows, self.end, self.laid = move.banks, move.rows, move.end, move.laid
        self._under_way = None

    def recover(self) -> None:
        """Finish a move that was interrupted."""
        if self._under_way is not None:
            self.apply(self._under_way)

    def drop_move(self) -> None:
        """Leave a move that was interrupted as it is: what it was about is not needed any more."""
        self._under_way = None

    # -- before a call ------------------------------------------------------------------------------------------------

    def make_ready(self, lanes: Sequence[Lane], fresh: int) -> None:
        """Rotate windows at the lanes' offsets, and move them to the front if ``fresh`` tokens have no room.

        Each is done when it is due: a step that does both takes longest.
        """
        fits = self.end + fresh <= self.size
        stale = any(row.offset != lane.offset for lane, row in zip(lanes, self.rows, strict=True))
        if self.banks and (stale or not fits):
            self.apply(self.relocation(lanes, stay=fits))

    def place_sinks(self, lanes: Sequence[Lane]) -> None:
        """Write the sinks just before each row's window, rotated to where the next query expects them."""
        for r, (lane, row) in enumerate(zip(lanes, self.rows, strict=True)):
            if row.placed != row.evicted and self.retention.sinks(lane.seen):
                self._place(r, lane, row)

    def _place(self, r: int, lane: Lane, row: Row) -> None:
        sinks = self.retention.sinks(lane.seen)
        start = self.end - self.length(lane, row)
        row_of = (slice(None), batch_slice(r, len(self.rows)), slice(None))
        source, to = (*row_of, slice(sinks)), (*row_of, slice(start, start + sinks))
        self._record(to)
        self._set_row(r, replace(row, placed=-1, floor=self.retention.first(row.evicted)))  # what is lost, first
        for bank in self.banks:
            bank.slots.keys[to] = self.rotary.move(bank.sinks.keys[source], self.shift(row.evicted) - row.offset)
            bank.slots.values[to] = bank.sinks.values[source]
        self._set_row(r, replace(self.rows[r], placed=row.evicted))

    def _set_row(self, r: int, row: Row) -> None:
        self.rows = [*self.rows[:r], row, *self.rows[r + 1 :]]

    def split_rows(self, count: int) -> None:
        """Let rows that were known as one be known one by one; doing it again changes nothing."""
        if len(self.rows) < count:
            self._floors = self._floors[:1] * count
            self.rows = self.rows * count

    def _record(self, to: tuple[slice, ...]) -> None:
        """While recording, save what sinks are about to overwrite."""
        if self.recording:
            self._floors = self._floors or [row.floor for row in self.rows]
            self._overwritten += [(tensor[to], tensor[to].clone()) for bank in self.banks for tensor in bank.slots]

    # -- moves --------------------------------------------------------------------------------------------------------

    def relocation(
        self,
        lanes: Sequence[Lane],
        rows: Sequence[Row] | None = None,
        cut: Sequence[int] | None = None,
        *,
        stay: bool = False,
    ) -> Move:
        """Rotate the windows at the lanes' offsets, and move them to the front unless they ``stay``.

        Args:
            lanes: What each row has seen once the move is done.
            rows: What the pool shall know then; as now if omitted.
            cut: Newest tokens of each row to leave behind.
            stay: Leave them where they stand.
        """
        self.restore_overwritten()
        rows = self.rows if rows is None else rows
        starts = [self._keep_from(lane, row) for lane, row in zip(lanes, rows, strict=True)]
        banks = self._grown_banks()
        counts = [lane.seen - start for lane, start in zip(lanes, starts, strict=True)]
        front = max(self.retention.sinks(lane.seen) + count for lane, count in zip(lanes, counts, strict=True))
        end = self.end if stay else front
        writes: list[Write] = []
        after = []
        for r, (lane, row, count) in enumerate(zip(lanes, rows, counts, strict=True)):
            source_end, index = self.end - (cut[r] if cut else 0), batch_slice(r, len(lanes))
            turn = partial(self._turned, distance=row.offset - lane.offset)
            for old, new in zip(self.banks, banks, strict=True):
                keys, values = (tensor[:, index, :, source_end - count : source_end] for tensor in old.slots)
                to_keys, to_values = (tensor[:, index, :, end - count : end] for tensor in new.slots)
                stands = new is old and end == source_end
                writes += [] if stands and row.offset == lane.offset else in_parts(to_keys, keys, turn)
                writes += [] if stands else in_parts(to_values, values, torch.clone)
            after.append(replace(row, offset=lane.offset, floor=starts[r], placed=-1))
        for old, new in zip(self.banks, banks, strict=True):
            if new is not old:
                writes += [from_aside(*pair) for pair in zip(new.sinks, old.sinks, strict=True)]
        return Move(Writes(writes), banks, after, end)

    def advance(self, lanes: Sequence[LaneCall], evicted: list[int]) -> Move:
        """Take over a call whose tokens were written at ``end``."""
        rows = [
            row if row.evicted == count else replace(row, evicted=count)
            for row, count in zip(self.rows, evicted, strict=True)
        ]
        return Move(Writes([]), self.banks, rows, self.end + lanes[0].fresh)

    def absorb(
        self,
        lanes: Sequence[Lane],
        evicted: list[int],
        windows: dict[int, KeyValue],
        sinks: dict[int, KeyValue],
    ) -> Move:
        """Take over a call whose tokens were kept aside.

        Args:
            lanes: The lanes as they are after the call.
            evicted: Tokens that each lane has evicted after the call.
            windows: For each layer the newest tokens of every row from ``keep_from`` on, right-aligned, rotated at the
                lanes' offsets.
            sinks: For each layer the pristine sinks, those of the call included.
        """
        banks = self.banks or self._allocate(windows)
        rows = []
        for lane, row, count in zip(lanes, self.rows, evicted, strict=True):
            start = self.keep_from(lane, row, count)
            rows.append(Row(count, lane.offset, start, -1, row.mark))
        end = max(
            self.retention.sinks(lane.seen) + lane.seen - row.floor for lane, row in zip(lanes, rows, strict=True)
        )
        writes: list[Write] = []
        for bank in banks:
            for layer, position in bank.layers.items():
                for target, source in zip(bank.slots, windows[layer], strict=True):
                    writes.append(from_aside(target[position, :, :, end - source.shape[2] : end], source))
                for target, source in zip(bank.sinks, sinks[layer], strict=True):
                    writes.append(from_aside(target[position, :, :, : source.shape[2]], source))
        return Move(Writes(writes), banks, rows, end)

    def _turned(self, keys: Tensor, distance: int) -> Tensor:
        """Give keys moved by some positions, always a copy."""
        return self.rotary.move(keys, distance) if distance else keys.clone()

    def keep_from(self, lane: Lane, row: Row, evicted: int) -> int:
        """Give the oldest window token to keep of a call kept aside; the call saw the list as it was before."""
        return self._keep_from(lane, replace(row, evicted=evicted, floor=self.retention.first(row.evicted)))

    def _keep_from(self, lane: Lane, row: Row) -> int:
        """Give the oldest window token worth keeping: the rule's, or the recorded past's as far as there is room."""
        first = self.retention.first(row.evicted)
        if self.recording:
            room = self.size - self.retention.num_sinks - 1
            first = min(first, max(row.mark, row.floor, self.retention.num_sinks, lane.seen - room))
        return min(first, lane.seen)

    def _grown_size(self) -> int:
        """Give the slots that recording wants, 0 where the banks have them already."""
        wanted = self.retention.capacity + RECORDED + max(MIN_SLACK, self.retention.capacity // SLACK_SHARE)
        return wanted if self.recording and self.size < wanted else 0

    def _grown_banks(self) -> list[Bank]:
        """Give the banks, larger ones if recording has just begun."""
        size = self._grown_size()
        if not size:
            return self.banks
        return [
            _bank(bank.layers, [tensor[0] for tensor in bank.slots], size, self.retention.num_sinks)
            for bank in self.banks
        ]

    # -- roll-back ----------------------------------------------------------------------------------------------------

    def restore_overwritten(self) -> None:
        """Bring back what sinks have overwritten since the past is recorded; the sinks are placed anew before use."""
        for target, source in reversed(self._overwritten):
            target.copy_(source)
        if self._overwritten:
            floors = zip(self.rows, self._floors, strict=True)
            self.rows = [replace(row, floor=floor, placed=-1) for row, floor in floors]
        self.forget_overwritten()

    def forget_overwritten(self) -> None:
        """Let go of the recorded past."""
        self._overwritten, self._floors = [], []

    def reachable(self, seen: int, evicted: int, r: int) -> bool:
        """Whether a row can go back to having seen and evicted so many tokens."""
        floor = self._floors[r] if self._floors else self.rows[r].floor
        first = self.retention.first(evicted)
        return seen <= first or floor <= first

    # -- allocation ---------------------------------------------------------------------------------------------------

    def _allocate(self, windows: dict[int, KeyValue]) -> list[Bank]:
        """Make room for every layer, one bank for all layers of one shape, dtype and device."""
        groups = [[layer] for layer in self.layers] if self.ring else _alike(self.layers, windows)
        return [_bank(layers, windows[layers[0]], self.size, self.retention.num_sinks) for layers in groups]


def _alike(layers: list[int], windows: dict[int, KeyValue]) -> Iterator[list[int]]:
    """Group layers whose keys and values can stand in one tensor."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for layer in layers:
        keys, values = windows[layer]
        kind = (keys.device, keys.dtype, keys.shape[:2], keys.shape[3], values.shape[3])
        groups.setdefault(kind, []).append(layer)
    yield from groups.values()


def _bank(layers: Collection[int], like: Sequence[Tensor], size: int, num_sinks: int) -> Bank:
    """Allocate zeros: a slot that a mask hides is still multiplied by a weight of zero, so it must be finite."""

    def zeros(tensor: Tensor, tokens: int) -> Tensor:
        batch, heads, _, width = tensor.shape
        return tensor.new_zeros((len(layers), batch, heads, tokens, width))

    with torch.inference_mode(mode=False):  # tensors made in inference mode could not be written outside it
        slots = KeyValue(*(zeros(tensor, size) for tensor in like))
        places = {layer: place for place, layer in enumerate(layers)}
        return Bank(places, slots, KeyValue(*(zeros(tensor, num_sinks) for tensor in like)))
