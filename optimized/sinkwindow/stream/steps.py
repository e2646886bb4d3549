"""Steps at fixed shapes, for ``torch.compile`` and CUDA graphs: one token for every row, all of it in tensors.

What a stream counts in Python is counted here in tensors, since a compiled graph runs no Python: how many tokens each
row has seen. All else follows from it: which slot of the ring is written, which are visible, how far the sinks are
rotated. Positions are natural indices and never come back below a bound, which would be a branch; their angles are
made in float64 instead (``model/exact_rope.py``). Calls of any other kind are the stream's; between a step and such a
call ``sync`` tells the stream what the steps have done, and ``follow`` takes over what the call has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkwindow.attention.mask import additive
from sinkwindow.attention.step import is_tracing
from sinkwindow.storage import ring
from sinkwindow.storage.bank import KeyValue, unlike

if TYPE_CHECKING:
    from sinkwindow.attention.rotation import Rotary
    from sinkwindow.stream.state import State
    from sinkwindow.stream.stream import Stream

MASKED = ("sdpa", "eager")  # attention implementations that take the mask of a step


@dataclass(frozen=True, slots=True, eq=False)
class StepLayer:
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
        turns: For each pool the positions to rotate the pristine sinks by, ``[batch, 1, 1]``.
    """

    naturals: Tensor
    slots: list[Tensor]
    turns: list[Tensor]


