"""One forward call in the making: what each layer is handed back, and what is taken over when all layers are done.

A call is planned before the first layer runs and committed after the last. In between it only writes to slots that
hold no retained token, or keeps what it will need aside; dropping the plan drops the call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sinkwindow.attention import BandedLayer
from sinkwindow.band import Band, band_of
from sinkwindow.lanes import batch_slice
from sinkwindow.storage import KeyValue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sinkwindow.lanes import LaneCall
    from sinkwindow.storage import Bank, Move, SlotPool

__all__ = ["PoolCall"]


class _Slices(NamedTuple):
    """The slots that a call uses of a bank, layer by layer.

    Attributes:
        places: For each of the model's layer indices, where it comes in the others.
        to_keys: Where the call's keys go.
        to_values: Where its values go.
        keys: What is handed back, cached keys in front.
        values: The same of the values.
    """

    places: dict[int, int]
    to_keys: tuple[Tensor, ...]
    to_values: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def _without_bank(layer: int) -> KeyError:
    return KeyError(f"Layer {layer} has no bank.")


@dataclass(slots=True, eq=False)
class PoolCall:
    """The part of a call that one pool plays.

    Attributes:
        pool: The pool, made ready for the call.
        lanes: The call, lane by lane.
        in_slots: Whether the call's tokens go straight into the slots; otherwise they are kept aside until the end.
        held: Cached columns that every layer returns in front of the call's columns.
        evicted: Tokens that each lane will have evicted after the call.
        banded: Where each layer's attention finds its band; ``None`` when the model's own attention is exact.
    """

    pool: SlotPool
    lanes: list[LaneCall]
    in_slots: bool
    held: int
    evicted: list[int]
    banded: dict[int, BandedLayer] | None
    _slices: list[_Slices] = field(default_factory=list)
    _windows: dict[int, KeyValue] = field(default_factory=dict)
    _sinks: dict[int, KeyValue] = field(default_factory=dict)
    _bands: dict[torch.device, Band] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _needs_sinks: bool = False

    def __post_init__(self) -> None:
        """Slice all layers of a bank at once: a handful of views per call instead of a handful per layer."""
        num_sinks = self.pool.retention.num_sinks
        brings_sinks = any(lane.seen < num_sinks for lane in self.lanes)
        self._needs_sinks = not self.in_slots or self.banded is not None or brings_sinks
        if not self.in_slots:
            return
        end, columns = self.pool.end, self.lanes[0].columns
        for bank in self.pool.banks:
            writes = (tensor.narrow(3, end, columns).unbind() for tensor in bank.slots)
            reads = (tensor.narrow(3, end - self.held, self.held + columns).unbind() for tensor in bank.slots)
            self._slices.append(_Slices(bank.layers, *writes, *reads))

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values, and hand back all that its queries may look at.

        Args:
            layer: The model's layer index.
            key: ``[batch, kv_heads, columns, head_dim]``, rotated by the model.
            value: ``[batch, kv_heads, columns, value_dim]``.

        Returns:
            Keys and values, ``[batch, kv_heads, held + columns, ...]``.
        """
        if self._needs_sinks:
            self._sinks[layer] = self._collect_sinks(layer, KeyValue(key.detach(), value.detach()))
        if self.banded is not None:
            self.banded[layer] = BandedLayer(self._band(key.device), self.pool.rotary, *self._sinks[layer])
        states = self._store(layer, key, value) if self.in_slots else self._keep_aside(layer, KeyValue(key, value))
        self._done.add(layer)
        return states

    def outcome(self) -> Move:
        """Give the move that takes the call over.

        Raises:
            RuntimeError: Some layer never handed over its keys; nothing is taken over then.
        """
        if len(self._done) < len(self.pool.layers):
            missing = [layer for layer in self.pool.layers if layer not in self._done]
            msg = f"Layers {missing} did not update the cache in this call; it is undone."
            raise RuntimeError(msg)
        if self.in_slots:
            return self.pool.advance(self.lanes, self.evicted)
        after = [lane.after for lane in self.lanes]
        return self.pool.absorb(after, self.evicted, self._windows, self._sinks)

    def _store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for places, to_keys, to_values, keys, values in self._slices:
            if (place := places.get(layer)) is not None:
                to_keys[place].copy_(key.detach() if key.requires_grad else key)  # asking costs a tenth of detaching
                to_values[place].copy_(value.detach() if value.requires_grad else value)
                return keys[place], values[place]
        raise _without_bank(layer)

    def _keep_aside(self, layer: int, fresh: KeyValue) -> KeyValue:
        """Put the cached columns in front, and keep of both what the window will need."""
        if self.held:
            bank, position = self._locate(layer)
            slots = (tensor[position, :, :, self.pool.end - self.held : self.pool.end] for tensor in bank.slots)
            states = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(slots, fresh, strict=True)))
        else:
            states = fresh
        self._windows[layer] = self._last(states)
        return states

    def _last(self, states: KeyValue) -> KeyValue:
        """Give the window that is left after the call, right-aligned, rotated at the lanes' last offset."""
        keys, values = (tensor.detach() for tensor in states)
        counts = [self._window_length(r) for r in range(len(self.lanes))]
        columns = [self._window_columns(r, max(counts)) for r in range(len(self.lanes))]
        if all(lane.real is None for lane in self.lanes):
            keys, values = (tensor[:, :, tensor.shape[2] - max(counts) :].clone() for tensor in (keys, values))
        else:
            index = torch.tensor(columns, dtype=torch.long, device=keys.device)[:, None, :, None]
            keys, values = (
                tensor.take_along_dim(index.expand(tensor.shape[0], tensor.shape[1], -1, tensor.shape[3]), dim=2)
                for tensor in (keys, values)
            )
        shift = self._window_shift(max(counts), keys.device)
        return KeyValue(keys if shift is None else self.pool.rotary.move(keys, shift), values)

    def _window_length(self, r: int) -> int:
        lane = self.lanes[r].after
        return lane.seen - self.pool.keep_from(lane, self.pool.rows[r], self.evicted[r])

    def _window_columns(self, r: int, count: int) -> list[int]:
        """List the columns of a row's last ``count`` tokens; column 0 stands in for tokens that never were."""
        lane = self.lanes[r]
        naturals = range(lane.seen_after - count, lane.seen_after)
        return [max(0, lane.column(natural, self.held)) if natural >= 0 else 0 for natural in naturals]

    def _window_shift(self, count: int, device: torch.device) -> Tensor | None:
        """Give the distance of each kept key to the call's last offset, ``[lanes, 1, count]``; ``None`` if all zero."""
        if all(len(lane.segments) == 1 for lane in self.lanes):
            return None
        shifts = []
        for lane in self.lanes:
            naturals = torch.arange(lane.seen_after - count, lane.seen_after, device=device)
            shifts.append(lane.offsets(naturals) - lane.segments[-1].offset)
        return torch.stack(shifts)[:, None]

    def _collect_sinks(self, layer: int, fresh: KeyValue) -> KeyValue:
        """Give the pristine sinks, those that this call brings included; slots of sinks yet to come are zeros.

        Sinks beyond a row's committed ones are nobody's yet, so the pool's own tensors may be written at once.
        """
        count = max(self.pool.retention.sinks(lane.seen_after) for lane in self.lanes)
        if self.pool.banks:
            bank, position = self._locate(layer)
            sinks = KeyValue(*(tensor[position, :, :, :count] for tensor in bank.sinks))
        else:
            sinks = KeyValue(*(tensor.new_zeros((*tensor.shape[:2], count, tensor.shape[3])) for tensor in fresh))
        for index, where, columns in self._births():
            for target, source in zip(sinks, fresh, strict=True):
                target[index, :, where] = source[index][:, :, columns]
        return sinks

    def _births(self) -> Iterator[tuple[slice, slice, list[int] | slice]]:
        """List the sinks that the call brings: batch slice, sink indices, columns of the call."""
        for r, lane in enumerate(self.lanes):
            first, last = lane.seen, self.pool.retention.sinks(lane.seen_after)
            if first < last:
                columns = slice(0, last - first) if lane.real is None else lane.real[: last - first]
                yield batch_slice(r, len(self.lanes)), slice(first, last), columns

    def _locate(self, layer: int) -> tuple[Bank, int]:
        for bank in self.pool.banks:
            if layer in bank.layers:
                return bank, bank.layers[layer]
        raise _without_bank(layer)

    def _band(self, device: torch.device) -> Band:
        if device not in self._bands:
            evicted = [row.evicted for row in self.pool.rows]
            self._bands[device] = band_of(
                self.lanes, evicted, self.pool.retention, self.held, device, ranked=self.pool.ranked
            )
        return self._bands[device]
