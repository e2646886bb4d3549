"""Attention over retained tokens, with the rank in the query's retained list as each token's position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinkwindow_reference.rotation import cos_sin, rotate_by_angles

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
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    upcast: bool = True,
) -> torch.Tensor:
    """Compute attention query by query, over each query's retained tokens at their ranks.

    Args:
        query: Queries before RoPE `[batch, heads, tokens, head_dim]`.
        key: Keys before RoPE `[batch, kv_heads, tokens, head_dim]`, each used by heads / kv_heads consecutive heads.
        value: Values `[batch, kv_heads, tokens, value_dim]`.
        retained: For each query the natural indices that it attends to, its own last (see `retained_lists`).
        inv_freq: RoPE frequencies `[pairs]` [rad per position].
        scaling: Factor on the dot products, by default `head_dim ** -0.5`.
        interleaved: How channels form pairs, see `rotate`.
        softcap: Limit scores to `softcap * tanh(scores / softcap)` (Gemma 2).
        sink_logits: Learned scores `[heads]` that enter the softmax as one more key, without a value (GPT-OSS; not the
            sinks of the rule).
        upcast: Whether to compute in float64. False computes in the dtype of the inputs (softmax at least in float32),
            to measure the rounding error of that dtype.

    Returns:
        Outputs `[batch, heads, tokens, value_dim]` in the dtype of `query`.

    Raises:
        ValueError: If heads is not a multiple of kv_heads, there is no query, or there is not one list per query.
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
        k_kept = rotate_by_angles(k.index_select(2, index), cos[:length], sin[:length], interleaved=interleaved)
        q_last = rotate_by_angles(
            q[:, :, [token]], cos[length - 1 : length], sin[length - 1 : length], interleaved=interleaved
        )
        scores = _scores(q_last, k_kept, scaling, softcap)
        outputs.append(_weighted_sum(scores, sink_logits, v.index_select(2, index)))
    return torch.cat(outputs, dim=2).to(query.dtype)


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """Return the scores `[batch, kv_heads, heads / kv_heads, kept]` of one query."""
    batch, _, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scores = (grouped @ key.transpose(-1, -2)) * scaling
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def _weighted_sum(scores: torch.Tensor, sink_logits: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """Return the sum of values `[batch, heads, 1, value_dim]`, weighted by the softmax of one query's scores."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sink_logits is not None:
        extra = sink_logits.to(wide.dtype).view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
        wide = torch.cat([wide, extra], dim=-1)
    weights = wide.softmax(dim=-1)[..., : scores.shape[-1]]
    return (weights.to(value.dtype) @ value).flatten(1, 2)[:, :, None]