class Steps:
    """Single-token calls of a static stream.

    Args:
        stream: The stream; it knows best between steps.
        layer_types: For each of its pools, what models with mixed layers call them.

    Attributes:
        seen: Tokens that each row has seen, ``[batch]`` int64.
        padding: Columns of each row that held none.
        step: The one under way.
    """

    def __init__(self, stream: Stream, layer_types: list[str]) -> None:
        self.stream = stream
        self._layer_types = layer_types
        self.seen = self.padding = torch.zeros(0, dtype=torch.long, device="cpu")
        self.step: Step | None = None
        self.layers: dict[int, StepLayer] = {}
        self._sizes: list[int] = []
        self._base: State | None = None

    # -- steps: everything here is traced -----------------------------------------------------------------------------

    def begin(self, kwargs: dict[str, Any], implementation: str) -> dict[str, object]:
        """Begin a step.

        Args:
            kwargs: The decoder's arguments, by name.
            implementation: Its attention.

        Returns:
            The arguments to change: ``position_ids``, ``[batch, 1]`` float64, and ``attention_mask``, ``[batch, 1, 1,
            size]``, bool, or for the eager attention what is added to scores; one for each type of layer where their
            windows differ.

        Raises:
            ValueError: The call is no step, the batch size is another one, or the attention takes no 4D mask.
        """
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        rows, columns = tokens.shape[:2]
        if self._base is None or (rows, columns) != (self.seen.shape[0], 1):
            raise ValueError(
                f"input_ids has shape {(rows, columns)}; a compiled call brings one token for each row that the cache "
                "holds. Run the prompt through the uncompiled model, before or between compiled calls."
            )
        if is_tracing():
            self._check(kwargs)
        if implementation not in MASKED:
            known = " or ".join(MASKED)
            raise ValueError(f"static=True works with attn_implementation {known}, got {implementation!r}.")
        naturals, slots, turns, masks = self.seen.clone(), [], [], []
        for pool, size in zip(self.stream.pools, self._sizes, strict=True):
            num_sinks, evicted = pool.retention.num_sinks, pool.retention.evicted_before(naturals)
            sinks = torch.arange(num_sinks, device=naturals.device).expand(rows, -1)
            slots.append(torch.cat((sinks, ring.slot_of(naturals, num_sinks, size)[:, None]), dim=1))
            turns.append(evicted[:, None, None])
            masks.append(ring.visible_slots(naturals, evicted, num_sinks, size)[:, None, None])
        self.step = Step(naturals, slots, turns)
        if implementation == "eager":
            masks = [additive(mask, next(iter(self.layers.values())).slots.keys.dtype) for mask in masks]
        by_type = dict(zip(self._layer_types, masks, strict=True))
        mask = masks[0] if len(by_type) == 1 else by_type
        return {"position_ids": naturals.double()[:, None], "attention_mask": mask}

    def _check(self, kwargs: dict[str, Any]) -> None:
        """Refuse what a traced step is told of its tokens and is not so; uncompiled, ``model/inputs.py`` has done it.

        Values of 4D masks, which ``generate`` makes, are not compared, nor positions on an accelerator: a graph could
        not go on there.

        Raises:
            ValueError: A mask is no 4D one of a step, or positions have another shape than its tokens.
            RuntimeError: Positions are others than those of its tokens; raised when the graph runs.
        """
        given, positions, rows = kwargs.get("attention_mask"), kwargs.get("position_ids"), self.seen.shape[0]
        for mask in given.values() if isinstance(given, dict) else (given,):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) and not mask.is_complex() else ()
            known = len(shape) == 4 and shape[:3] in ((1, 1, 1), (rows, 1, 1)) and shape[3] in self._sizes  # noqa: PLR2004
            if mask is not None and not known:
                raise ValueError(
                    "attention_mask of a compiled step must be omitted, since the cache knows its padding, or be the "
                    "4D one that generate makes: where a new token may be padding, call the uncompiled model."
                )
        if positions is None:
            return
        if not isinstance(positions, Tensor) or positions.shape[-2:] not in ((1, 1), (rows, 1)):
            raise ValueError(f"position_ids of a compiled step must have shape ({rows}, 1); omit it: the cache counts.")
        if positions.device.type == self.seen.device.type == "cpu":
            found, naturals = positions[..., 0], self.seen
            ranks = naturals - self.stream.pools[0].retention.evicted_before(naturals)
            right = (found == naturals) | (found == naturals + self.padding) | (found == ranks)
            torch._assert_async(right.all(), "position_ids are not those of the new tokens; omit them")  # noqa: SLF001

    def update(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Write a layer's token and return all slots; one write serves the token and the sinks.

        Args:
            layer: The model's layer index.
            key: ``[batch, kv_heads, 1, head_dim]``, rotated by the model.
            value: ``[batch, kv_heads, 1, value_dim]``.

        Raises:
            RuntimeError: They require a gradient, which nothing could pass on.
            ValueError: Their dtype or device is not that of the cached ones.
        """
        step, place = self.step, self.layers[layer]
        assert step is not None  # noqa: S101 - the cache asks only then
        if key.requires_grad or value.requires_grad:
            raise RuntimeError("A step of a static cache writes in place, which has no gradient: use torch.no_grad().")
        for new, old in ((key, place.slots.keys), (value, place.slots.values)):
            if new.dtype != old.dtype or new.device != old.device or new.shape[1] != old.shape[1]:
                raise ValueError(unlike(KeyValue(key, value), place.slots))
        fresh, sinks = KeyValue(key, value), place.sinks
        num_sinks = sinks.keys.shape[2]
        if num_sinks:
            naturals = step.naturals.to(key.device)
            is_new = (torch.arange(num_sinks, device=key.device) == naturals[:, None])[:, None, :, None]
            for pristine, new in zip(sinks, fresh, strict=True):
                pristine.copy_(torch.where(is_new, new, pristine))
            rotated = place.rotary.rotate_by(sinks.keys, step.turns[place.pool].to(key.device))
            fresh = KeyValue(torch.cat((rotated, fresh.keys), dim=2), torch.cat((sinks.values, fresh.values), dim=2))
        index = step.slots[place.pool].to(key.device)
        rows = torch.arange(index.shape[0], device=key.device)[:, None]
        for target, new in zip(place.slots, fresh, strict=True):
            target[rows, :, index] = new.transpose(1, 2)  # compiled in place, which a scatter is not
        if not torch.is_grad_enabled():
            return place.slots
        # A backward pass may need them as they are now, for the gradient of a query.
        return KeyValue(place.slots.keys.clone(), place.slots.values.clone())

    def commit(self) -> None:
        """Count the step's token."""
        self.step = None
        self.seen.add_(1)

    # -- between steps ------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the next call can be a step."""
        return self._base is not None

    def sync(self) -> None:
        """Tell the stream what the steps have done so far; only a call that runs, or nothing, may change it."""
        self.stream.state = state = self.state()
        if self._base is not None:
            self._base = state

    def state(self) -> State:
        """Return the stream's state with what the steps have done so far."""
        state = self._base
        if state is None or state is not self.stream.state:  # it has changed, and `follow` was interrupted
            return self.stream.state
        seen = self.seen[: len(state.lanes)].tolist()
        steps = seen[0] - state.lanes[0].seen
        if not steps:
            return state
        pools = []
        for pool, slots, size in zip(self.stream.pools, state.pools, self._sizes, strict=True):
            oldest = size - pool.retention.num_sinks - 1  # a step that failed may have written one slot more
            rows = tuple(
                replace(row, evicted=pool.retention.evicted_before(count), floor=max(row.floor, count - oldest))
                for row, count in zip(slots.lanes, seen, strict=True)
            )
            pools.append(replace(slots, lanes=rows))
        rule, lanes = self.stream.rule, []
        for lane, row, count in zip(state.lanes, pools[0].lanes, seen, strict=True):
            lanes.append(replace(lane, seen=count, evictions=rule.evictions(row.evicted)))
        return replace(
            state,
            pools=tuple(pools),
            lanes=tuple(lanes),
            columns=state.columns + steps,
            forwarded=state.forwarded + steps,
            note=None,
        )

    def follow(self) -> None:
        """Take over what the stream holds, so that the next call can be a step."""
        self.step = None
        state = self.stream.state
        if self._base is state:
            return
        self._base = None
        if state.batch is None or not all(slots.banks for slots in state.pools):
            return
        self._find_layers(state)
        self._sizes = [slots.banks[0].slots.keys.shape[3] for slots in state.pools]
        device = state.pools[0].banks[0].slots.keys.device
        if self.seen.shape[0] != state.batch or self.seen.device != device:
            with torch.inference_mode(mode=False):
                seen = torch.zeros(state.batch, dtype=torch.long, device=device)
                padding = torch.zeros_like(seen)
            _keep_addresses(seen, padding)
            self.seen, self.padding = seen, padding  # at once: an interrupted call leaves none without the other
        self.seen.copy_(torch.tensor([lane.seen for lane in state.lanes], device="cpu").expand_as(self.seen))
        self.padding.copy_(state.columns - self.seen)
        self._base = state  # last: where this was interrupted, the next call begins it again

    def _find_layers(self, state: State) -> None:
        """Find each layer's tensors; they keep their addresses as long as the banks are the same."""
        layers = {}
        for index, (pool, held) in enumerate(zip(self.stream.pools, state.pools, strict=True)):
            for bank in held.banks:
                slots, sinks = (KeyValue(*(tensor[0] for tensor in pair)) for pair in (bank.slots, bank.sinks))
                layers[next(iter(bank.layers))] = StepLayer(index, pool.rotary, slots, sinks)
        known, found = ([layer.slots.keys.data_ptr() for layer in one.values()] for one in (self.layers, layers))
        if known != found:
            for layer in layers.values():
                _keep_addresses(*layer.slots, *layer.sinks)
            self.layers = layers


def _keep_addresses(*tensors: Tensor) -> None:
    """Tell CUDA graphs that tensors stay where they are, though a graph writes to them; other addresses record anew."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)  # noqa: SLF001 - what transformers' StaticCache does
