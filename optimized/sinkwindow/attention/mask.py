"""Which keys each query may attend to, as a 4D mask for the model's own attention.

A call that crosses evictions has queries whose lists differ. RoPE sees differences of positions only, so window keys
can stay at their natural positions; what differs is how far the sinks have been rotated. So every layer is given the
sinks once for each *epoch* (a run of tokens between two evictions) that begins in the call, and the mask shows each
query the copy of its own epoch::

    columns   epoch 1 | epoch 2 | ... | sinks, window | call
              (S copies each)         | (cached list) | (new tokens)

Cached lists are right-aligned; a shorter row has unused columns in front, which the mask hides, as it hides padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinkwindow.lanes import LaneCall
    from sinkwindow.retention import Retention


def epochs_begun(lane: LaneCall, evicted: int, rule: Retention) -> int:
    """Return how many evictions happen before the last token of a call attends.

    Args:
        lane: The lane's part in the call.
        evicted: Tokens that it had evicted before.
        rule: The pool's rule.
    """
    if rule.evict == "call" or lane.after.seen == lane.before.seen:
        return 0
    return (rule.evicted_before(lane.after.seen - 1) - evicted) // (rule.buffer + 1)


def visible(
    lanes: Sequence[LaneCall],
    evicted: Sequence[int],
    rule: Retention,
    held: int,
    epochs: int,
    device: torch.device,
    *,
    ranked: bool,
) -> Tensor:
    """Return which columns each query attends to.

    Args:
        lanes: The call, lane by lane.
        evicted: Tokens that each lane had evicted before the call.
        rule: The pool's rule.
        held: Cached columns.
        epochs: Copies of the sinks in front of them.
        device: Where the mask is wanted.
        ranked: Whether positions are ranks; otherwise sinks never move, and are visible where they are.

    Returns:
        ``[lanes, 1, columns, epochs * num_sinks + held + columns]`` bool.
    """
    sinks = rule.num_sinks
    keys = _naturals(lanes, evicted, rule, held, device)
    queries = keys[:, held:]  # [lanes, columns]
    now = torch.tensor(evicted, device=device)[:, None]
    gone = rule.evicted_before(queries) if rule.evict == "token" else now.expand_as(queries)
    query, key, first = queries[:, :, None], keys[:, None, :], (sinks + gone)[:, :, None]
    in_place = ((gone == now) | (not ranked))[:, :, None]  # the query's sinks are those of the cached list
    seen = (key >= 0) & (key <= query) & ((key >= first) | ((key < sinks) & in_place))
    # A query of padding attends to itself: a row that is masked throughout would become NaN in a softmax.
    columns = torch.arange(keys.shape[1], device=device)
    seen |= (query < 0) & (columns == columns[held:, None])
    if epochs:
        begun = now + (rule.buffer + 1) * torch.arange(1, epochs + 1, device=device)  # [lanes, epochs]
        copies = (gone[:, :, None] == begun[:, None, :]).repeat_interleave(sinks, dim=2)
        seen = torch.cat((copies, seen), dim=2)
    return seen[:, None]


def columns_with_tokens(
    lanes: Sequence[LaneCall], evicted: Sequence[int], rule: Retention, held: int, device: torch.device
) -> Tensor:
    """Return the 2D mask for a model that makes its own 4D mask of it, ``[lanes, held + columns]`` int64."""
    return (_naturals(lanes, evicted, rule, held, device) >= 0).long()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as what is added to scores: 0 where a query attends, the dtype's minimum elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _naturals(
    lanes: Sequence[LaneCall], evicted: Sequence[int], rule: Retention, held: int, device: torch.device
) -> Tensor:
    """Return the natural index in each column, ``[lanes, held + columns]``, negative where a row has none."""
    seen = torch.tensor([lane.before.seen for lane in lanes], device=device)[:, None]
    gone = torch.tensor(evicted, device=device)[:, None]
    cached = seen - held + torch.arange(held, device=device)
    cached = torch.where(cached >= rule.num_sinks + gone, cached, cached - gone)  # sinks are in front of the window
    return torch.cat((cached, torch.stack([lane.naturals(device) for lane in lanes])), dim=1)
