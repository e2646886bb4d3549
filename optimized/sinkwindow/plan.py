"""Planning a call: which positions, which path through each pool, which mask."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkwindow.call import PoolCall
from sinkwindow.lanes import Lane, LaneCall, segments_for
from sinkwindow.retention import Retention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinkwindow.attention import BandedLayer
    from sinkwindow.families import LayerKind, ModelFacts
    from sinkwindow.storage import SlotPool
    from sinkwindow.stream import Stream, StreamCall

__all__ = [
    "call_mask",
    "check_columns",
    "check_lengths",
    "check_original_positions",
    "first_cut",
    "lane_call",
    "needs_band",
    "pool_call",
    "position_bound",
    "rebased",
    "rows_agree",
    "rule_of",
]


def check_lengths(rule: Retention, facts: ModelFacts) -> None:
    """Compare the longest list with what the model can rotate and see.

    Raises:
        ValueError: The model's own sliding window would hide retained tokens, or its table of positions is too short.

    Warns:
        UserWarning: The list is longer than the model's trained length.
    """
    if facts.native_window is not None and rule.capacity > facts.native_window:
        msg = (
            f"num_sinks + window + buffer + 1 = {rule.capacity} exceeds the model's own sliding window of "
            f"{facts.native_window} tokens, which would hide the sinks; choose a smaller window or buffer."
        )
        raise ValueError(msg)
    if facts.trained_length is None or rule.capacity <= facts.trained_length:
        return
    if facts.has_table:
        msg = (
            f"num_sinks + window + buffer + 1 = {rule.capacity} exceeds the model's table of {facts.trained_length} "
            "positions; choose a smaller window or buffer."
        )
        raise ValueError(msg)
    warnings.warn(
        f"num_sinks + window + buffer + 1 = {rule.capacity} exceeds the {facts.trained_length} positions that the "
        "model was trained on; beyond them quality falls. Choose a smaller window or buffer.",
        UserWarning,
        stacklevel=4,
    )


def check_columns(held: int, columns: int, longest: int) -> None:
    """Compare a call with the columns that the model can attend to at once.

    Raises:
        ValueError: It brings more than fit beside the cached ones.
    """
    if held + columns > longest:
        msg = (
            f"The call brings {columns} columns beside {held} cached ones, and this model's ALiBi table ends at "
            f'{longest}; feed shorter calls, or use evict="token", which splits them.'
        )
        raise ValueError(msg)


def check_original_positions(facts: ModelFacts) -> None:
    """Warn of positions that do not move.

    Raises:
        ValueError: The model has no positions to keep: ALiBi follows the order of the keys.

    Warns:
        UserWarning: Otherwise.
    """
    if facts.trained_length is None or not any(kind.rotary.inv_freq.numel() for kind in facts.kinds):
        msg = 'positions="original" needs rotary positions, which this model has not; use positions="rank".'
        raise ValueError(msg)
    warnings.warn(
        f'positions="original" is right only below the {facts.trained_length} positions that the model was trained on; '
        "a call beyond them is refused.",
        UserWarning,
        stacklevel=4,
    )


def position_bound(rule: Retention, facts: ModelFacts) -> int:
    """Choose the position that rotations stay below.

    The trained length, if a list fits. Rotations see differences only, so where the list nearly fills the trained
    length, positions may exceed it by a window: otherwise every eviction would rotate (and round) every key again.
    Frequencies that depend on the largest position do not allow that.
    """
    roomy = rule.capacity if facts.length_dependent else rule.capacity + rule.window
    return max(facts.trained_length or roomy, roomy)


def rebased(lanes: Sequence[Lane], pool: SlotPool, fresh: Sequence[int], bound: int) -> tuple[Lane, ...]:
    """Give the lanes with their next token back at its rank, if the next positions would reach the bound."""
    reach = max(lane.seen - lane.offset + count for lane, count in zip(lanes, fresh, strict=True))
    if reach <= bound:
        return tuple(lanes)
    return tuple(Lane(lane.seen, row.evicted) for lane, row in zip(lanes, pool.rows, strict=True))


def lane_call(lane: Lane, columns: int, real: list[int] | None, bound: int, rule: Retention) -> LaneCall:
    """Plan a lane's part of a call."""
    fresh = columns if real is None else len(real)
    return LaneCall(lane.seen, columns, real, segments_for(lane, fresh, bound, rule.capacity - 1), lane.offset)


