"""State of one forward call: what each layer gets back, and what holds when all layers are done.

A call is planned before the first layer runs and committed after the module that the user called has returned. In
between it writes only to slots that hold no retained token, or keeps what it will need aside; so a call is aborted by
dropping its ``StreamCall``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkwindow.attention import mask as masks
from sinkwindow.lanes import batch_slice
from sinkwindow.storage.bank import KeyValue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sinkwindow.lanes import LaneCall
    from sinkwindow.storage.slots import Pool, Slots
    from sinkwindow.stream.state import State

__all__ = ["PoolCall", "StreamCall"]


@dataclass(slots=True, eq=False)
class PoolCall:
    """The part of a call that concerns one pool.

    Attributes:
        pool: The pool.
        slots: What it holds, made ready for the call.
        lanes: The call, lane by lane.
        held: Cached columns that every layer returns in front of the call's columns.
        recording: Whether evicted tokens are kept for a roll-back.
        in_slots: Whether the call's tokens go straight into the slots; otherwise they are kept aside until the end.
        epochs: Copies of the sinks in front of the cached columns, see ``attention/mask.py``.
        evicted: Tokens that each lane will have evicted after the call.
        length: Columns that every layer returns, ``epochs * num_sinks + held + columns``.
    """

    pool: Pool
    slots: Slots
    lanes: list[LaneCall]
    held: int
    recording: bool
    in_slots: bool
    epochs: int = field(init=False)
    evicted: list[int] = field(init=False)
    length: int = field(init=False)
    _views: dict[int, tuple[Tensor | None, ...]] = field(init=False)
    _todo: set[int] = field(init=False)
    _whole: bool = field(init=False)  # what a layer returns is one view of the slots
    _brings_sinks: bool = field(init=False)
    _starts: list[int] = field(init=False)
    _windows: dict[int, KeyValue] = field(default_factory=dict)
    _sinks: dict[int, KeyValue] = field(default_factory=dict)
    _turns: dict[torch.device, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Slice all layers of a bank at once: a handful of views per call instead of a handful per layer."""
        pool, slots, rule = self.pool, self.slots, self.pool.retention
        rows = list(zip(self.lanes, slots.lanes, strict=True))
        self.evicted = [rule.evicted_after(lane.after.seen, row.evicted) for lane, row in rows]
        epochs = max(masks.epochs_begun(lane, row.evicted, rule) for lane, row in rows)
        self.epochs = epochs if pool.ranked and rule.num_sinks else 0
        columns = self.lanes[0].columns
        self.length = self.epochs * rule.num_sinks + self.held + columns
        self._brings_sinks = any(lane.before.seen < rule.num_sinks for lane in self.lanes)
        self._todo = set(pool.layers)
        if not self.in_slots:
            self._starts = [
                pool.keep_from(slots, r, lane.after, gone, recording=self.recording)
                for r, (lane, gone) in enumerate(zip(self.lanes, self.evicted, strict=True))
            ]
        copied = pool.must_copy(slots, recording=self.recording)
        self._whole = self.in_slots and not copied and not self.epochs
        self._views = {}
        if not slots.banks:
            return
        before = [lane.before for lane in self.lanes]
        copies = iter(pool.copied(slots, before, self.held) if copied else ())
        end, start = slots.end, slots.end - self.held
        for bank in slots.banks:
            nothing = (None,) * len(bank.layers)
            to = [tensor.narrow(3, end, columns).unbind() if self.in_slots else nothing for tensor in bank.slots]
            if copied:
                read = [tensor.unbind() for tensor in next(copies)]
            else:
                read = [tensor.narrow(3, start, self.held + columns * self._whole).unbind() for tensor in bank.slots]
            self._views |= zip(bank.layers, zip(*to, *read, strict=True), strict=True)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, and return all that its queries may attend to.

        Args:
            layer: The model's layer index.
            key: ``[batch, kv_heads, columns, head_dim]``, rotated by the model.
            value: ``[batch, kv_heads, columns, value_dim]``.

        Returns:
            Keys and values, ``[batch, kv_heads, length, ...]``.
        """
        to_keys, to_values, keys, values = self._views.get(layer, (None,) * 4)
        if to_keys is not None and to_values is not None:
            to_keys.copy_(key.detach() if key.requires_grad else key)  # the check is ten times cheaper than detach()
            to_values.copy_(value.detach() if value.requires_grad else value)
        self._todo.discard(layer)
        if self._brings_sinks or self.epochs or not self.in_slots:
            self._sinks[layer] = self._collect_sinks(layer, KeyValue(key.detach(), value.detach()))
        if self._whole and keys is not None and values is not None:
            return keys, values
        cached = [] if keys is None or values is None else [KeyValue(keys, values)]
        if not self.in_slots:
            self._windows[layer] = self._window(*cached, KeyValue(key, value))
        copies = [self._rotated(self._sinks[layer])] if self.epochs else []
        return _joined(*copies, *cached, KeyValue(key, value))

    def outcome(self) -> Slots:
        """Return what the pool holds after the call.

        Raises:
            RuntimeError: Some layer never handed over its keys.
        """
        if self._todo:
            raise RuntimeError(f"Layers {sorted(self._todo)} did not update the cache in this call; it is undone.")
        if self.in_slots:
            rows = [
                row if row.evicted == gone else replace(row, evicted=gone)
                for row, gone in zip(self.slots.lanes, self.evicted, strict=True)
            ]
            return replace(self.slots, lanes=tuple(rows), end=self.slots.end + self.lanes[0].columns)
        after = [lane.after for lane in self.lanes]
        aside = self._windows, self._sinks
        return self.pool.absorb(self.slots, after, self.evicted, self._starts, *aside, recording=self.recording)

    def visible(self, device: torch.device) -> Tensor:
        """Return which columns each query attends to, ``[lanes, 1, columns, length]`` bool."""
        evicted, pool = [row.evicted for row in self.slots.lanes], self.pool
        return masks.visible(self.lanes, evicted, pool.retention, self.held, self.epochs, device, ranked=pool.ranked)

    def fold(self, weights: Tensor) -> Tensor:
        """Return attention weights with those of copied sinks added to the sinks' own columns.

        Args:
            weights: ``[batch, heads, columns, length]``, as the model's attention returns them.

        Returns:
            ``[batch, heads, columns, held + columns]``.
        """
        count = self.pool.retention.num_sinks
        width = self.epochs * count
        if not width:
            return weights
        folded = weights[..., width:].clone()
        for r, (lane, row) in enumerate(zip(self.lanes, self.slots.lanes, strict=True)):
            rows, first = batch_slice(r, len(self.lanes)), self.held - (lane.before.seen - row.evicted)
            for sink in range(self.pool.retention.sinks(lane.after.seen)):
                column = first + sink if sink < lane.before.seen else lane.column(sink, self.held)
                folded[rows, ..., column] += weights[rows, ..., sink:width:count].sum(dim=-1)
        return folded

    def _rotated(self, sinks: KeyValue) -> KeyValue:
        """Return the sinks once for each epoch that begins in the call, ``[batch, kv_heads, epochs * S, ...]``."""
        device = sinks.keys.device
        if device not in self._turns:
            step = self.pool.retention.buffer + 1
            turns = [
                [self.pool.turn(row.evicted + step * epoch, lane.after.offset) for epoch in range(1, self.epochs + 1)]
                for lane, row in zip(self.lanes, self.slots.lanes, strict=True)
            ]
            self._turns[device] = torch.tensor(turns, device=device)[:, None, :, None]  # [lanes, 1, epochs, 1]
        keys, values = (tensor[:, :, None].expand(-1, -1, self.epochs, -1, -1) for tensor in sinks)
        return KeyValue(self.pool.rotary.rotate_by(keys, self._turns[device]).flatten(2, 3), values.flatten(2, 3))

    def _window(self, *states: KeyValue) -> KeyValue:
        """Return the window that is left after the call, right-aligned, in memory of its own."""
        counts = [lane.after.seen - start for lane, start in zip(self.lanes, self._starts, strict=True)]
        longest = max(counts)
        if any(lane.real is not None for lane in self.lanes):
            index = torch.tensor([self._columns_of(lane, longest) for lane in self.lanes], dtype=torch.long)
            index = index.to(states[0].keys.device)[:, None, :, None]
            keys, values = (tensor.take_along_dim(index, dim=2) for tensor in _joined(*states))
            return KeyValue(keys.detach(), values.detach())
        fresh = states[-1].keys.shape[2]
        if longest <= fresh:
            return KeyValue(*(tensor.detach()[:, :, fresh - longest :].clone() for tensor in states[-1]))
        cached = KeyValue(*(tensor[:, :, self.held - (longest - fresh) :] for tensor in states[0]))
        return KeyValue(*(tensor.detach() for tensor in _joined(cached, states[-1])))

    def _columns_of(self, lane: LaneCall, count: int) -> list[int]:
        """Return the columns of a lane's newest tokens; 0 is a placeholder for indices before the first token."""
        naturals = range(lane.after.seen - count, lane.after.seen)
        return [max(0, lane.column(natural, self.held)) if natural >= 0 else 0 for natural in naturals]

    def _collect_sinks(self, layer: int, fresh: KeyValue) -> KeyValue:
        """Return the pristine sinks, those that the call brings included; sinks yet to come are zeros.

        Sink slots past the committed count are unused, so the bank's own may be written at once.
        """
        bank = next((bank for bank in self.slots.banks if layer in bank.layers), None)
        if bank is not None:
            sinks = KeyValue(*(tensor[bank.layers[layer]] for tensor in bank.sinks))
        else:
            count = self.pool.retention.num_sinks
            sinks = KeyValue(*(tensor.new_zeros((*tensor.shape[:2], count, tensor.shape[3])) for tensor in fresh))
        for index, lane, where, columns in self._new_sinks():
            keys, values = (tensor[index][:, :, columns] for tensor in fresh)
            sinks.keys[index, :, where] = (
                self.pool.rotary.rotate_by(keys, lane.after.offset) if lane.after.offset else keys
            )
            sinks.values[index, :, where] = values
        return sinks

    def _new_sinks(self) -> Iterator[tuple[slice, LaneCall, slice, list[int] | slice]]:
        """Yield the sinks that the call brings: batch slice, lane, sink indices, columns of the call."""
        for r, lane in enumerate(self.lanes):
            first, last = lane.before.seen, self.pool.retention.sinks(lane.after.seen)
            if first < last:
                columns = slice(0, last - first) if lane.real is None else lane.real[: last - first]
                yield batch_slice(r, len(self.lanes)), lane, slice(first, last), columns


