"""A stream of tokens through a set of slot pools: calls begun, taken over or dropped, rows moved, tokens taken back.

Everything here is independent of any model: it knows lanes, columns and pools. ``cache.py`` fits it to transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from sinkwindow.events import Eviction, evictions
from sinkwindow.history import History, Past
from sinkwindow.lanes import Lane, LaneCall
from sinkwindow.moves import Writes
from sinkwindow.plan import check_columns, first_cut, lane_call, needs_band, pool_call, rebased, rows_agree
from sinkwindow.storage import Move, Row, SlotPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinkwindow.attention import BandedLayer
    from sinkwindow.call import PoolCall
    from sinkwindow.inputs import Inputs
    from sinkwindow.retention import Retention

T = TypeVar("T")

__all__ = ["Snapshot", "State", "Stream", "StreamCall"]


@dataclass(frozen=True, slots=True)
class State:
    """What the cache knows beside its tensors; replaced as a whole when a call is taken over.

    Attributes:
        lanes: One for all rows while they agree, else one per row.
        columns: Columns fed and not cropped, padding included.
        batch: Rows, ``None`` before the first call.
        num_evictions: Evictions so far, all rows together.
        forwarded: Columns ever fed, cropped ones included.
    """

    lanes: tuple[Lane, ...] = (Lane(),)
    columns: int = 0
    batch: int | None = None
    num_evictions: int = 0
    forwarded: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A copy of a cache's content, for ``StreamingCache.restore``; opaque."""

    rules: list[Retention]
    static: bool
    state: State
    moves: list[Move]
    history: History


@dataclass(frozen=True, slots=True, eq=False)
class StreamCall:
    """A forward call under way.

    Attributes:
        before: The lanes before the call.
        lanes: The call, lane by lane.
        batch: Rows.
        pools: Its part in each pool.
        banded: Filled layer by layer when queries see different lists; ``None`` when the model's attention is exact.
    """

    before: tuple[Lane, ...]
    lanes: list[LaneCall]
    batch: int
    pools: list[PoolCall]
    banded: dict[int, BandedLayer] | None

    def positions(self, device: torch.device) -> Tensor:
        """Give the rotation position of each column, ``[lanes, columns]`` int64."""
        rows = [lane.positions(device) for lane in self.lanes]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a roll-back goes: the column, what each lane loses, and what each pool's rows had evicted there."""

    column: int
    removed: list[int]
    evicted: list[list[int]]


