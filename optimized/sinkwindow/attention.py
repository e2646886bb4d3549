"""Exact attention for calls that cross evictions: every query sees the list of its own time.

For the window part, queries and keys stay at the positions the model gave them and a band hides what is evicted.
For the sink columns the query is moved back to its rank and meets the sinks where they were born. One softmax covers
both parts, block by block, so that memory stays bounded by a block of queries. The same function serves calls with
padding, whose rows each have their own band.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sinkwindow.lanes import LaneCall
    from sinkwindow.retention import Retention
    from sinkwindow.rotation import Rotary

__all__ = [
    "ATTENTION_NAME",
    "Band",
    "BandedLayer",
    "band_of",
    "banded_attention",
    "call_under_way",
    "enter_call",
    "leave_call",
]

ATTENTION_NAME = "sinkwindow"
BLOCK = 128  # queries per block: a band of W keys is read as W + BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A run of queries, the columns that any of them can see, and who sees whom among them.

    Attributes:
        queries: Of the call's columns.
        columns: Of the cached columns followed by the call's.
        hidden: ``[lanes, 1, 1, queries, sinks + columns]`` bool, True where a query must not look.
        key_shift: Positions to move the keys by, ``[lanes, 1, columns]``; ``None`` where they stand right already.
    """

    queries: slice
    columns: slice
    hidden: Tensor
    key_shift: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Who sees whom in one call, for the layers of one pool on one device.

    Attributes:
        rank_shift: Positions from where the model rotated each query to its rank, ``[lanes, 1, queries]``.
        num_sinks: Sinks present, those of the call included.
        blocks: The blocks, covering all queries.
    """

    rank_shift: Tensor
    num_sinks: int
    blocks: list[Block]


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """The index arithmetic behind a ``Band``, one lane a row; natural indices are -1 where there is none."""

    naturals: Tensor  # [lanes, queries]
    first: Tensor  # [lanes, queries]: oldest window token that a query sees
    offsets: Tensor  # [lanes, queries]
    key_naturals: Tensor  # [lanes, columns]: window keys only
    key_offsets: Tensor  # [lanes, columns]
    held: int
    padded: bool

    def hidden(self, queries: slice, columns: slice, num_sinks: int) -> Tensor:
        """Say which of the sinks and columns each query must not see, ``[lanes, 1, 1, queries, sinks + columns]``."""
        naturals = self.naturals[:, queries, None]
        keys = self.key_naturals[:, None, columns]
        window = (keys >= self.first[:, queries, None]) & (keys <= naturals) & (keys >= 0)
        if self.padded:  # a padding query looks at itself: a softmax needs somebody to look at
            column = torch.arange(columns.start, columns.stop, device=keys.device)
            itself = torch.arange(queries.start, queries.stop, device=keys.device)[:, None] + self.held
            window |= (naturals < 0) & (column == itself)
        sinks = torch.arange(num_sinks, device=keys.device) <= naturals
        return ~torch.cat((sinks, window), dim=-1)[:, None, None]

    def key_shift(self, queries: slice, columns: slice) -> Tensor | None:
        """Give the distance of each key from where the block's queries' segment would have rotated it."""
        naturals, offsets = self.naturals[:, queries], self.offsets[:, queries]
        segment = torch.where(naturals >= 0, offsets, 0).amax(dim=1, keepdim=True)
        keys = self.key_naturals[:, columns]
        shift = torch.where(keys >= 0, self.key_offsets[:, columns] - segment, 0)
        return shift[:, None] if bool(shift.any()) else None


def band_of(lanes: list[LaneCall], evicted: list[int], retention: Retention, held: int, device: torch.device) -> Band:
    """Lay out a call.

    Args:
        lanes: The call, lane by lane.
        evicted: Tokens that each lane had evicted before the call.
        retention: The pool's rule.
        held: Cached columns in front of the call's columns.
        device: Where the layers' queries are.
    """
    naturals = torch.stack([lane.naturals(device) for lane in lanes])
    gone = torch.stack([_evicted_before(naturals[r], evicted[r], retention) for r in range(len(lanes))])
    past = torch.stack([torch.arange(lane.seen - held, lane.seen, device=device) for lane in lanes])
    oldest = torch.tensor([retention.first(count) for count in evicted], device=device)[:, None]
    keys = torch.cat((torch.where(past >= oldest, past, -1), naturals), dim=1)
    layout = _Layout(
        naturals=naturals,
        first=retention.num_sinks + gone,
        offsets=torch.stack([lane.offsets(row) for lane, row in zip(lanes, naturals, strict=True)]),
        key_naturals=torch.where(keys >= retention.num_sinks, keys, -1),
        key_offsets=torch.stack([lane.offsets(row) for lane, row in zip(lanes, keys, strict=True)]),
        held=held,
        padded=any(lane.padded for lane in lanes),
    )
    num_sinks = max(retention.sinks(lane.seen_after) for lane in lanes)
    segmented = any(len(lane.segments) > 1 for lane in lanes)
    return Band(
        rank_shift=torch.where(naturals >= 0, layout.offsets - gone, 0)[:, None],
        num_sinks=num_sinks,
        blocks=[
            Block(
                queries,
                columns,
                layout.hidden(queries, columns, num_sinks),
                layout.key_shift(queries, columns) if segmented else None,
            )
            for queries, columns in _blocks(lanes, evicted, retention, held)
        ],
    )


def _evicted_before(naturals: Tensor, evicted: int, retention: Retention) -> Tensor:
    """Count the tokens evicted before each query attends: ``Retention.evicted_before``, elementwise."""
    if retention.evict == "call":
        return torch.full_like(naturals, evicted)
    step = retention.buffer + 1
    overflow = (naturals - retention.limit - retention.buffer).clamp(min=0)
    return (overflow + step - 1) // step * step


def _blocks(
    lanes: list[LaneCall], evicted: list[int], retention: Retention, held: int
) -> Iterator[tuple[slice, slice]]:
    """Cut the call into runs of queries within which every lane stays in one segment, with the columns they see."""
    cuts = {*range(0, lanes[0].columns, BLOCK), lanes[0].columns}
    for lane in lanes:
        cuts.update(lane.column(segment.first, 0) for segment in lane.segments[1:])
    for start, stop in pairwise(sorted(cuts)):
        low = min(_oldest_column(lane, gone, retention, held, start) for lane, gone in zip(lanes, evicted, strict=True))
        yield slice(start, stop), slice(low, held + stop)


def _oldest_column(lane: LaneCall, evicted: int, retention: Retention, held: int, start: int) -> int:
    """Give the oldest column that a lane's queries from column ``start`` on can see (padding sees itself)."""
    natural = lane.natural_at(start)
    if natural >= lane.seen_after:
        return held + start
    gone = evicted if retention.evict == "call" else retention.evicted_before(natural)
    oldest = min(max(retention.first(gone), lane.seen - held), natural)
    return max(0, min(lane.column(oldest, held), held + start))


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


