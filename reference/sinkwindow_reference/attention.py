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
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
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
        softcap: Squash scores to `softcap * tanh(scores / softcap)` (Gemma 2).
        sink_logits: Learned scores `[heads]` of a key that is not there and takes its share all the same (GPT-OSS; not
            the sinks of the rule).
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
        scores = _scores(q_last, k_kept, scaling, softcap)
        outputs.append(_weigh(scores, sink_logits, v.index_select(2, index)))
    return torch.cat(outputs, dim=2).to(query.dtype)


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """Return one query's scores `[batch, kv_heads, heads / kv_heads, kept]` for every key it keeps."""
    batch, _, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scores = (grouped @ key.transpose(-1, -2)) * scaling
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def _weigh(scores: torch.Tensor, sink_logits: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """Softmax the scores and sum the values `[batch, kv_heads, kept, value_dim]`: `[batch, heads, 1, value_dim]`."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sink_logits is not None:
        absent = sink_logits.to(wide.dtype).view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
        wide = torch.cat([wide, absent], dim=-1)
    weights = wide.softmax(dim=-1)[..., : scores.shape[-1]]
    return (weights.to(value.dtype) @ value).flatten(1, 2)[:, :, None]