class Stream:
    """The content of a cache.

    Args:
        pools: The first one's rule is the stream's; others hold layers with a window of their own.
        bound: Rotation positions stay below it.
        splits: Whether the model attends by itself, so that calls come split where they evict.
        longest: Columns, cached ones included, that the model can attend to in one call; ``None`` for any number.
    """

    def __init__(self, pools: list[SlotPool], bound: int, *, splits: bool = False, longest: int | None = None) -> None:
        self.pools = pools
        self.splits = splits
        self._longest = longest
        self.rule = pools[0].retention
        self.state = State()
        self._bound = bound
        self._history = self._new_history()
        self._unfinished: tuple[list[tuple[SlotPool, Move]], State] | None = None

    @property
    def retained(self) -> list[list[int]]:
        """Retained natural indices, lane by lane."""
        rows = zip(self.state.lanes, self.pools[0].rows, strict=True)
        return [self.rule.retained(lane.seen, row.evicted) for lane, row in rows]

    def per_row(self, lanes: list[T]) -> list[T]:
        """Repeat what all rows share."""
        if self.state.batch is None:
            return lanes[:1]
        return lanes * self.state.batch if len(lanes) == 1 else lanes

    # -- calls --------------------------------------------------------------------------------------------------------

    def begin(self, inputs: Inputs) -> StreamCall:
        """Plan a call and bring the pools in order for it; what the stream holds does not change.

        Raises:
            ValueError: The model cannot attend to so many columns.
        """
        self.complete()
        if self._longest is not None:
            check_columns(self.pools[0].held(self.state.lanes), inputs.columns, self._longest)
        if inputs.real is not None and len(self.state.lanes) < inputs.batch:
            self._split_lanes(inputs.batch)
        real = inputs.real or [None] * len(self.state.lanes)
        fresh = [inputs.columns if columns is None else len(columns) for columns in real]
        before = rebased(self.state.lanes, self.pools[0], fresh, self._bound)
        if before is not self.state.lanes:
            self.state = replace(self.state, lanes=before)
        lanes: list[LaneCall] = [
            lane_call(lane, inputs.columns, columns, self._bound, self.rule)
            for lane, columns in zip(before, real, strict=True)
        ]
        banded: dict[int, BandedLayer] | None = {} if self._needs_band(lanes) else None
        pools = [pool_call(pool, before, lanes, banded) for pool in self.pools]
        return StreamCall(before, lanes, inputs.batch, pools, banded)

    def first_cut(self, inputs: Inputs) -> int | None:
        """Give the column at which a call must be split for a model that attends by itself, ``None`` for nowhere."""
        self.complete()
        lanes = self.state.lanes * (inputs.batch if inputs.real and len(self.state.lanes) == 1 else 1)
        real = inputs.real or [None] * len(lanes)
        pool = replace(self.pools[0], rows=self.pools[0].rows * (len(lanes) // len(self.state.lanes)))
        return first_cut(pool, lanes, inputs.columns, real, self._longest)

    def seen_after(self, inputs: Inputs) -> list[int]:
        """Count the tokens that each row, or all rows, will have seen after a call."""
        return [lane.seen + fresh for lane, fresh in self._fresh(inputs)]

    def would_evict(self, inputs: Inputs) -> bool:
        """Say whether a call makes some row evict."""
        rows = self.pools[0].rows * (inputs.batch if inputs.real and len(self.state.lanes) == 1 else 1)
        return any(
            self.rule.evicted_after(lane.seen + fresh, row.evicted) > row.evicted
            for (lane, fresh), row in zip(self._fresh(inputs), rows, strict=True)
        )

    def _fresh(self, inputs: Inputs) -> list[tuple[Lane, int]]:
        """Pair each lane, one per row where the call has padding, with the tokens that a call brings it."""
        lanes = self.state.lanes * (inputs.batch if inputs.real and len(self.state.lanes) == 1 else 1)
        real = inputs.real or [None] * len(lanes)
        return [
            (lane, inputs.columns if columns is None else len(columns))
            for lane, columns in zip(lanes, real, strict=True)
        ]

    def _needs_band(self, lanes: list[LaneCall]) -> bool:
        """Say whether the model's own masks cannot describe a call; models that attend by themselves have none."""
        if self.splits:
            return False
        one_mask = len(self.pools) == 1  # a 2D mask then speaks of the cached columns of all layers
        uneven = not one_mask and not rows_agree(self.pools, self.state.lanes)
        return uneven or any(lane.padded for lane in lanes) or any(needs_band(pool, lanes) for pool in self.pools)

    def commit(self, call: StreamCall) -> list[Eviction]:
        """Take a call over that has succeeded, and tell what it evicted."""
        moves = [(part.pool, part.outcome()) for part in call.pools]
        before = [[row.evicted for row in pool.rows] for pool in self.pools]
        events = self._events(call, before[0], moves[0][1].rows)
        state, columns = self.state, call.lanes[0].columns
        if self._history.needs(call.lanes):
            real = [lane.real for lane in call.lanes]
            self._history.record(Past(state.columns, columns, real, before, state.num_evictions))
        after = State(
            lanes=tuple(lane.after for lane in call.lanes),
            columns=state.columns + columns,
            batch=call.batch,
            num_evictions=state.num_evictions + len(events),
            forwarded=state.forwarded + columns,
        )
        self._transact(moves, after)
        return events

    def complete(self) -> None:
        """Finish a change that was interrupted."""
        for pool in self.pools:
            pool.recover()
        if self._unfinished is not None:
            moves, state = self._unfinished
            for pool, move in moves:
                pool.apply(move)
            self.state = state
            self._unfinished = None
        if self.state.batch is None and len(self.state.lanes) > 1:  # the first call failed, and with it its batch size
            self.state = replace(self.state, lanes=(Lane(),))
            for pool in self.pools:
                pool.rows = [Row()]
        for pool in self.pools:
            pool.split_rows(len(self.state.lanes))

    def reset(self) -> None:
        """Forget everything, changes under way too."""
        self._history = self._new_history()
        self._unfinished = ([(pool, Move(Writes([]), [], [Row()], 0)) for pool in self.pools], State())
        for pool in self.pools:  # only now: half a move must not be dropped by half a reset
            pool.drop_move()
            pool.forget_overwritten()
        self.complete()

    def _transact(self, moves: list[tuple[SlotPool, Move]], state: State) -> None:
        """Change tensors and state together: from here on an interruption is completed by the next call."""
        self._unfinished = (moves, state)
        self.complete()

    def _split_lanes(self, batch: int) -> None:
        """Give every row a lane of its own, from now on; what the rows have seen stays as it is."""
        self.state = replace(self.state, lanes=self.state.lanes * batch)
        for pool in self.pools:
            pool.split_rows(batch)

    def _events(self, call: StreamCall, before: list[int], after: list[Row]) -> list[Eviction]:
        events: list[Eviction] = []
        for r, lane in enumerate(call.lanes):
            if before[r] == after[r].evicted:
                continue
            rows = range(r, r + 1) if len(call.lanes) > 1 else range(call.batch)
            events += evictions(self.rule, lane, before[r], after[r].evicted, rows)
        return events

    def _new_history(self) -> History:
        return History([pool.retention for pool in self.pools])

    # -- rows ---------------------------------------------------------------------------------------------------------

    def select_rows(self, index: Tensor) -> None:
        """Let row ``i`` go on from row ``index[i]``, ``[rows]`` int64, in everything the stream knows."""
        self.complete()
        if self.state.batch is None:
            return
        chosen = [int(row) for row in index.tolist()]
        lanes = self.state.lanes
        moves = []
        for pool in self.pools:
            pool.restore_overwritten()
            banks = [bank.map(lambda tensor: tensor.index_select(1, index.to(tensor.device))) for bank in pool.banks]
            rows = [pool.rows[row] for row in chosen] if len(lanes) > 1 else pool.rows
            moves.append((pool, Move(Writes([]), banks, rows, pool.end)))
        if len(lanes) > 1:
            lanes = tuple(lanes[row] for row in chosen)
            self._history.select(chosen)
        count = self._count_evictions([row.evicted for row in moves[0][1].rows], len(chosen))
        if count is None:  # evicting by call, rows differ by their own calls only: each has its share
            count = self.state.num_evictions * len(chosen) // self.state.batch
        self._transact(moves, replace(self.state, lanes=lanes, batch=len(chosen), num_evictions=count))

    # -- going back ---------------------------------------------------------------------------------------------------

    def can_crop(self, columns: int) -> bool:
        """Say whether the newest ``columns`` columns can be taken back exactly."""
        self.complete()
        return columns >= 0 and self._target(columns) is not None

    def crop(self, columns: int) -> None:
        """Take the newest columns back.

        Raises:
            ValueError: What they evicted is gone; nothing has changed then.
        """
        self.complete()
        target = self._target(columns)
        if target is None:
            msg = (
                f"The last {columns} columns cannot be taken back: they evicted tokens that are gone. Call "
                "activate_past_recording() before feeding them, or snapshot() and restore()."
            )
            raise ValueError(msg)
        lanes = tuple(
            Lane(lane.seen - gone, min(lane.offset, evicted))  # no position below a rank
            for lane, gone, evicted in zip(self.state.lanes, target.removed, target.evicted[0], strict=True)
        )
        moves = [(pool, self._cut(pool, lanes, target, index)) for index, pool in enumerate(self.pools)]
        count = self._evictions_at(target)
        self._history.forget_from(target.column)
        self._transact(moves, replace(self.state, lanes=lanes, columns=target.column, num_evictions=count))

    def record_past(self) -> None:
        """Keep what is evicted from now on, as far as there is room."""
        for pool in self.pools:
            pool.recording = True
        self.forget_past()
        moves = [(pool, pool.relocation(self.state.lanes)) for pool in self.pools if pool.banks]
        self._transact(moves, self.state)

    def forget_past(self) -> None:
        """Begin the recorded past anew: what was evicted before is not needed any more."""
        for pool in self.pools:
            pool.forget_overwritten()
            pool.rows = [replace(row, mark=pool.retention.first(row.evicted)) for row in pool.rows]

    def _cut(self, pool: SlotPool, lanes: Sequence[Lane], target: _Target, index: int) -> Move:
        pool.restore_overwritten()
        rows = [
            replace(
                row, evicted=count, floor=min(row.floor, lane.seen), placed=row.placed if count == row.evicted else -1
            )
            for row, lane, count in zip(pool.rows, lanes, target.evicted[index], strict=True)
        ]  # what is fed now stands; and sinks that stand for so many evicted are another text's when as many are again
        end = pool.end - target.removed[0]
        if len(set(target.removed)) == 1 and end >= max(map(pool.length, lanes, rows)):
            return Move(Writes([]), pool.banks, rows, end)
        return pool.relocation(lanes, rows, target.removed)

    def _target(self, columns: int) -> _Target | None:
        state = self.state
        column = state.columns - columns
        if column < 0:
            return None
        removed = self._history.removed(column, state.columns, len(state.lanes))
        evicted: list[list[int]] = []
        for index, pool in enumerate(self.pools):
            evicted.append([])
            for r, lane in enumerate(state.lanes):
                seen = lane.seen - removed[r]
                count = self._history.evicted_at(column, seen, r, index, pool) if removed[r] else pool.rows[r].evicted
                if count is None or not pool.reachable(seen, count, r):
                    return None
                evicted[-1].append(count)
        return _Target(column, removed, evicted)

    def _evictions_at(self, target: _Target) -> int:
        """Count the evictions up to where a roll-back goes, all rows together."""
        after, batch = target.evicted[0], self.state.batch or 1
        counted = self._count_evictions(after, batch)
        return self._history.num_evictions_at(target.column, counted, after, batch // len(after))

    def _count_evictions(self, evicted: list[int], batch: int) -> int | None:
        """Count the evictions, all rows together, that led to so many evicted tokens; ``None`` evicting by call."""
        if self.rule.evict == "call":
            return None
        return sum(count // (self.rule.buffer + 1) for count in evicted) * (batch // len(evicted))

    # -- copies -------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Copy the content."""
        self.complete()
        moves = []
        for pool in self.pools:
            pool.restore_overwritten()
            moves.append(Move(Writes([]), [bank.map(torch.clone) for bank in pool.banks], list(pool.rows), pool.end))
        rules = [pool.retention for pool in self.pools]
        return Snapshot(rules, self.pools[0].ring, self.state, moves, self._history.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot.

        Raises:
            ValueError: The snapshot is of a cache with other sizes, or only one of the two is static.
        """
        self.complete()
        if snapshot.rules != [pool.retention for pool in self.pools]:
            msg = f"snapshot is of a cache with {snapshot.rules[0]}, this one has {self.rule}."
            raise ValueError(msg)
        if snapshot.static != self.pools[0].ring:
            msg = f"snapshot is of a cache with static={snapshot.static}, this one has static={not snapshot.static}."
            raise ValueError(msg)
        moves = []
        for pool, move in zip(self.pools, snapshot.moves, strict=True):
            pool.forget_overwritten()
            moves.append((pool, replace(move, banks=[bank.map(torch.clone) for bank in move.banks])))
        self._history = snapshot.history.copy()
        self._transact(moves, snapshot.state)
