"""The reference under any Hugging Face model with rotary positions or ALiBi.

With all positions 0 a model's own RoPE is the identity (times its attention scaling, if it has one), so that the
attention function receives queries and keys before rotation and can rotate them to their ranks itself. Models that
call their own attention go token by token (`steps`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinkwindow_reference.angles import exact_angles
from sinkwindow_reference.attach import Plan, rank_attention_under
from sinkwindow_reference.checks import call_ranges, real_tokens
from sinkwindow_reference.layers import OWN_ATTENTION, own_windows
from sinkwindow_reference.retention import retained_lists
from sinkwindow_reference.rope import ropes_of
from sinkwindow_reference.steps import logits_by_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


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
) -> torch.Tensor:
    """Return the logits that a model must give under the rule, whatever cache or kernel computes them.

    Each row runs alone and without its padding; a dropout of a model in training mode stays on.

    Args:
        model: A causal language model with rotary positions or ALiBi.
        input_ids: Tokens `[batch, columns]`.
        attention_mask: 1 for real tokens, 0 for padding on either side `[batch, columns]`; all real by default.
        num_sinks: S, first tokens of each row, never evicted [tokens].
        window: W, most recent tokens that survive an eviction [tokens].
        buffer: B, overgrowth before one batched eviction [tokens].
        evict: "token" (the product) or "call" (one eviction after each call).
        chunks: Lengths of the calls, padding included [columns]; they matter to `evict="call"` alone.
        upcast: Attention in float64; False stays in the model's dtype (see `rank_attention`), and so do models that
            call their own attention.

    Returns:
        Logits `[batch, columns, vocab]`, NaN at padding so that nobody reads it by mistake.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is too small, a shape or the sum of `chunks` does not fit, a row has no token, or the
            model cannot run under the reference.
    """
    mask = real_tokens(input_ids, attention_mask)
    calls = call_ranges(input_ids.shape[1], evict, chunks)
    ropes = ropes_of(model)
    rows = []
    for ids, real in zip(input_ids, mask, strict=True):
        lengths = [int(real[call.start : call.stop].sum()) for call in calls]
        lists = retained_lists(
            int(real.sum()), num_sinks=num_sinks, window=window, buffer=buffer, evict=evict,
            chunks=[length for length in lengths if length],  # a call of padding alone feeds nothing
        )  # fmt: skip
        with exact_angles(model):
            if model.config.model_type in OWN_ATTENTION:
                logits = logits_by_steps(model, ids[real], lists, ropes)
            else:
                logits = _row_logits(model, ids[real], Plan(lists, ropes, own_windows(model.config), upcast))
        row = logits.new_full((len(ids), logits.shape[-1]), torch.nan)
        row[real] = logits
        rows.append(row)
    return torch.stack(rows)


def _row_logits(model: PreTrainedModel, ids: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return `[tokens, vocab]` for one row of real tokens `[tokens]`."""
    with rank_attention_under(model, plan):
        output = model(input_ids=ids[None], position_ids=torch.zeros_like(ids)[None], use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits
