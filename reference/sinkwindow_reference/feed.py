"""Feed one token to a model that has a stock cache."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


@torch.no_grad()
def feed(model: PreTrainedModel, token: torch.Tensor, rank: int, cache: DynamicCache) -> torch.Tensor:
    """Feed a token `[1, 1]` at its rank, behind the `rank` tokens in the cache; returns its logits `[vocab]`."""
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # before transformers 5.24
    arguments: dict[str, Any] = {name: cache, "attention_mask": token.new_ones(1, rank + 1)}
    if "position_ids" in known:  # ALiBi families read distances off the order of the keys and the mask
        arguments["position_ids"] = torch.full_like(token, rank)
    logits: torch.Tensor = model(input_ids=token, use_cache=True, **arguments).logits
    return logits[0, -1]