def needs_band(pool: SlotPool, lanes: Sequence[LaneCall]) -> bool:
    """Say whether a pool's queries see different lists in this call."""
    rule = pool.retention
    return any(len(lane.segments) > 1 for lane in lanes) or any(
        rule.evict == "token" and rule.evicted_before(lane.seen_after - 1) > row.evicted
        for lane, row in zip(lanes, pool.rows, strict=True)
    )


def pool_call(
    pool: SlotPool, before: Sequence[Lane], lanes: list[LaneCall], banded: dict[int, BandedLayer] | None
) -> PoolCall:
    """Bring a pool's slots in order and plan its part of a call."""
    columns = lanes[0].columns
    plain = not any(lane.padded or len(lane.segments) > 1 for lane in lanes)  # aligned, and rotated at one offset
    held = pool.held(before)
    in_slots = plain and bool(pool.banks) and held + columns <= pool.size  # after a move if need be
    pool.make_ready(before, columns if in_slots else 0)
    in_slots = in_slots and pool.end + columns <= pool.size
    if pool.banks:
        pool.place_sinks(before)
    evicted = [
        pool.retention.evicted_after(lane.seen_after, row.evicted) for lane, row in zip(lanes, pool.rows, strict=True)
    ]
    return PoolCall(pool, lanes, in_slots, held, evicted, banded)


def padding_mask(pool: SlotPool, before: Sequence[Lane], lanes: Sequence[LaneCall], device: torch.device) -> Tensor:
    """Show each row's retained and real columns, ``[lanes, held + columns]`` int64, 1 where there is a token."""
    lengths = [pool.length(lane, row) for lane, row in zip(before, pool.rows, strict=True)]
    held = torch.arange(max(lengths), device=device)
    start = max(lengths) - torch.tensor(lengths, device=device)
    real = torch.stack([lane.naturals(device) >= 0 for lane in lanes])
    return torch.cat((held >= start[:, None], real), dim=1).long()


def call_mask(stream: Stream, call: StreamCall, device: torch.device) -> Tensor | None:
    """Give the 2D mask that the model makes its own of; none where all columns are tokens, or a band knows better."""
    if not stream.splits and (call.banded is not None or rows_agree(stream.pools, call.before)):
        return None
    return padding_mask(stream.pools[0], call.before, call.lanes, device).expand(call.batch, -1)


def rows_agree(pools: Sequence[SlotPool], before: Sequence[Lane]) -> bool:
    """Say whether all rows hold equally many tokens, in every pool."""
    return len(before) == 1 or all(
        len({pool.length(lane, row) for lane, row in zip(before, pool.rows, strict=True)}) == 1 for pool in pools
    )


def first_cut(
    pool: SlotPool, before: Sequence[Lane], columns: int, real: Sequence[list[int] | None], longest: int | None
) -> int | None:
    """Give the column after which a call must be split so that none of its queries meets an eviction of the same call.

    Nor may a piece, padding included, be longer than the model can attend to.

    Returns:
        A column within the call, ``None`` when the call can run in one piece.
    """
    rule = pool.retention
    if rule.evict == "call":
        return None
    most = columns if longest is None else longest - pool.held(before)
    cuts = [most] if most < columns else []
    for lane, row, places in zip(before, pool.rows, real, strict=True):
        room = rule.capacity - pool.length(lane, row)
        if (columns if places is None else len(places)) > room:
            cuts.append(room if places is None else places[room - 1] + 1)
    return min(cuts, default=None)


def rule_of(kind: LayerKind, retention: Retention) -> Retention:
    """Give the rule of a kind of layers: the stream's, or a window of their own, the query's token included.

    Raises:
        ValueError: A window of one token, which leaves nothing to cache.
    """
    if kind.window is None:
        return retention
    if kind.window < 2:  # noqa: PLR2004
        msg = f"The model's own sliding window of {kind.window} tokens is too short to be cached."
        raise ValueError(msg)
    return Retention(0, kind.window - 1)
