"""Exact attention for calls that cross evictions: every query sees the list of its own time.

For the window part, queries and keys stay at the positions the model gave them and a band hides what is evicted.
For the sink columns the query is moved back to its rank and meets the sinks where they were born. One softmax covers
both parts, block by block, so that memory stays bounded by a block of queries. The same function serves calls with
padding, whose rows each have their own band.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sinkwindow.band import Band, Block
    from sinkwindow.rotation import Rotary

__all__ = [
    "ATTENTION_NAME",
    "STEP_NAME",
    "BandedLayer",
    "banded_attention",
    "enter_call",
    "exact_from",
    "leave_call",
    "step_attention",
]

ATTENTION_NAME = "sinkwindow"
STEP_NAME = "sinkwindow_step"


@dataclass(frozen=True, slots=True, eq=False)
class BandedLayer:
    """What the attention function needs beside the model's own arguments, for one layer.

    Attributes:
        band: Who sees whom.
        rotary: The layer's rotation.
        sink_keys: Keys of the sinks as first rotated, ``[batch, kv_heads, sinks, head_dim]``.
        sink_values: Their values, ``[batch, kv_heads, sinks, head_dim]``.
    """

    band: Band
    rotary: Rotary
    sink_keys: Tensor
    sink_values: Tensor


@dataclass(frozen=True, slots=True)
class _OpenCall:
    """A streaming call in this thread.

    Attributes:
        layers: Filled as the cache meets them.
        weights: Whether attention weights are asked for.
        exact_from: Position from which angles are made in float64.
    """

    layers: dict[int, BandedLayer]
    weights: bool
    exact_from: int


_open_call: ContextVar[_OpenCall | None] = ContextVar("sinkwindow_call", default=None)


def enter_call(layers: dict[int, BandedLayer] | None, *, weights: bool, exact_from: int) -> None:
    """Open a streaming call in this thread.

    Args:
        layers: Fills up as the cache is updated; ``None`` for a call without a band.
        weights: Whether attention weights are returned, as the eager attention does.
        exact_from: Positions from which the model's float32 angles are not good enough.
    """
    _open_call.set(_OpenCall({} if layers is None else layers, weights, exact_from))


def leave_call() -> None:
    """Close a streaming call."""
    _open_call.set(None)


def exact_from() -> int | None:
    """Give the position from which the open call's angles are made in float64, ``None`` if no call is open."""
    call = _open_call.get()
    return None if call is None else call.exact_from


def banded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the band knows better
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - a cache is for inference
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor | None]:
    """Attend across evictions; registered with ``transformers.AttentionInterface``.

    Args:
        module: The model's attention module; its ``layer_idx`` names the layer.
        query: ``[batch, heads, queries, head_dim]``, rotated by the model.
        key: ``[batch, kv_heads, held + queries, head_dim]``, as returned by the cache.
        value: ``[batch, kv_heads, held + queries, head_dim]``.
        attention_mask: Ignored.
        scaling: Factor of the scores; ``head_dim ** -0.5`` when ``None``.
        dropout: Ignored.
        softcap: Scores are squashed to ``softcap * tanh(scores / softcap)`` (Gemma 2).
        s_aux: Learned logits ``[heads]`` that take their share of each softmax (GPT-OSS).
        **kwargs: Ignored.

    Returns:
        Attention output ``[batch, queries, heads, head_dim]``, and if the model's own attention is the eager one the
        weights ``[batch, heads, queries, held + queries]``, else ``None``.

    Raises:
        RuntimeError: No streaming call is under way in this thread.
    """
    call = _open_call.get()
    if call is None:
        msg = f"The {ATTENTION_NAME!r} attention serves StreamingCache calls only; choose another attn_implementation."
        raise RuntimeError(msg)
    layer = call.layers[module.layer_idx]  # type: ignore[index]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    ranked = layer.rotary.move(query, layer.band.rank_shift)
    soft = _Softmax(scale, softcap, s_aux)
    outputs, weights = [], []
    for block in layer.band.blocks:
        attended, shares = _attend(query, ranked, key, value, layer, block, soft)
        outputs.append(attended)
        if call.weights:
            weights.append(_by_column(shares, layer.band, block, key.shape[2]))
    output = torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
    return output, torch.cat(weights, dim=2) if weights else None


