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
from sinkwindow.storage.aside import Aside
from sinkwindow.storage.bank import KeyValue, unlike
from sinkwindow.storage.slots import Slots

if TYPE_CHECKING:
    from sinkwindow.lanes import LaneCall
    from sinkwindow.storage.slots import Pool
    from sinkwindow.stream.state import State


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
        in_place: Whether such a call may write over what the slots hold.
        copied: Whether the cached columns are read as a copy, since the slots do not hold them in order.
        crosses: Whether its queries' lists differ: an eviction happens between them.
        epochs: Copies of the sinks in front of the cached columns, see ``attention/mask.py``.
        evicted: Tokens that each lane will have evicted after the call.
        front: Columns that every layer returns in front of the call's, ``epochs * num_sinks + held``.
    """

    pool: Pool
    slots: Slots
    lanes: list[LaneCall]
    held: int
    recording: bool
    in_slots: bool
    in_place: bool = False
    copied: bool = False
    crosses: bool = False
    epochs: int = 0
    evicted: list[int] = field(default_factory=list)
    front: int = 0
    _cached: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # views of each layer's cached columns,
    _targets: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # and of where its new ones go
    _whole: bool = False  # what a layer returns is one view of the slots
    _needs_sinks: bool = False
    _begun: bool = False  # some layer has handed over its keys
    _aside: Aside | None = None
    _turns: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pool, rule = self.pool, self.pool.retention
        epochs, brings_sinks = 0, False
        # Plain loops, here and in Stream.begin: this runs for every token, and a generator costs a frame per lane.
        for lane, row in zip(self.lanes, self.slots.lanes, strict=True):
            self.evicted.append(rule.evicted_after(lane.after.seen, row.evicted))
            epochs = max(epochs, masks.epochs_begun(lane, row.evicted, rule))
            brings_sinks = brings_sinks or lane.before.seen < rule.num_sinks
        self.crosses = epochs > 0
        self.epochs = epochs if pool.ranked and rule.num_sinks else 0
        self.front = self.epochs * rule.num_sinks + self.held
        self.copied = self.copied or (pool.static and bool(self.slots.banks))
        self._needs_sinks = brings_sinks or self.epochs > 0 or not self.in_slots
        self._whole = self.in_slots and not self.copied and not self.epochs
        self._prepare()

    def _prepare(self) -> None:
        """Slice all layers of a bank at once: a handful of views per call instead of a handful per layer."""
        pool, slots, columns = self.pool, self.slots, self.lanes[0].columns
        if not self.in_slots:
            sizes = pool, slots, self.lanes, self.held, self.evicted
            self._aside = Aside(*sizes, recording=self.recording, in_place=self.in_place)
        copies = pool.copied(slots, [lane.before for lane in self.lanes], self.held) if self.copied else []
        width = self.held + (columns if self._whole else 0)
        for index, bank in enumerate(slots.banks):
            keys, values = copies[index] if copies else bank.slots.narrowed(slots.end - self.held, width)
            self._cached |= zip(bank.layers, zip(keys.unbind(), values.unbind(), strict=True), strict=True)
            if self.in_slots:
                fresh = bank.slots.narrowed(slots.end, columns)
                targets = zip(fresh.keys.unbind(), fresh.values.unbind(), strict=True)
                self._targets |= zip(bank.layers, targets, strict=True)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, and return all that its queries may attend to.

        Args:
            layer: The model's layer index.
            key: ``[batch, kv_heads, columns, head_dim]``, rotated by the model.
            value: ``[batch, kv_heads, columns, value_dim]``.

        Returns:
            Keys and values, ``[batch, kv_heads, front + columns, ...]``. Gradients reach the call's own keys; cached
            ones are constants.

        Raises:
            ValueError: Their dtype or device does not go with that of the cached ones.
        """
        cached = self._cached.get(layer)
        if cached is not None:
            keys, values = cached
            kinds = key.dtype, value.dtype, key.device, key.shape[1]
            if kinds != (keys.dtype, values.dtype, keys.device, keys.shape[1]):
                self._adapt(layer, key, value)
                cached = self._cached[layer]
        self._begun = True
        differentiable = torch.is_grad_enabled()  # a query alone may ask for a gradient: it would keep a view
        if self.in_slots:
            to_keys, to_values = self._targets[layer]
            to_keys.copy_(key.detach() if differentiable else key)
            to_values.copy_(value.detach() if differentiable else value)
        whole = cached if self._whole and not differentiable else None
        if whole is not None and not self._needs_sinks:
            return whole
        fresh = KeyValue(key, value)
        sinks = self._collect_sinks(layer, fresh) if self._needs_sinks else fresh
        if whole is not None:
            return whole
        states = [fresh]
        if cached is not None:
            states = [KeyValue(*(tensor[:, :, : self.held] for tensor in cached)), fresh]
        if self.epochs:
            states = [self._rotated(sinks), *states]
        result = fresh
        if len(states) > 1:
            result = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(*states, strict=True)))
        if self._aside is not None:
            self._aside.keep(layer, result, sinks)
        return result

    def _adapt(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take keys or values of another dtype than the cached ones.

        As with ``torch.cat`` the wider dtype holds from now on: a prompt was run under autocast, and steps are not.
        """
        fresh, cached = KeyValue(key, value), KeyValue(*self._cached[layer])
        own, new = ([tensor.dtype for tensor in pair] for pair in (cached, fresh))
        wider = [torch.promote_types(*pair) for pair in zip(own, new, strict=True)]
        narrower = wider != new and not torch.is_autocast_enabled(key.device.type)
        moved = key.device != cached.keys.device or key.shape[1] != cached.keys.shape[1]
        if moved or narrower or (wider != own and (self.pool.static or self._begun)):
            raise ValueError(unlike(fresh, cached))
        if wider != own:
            banks = tuple(bank.widened(*wider) for bank in self.slots.banks)
            self.slots = replace(self.slots, banks=banks)
            self._prepare()

    def outcome(self) -> Slots:
        """Return what the pool holds after the call."""
        if self._aside is None:
            rows = []
            for row, gone in zip(self.slots.lanes, self.evicted, strict=True):
                rows.append(row if row.evicted == gone else replace(row, evicted=gone))
            return Slots(self.slots.banks, tuple(rows), self.slots.end + self.lanes[0].columns)
        return self._aside.slots()

    def visible(self, device: torch.device) -> Tensor:
        """Return which columns each query attends to, ``[lanes, 1, columns, front + columns]`` bool."""
        evicted, pool = [row.evicted for row in self.slots.lanes], self.pool
        return masks.visible(self.lanes, evicted, pool.retention, self.held, self.epochs, device, ranked=pool.ranked)

    def is_uneven(self) -> bool:
        """Return whether some row has fewer cached tokens than another."""
        return any(
            lane.before.seen - row.evicted < self.held for lane, row in zip(self.lanes, self.slots.lanes, strict=True)
        )

    def fold(self, weights: Tensor) -> Tensor:
        """Return attention weights with those of copied sinks added to the sinks' own columns.

        Args:
            weights: ``[batch, heads, columns, front + columns]``, as the model's attention returns them.

        Returns:
            ``[batch, heads, columns, held + columns]``.
        """
        count = self.pool.retention.num_sinks
        width = self.epochs * count
        if not width:
            return weights
        folded = weights[..., width:].clone()  # [batch, heads, columns, held + columns]
        for r, (lane, row) in enumerate(zip(self.lanes, self.slots.lanes, strict=True)):
            rows, first = batch_slice(r, len(self.lanes)), self.held - (lane.before.seen - row.evicted)
            for sink in range(self.pool.retention.sinks(lane.after.seen)):
                # A sink is at the head of the cached list, or among the tokens that the call brings.
                column = first + sink if sink < lane.before.seen else lane.column(sink, self.held)
                folded[rows, ..., column] += weights[rows, ..., sink:width:count].sum(dim=-1)
        return folded

    def _rotated(self, sinks: KeyValue) -> KeyValue:
        """Return the sinks once for each epoch that begins in the call, ``[batch, kv_heads, epochs * S, ...]``."""
        device, dtype, rotary = sinks.keys.device, sinks.keys.dtype, self.pool.rotary
        if device not in self._turns:
            step = self.pool.retention.buffer + 1
            turns = [
                [self.pool.turn(row.evicted + step * epoch, lane.after.offset) for epoch in range(1, self.epochs + 1)]
                for lane, row in zip(self.lanes, self.slots.lanes, strict=True)
            ]
            distances = torch.tensor(turns, device=device)[:, None, :, None]  # [lanes, 1, epochs, 1]
            self._turns[device] = rotary.cos_sin(distances, device, dtype)
        # [batch, kv_heads, S, width] -> [batch, kv_heads, epochs, S, width] -> [batch, kv_heads, epochs * S, width]
        keys, values = (tensor[:, :, None].expand(-1, -1, self.epochs, -1, -1) for tensor in sinks)
        return KeyValue(rotary.rotate(keys, *self._turns[device]).flatten(2, 3), values.flatten(2, 3))

    def _collect_sinks(self, layer: int, fresh: KeyValue) -> KeyValue:
        """Return the pristine sinks, those that the call brings included; sinks yet to come are zeros.

        Sink slots past the committed count are unused, so the bank's own may be written at once; gradients go through
        a copy.
        """
        bank = next((bank for bank in self.slots.banks if layer in bank.layers), None)
        if bank is not None:
            sinks = KeyValue(*(tensor[bank.layers[layer]] for tensor in bank.sinks))
        else:
            count = self.pool.retention.num_sinks
            sinks = KeyValue(*(tensor.new_zeros((*tensor.shape[:2], count, tensor.shape[3])) for tensor in fresh))
        targets = [sinks]
        if self.epochs and any(tensor.requires_grad for tensor in fresh):
            targets = [sinks, KeyValue(*map(torch.clone, sinks))]
        for r, lane in enumerate(self.lanes):
            first, last = lane.before.seen, self.pool.retention.sinks(lane.after.seen)
            if first >= last:
                continue
            index, where = batch_slice(r, len(self.lanes)), slice(first, last)
            columns = slice(0, last - first) if lane.real is None else lane.real[: last - first]
            keys, values = (tensor[index][:, :, columns] for tensor in fresh)
            # To their natural index, whatever the offset.
            keys = self.pool.rotary.rotate_by(keys, lane.after.offset) if lane.after.offset else keys
            for (to_keys, to_values), source in zip(
                targets, ((keys.detach(), values.detach()), (keys, values)), strict=False
            ):
                to_keys[index, :, where], to_values[index, :, where] = source
        return targets[-1]


@dataclass(slots=True, eq=False)
class StreamCall:
    """A forward call under way.

    Attributes:
        state: The stream before the call, at the offsets that the call uses.
        lanes: The call, lane by lane.
        batch: Rows.
        parts: Its part in each pool.
        reach: The position that is farthest from 0.
        plain: Whether all its columns hold tokens.
        has_copies: Whether some layer is given copies of sinks.
    """

    state: State
    lanes: list[LaneCall]
    batch: int
    parts: list[PoolCall]
    reach: int
    plain: bool
    has_copies: bool

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of each column, ``[lanes, columns]`` int64."""
        if len(self.lanes) == 1:
            return self.lanes[0].positions(device)[None]
        return torch.stack([lane.positions(device) for lane in self.lanes])

    def masks(self, device: torch.device) -> list[Tensor] | None:
        """Return the bool mask of each pool, ``None`` where a causal mask over all columns says the same."""
        needed = (len(self.lanes) > 1 or not self.plain) and not self.is_even()
        for part in self.parts:
            needed = needed or part.crosses
        return [part.visible(device) for part in self.parts] if needed else None

    def is_even(self) -> bool:
        """Return whether all columns hold tokens, the cached ones of every row too."""
        return self.plain and (len(self.lanes) == 1 or not any(part.is_uneven() for part in self.parts))

    def columns_with_tokens(self, device: torch.device) -> Tensor:
        """Return the 2D mask for a model that makes its own 4D mask of it, ``[batch, held + columns]`` int64."""
        part = self.parts[0]
        evicted = [row.evicted for row in part.slots.lanes]
        found = masks.columns_with_tokens(self.lanes, evicted, part.pool.retention, part.held, device)
        return found.expand(self.batch, -1)
