"""Steps at fixed shapes, for ``torch.compile`` and CUDA graphs: one token for every row, all of it in tensors.

While steps run, a pool's slots stand as a ring, in which nothing ever moves but the sinks::

    slots   0 ..... S | S ........................ size
            (sinks)   | token n at S + (n - S) mod R, with R = size - S

What a stream counts in Python is counted here in tensors, since a compiled graph runs no Python: how many tokens each
row has seen. All else follows from it: which slot is written, which are visible, how far the sinks have travelled.
Positions are never brought back below a bound, which would be a branch; their angles are made in float64 instead, and
so they come as float64, which is how ``angles.sharpen`` knows. Calls of any other kind are the stream's: the ring is
unrolled before and laid again after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkwindow.attention import STEP_NAME
from sinkwindow.band import evicted_before
from sinkwindow.families import FULL, SLIDING
from sinkwindow.lanes import Lane, batch_slice
from sinkwindow.moves import Write, Writes
from sinkwindow.storage import KeyValue, Move, Row, SlotPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sinkwindow.families import ModelFacts
    from sinkwindow.retention import Retention
    from sinkwindow.rotation import Rotary
    from sinkwindow.stream import State, Stream

__all__ = ["Ring", "check_static"]

MASKED = ("sdpa", "eager")  # attention implementations that take a 4D mask


def check_static(facts: ModelFacts, retention: Retention, choices: dict[str, object]) -> None:
    """Refuse what no step at fixed shapes can do.

    Args:
        facts: Of the model.
        retention: The rule.
        choices: Arguments that a ring has only one value for: their names, their values.

    Raises:
        ValueError: Naming the argument, its value, and the way out.
    """
    name = type(facts.decoder).__name__
    only: dict[str, object] = {"on_evict": None, "positions": "rank", "on_overflow": "evict"}
    for argument, value in {"evict": retention.evict, **choices}.items():
        wanted = only.get(argument, "token")
        if value != wanted:
            msg = f"static=True goes with {argument}={wanted!r}, got {value!r}: use that, or static=False."
            raise ValueError(msg)
    if facts.own_attention:
        msg = f"static=True needs a model that takes a 4D mask, and {name} attends by itself: use static=False."
        raise ValueError(msg)
    if facts.length_dependent:
        msg = (
            f"static=True lets positions grow for ever, and {name}'s rotary frequencies or tables depend on the "
            "largest one: use static=False."
        )
        raise ValueError(msg)
    if facts.decoder.device.type == "mps":
        msg = "static=True needs float64 for its angles, which mps has not: use static=False."
        raise ValueError(msg)


@dataclass(frozen=True, slots=True, eq=False)
class RingLayer:
    """One layer's tensors.

    Attributes:
        pool: Index of its pool.
        rotary: How it rotates.
        slots: Keys and values, ``[batch, kv_heads, size, ...]``.
        sinks: Pristine sinks, ``[batch, kv_heads, num_sinks, ...]``.
    """

    pool: int
    rotary: Rotary
    slots: KeyValue
    sinks: KeyValue


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What the layers share in a step.

    Attributes:
        naturals: Natural index of each row's token, ``[batch]`` int64.
        slots: For each pool the slots that are written, of the sinks and of the token, ``[batch, num_sinks + 1]``.
        turns: For each pool the positions to move the pristine sinks by, ``[batch, 1, 1]``.
        lends: The decoder's own attention, where ours takes its place.
    """

    naturals: Tensor
    slots: list[Tensor]
    turns: list[Tensor]
    lends: str | None


