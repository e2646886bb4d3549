"""Logits of any Hugging Face model with RoPE or ALiBi under the rule.

With all positions 0, the RoPE of a model is the identity (times its attention scaling, if any). The attention function
then receives unrotated queries and keys and can rotate them to their ranks. Models that do not use transformers'
AttentionInterface run token by token instead (`steps`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinkwindow_reference.models.attach import Plan, use_rank_attention
from sinkwindow_reference.models.checks import real_tokens
from sinkwindow_reference.models.exact_rope import exact_rope
from sinkwindow_reference.models.layers import OWN_ATTENTION, check_lengths, own_windows
from sinkwindow_reference.models.rope import ropes_of
from sinkwindow_reference.models.steps import logits_by_steps
from sinkwindow_reference.retention import call_lengths, retained_lists

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from sinkwindow_reference.models.rope import Rope


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    num_sinks: int,
    window: int,
    buffer: int = 0,
    evict: str = "token",
    chunks: Sequence[int] | None = None,
    upcast: bool = True,
    ropes: Sequence[Rope] | None = None,
) -> torch.Tensor:
    """Return the logits of a model under the rule, the correct result for any cache or kernel.

    Each row runs alone and without its padding. Dropout stays on if the model is in training mode.

    Args:
        model: Causal language model with RoPE or ALiBi.
        input_ids: Tokens `[batch, columns]`.
        attention_mask: 1 for real tokens, 0 for padding on either side `[batch, columns]`; by default all 1.
        num_sinks: First tokens of each row, never evicted [tokens].
        window: Most recent tokens that survive an eviction [tokens].
        buffer: Extra tokens allowed before one batched eviction [tokens].
        evict: "token" evicts after every token; "call", as in the original reproduction, once after every call.
        chunks: Lengths of the calls, padding included [columns]; they matter only to "call".
        upcast: Whether to compute attention in float64, see `rank_attention`. Models that do not use
            AttentionInterface always compute in their own dtype.
        ropes: How each layer rotates; by default read off the model, whose family must be known.

    Returns:
        Logits `[batch, columns, vocab]`, NaN at padding.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is too small, a shape or the sum of `chunks` is wrong, a row has no token, or the model
            is not supported.
    """
    mask, text_config = real_tokens(input_ids, attention_mask), model.config.get_text_config()
    calls = call_lengths(input_ids.shape[1], evict, chunks)
    ropes = ropes_of(model) if ropes is None else list(ropes)
    rows = []
    for ids, real in zip(input_ids, mask, strict=True):
        lengths = [int(call.sum()) for call in real.split(calls)]
        lists = retained_lists(
            int(real.sum()), num_sinks=num_sinks, window=window, buffer=buffer, evict=evict,
            chunks=[length for length in lengths if length],  # skip calls of padding only
        )  # fmt: skip
        check_lengths(text_config, max(map(len, lists)))
        with exact_rope(model):
            if model.config.model_type in OWN_ATTENTION:
                logits = logits_by_steps(model, ids[real], lists, ropes)
            else:
                logits = _row_logits(model, ids[real], Plan(lists, ropes, own_windows(text_config), upcast))
        row = logits.new_full((len(ids), logits.shape[-1]), torch.nan)
        row[real] = logits
        rows.append(row)
    return torch.stack(rows)


def _row_logits(model: PreTrainedModel, ids: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return `[tokens, vocab]` for one row without padding `[tokens]`."""
    with use_rank_attention(model, plan):
        output = model(input_ids=ids[None], position_ids=torch.zeros_like(ids)[None], use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits
