"""The rule for models that do not use AttentionInterface (BLOOM, Falcon, MPT), token by token.

Each step passes a new stock `DynamicCache` with the keys and values of the retained list, in order. ALiBi then biases
by rank, because it computes distances from that order. Keys with RoPE are rotated from the rank at which the model
computed them to their current rank, always starting from the key that the model computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from sinkwindow_reference.models.feed import feed
from sinkwindow_reference.rotation import rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from sinkwindow_reference.models.rope import Rope


def logits_by_steps(
    model: PreTrainedModel, ids: torch.Tensor, retained: Sequence[Sequence[int]], ropes: Sequence[Rope]
) -> torch.Tensor:
    """Return `[tokens, vocab]` for the tokens `[tokens]` of one row, computed in the model's dtype."""
    history: list[list[torch.Tensor]] = [[] for _ in ropes]  # for each layer: keys and values of all tokens
    first_ranks: list[int] = []  # for each token: the rank at which the model computed its key
    logits = []
    for token, kept in enumerate(retained):
        cache = _cache_of(history, ropes, kept[:-1], first_ranks)
        logits.append(feed(model, ids[token].view(1, 1), len(kept) - 1, cache))
        first_ranks.append(len(kept) - 1)
        layers: list[Any] = list(cache.layers)
        for layer, both in zip(layers, history, strict=True):
            new = [layer.keys[..., -1:, :], layer.values[..., -1:, :]]
            both[:] = [torch.cat(pair, dim=-2) for pair in zip(both, new, strict=True)] if both else new
    return torch.stack(logits)


def _cache_of(
    history: Sequence[Sequence[torch.Tensor]], ropes: Sequence[Rope], past: Sequence[int], first_ranks: Sequence[int]
) -> DynamicCache:
    """Return a stock cache of the tokens `past`, each at its rank."""
    cache = DynamicCache()
    index = torch.tensor(list(past), dtype=torch.long)
    shift = torch.arange(len(past)) - torch.tensor([first_ranks[token] for token in past], dtype=torch.long)
    for layer, (both, rope) in enumerate(zip(history, ropes, strict=True)):
        if past:
            keys, values = (tensor.index_select(-2, index.to(tensor.device)) for tensor in both)
            inv_freq = rope.inv_freq.to(keys.device)
            cache.update(rotate(keys, shift.to(keys.device), inv_freq, interleaved=rope.interleaved), values, layer)
    return cache