@dataclass(slots=True, eq=False)
class Ring:
    """A stream whose single-token calls have fixed shapes.

    Attributes:
        stream: The stream; in charge between steps.
        slides: For each of its pools, whether its layers have a window of their own.
        seen: Tokens that each row has seen, ``[batch]`` int64.
        offset: Natural index minus position, ``[batch]`` int64, the same until the next call that is no step.
        step: The one under way.
    """

    stream: Stream
    slides: list[bool]
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    offset: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    step: Step | None = None
    _layers: dict[int, RingLayer] = field(default_factory=dict)
    _base: tuple[State, list[list[Row]]] | None = None

    @property
    def laid(self) -> bool:
        """Whether the next call can be a step, and the tensors here know more than the stream."""
        return self._base is not None and all(pool.laid for pool in self.stream.pools)

    # -- steps: everything here is traced -----------------------------------------------------------------------------

    def begin(self, kwargs: dict[str, Any], implementation: str) -> tuple[dict[str, object], str | None]:
        """Begin a step.

        Args:
            kwargs: The decoder's arguments, by name.
            implementation: Its attention.

        Returns:
            The arguments to change: ``position_ids``, ``[batch, 1]`` float64, and ``attention_mask``, ``[batch, 1, 1,
            size]``, bool, or for the eager attention what is added to scores; one for each type of layer where their
            windows differ. And the attention to use, ``None`` for the decoder's own.

        Raises:
            ValueError: The call is no step, the batch size is another one, or the attention takes no 4D mask.
        """
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        rows, columns = tokens.shape[:2]
        if not self.laid or (rows, columns) != (self.seen.shape[0], 1):
            msg = (
                f"input_ids has shape {(rows, columns)}; a compiled call brings one token for each row that the cache "
                "holds. Feed a prompt to the model itself, before or between compiled calls."
            )
            raise ValueError(msg)
        if implementation not in MASKED:
            msg = f"static=True works with attn_implementation {' or '.join(MASKED)}, got {implementation!r}."
            raise ValueError(msg)
        pools, naturals = self.stream.pools, self.seen.clone()
        gone = [evicted_before(naturals, 0, pool.retention) for pool in pools]
        self.step = Step(
            naturals,
            [_written(pool, naturals) for pool in pools],
            [(evicted - self.offset)[:, None, None] for evicted in gone],
            implementation if implementation == "sdpa" else None,
        )
        masks = [_visible(pool, naturals, evicted)[:, None, None] for pool, evicted in zip(pools, gone, strict=True)]
        if implementation == "eager":
            dtype = pools[0].banks[0].slots.keys.dtype
            least = torch.finfo(dtype).min
            masks = [torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least) for mask in masks]
        positions = (naturals - self.offset).double()[:, None]
        changes: dict[str, object] = {"position_ids": positions, "attention_mask": self._by_type(masks)}
        return changes, STEP_NAME if self.step.lends else None

    def _by_type(self, masks: list[Tensor]) -> Tensor | dict[str, Tensor]:
        """Name the masks as models with mixed layers want it."""
        if not any(self.slides):
            return masks[0]
        return {SLIDING if slides else FULL: mask for slides, mask in zip(self.slides, masks, strict=True)}

    def update(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Write a layer's token and give all slots; one write serves the token and the sinks.

        Args:
            layer: The model's layer index.
            key: ``[batch, kv_heads, 1, head_dim]``, rotated by the model.
            value: ``[batch, kv_heads, 1, value_dim]``.
        """
        step, place = self.step, self._layers[layer]
        assert step is not None  # noqa: S101 - the cache asks only then
        fresh, sinks = KeyValue(key.detach(), value.detach()), place.sinks
        num_sinks = sinks.keys.shape[2]
        if num_sinks:
            naturals = step.naturals.to(key.device)
            born = (torch.arange(num_sinks, device=key.device) == naturals[:, None])[:, None, :, None]
            for pristine, new in zip(sinks, fresh, strict=True):
                pristine.copy_(torch.where(born, new, pristine))
            moved = place.rotary.move(sinks.keys, step.turns[place.pool].to(key.device))
            fresh = KeyValue(torch.cat((moved, fresh.keys), dim=2), torch.cat((sinks.values, fresh.values), dim=2))
        index = step.slots[place.pool].to(key.device)
        rows = torch.arange(index.shape[0], device=key.device)[:, None]
        for target, new in zip(place.slots, fresh, strict=True):
            target[rows, :, index] = new.transpose(1, 2)  # compiled in place, which a scatter is not
        return place.slots

    def end(self) -> str | None:
        """Take the step over: only now is its token counted. Give the attention that it has lent."""
        if self.step is None:
            return None
        lent, self.step = self.step.lends, None
        self.seen.add_(1)
        return lent

    # -- between steps ------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Tell the stream what the steps have done so far; telling it again changes nothing."""
        if self._base is None or not self.laid:  # then the stream knows best
            return
        state, rows_of = self._base
        seen = self.seen[: len(state.lanes)].tolist()
        steps = seen[0] - state.lanes[0].seen
        rows_per_lane = (state.batch or 1) // len(state.lanes)
        for pool, rows in zip(self.stream.pools, rows_of, strict=True):
            size = pool.size - pool.retention.num_sinks
            pool.rows = [
                replace(row, evicted=pool.retention.evicted_before(count), floor=max(row.floor, count - size + 1))
                for row, count in zip(rows, seen, strict=True)
            ]
        gone = [row.evicted - old.evicted for row, old in zip(self.stream.pools[0].rows, rows_of[0], strict=True)]
        self.stream.state = replace(
            state,
            lanes=tuple(replace(lane, seen=count) for lane, count in zip(state.lanes, seen, strict=True)),
            columns=state.columns + steps,
            forwarded=state.forwarded + steps,
            num_evictions=state.num_evictions + rows_per_lane * sum(gone) // (self.stream.rule.buffer + 1),
        )

    def lay(self) -> None:
        """Let the next call be a step, if there is something to go on from."""
        self.step = None
        state, pools = self.stream.state, self.stream.pools
        if state.batch is None or self.laid or not all(pool.banks for pool in pools):
            return
        for pool in pools:
            if not pool.laid:
                pool.make_ready(state.lanes, 0)  # an interrupted rebase may not have reached all pools
                pool.apply(_lay(pool, state.lanes))
        self._take_places()
        for counter, name in ((self.seen, "seen"), (self.offset, "offset")):
            counter.copy_(torch.tensor([getattr(lane, name) for lane in state.lanes]).expand_as(counter))
        self._base = state, [list(pool.rows) for pool in pools]  # last: an interrupted laying is begun again

    def unroll(self) -> None:
        """Give the slots back to the stream."""
        self.step = None
        self.sync()
        self._base = None
        for pool in self.stream.pools:
            if pool.laid:
                pool.apply(_unroll(pool, self.stream.state.lanes))

    def forget(self) -> None:
        """Let go of what the steps know, for a stream that forgets."""
        self.step = self._base = None

    def _take_places(self) -> None:
        """Find each layer's tensors; they and the counters keep their addresses as long as the banks are the same."""
        device, batch = self.stream.pools[0].banks[0].slots.keys.device, self.stream.state.batch or 0
        layers = {}
        for index, pool in enumerate(self.stream.pools):
            for bank in pool.banks:
                slots, sinks = (KeyValue(*(tensor[0] for tensor in pair)) for pair in (bank.slots, bank.sinks))
                layers[next(iter(bank.layers))] = RingLayer(index, pool.rotary, slots, sinks)
        known = self._layers.values()
        if [p.slots.keys.data_ptr() for p in known] != [p.slots.keys.data_ptr() for p in layers.values()]:
            self._layers = layers
            for place in layers.values():
                _keep_addresses(*place.slots, *place.sinks)
        if self.seen.shape[0] != batch or self.seen.device != device:
            with torch.inference_mode(mode=False):
                self.seen = torch.zeros(batch, dtype=torch.long, device=device)
                self.offset = torch.zeros_like(self.seen)
            _keep_addresses(self.seen, self.offset)


def _keep_addresses(*tensors: Tensor) -> None:
    """Tell CUDA graphs that tensors stay where they are, though a graph writes to them; other addresses record anew."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)  # noqa: SLF001 - what transformers' StaticCache does


# -- who stands where -------------------------------------------------------------------------------------------------


def _written(pool: SlotPool, naturals: Tensor) -> Tensor:
    """List the slots that a step writes, ``[batch, num_sinks + 1]``."""
    num_sinks = pool.retention.num_sinks
    slot = torch.where(naturals < num_sinks, naturals, num_sinks + (naturals - num_sinks) % (pool.size - num_sinks))
    sinks = torch.arange(num_sinks, device=naturals.device).expand(naturals.shape[0], -1)
    return torch.cat((sinks, slot[:, None]), dim=1)


def _standing(pool: SlotPool, newest: Tensor) -> Tensor:
    """Give the natural index of the token in each slot, ``[batch, size]``, negative where there is none."""
    num_sinks, newest = pool.retention.num_sinks, newest[:, None]
    slots = torch.arange(pool.size, device=newest.device)
    window = newest - (newest - slots) % (pool.size - num_sinks)
    sinks = torch.where(slots <= newest, slots, -1)
    return torch.where(slots < num_sinks, sinks, torch.where(window >= num_sinks, window, -1))


def _visible(pool: SlotPool, newest: Tensor, evicted: Tensor) -> Tensor:
    """Say which slots a step's token sees, itself included, ``[batch, size]`` bool."""
    standing, num_sinks = _standing(pool, newest), pool.retention.num_sinks
    return (standing >= 0) & ((standing < num_sinks) | (standing >= num_sinks + evicted[:, None]))


def _lay(pool: SlotPool, lanes: Sequence[Lane]) -> Move:
    """Lay a pool's window as a ring; sinks and their keys' places are each step's business, not so their values."""
    num_sinks = pool.retention.num_sinks
    writes, rows = [], []
    for r, (lane, row) in enumerate(zip(lanes, pool.rows, strict=True)):
        first = max(row.floor, num_sinks, lane.seen - (pool.size - num_sinks))
        standing = _standing(pool, torch.tensor([lane.seen - 1]))[0, num_sinks:]
        index = torch.where(standing >= first, pool.end - lane.seen + standing, 0)
        writes += _rearranged(pool, batch_slice(r, len(lanes)), index, slice(num_sinks, pool.size))
        rows.append(replace(row, floor=first, placed=-1))
    for bank in pool.banks:
        writes += [
            Write(slots[:, :, :, :num_sinks], partial(torch.clone, sinks))
            for slots, sinks in zip(bank.slots, bank.sinks, strict=True)
        ]
    return Move(Writes(writes), pool.banks, rows, pool.end, laid=True)


def _unroll(pool: SlotPool, lanes: Sequence[Lane]) -> Move:
    """Put a ring's window in order again, with room for the sinks in front."""
    num_sinks = pool.retention.num_sinks
    counts = [max(0, lane.seen - max(row.floor, num_sinks)) for lane, row in zip(lanes, pool.rows, strict=True)]
    end = num_sinks + max(counts)
    writes, rows = [], []
    for r, (lane, row, count) in enumerate(zip(lanes, pool.rows, counts, strict=True)):
        naturals = torch.arange(lane.seen - count, lane.seen)
        index = num_sinks + (naturals - num_sinks) % (pool.size - num_sinks)
        writes += _rearranged(pool, batch_slice(r, len(lanes)), index, slice(end - count, end))
        rows.append(replace(row, floor=lane.seen - count, placed=-1))
    return Move(Writes(writes), pool.banks, rows, end)


def _rearranged(pool: SlotPool, batch: slice, index: Tensor, to: slice) -> list[Write]:
    """Write the slots ``index`` into the slots ``to``, in every layer."""
    writes = []
    for bank in pool.banks:
        for tensor in bank.slots:
            rows = tensor[:, batch]
            source: Callable[[], Tensor] = partial(rows.index_select, 3, index.to(tensor.device))
            writes.append(Write(rows[:, :, :, to], source))
    return writes
