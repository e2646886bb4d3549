"""The way back: what every row had seen and evicted some columns ago, and the state that a roll-back leads to.

Where all columns were tokens and the rule evicts token by token, counting is enough. Other calls are recorded as they
commit, and counting starts from the last record before the column.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sinkwindow.lanes import Lane
from sinkwindow.storage.journal import Writes
from sinkwindow.storage.states import states_before
from sinkwindow.stream.state import CallRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sinkwindow.storage.slots import Pool, Slots
    from sinkwindow.stream.call import StreamCall
    from sinkwindow.stream.state import State


MOST = 4096  # records kept, of calls that counting alone cannot undo; a roll-back further back is refused


def recorded(state: State, call: StreamCall) -> tuple[CallRecord, ...]:
    """Return the records of a state after a call that counting alone cannot undo, the newest ``MOST`` at most."""
    record = CallRecord(
        start=state.columns,
        columns=call.lanes[0].columns,
        real=tuple(compact(lane.real) for lane in call.lanes),
        lanes=tuple(lane.before for lane in call.lanes),
        evicted=tuple(tuple(row.evicted for row in slots.lanes) for slots in call.state.pools),
    )
    return (*state.past, record)[-MOST:]


def compact(real: Sequence[int] | None) -> Sequence[int] | None:
    """Return columns as a range where none is left out, as behind padding: a record is small then."""
    if not real or real[-1] - real[0] + 1 != len(real):
        return real
    whole = range(real[0], real[-1] + 1)
    return whole if list(real) == list(whole) else real  # of a file, where anything may be between


def tokens_fed(past: Sequence[CallRecord], batch: int) -> Tensor:
    """Return which columns held tokens up to the end of the last record, ``[batch, columns]`` bool."""
    end = past[-1].start + past[-1].columns if past else 0
    fed = torch.ones(batch, end, dtype=torch.bool, device="cpu")
    for record in past:
        for row in range(batch):
            real = record.real[row if len(record.real) > 1 else 0]
            if real is not None:
                call = fed[row, record.start : record.start + record.columns]
                call.zero_()
                call[list(real)] = True
    return fed


def select_past(past: Sequence[CallRecord], rows: Sequence[int]) -> tuple[CallRecord, ...]:
    """Return the records of reordered rows."""
    return tuple(
        replace(
            record,
            real=tuple(record.real[row] for row in rows),
            lanes=tuple(record.lanes[row] for row in rows),
            evicted=tuple(tuple(pool[row] for row in rows) for pool in record.evicted),
        )
        if len(record.real) > 1
        else record
        for record in past
    )


def cropped(pools: Sequence[Pool], state: State, columns: int) -> tuple[Writes, State] | None:
    """Return what to write, and the state then, to take columns back, at least one; ``None`` if that is impossible."""
    column = state.columns - columns
    counts, states = _counts_at(pools, state, column), states_before(state.states, columns)
    if counts is None or states is None or not _reachable(pools, state, counts):
        return None
    lanes = tuple(
        replace(then, offset=min(lane.offset, gone))  # no position below a rank
        for lane, then, gone in zip(state.lanes, counts.lanes, counts.evicted[0], strict=True)
    )
    removed = [lane.seen - then.seen for lane, then in zip(state.lanes, lanes, strict=True)]
    writes, after = [], []
    for pool, slots, evicted in zip(pools, state.pools, counts.evicted, strict=True):
        change = _cut(pool, slots, lanes, evicted, removed, recording=state.recording)
        writes += change[0].parts
        after.append(change[1])
    return Writes(writes), replace(
        state,
        pools=tuple(after),
        lanes=lanes,
        columns=column,
        past=_shortened(state.past, column),
        states=states,
        note=None,
    )


def _counts_at(pools: Sequence[Pool], state: State, column: int) -> CallRecord | None:
    """Return the record of a call of no columns at a column, ``None`` if what was before is forgotten.

    It is counted forward from the last record that starts at or before the column.
    """
    record = next((record for record in reversed(state.past) if record.start <= column), None)
    if record is None:
        if column and state.forgot:
            return None
        record = CallRecord(0, 0, (None,), (Lane(),), ((0,),) * len(pools))
    # So many columns of the recorded call come before, and behind it so many in which every lane had a token.
    inside = min(column - record.start, record.columns)
    beyond = column - record.start - inside
    lanes, evicted = [], [[] for _ in pools]  # type: tuple[list[Lane], list[list[int]]]
    for r in range(len(state.lanes)):
        own = r if len(record.real) > 1 else 0
        lane, real = record.lanes[own], record.real[own]
        seen = lane.seen + beyond + (inside if real is None else sum(place < inside for place in real))
        for pool, gone, before in zip(pools, evicted, record.evicted, strict=True):
            gone.append(pool.retention.evicted_after(seen, before[own]))
        more = pools[0].retention.evictions(evicted[0][-1] - record.evicted[0][own])
        lanes.append(Lane(seen, evictions=lane.evictions + more))
    return CallRecord(column, 0, (None,) * len(lanes), tuple(lanes), tuple(map(tuple, evicted)))


def _reachable(pools: Sequence[Pool], state: State, counts: CallRecord) -> bool:
    """Return whether every row's tokens of that time are still in their slots."""
    return all(
        pool.reachable(row, lane.seen, gone)
        for pool, slots, evicted in zip(pools, state.pools, counts.evicted, strict=True)
        for row, lane, gone in zip(slots.lanes, counts.lanes, evicted, strict=True)
    )


def _cut(
    pool: Pool, slots: Slots, lanes: Sequence[Lane], evicted: Sequence[int], removed: Sequence[int], *, recording: bool
) -> tuple[Writes, Slots]:
    """Return what to write in a pool that loses its newest tokens, and what it holds then.

    Tokens fed from here on are in their slots. Sinks placed for the old count must be placed again even if the count is
    reached again.
    """
    rows = tuple(
        replace(row, evicted=gone, floor=min(row.floor, lane.seen), placed=row.placed if gone == row.evicted else -1)
        for row, lane, gone in zip(slots.lanes, lanes, evicted, strict=True)
    )
    after, end = replace(slots, lanes=rows), slots.end - removed[0]
    aligned = len(set(removed)) == 1 and end >= pool.held(after, lanes)
    if pool.static or aligned or not slots.banks:
        return Writes([]), replace(after, end=end)
    return pool.relocation(after, lanes, cut=removed, recording=recording)


def _shortened(past: tuple[CallRecord, ...], column: int) -> tuple[CallRecord, ...]:
    """Return the records of what is before a column."""
    kept = [record for record in past if record.start < column]
    if kept and kept[-1].start + kept[-1].columns > column:
        columns = column - kept[-1].start
        real = tuple(None if r is None else compact([place for place in r if place < columns]) for r in kept[-1].real)
        kept[-1] = replace(kept[-1], columns=columns, real=real)
    return tuple(kept)