def step_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Attend with one query per row, as the ``sdpa`` of transformers would; registered like ``banded_attention``.

    With a mask, that one copies keys and values for every head of a group. Here the heads of a group are queries of
    their common head.

    Args:
        module: Ignored.
        query: ``[batch, heads, 1, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``.
        value: ``[batch, kv_heads, slots, value_dim]``.
        attention_mask: ``[batch, 1, 1, slots]`` bool, True where a slot is seen.
        scaling: Factor of the scores; ``head_dim ** -0.5`` when ``None``.
        **kwargs: Ignored.

    Returns:
        Attention output ``[batch, 1, heads, value_dim]``, and no weights.
    """
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    output = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, -1), None


@dataclass(frozen=True, slots=True, eq=False)
class _Softmax:
    """How scores become weights."""

    scale: float
    cap: float | None
    share: Tensor | None  # [heads]

    def __call__(self, products: Tensor, hidden: Tensor) -> Tensor:
        """Turn dot products ``[batch, kv_heads, group, queries, keys]`` into weights of the same shape."""
        scores = products.mul_(self.scale)
        if self.cap is not None:
            scores = (scores / self.cap).tanh_().mul_(self.cap)
        scores.masked_fill_(hidden, float("-inf"))
        if self.share is None:
            return torch.softmax(scores, dim=-1)
        share = self.share.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
        return torch.softmax(torch.cat((scores, share), dim=-1), dim=-1)[..., :-1]


def _attend(
    query: Tensor, ranked: Tensor, key: Tensor, value: Tensor, layer: BandedLayer, block: Block, soft: _Softmax
) -> tuple[Tensor, Tensor]:
    """Attend for one block of queries: output ``[batch, heads, block, head_dim]``, weights of sinks, then columns."""
    keys, values = key[:, :, block.columns], value[:, :, block.columns]
    if block.key_shift is not None:
        keys = layer.rotary.move(keys, block.key_shift)
    pinned = _scores(ranked[:, :, block.queries], layer.sink_keys)
    window = _scores(query[:, :, block.queries], keys)
    weights = soft(torch.cat((pinned, window), dim=-1), block.hidden).to(values.dtype)
    sinks = layer.sink_keys.shape[2]
    output = _weigh(weights[..., :sinks], layer.sink_values) + _weigh(weights[..., sinks:], values)
    return output.flatten(1, 2), weights.flatten(1, 2)


def _by_column(weights: Tensor, band: Band, block: Block, columns: int) -> Tensor:
    """Lay a block's weights out by the columns that the cache returned, ``[batch, heads, block, columns]``."""
    laid = weights.new_zeros((*weights.shape[:3], columns))
    laid[..., block.columns] = weights[..., band.num_sinks :]
    index = band.sink_columns[:, None, None].expand(*weights.shape[:3], -1)
    return laid.scatter_add_(-1, index, weights[..., : band.num_sinks])


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Multiply queries by keys, ``[batch, kv_heads, heads per kv_head, queries, keys]``, in at least float32.

    As the fused kernels do: a score of 20 kept in bfloat16 would be off by 0.06, and float16 could overflow.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    products = query.reshape(batch, kv_heads, group * queries, width) @ key.transpose(-1, -2)
    return products.view(batch, kv_heads, group, queries, keys)


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    """Sum values by weight, ``[batch, kv_heads, heads per kv_head, queries, head_dim]``."""
    return (weights.flatten(2, 3) @ value).view(*weights.shape[:4], value.shape[3])
