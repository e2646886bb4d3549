"""Attention in which every token sits at its rank in the retained list of the query that looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinkwindow_reference.rotation import cos_sin, turn

if TYPE_CHECKING:
    from collections.abc import Sequence


def rank_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    retained: Sequence[Sequence[int]],
    inv_freq: torch.Tensor,
    *,
    scaling: float | None = None,
    interleaved: bool = False,
    upcast: bool = True,
) -> torch.Tensor:
    """Attend, query by query, to the retained tokens at their ranks.

    Args:
        query: Queries before RoPE `[batch, heads, tokens, head_dim]`.
        key: Keys before RoPE `[batch, kv_heads, tokens, head_dim]`, each read by heads / kv_heads heads in a row.
        value: Values `[batch, kv_heads, tokens, value_dim]`.
        retained: For each query the natural indices that it attends to, its own last (`retained_lists`).
        inv_freq: RoPE frequencies `[pairs]` [rad per position].
        scaling: Factor on the dot products, `head_dim ** -0.5` by default.
        interleaved: The pairing of channels, see `rotate`.
        upcast: Compute in float64. False is the same mathematics in the inputs' own dtype (softmax at least in
            float32): the yardstick for the error that this dtype cannot avoid.

    Returns:
        Outputs `[batch, heads, tokens, value_dim]` in the dtype of `query`.

    Raises:
        ValueError: If the heads are no multiple of the KV heads, or there is no query, or not one list per query.
    """
    if query.shape[1] % key.shape[1] or not retained or len(retained) != query.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)} needs a multiple of the {key.shape[1]} KV heads and one retained list per "
            f"token, got {len(retained)} lists"
        )
    dtype = torch.float64 if upcast else query.dtype
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    ranks = torch.arange(max(map(len, retained)), device=q.device)
    cos, sin = cos_sin(ranks, inv_freq, dtype)  # [ranks, pairs], the same for every query
    outputs = []
    for token, kept in enumerate(retained):
        index, length = torch.tensor(kept, device=k.device), len(kept)
        k_kept = turn(k.index_select(2, index), cos[:length], sin[:length], interleaved=interleaved)
        q_last = turn(q[:, :, [token]], cos[length - 1 : length], sin[length - 1 : length], interleaved=interleaved)
        outputs.append(_attend(q_last, k_kept, v.index_select(2, index), scaling))
    return torch.cat(outputs, dim=2).to(query.dtype)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention of one query `[batch, heads, 1, head_dim]` to every key `[batch, kv_heads, kept, head_dim]`."""
    batch, heads, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)  # [batch, kv_heads, heads / kv_heads, head_dim]
    scores = (grouped @ key.transpose(-1, -2)) * scaling
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
    return (weights.to(value.dtype) @ value).reshape(batch, heads, 1, -1)
