"""Run a model on one token, with a stock cache."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


@torch.no_grad()
def feed(model: PreTrainedModel, token: torch.Tensor, rank: int, cache: DynamicCache) -> torch.Tensor:
    """Return the logits `[vocab]` of a token `[1, 1]` that follows the `rank` tokens in the cache, and cache it."""
    accepted = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in accepted else "past_key_values"  # before transformers 5.24
    arguments: dict[str, Any] = {name: cache, "attention_mask": token.new_ones(1, rank + 1)}
    if "position_ids" in accepted:  # ALiBi families compute distances from the order of the keys and the mask
        arguments["position_ids"] = torch.full_like(token, rank)
    logits: torch.Tensor = model(input_ids=token, use_cache=True, **arguments).logits
    return logits[0, -1]
