"""The window that a long call leaves: kept outside of the slots that are in use until the call counts.

A call that is longer than the free slots would write over retained tokens. Its window goes to other slots, a layer at a
time, and these take the place of the old ones when it commits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinkwindow.storage import ring
from sinkwindow.storage.bank import Bank, KeyValue, allocate
from sinkwindow.storage.slots import Pool, PoolLane, Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sinkwindow.lanes import LaneCall


class Aside:
    """What a pool will hold after a call.

    Args:
        pool: The pool.
        slots: What it holds before the call.
        lanes: The call, lane by lane.
        held: Cached columns in front of the call's.
        evicted: Tokens that each lane will have evicted.
        recording: Whether evicted tokens are kept for a roll-back.
        in_place: Whether what the slots hold may be written over, a layer at a time: in a fork, nobody else reads it.
    """

    def __init__(
        self,
        pool: Pool,
        slots: Slots,
        lanes: Sequence[LaneCall],
        held: int,
        evicted: Sequence[int],
        *,
        recording: bool,
        in_place: bool,
    ) -> None:
        self._pool, self._lanes, self._held = pool, lanes, held
        self._size = pool.size(slots, recording=recording)
        fits = held + lanes[0].columns < self._size  # then what the call evicts stays, for a roll-back
        rows, self._end, self._counts = [], 0, []
        for lane, row, gone in zip(lanes, slots.lanes, evicted, strict=True):
            oldest = pool.retention.first(row.evicted)  # of the cached columns
            start = pool.keep_from(lane.after, row, gone, oldest, self._size, recording=recording or fits)
            rows.append(PoolLane(gone, lane.after.offset, start, -1, row.mark))
            self._counts.append(lane.after.seen - start)
            self._end = max(self._end, pool.retention.sinks(lane.after.seen) + self._counts[-1])
        self._rows = tuple(rows)
        self._banks = slots.banks if in_place else tuple(bank.with_slots(self._size) for bank in slots.banks)
        self._spare = slots.spare
        self._first: dict[int, tuple[KeyValue, KeyValue]] = {}  # window and sinks of each layer, in the first call
        self._index: Tensor | None = None

    def keep(self, layer: int, states: KeyValue, sinks: KeyValue) -> None:
        """Keep what the window needs of a layer.

        Args:
            layer: The model's layer index.
            states: Cached columns and the call's, the newest on the right, ``[batch, kv_heads, columns, ...]``; in
                memory of their own if there are cached ones.
            sinks: The pristine sinks, those of the call included.
        """
        longest = max(self._counts)
        if any(lane.padded for lane in self._lanes):
            window = self._gathered(states, longest)
        else:
            start = states.keys.shape[2] - longest
            window = KeyValue(*(tensor[:, :, start:].detach() for tensor in states))
        if self._banks:
            bank = next(bank for bank in self._banks if layer in bank.layers)
            self._store(bank, bank.layers[layer], window)
        else:  # nothing is allocated before all layers have shown their shapes
            self._first[layer] = KeyValue(*map(torch.clone, window)), KeyValue(*map(torch.detach, sinks))

    def slots(self) -> Slots:
        """Return what the pool holds after the call."""
        if not self._banks:
            windows = {layer: window for layer, (window, _) in self._first.items()}
            pool, num_sinks = self._pool, self._pool.retention.num_sinks
            banks = allocate(pool.layers, windows, self._size, num_sinks, apart=pool.static, spare=self._spare)
            self._banks = tuple(banks)
            for bank in self._banks:
                for layer, place in bank.layers.items():
                    window, sinks = self._first.pop(layer)
                    for target, source in zip(bank.sinks, sinks, strict=True):
                        target[place] = source
                    self._store(bank, place, window)
        return Slots(self._banks, self._rows, self._end)

    def _store(self, bank: Bank, place: int, window: KeyValue) -> None:
        """Write the newest tokens of all rows, ``[batch, kv_heads, longest, ...]``, into a layer's slots."""
        num_sinks, start = self._pool.retention.num_sinks, self._end - window.keys.shape[2]
        for target, pristine, source in zip(bank.slots, bank.sinks, window, strict=True):
            # A slot that a mask hides is still multiplied by a weight of zero, so it must be finite.
            if self._pool.static:
                target[place].zero_()
                after = [lane.after for lane in self._lanes]
                ring.write(target[place], source, after, self._counts, num_sinks)
                target[place, :, :, :num_sinks] = pristine[place]  # values for good, keys until a step rotates them
            else:
                target[place, :, :, max(0, start - num_sinks) : start].zero_()
                target[place, :, :, start : self._end] = source

    def _gathered(self, states: KeyValue, longest: int) -> KeyValue:
        """Return the newest tokens of padded rows, right-aligned."""
        if self._index is None:
            columns = [self._columns_of(lane, longest) for lane in self._lanes]
            self._index = torch.tensor(columns, dtype=torch.long, device="cpu")[:, None, :, None]
        copied = states.keys.shape[2] - self._held - self._lanes[0].columns  # columns of copied sinks in front
        index = self._index.to(states.keys.device) + copied
        return KeyValue(*(tensor.take_along_dim(index, dim=2).detach() for tensor in states))

    def _columns_of(self, lane: LaneCall, count: int) -> list[int]:
        """Return the columns of a lane's newest tokens; 0 is a placeholder for indices before the first token."""
        naturals = range(lane.after.seen - count, lane.after.seen)
        return [max(0, lane.column(natural, self._held)) if natural >= 0 else 0 for natural in naturals]
