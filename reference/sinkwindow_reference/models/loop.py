"""A generation loop without a cache class: compress a stock `DynamicCache` with `index_select` between steps.

A stock cache stores rotated keys. When evictions lower the rank of a key, the loop rotates it back by the difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from sinkwindow_reference.models.feed import feed
from sinkwindow_reference.models.layers import own_windows
from sinkwindow_reference.models.rope import Rope, ropes_of
from sinkwindow_reference.retention import RetainedList, check_int
from sinkwindow_reference.rotation import rotate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def generate_by_index_select(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    num_sinks: int,
    window: int,
    buffer: int = 0,
) -> torch.Tensor:
    """Return the prompt followed by its greedy continuation `[1, prompt + max_new_tokens]`.

    Raises:
        TypeError, ValueError: See `stream_by_index_select`.
    """
    sizes = {"num_sinks": num_sinks, "window": window, "buffer": buffer}
    steps = list(stream_by_index_select(model, input_ids, max_new_tokens=max_new_tokens, **sizes))
    new = [logits.argmax().view(1, 1) for logits in steps[input_ids.shape[1] - 1 :]]
    return torch.cat([input_ids, *new[:max_new_tokens]], dim=1)


def stream_by_index_select(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    num_sinks: int,
    window: int,
    buffer: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield the logits `[vocab]` of each prompt token, then of each token of the greedy continuation except the last.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is too small, the batch is not 1, the prompt is empty, or the model is refused.
    """
    check_int("max_new_tokens", max_new_tokens, at_least=0)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.numel():  # noqa: PLR2004 - batch and tokens
        raise ValueError(
            f"input_ids must have the shape [1, tokens], got {tuple(input_ids.shape)}: pass one row at a time"
        )
    kept, cache, ropes = RetainedList(num_sinks, window, buffer), DynamicCache(), ropes_of(model)
    if any(own_windows(model.config)):
        raise ValueError(
            f"model of type {model.config.model_type!r} mixes sliding and full layers, but the loop has one list"
        )
    prompt = input_ids.shape[1]
    token = input_ids[:, :1]
    for step in range(prompt + max(max_new_tokens, 1) - 1):
        kept.append(step)
        logits = feed(model, token, len(kept.tokens) - 1, cache)
        evicted = kept.evict_if_full()
        if evicted:
            for layer, rope in zip(cache.layers, ropes, strict=True):
                _compress(layer, num_sinks, len(evicted), rope)
        yield logits
        token = input_ids[:, step + 1 : step + 2] if step + 1 < prompt else logits.argmax().view(1, 1)


def _compress(layer: Any, num_sinks: int, num_evicted: int, rope: Rope) -> None:
    """Remove the evicted tokens from a layer of the cache and rotate the keys after them to their new ranks."""
    device, length = layer.keys.device, layer.keys.shape[-2]
    sinks = torch.arange(num_sinks, device=device)
    window = torch.arange(num_sinks + num_evicted, length, device=device)
    # At least float32, because a key in the window is rounded again at every eviction.
    keys = layer.keys.index_select(-2, window).to(torch.promote_types(layer.keys.dtype, torch.float32))
    shift = torch.full_like(window, -num_evicted)
    keys = rotate(keys, shift, rope.inv_freq.to(device), interleaved=rope.interleaved)
    layer.keys = torch.cat([layer.keys.index_select(-2, sinks), keys.to(layer.keys.dtype)], dim=-2)
    layer.values = layer.values.index_select(-2, torch.cat([sinks, window]))