@dataclass(frozen=True, slots=True, eq=False)
class StreamCall:
    """A forward call under way.

    Attributes:
        state: The stream before the call, at the offsets that the call uses.
        lanes: The call, lane by lane.
        batch: Rows.
        parts: Its part in each pool.
    """

    state: State
    lanes: list[LaneCall]
    batch: int
    parts: list[PoolCall]

    @property
    def reach(self) -> int:
        """The position of the call that is farthest from 0."""
        ends = [(lane.before.seen - lane.after.offset, lane.after.seen - lane.after.offset) for lane in self.lanes]
        return max(max(abs(first), last) for first, last in ends)

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of each column, ``[lanes, columns]`` int64."""
        rows = [lane.positions(device) for lane in self.lanes]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)

    def masks(self, device: torch.device) -> list[Tensor] | None:
        """Return the bool mask of each pool, ``None`` where the model's own causal masks say the same."""
        if not self._needs_masks():
            return None
        return [part.visible(device) for part in self.parts]

    def columns_with_tokens(self, device: torch.device) -> Tensor:
        """Return the 2D mask for a model that makes its own 4D mask of it, ``[batch, held + columns]`` int64."""
        part = self.parts[0]
        evicted = [row.evicted for row in part.slots.lanes]
        found = masks.columns_with_tokens(self.lanes, evicted, part.pool.retention, part.held, device)
        return found.expand(self.batch, -1)

    def _needs_masks(self) -> bool:
        """Return whether queries see other columns than a causal mask over all columns shows them."""
        for part in self.parts:
            rule, rows = part.pool.retention, part.slots.lanes
            lengths = {lane.before.seen - row.evicted for lane, row in zip(self.lanes, rows, strict=True)}
            crosses = any(
                masks.epochs_begun(lane, row.evicted, rule) for lane, row in zip(self.lanes, rows, strict=True)
            )
            if crosses or len(lengths) > 1:
                return True
        return any(lane.padded for lane in self.lanes)


def _joined(*states: KeyValue) -> KeyValue:
    """Return keys and values joined along the tokens."""
    if len(states) == 1:
        return states[0]
    return KeyValue(*(torch.cat(parts, dim=2) for parts in zip(*states, strict=True)))
