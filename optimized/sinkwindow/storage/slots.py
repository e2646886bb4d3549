"""Where keys and values are: preallocated slots with travelling sinks.

A pool holds the layers that share one retention rule. Its rows end at the same slot ``end``; a row's retained list
is in the slots just before it, sinks first, so that attention reads one contiguous slice::

    slots   0 ....... end-length ............ end ........ size
            (free)    [ sinks | window      ] (free)

A new token is written at ``end``. An eviction moves nothing but the sinks: they are rotated forward by the number of
evicted tokens, always from the pristine copy, and written over the youngest evicted tokens' slots, just before the
window. When ``end`` reaches the last slot, the window is moved to the front once; when positions start again, its keys
are rotated in place. With S = 2, W = 4, B = 1, before and after the eviction that token 7 causes::

    slots      0  1  2  3  4  5  6  7  8              0  1  2  3  4  5  6  7  8
    tokens    [s0 s1 2  3  4  5  6  7] .       ->     .  .  [s0 s1 4  5  6  7] .

The slots of a static cache are a ring instead (``ring.py``). A ``Slots`` says where tokens are and never changes: every
operation returns another one. Tensors are written only where no retained token is, or through a journal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from sinkwindow.lanes import batch_slice
from sinkwindow.storage import ring
from sinkwindow.storage.bank import Bank, KeyValue
from sinkwindow.storage.journal import Write, Writes, in_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sinkwindow.attention.rotation import Rotary
    from sinkwindow.lanes import Lane
    from sinkwindow.retention import Retention

SLACK_SHARE = 16  # one sixteenth of the list as free slots: 6% of memory buys a move per many tokens, not per token
MIN_SLACK = 8  # [tokens], for tiny caches
RECORDED = 128  # [tokens] kept beyond the rule while a roll-back may ask for them: drafts are shorter than this


@dataclass(frozen=True, slots=True)
class PoolLane:
    """What a pool knows of a lane.

    Attributes:
        evicted: Tokens evicted so far.
        offset: Natural index minus position of the window keys in the slots.
        floor: Lowest natural index whose window key is still in its slot.
        placed: Value of ``evicted`` for which the sinks are in front of the window; -1 when they are not.
        mark: Lowest natural index that a roll-back may ask for while the past is recorded.
    """

    evicted: int = 0
    offset: int = 0
    floor: int = 0
    placed: int = -1
    mark: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Which tokens are in which slots of a pool.

    Attributes:
        banks: The tensors; none before the first call commits.
        lanes: One per lane of the stream.
        end: Slot after the newest token, the same for all rows; without meaning in a ring.
        spare: Tensors of an earlier text, which the first call's take the place of where they fit.
    """

    banks: tuple[Bank, ...] = ()
    lanes: tuple[PoolLane, ...] = (PoolLane(),)
    end: int = 0
    spare: tuple[Bank, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The layers that share one retention rule.

    Attributes:
        retention: The rule.
        rotary: How the layers rotate.
        layers: The model's layer indices.
        ranked: Whether a token's position is its rank; otherwise its natural index.
        static: Whether the slots are a ring, with a bank for each layer.
    """

    retention: Retention
    rotary: Rotary
    layers: Sequence[int]
    ranked: bool = True
    static: bool = False

    def size(self, slots: Slots, *, recording: bool) -> int:
        """Return the slots per row, those to allocate before there are any."""
        if slots.banks:
            return slots.banks[0].slots.keys.shape[3]
        capacity = self.retention.capacity
        if self.static:
            return capacity + MIN_SLACK  # nothing moves in a ring
        return capacity + max(MIN_SLACK, capacity // SLACK_SHARE) + (RECORDED if recording else 0)

    def emptied(self, slots: Slots) -> Slots:
        """Return slots without a token that keep the tensors for the next text, unless recording has enlarged them."""
        banks = slots.banks or slots.spare
        size = self.size(Slots(), recording=False)
        return Slots(spare=banks if banks and banks[0].slots.keys.shape[3] == size else ())

    def held(self, slots: Slots, lanes: Sequence[Lane]) -> int:
        """Return how many cached columns a call sees: those of the longest list."""
        longest = 0
        for lane, row in zip(lanes, slots.lanes, strict=True):
            longest = max(longest, lane.seen - row.evicted)
        return longest

    def turn(self, evicted: int, offset: int) -> int:
        """Return by how many positions pristine sinks are rotated for queries at an offset, ``evicted`` being gone."""
        return (evicted if self.ranked else 0) - offset

    # -- before a call ------------------------------------------------------------------------------------------------

    def relocation(
        self,
        slots: Slots,
        lanes: Sequence[Lane],
        *,
        cut: Sequence[int] | None = None,
        recording: bool,
        stay: bool = False,
    ) -> tuple[Writes, Slots]:
        """Rotate windows to the lanes' offsets and move them to the front, into larger banks if recording wants them.

        Args:
            slots: What holds now; with ``cut``, lanes as they are to be.
            lanes: What each row has seen once it is done.
            cut: Newest tokens of each row to leave behind.
            recording: Whether evicted tokens are kept for a roll-back.
            stay: Leave windows where they are, and rotate only.

        Returns:
            What to write, and what holds then.
        """
        size = self.size(slots, recording=recording)
        wanted = self.size(Slots(), recording=True) if recording else 0
        banks = tuple(bank.with_slots(wanted) for bank in slots.banks) if size < wanted else slots.banks
        for bank in banks if size < wanted else ():
            torch._foreach_zero_(bank.slots)
        # Each row keeps the tokens [start, seen), right-aligned at `end`, with room for its sinks in front of them.
        pairs = list(zip(lanes, slots.lanes, strict=True))
        starts = [self.keep_from(lane, row, row.evicted, row.floor, size, recording=recording) for lane, row in pairs]
        counts = [lane.seen - start for (lane, _), start in zip(pairs, starts, strict=True)]
        front = max(self.retention.sinks(lane.seen) + count for (lane, _), count in zip(pairs, counts, strict=True))
        end = slots.end if stay else front
        writes: list[Write] = []
        for r, ((lane, row), count) in enumerate(zip(pairs, counts, strict=True)):
            index, old_end = batch_slice(r, len(lanes)), slots.end - (cut[r] if cut else 0)
            turn = partial(self._turned, distance=row.offset - lane.offset)
            for old, new in zip(slots.banks, banks, strict=True):
                # [layers, rows, kv_heads, count, width]; keys change where their slot or their offset does
                keys, values = (tensor[:, index, :, old_end - count : old_end] for tensor in old.slots)
                to_keys, to_values = (tensor[:, index, :, end - count : end] for tensor in new.slots)
                in_place = new is old and end == old_end
                writes += [] if in_place and row.offset == lane.offset else in_parts(to_keys, keys, turn)
                writes += [] if in_place else in_parts(to_values, values, torch.clone)
        rows = [
            replace(row, offset=lane.offset, floor=start, placed=-1)
            for (lane, row), start in zip(pairs, starts, strict=True)
        ]
        return Writes(writes), Slots(banks, tuple(rows), end)

    def _turned(self, keys: Tensor, distance: int) -> Tensor:
        """Return keys rotated by some positions, always a copy."""
        return self.rotary.rotate_by(keys, distance) if distance else keys.clone()

    def place_sinks(self, slots: Slots, lanes: Sequence[Lane], into: Sequence[KeyValue], end: int) -> None:
        """Write the sinks just before each row's window, rotated to where the next query expects them.

        Args:
            slots: What holds now.
            lanes: What each row has seen.
            into: For each bank the tensors to write to, ``[layers, batch, kv_heads, any, ...]``.
            end: Where the lists end in them.
        """
        for r, (lane, row) in enumerate(zip(lanes, slots.lanes, strict=True)):
            count, start = self.retention.sinks(lane.seen), end - (lane.seen - row.evicted)
            rows = (slice(None), batch_slice(r, len(lanes)), slice(None))
            source, to = (*rows, slice(count)), (*rows, slice(start, start + count))
            for bank, (keys, values) in zip(slots.banks, into, strict=True):
                keys[to] = self.rotary.rotate_by(bank.sinks.keys[source], self.turn(row.evicted, lane.offset))
                values[to] = bank.sinks.values[source]

    def must_copy(self, slots: Slots) -> bool:
        """Return whether sinks would be written over tokens that the recorded past needs: then a copy is read."""
        return any(self.retention.first(row.evicted) > row.mark for row in slots.lanes)

    def copied(self, slots: Slots, lanes: Sequence[Lane], held: int) -> list[KeyValue]:
        """Return the cached lists as copies, right-aligned, ``[layers, batch, kv_heads, held, ...]`` for each bank."""
        if self.static:
            rule, firsts = self.retention, [self.retention.first(row.evicted) for row in slots.lanes]
            index = ring.list_slots(lanes, firsts, rule.num_sinks, self.size(slots, recording=False), held)
            copies = [KeyValue(*(ring.read(tensor, index) for tensor in bank.slots)) for bank in slots.banks]
        else:
            region = slice(slots.end - held, slots.end)
            copies = [KeyValue(*(tensor[:, :, :, region].clone() for tensor in bank.slots)) for bank in slots.banks]
        self.place_sinks(slots, lanes, copies, held)
        return copies

    # -- after a call -------------------------------------------------------------------------------------------------

    def keep_from(self, lane: Lane, row: PoolLane, evicted: int, oldest: int, size: int, *, recording: bool) -> int:
        """Return the oldest window token to keep: the rule's, or an older one for a roll-back, if there is room."""
        first = self.retention.first(evicted)
        if recording or self.static:
            mark = 0 if self.static else row.mark
            room = size - self.retention.num_sinks - 1
            first = min(first, max(mark, oldest, self.retention.num_sinks, lane.seen - room))
        return min(first, lane.seen)

    # -- roll-back ----------------------------------------------------------------------------------------------------

    def reachable(self, row: PoolLane, seen: int, evicted: int) -> bool:
        """Return whether a row can go back to having seen and evicted so many tokens."""
        first = self.retention.first(evicted)
        return seen <= first or row.floor <= first
