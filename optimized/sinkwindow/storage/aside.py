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
        spare: Banks that are free to be written, for a call that runs in pieces.
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
        spare: tuple[Bank, ...] = (),
    ) -> None:
        self._pool, self._lanes, self._held = pool, lanes, held
        self._size = pool.size(slots, recording=recording)
        rows, self._end, self._counts = [], 0, []
        for lane, row, gone in zip(lanes, slots.lanes, evicted, strict=True):
            oldest = pool.retention.first(row.evicted)  # of the cached columns
            start = pool.keep_from(lane.after, row, gone, oldest, self._size, recording=recording)
            rows.append(PoolLane(gone, lane.after.offset, start, -1, row.mark))
            self._counts.append(lane.after.seen - start)
            self._end = max(self._end, pool.retention.sinks(lane.after.seen) + self._counts[-1])
        self._rows = tuple(rows)
        self._banks = spare or tuple(bank.with_slots(self._size) for bank in slots.banks)
        self._first: dict[int, tuple[KeyValue, KeyValue]] = {}  # window and sinks of each layer, in the first call
        self._index: Tensor | None = None

    def keep(self, layer: int, states: Sequence[KeyValue], sinks: KeyValue) -> None:
        """Keep what the window needs of a layer.

        Args:
            layer: The model's layer index.
            states: Cached columns, if there are any, and the call's, ``[batch, kv_heads, columns, ...]``.
            sinks: The pristine sinks, those of the call included.
        """
        longest, parts = max(self._counts), list(states)
        if any(lane.padded for lane in self._lanes):
            parts = [self._gathered(parts, longest)]
        elif self._pool.static or not self._banks:
            parts = [_newest(parts, longest)]
        if self._banks:
            bank = next(bank for bank in self._banks if layer in bank.layers)
            self._store(bank, bank.layers[layer], parts, longest)
        else:  # nothing is allocated before all layers have shown their shapes
            self._first[layer] = parts[0], sinks

    def slots(self) -> Slots:
        """Return what the pool holds after the call."""
        if not self._banks:
            windows = {layer: window for layer, (window, _) in self._first.items()}
            sizes = self._size, self._pool.retention.num_sinks
            self._banks = tuple(allocate(self._pool.layers, windows, *sizes, apart=self._pool.static))
            for bank in self._banks:
                for layer, place in bank.layers.items():
                    window, sinks = self._first.pop(layer)
                    for target, source in zip(bank.sinks, sinks, strict=True):
                        target[place] = source
                    self._store(bank, place, [window], max(self._counts))
        return Slots(self._banks, self._rows, self._end)

    def _store(self, bank: Bank, place: int, parts: Sequence[KeyValue], longest: int) -> None:
        """Write the newest tokens of all rows into a layer's slots, from the last one backwards."""
        num_sinks = self._pool.retention.num_sinks
        for target, pristine, tensors in zip(bank.slots, bank.sinks, zip(*parts, strict=True), strict=True):
            if self._pool.static:
                after = [lane.after for lane in self._lanes]
                target[place].zero_()  # a slot that a mask hides is still multiplied by a weight of zero
                ring.write(target[place], tensors[0], after, self._counts, num_sinks)
                target[place, :, :, :num_sinks] = pristine[place]  # values for good, keys until a step rotates them
                continue
            # [batch, kv_heads, slots, width]: the call's columns end at `end`, cached ones come before them.
            stop = self._end
            target[place, :, :, max(0, stop - longest - num_sinks) : stop - longest].zero_()  # likewise
            for tensor in reversed(tensors):
                count = min(tensor.shape[2], stop - (self._end - longest))
                target[place, :, :, stop - count : stop] = tensor[:, :, tensor.shape[2] - count :].detach()
                stop -= count

    def _gathered(self, parts: Sequence[KeyValue], longest: int) -> KeyValue:
        """Return the newest tokens of padded rows, right-aligned."""
        if self._index is None:
            columns = [self._columns_of(lane, longest) for lane in self._lanes]
            self._index = torch.tensor(columns, dtype=torch.long)[:, None, :, None]
        index = self._index.to(parts[0].keys.device)
        tensors = (torch.cat(pair, dim=2).take_along_dim(index, dim=2) for pair in zip(*parts, strict=True))
        return KeyValue(*(tensor.detach() for tensor in tensors))

    def _columns_of(self, lane: LaneCall, count: int) -> list[int]:
        """Return the columns of a lane's newest tokens; 0 is a placeholder for indices before the first token."""
        naturals = range(lane.after.seen - count, lane.after.seen)
        return [max(0, lane.column(natural, self._held)) if natural >= 0 else 0 for natural in naturals]


def _newest(parts: Sequence[KeyValue], longest: int) -> KeyValue:
    """Return the newest columns in memory of their own."""
    fresh = parts[-1].keys.shape[2]
    if longest <= fresh:
        return KeyValue(*(tensor[:, :, fresh - longest :].detach().clone() for tensor in parts[-1]))
    tensors = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
    return KeyValue(*(tensor[:, :, tensor.shape[2] - longest :].detach() for tensor in tensors))