_layers: ContextVar[dict[int, BandedLayer] | None] = ContextVar("sinkwindow_layers", default=None)
_NO_BAND: dict[int, BandedLayer] = {}


def enter_call(layers: dict[int, BandedLayer] | None) -> None:
    """Open a streaming call in this thread; ``layers`` fills up as the cache is updated, ``None`` without bands."""
    _layers.set(_NO_BAND if layers is None else layers)


def leave_call() -> None:
    """Close a streaming call."""
    _layers.set(None)


def call_under_way() -> bool:
    """Say whether a streaming call is open in this thread."""
    return _layers.get() is not None


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
) -> tuple[Tensor, None]:
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
        Attention output ``[batch, queries, heads, head_dim]``, and ``None`` for the weights.

    Raises:
        RuntimeError: No streaming call is under way in this thread.
    """
    layers = _layers.get()
    if layers is None:
        msg = f"The {ATTENTION_NAME!r} attention serves StreamingCache calls only; choose another attn_implementation."
        raise RuntimeError(msg)
    layer = layers[module.layer_idx]  # type: ignore[index]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    ranked = layer.rotary.move(query, layer.band.rank_shift)
    soft = _Softmax(scale, softcap, s_aux)
    blocks = [_attend(query, ranked, key, value, layer, block, soft) for block in layer.band.blocks]
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


@dataclass(frozen=True, slots=True, eq=False)
class _Softmax:
    """How scores become weights."""

    scale: float
    cap: float | None
    share: Tensor | None  # [heads]

    def __call__(self, products: Tensor, hidden: Tensor) -> Tensor:
        """Turn dot products ``[batch, kv_heads, group, queries, keys]`` into weights of the same shape and dtype."""
        scores = products.mul_(self.scale)
        if self.cap is not None:
            scores = (scores / self.cap).tanh_().mul_(self.cap)
        scores.masked_fill_(hidden, float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        if self.share is None:
            return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)
        share = self.share.view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
        return torch.softmax(torch.cat((scores, share), dim=-1), dim=-1, dtype=wide)[..., :-1].to(scores.dtype)


def _attend(
    query: Tensor, ranked: Tensor, key: Tensor, value: Tensor, layer: BandedLayer, block: Block, soft: _Softmax
) -> Tensor:
    """Attend for one block of queries, ``[batch, heads, block, head_dim]``."""
    keys, values = key[:, :, block.columns], value[:, :, block.columns]
    if block.key_shift is not None:
        keys = layer.rotary.move(keys, block.key_shift)
    pinned = _scores(ranked[:, :, block.queries], layer.sink_keys)
    weights = soft(torch.cat((pinned, _scores(query[:, :, block.queries], keys)), dim=-1), block.hidden)
    sinks = layer.sink_keys.shape[2]
    output = _weigh(weights[..., :sinks], layer.sink_values) + _weigh(weights[..., sinks:], values)
    return output.flatten(1, 2)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Multiply queries by keys, ``[batch, kv_heads, heads per kv_head, queries, keys]``."""
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    products = query.reshape(batch, kv_heads, group * queries, width) @ key.transpose(-1, -2)
    return products.view(batch, kv_heads, group, queries, keys)


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    """Sum values by weight, ``[batch, kv_heads, heads per kv_head, queries, head_dim]``."""
    return (weights.flatten(2, 3) @ value).view(*weights.shape[:4], value.shape[3])
