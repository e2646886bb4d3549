"""A stream of tokens through pools of slots, independent of any model; ``cache.py`` fits it to transformers.

Its calls have four verbs: ``begin``, ``commit`` and ``repair``; to abort one is to drop its ``StreamCall``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from sinkwindow.lanes import Inputs, Lane, LaneCall
from sinkwindow.storage.journal import Write, Writes
from sinkwindow.storage.slots import Pool, Slots
from sinkwindow.storage.states import RECURRENT, without_past
from sinkwindow.stream.call import PoolCall, StreamCall
from sinkwindow.stream.events import Eviction, evictions_of
from sinkwindow.stream.history import cropped, recorded, select_past, tokens_fed
from sinkwindow.stream.state import CallRecord, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


T = TypeVar("T")

# Columns of a call run at once, and columns of copied sinks among them: beyond, masked columns cost more than the fixed
# cost of another piece. On a GPU that is the launch of all kernels, and more columns are no faster (docs/gpu.md).
PIECE, PIECE_COPIES = 256, 2048
GPU_PIECE, GPU_PIECE_COPIES = 1024, 4096


class Stream:
    """The content of a cache.

    Args:
        pools: The first one's rule is the stream's; others hold layers with a window of their own.
        bound: Positions stay below it.
        longest: Columns, cached ones included, that the model can attend to in one call; ``None`` for any number.
        state: What it holds; nothing if omitted.

    Attributes:
        rule: The first pool's.
        capacity: Of the rule.
        static: Whether the slots are rings.
        state: What the stream holds.
    """

    def __init__(
        self, pools: Sequence[Pool], bound: int, *, longest: int | None = None, state: State | None = None
    ) -> None:
        self.pools = pools
        self.rule = pools[0].retention
        self.capacity = self.rule.capacity  # read in every call
        self.bound = bound
        self.static = pools[0].static
        self._is_fork = state is not None
        self.longest = longest
        self.state = State(tuple(Slots() for _ in pools)) if state is None else state
        self._unfinished: tuple[Writes, State] | None = None
        self._fed: tuple[tuple[CallRecord, ...], Tensor] | None = None  # of the past that `tokens_fed` last looked at

    def per_row(self, lanes: list[T]) -> list[T]:
        """Return a list with an item for every row, of one for every lane."""
        if self.state.batch is None:
            return lanes[:1]
        return lanes * self.state.batch if len(lanes) == 1 else lanes

    def tokens_fed(self, batch: int) -> Tensor:
        """Return which columns held tokens, ``[batch, columns]`` bool, if no record of padding was dropped."""
        past = self.state.past
        if (
            self._fed is None or self._fed[0] is not past or len(self._fed[1]) != batch
        ):  # else no padding has come since
            self._fed = past, tokens_fed(past, batch)
        fed = self._fed[1]
        return torch.cat((fed, fed.new_ones(batch, self.state.columns - fed.shape[1])), dim=1)

    # -- calls --------------------------------------------------------------------------------------------------------

    def preview(self, inputs: Inputs) -> tuple[int, bool]:
        """Return how many tokens the longest row will have seen after a call, and whether some row evicts."""
        state = self.state if inputs.real is None else self.state.by_row(inputs.batch)
        most, evicts = 0, False
        for lane, row, fresh in zip(state.lanes, state.pools[0].lanes, inputs.counts(len(state.lanes)), strict=True):
            most = max(most, lane.seen + fresh)
            evicts = evicts or self.rule.evicted_after(lane.seen + fresh, row.evicted) > row.evicted
        return most, evicts

    def piece_length(self, inputs: Inputs, *, masked: bool) -> int:
        """Return how many columns of a call to run at once: from the first, all of them if that is no less.

        Args:
            inputs: What is left of the call.
            masked: Whether the model's attention takes 4D masks; otherwise pieces end at evictions.
        """
        if self.rule.evict == "call":
            return inputs.columns
        state = self.state if inputs.real is None else self.state.by_row(inputs.batch)
        held = self.pools[0].held(state.pools[0], state.lanes)
        most = max(self.bound - held, self.rule.window) if self.longest is None else self.longest - held
        if masked and self.has_room(inputs) and inputs.columns <= most:
            return inputs.columns
        if masked:
            on_cpu = inputs.device.type == "cpu"
            longest, copies = (PIECE, PIECE_COPIES) if on_cpu else (GPU_PIECE, GPU_PIECE_COPIES)
            copies_per_token = self.rule.num_sinks / (self.rule.buffer + 1)
            return min(inputs.columns, most, longest, max(1, int(copies / max(1, copies_per_token))))
        ends = [inputs.columns, most]
        for r, (lane, row) in enumerate(zip(state.lanes, state.pools[0].lanes, strict=True)):
            room = self.capacity - (lane.seen - row.evicted)
            real: Sequence[int] = inputs.real[r] if inputs.real else range(inputs.columns)
            if len(real) > room:
                ends.append(real[room - 1] + 1)
        return min(ends)

    def begin(self, inputs: Inputs, *, aside: bool = False) -> StreamCall:
        """Plan a call and put the slots in order for it; what the stream holds does not change.

        Args:
            inputs: What the call brings.
            aside: Whether it must leave the slots alone, even if they have room.

        Raises:
            ValueError: The model cannot attend to so many columns.
        """
        state = self.state if inputs.real is None else self.state.by_row(inputs.batch)
        if self.longest is not None:
            held = self.pools[0].held(state.pools[0], state.lanes)
            if held + inputs.columns > self.longest:
                raise ValueError(
                    f"The call brings {inputs.columns} columns and {held} are cached, but what this model attends "
                    f"to ends at {self.longest}; feed shorter calls, choose a smaller window, or use "
                    'evict="token", which splits them.'
                )
        fresh = [inputs.columns] * len(state.lanes) if inputs.real is None else inputs.counts(len(state.lanes))
        reach = 0
        for lane, count in zip(state.lanes, fresh, strict=True):
            reach = max(reach, lane.seen - lane.offset + count)
        if reach > self.bound:
            state = self._rebased(state, fresh)
        if state.batch is not None:
            self.state = state
        lanes, plain, reach = [], min(fresh) == inputs.columns, 0
        for r, (lane, count) in enumerate(zip(state.lanes, fresh, strict=True)):
            after = Lane(lane.seen + count, lane.offset, lane.evictions)
            reach = max(reach, after.seen - after.offset, after.offset - lane.seen)
            lanes.append(LaneCall(lane, after, inputs.columns, inputs.real[r] if inputs.real else None))
        columns = inputs.columns if plain and not aside else 0
        parts, has_copies = [], False
        for index in range(len(self.pools)):
            parts.append(self._begin_pool(index, state, lanes, columns))
            has_copies = has_copies or parts[-1].epochs > 0
        state = state if state.batch is None else self.state
        return StreamCall(state, lanes, inputs.batch, parts, reach, plain, has_copies)

    def _rebased(self, state: State, fresh: Sequence[int]) -> State:
        """Return the state with the next tokens back at their ranks, since their positions would reach the bound.

        If even then there are too few positions, the call begins below its rank, where RoPE is as accurate.
        """
        rows = zip(state.lanes, state.pools[0].lanes, fresh, strict=True)
        lanes = [replace(lane, offset=max(row.evicted, lane.seen + count - self.bound)) for lane, row, count in rows]
        return replace(state, lanes=tuple(lanes))

    def _begin_pool(self, index: int, state: State, lanes: list[LaneCall], columns: int) -> PoolCall:
        """Put a pool's slots in order and plan its part of a call; ``columns`` is 0 where they cannot be written."""
        pool, slots, recording = self.pools[index], state.pools[index], state.recording
        held = pool.held(slots, state.lanes)
        if not slots.banks or pool.static:
            return PoolCall(pool, slots, lanes, held, recording, in_slots=False, in_place=self._is_fork)
        size = pool.size(slots, recording=recording)
        room = columns if columns <= size - held else 0  # enough, after a move if need be
        stale = unplaced = False
        for lane, row in zip(state.lanes, slots.lanes, strict=True):
            stale = stale or lane.offset != row.offset
            unplaced = unplaced or row.placed != row.evicted
        if stale or slots.end + room > size:
            stay = slots.end + room <= size
            writes, slots = pool.relocation(slots, state.lanes, recording=recording, stay=stay)
            self.change(writes, self._with_pool(index, slots))
            size, unplaced = pool.size(slots, recording=recording), True
        copied = recording and pool.must_copy(slots)
        if unplaced and not copied and pool.retention.num_sinks:
            slots = self._place_sinks(index, slots)
        in_slots = 0 < room <= size - slots.end
        return PoolCall(pool, slots, lanes, held, recording, in_slots, self._is_fork, copied)

    def _place_sinks(self, index: int, slots: Slots) -> Slots:
        """Write the sinks in front of the windows, where they stay until a row evicts."""
        pool = self.pools[index]
        lost = tuple(replace(row, placed=-1, floor=pool.retention.first(row.evicted)) for row in slots.lanes)
        slots = self._set_pool(index, replace(slots, lanes=lost))  # before they are written
        pool.place_sinks(slots, self.state.lanes, [bank.slots for bank in slots.banks], slots.end)
        placed = tuple(replace(row, placed=row.evicted) for row in slots.lanes)
        return self._set_pool(index, replace(slots, lanes=placed))

    def commit(self, call: StreamCall) -> list[Eviction]:
        """Count a call that has succeeded, by one assignment of a new ``State``, and return what it evicted."""
        state, events = self.after(call)
        self.adopt(state)
        return events

    def has_room(self, inputs: Inputs) -> bool:
        """Return whether a call fits into the free slots: what it evicts stays there, for a roll-back."""
        state = self.state
        return (
            not self.static
            and min(inputs.counts(len(state.lanes))) == inputs.columns
            and all(
                slots.banks
                and pool.held(slots, state.lanes) + inputs.columns <= pool.size(slots, recording=state.recording)
                for pool, slots in zip(self.pools, state.pools, strict=True)
            )
        )

    def fork(self, state: State) -> Stream:
        """Return a stream that goes on from another state, whose tensors it may write: of a copy, or a call ``aside``.

        This stream stays as it is, until ``adopt`` takes the state of the other one over.
        """
        return Stream(self.pools, self.bound, longest=self.longest, state=state)

    def after(self, call: StreamCall) -> tuple[State, list[Eviction]]:
        """Return what the stream holds once a call counts, and what the call evicted."""
        events, state, lanes = evictions_of(call), call.state, [lane.after for lane in call.lanes]
        for r, (row, gone) in enumerate(zip(call.parts[0].slots.lanes, call.parts[0].evicted, strict=True)):
            if gone != row.evicted:
                lanes[r] = replace(lanes[r], evictions=lanes[r].evictions + self.rule.evictions(gone - row.evicted))
        columns = call.lanes[0].columns
        counting = call.plain and self.rule.evict == "token"  # is enough to undo the call
        past = state.past if counting else recorded(state, call)
        after = State(
            pools=tuple(map(PoolCall.outcome, call.parts)),
            lanes=tuple(lanes),
            columns=state.columns + columns,
            batch=call.batch,
            forwarded=state.forwarded + columns,
            past=past,
            forgot=state.forgot or len(past) < len(state.past) + (not counting),
            recording=state.recording,
            states=state.states,  # of before the call: whoever runs the layers has the new ones
        )
        return after, events

    def repair(self) -> None:
        """Finish, or undo, a change of tensors that was interrupted."""
        if self._unfinished is not None:
            writes, state = self._unfinished
            writes.finish()
            self.state = state
            self._unfinished = None

    # -- changes ------------------------------------------------------------------------------------------------------

    def adopt(self, state: State) -> None:
        """Put another state in the place of this one.

        A ring's tensors keep their addresses, which CUDA graphs replay from: there the new content is copied over the
        old, and an interruption is undone.
        """
        if self.static and not self._is_fork:
            state = self._in_place(state)
        self.state = state
        self._unfinished = None

    def _in_place(self, state: State) -> State:
        olds, news = self.state.tensors, state.tensors
        if [(old.shape, old.dtype, old.device) for old in olds] != [(new.shape, new.dtype, new.device) for new in news]:
            return state
        pairs = [(old, new) for old, new in zip(olds, news, strict=True) if old is not new]  # sinks are shared
        with torch.inference_mode(mode=False):
            saved = [old.clone() for old, _ in pairs]
        # From here on an interruption finds the old content half overwritten: `repair` writes it back.
        undo = [Write(old, copy.clone) for (old, _), copy in zip(pairs, saved, strict=True)]
        self._unfinished = Writes(undo), self.state
        for old, new in pairs:
            old.copy_(new)
        pools = zip(state.pools, self.state.pools, strict=True)
        return replace(state, pools=tuple(replace(new, banks=old.banks) for new, old in pools))

    def change(self, writes: Writes, state: State) -> None:
        """Change tensors and state together: from here on an interruption is finished by ``repair``."""
        self._unfinished = writes, state
        self.repair()

    def _set_pool(self, index: int, slots: Slots) -> Slots:
        self.state = self._with_pool(index, slots)
        return slots

    def _with_pool(self, index: int, slots: Slots) -> State:
        return replace(self.state, pools=(*self.state.pools[:index], slots, *self.state.pools[index + 1 :]))

    def reset(self) -> None:
        """Forget everything, interrupted changes too; tensors are kept for the next text."""
        pools = tuple(pool.emptied(slots) for pool, slots in zip(self.pools, self.state.pools, strict=True))
        self.change(Writes([]), State(pools))  # takes the place of a change that was interrupted

    def select_rows(self, index: Tensor) -> None:
        """Continue row ``i`` from row ``index[i]``, ``[rows]`` int64, in everything the stream knows."""
        state = self.state
        if state.batch is None:
            return
        chosen = [int(row) for row in index.tolist()]
        several = len(state.lanes) > 1
        lanes = tuple(state.lanes[row] for row in chosen) if several else state.lanes

        def select(tensor: Tensor, dim: int = 1) -> Tensor:
            return tensor.index_select(dim, index.to(tensor.device))

        pools = tuple(
            replace(
                slots,
                banks=tuple(bank.map(select) for bank in slots.banks),
                lanes=tuple(slots.lanes[row] for row in chosen) if several else slots.lanes,
            )
            for slots in state.pools
        )
        past = select_past(state.past, chosen) if several else state.past
        states = {key: select(tensor, 0) for key, tensor in state.states.items()}
        self.adopt(replace(state, pools=pools, lanes=lanes, batch=len(chosen), past=past, states=states))

    # -- going back ---------------------------------------------------------------------------------------------------

    def can_crop(self, columns: int) -> bool:
        """Return whether the newest columns can be taken back exactly."""
        return not columns or (columns <= self.state.columns and cropped(self.pools, self.state, columns) is not None)

    def crop(self, columns: int) -> None:
        """Take the newest columns back, at least one.

        Raises:
            ValueError: The tokens that they evicted are gone; nothing has changed then.
        """
        change = cropped(self.pools, self.state, columns)
        if change is None and any(kind == RECURRENT for _, kind, _ in self.state.states):
            raise ValueError(
                f"The last {columns} columns cannot be taken back: the model has linear attention or state-space "
                "layers, whose state has no way back. Call snapshot() before feeding them, then restore()."
            )
        if change is None:
            raise ValueError(
                f"The last {columns} columns cannot be taken back: they evicted tokens that are gone. Call "
                "activate_past_recording() before feeding them, or snapshot() and restore()."
            )
        self.change(*change)

    def record_past(self) -> None:
        """Keep tokens that are evicted from now on, as far as there is room."""
        if self.static:
            return
        self.forget_past()
        state, writes, pools = replace(self.state, recording=True), [], []
        for pool, slots in zip(self.pools, state.pools, strict=True):
            change = pool.relocation(slots, state.lanes, recording=True) if slots.banks else (Writes([]), slots)
            writes += change[0].parts
            pools.append(change[1])
        self.change(Writes(writes), replace(state, pools=tuple(pools)))

    def forget_past(self) -> None:
        """Begin the recorded past again: what was evicted before is not needed any more."""
        pools = []
        for pool, slots in zip(self.pools, self.state.pools, strict=True):
            rows = tuple(replace(row, mark=pool.retention.first(row.evicted)) for row in slots.lanes)
            pools.append(replace(slots, lanes=rows))
        self.state = replace(self.state, pools=tuple(pools), states=without_past(self.state.states))
