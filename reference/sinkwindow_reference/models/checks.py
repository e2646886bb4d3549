"""Checks of inputs and layers: each error names the argument, its value and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

# Keyword arguments with which a layer requests what `rank_attention` does not support.
UNSUPPORTED = ("sinks", "position_bias")


def check_layer(kwargs: Mapping[str, Any], longest: int) -> None:
    """Refuse a layer whose attention `rank_attention` cannot compute.

    Args:
        kwargs: What the layer passed to the attention function.
        longest: Length of the longest retained list [tokens].

    Raises:
        ValueError: If the layer needs an unsupported argument, or its sliding window is shorter than `longest`.
    """
    found = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if found:
        raise ValueError(f"the model's attention uses {found}, which the reference does not support: use another model")
    window = kwargs.get("sliding_window")
    if window is not None and window < longest:
        raise ValueError(
            f"the model's own sliding_window is {window} tokens, the rule attends to {longest}: lower window or buffer"
        )


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which tokens are not padding, as a bool mask `[batch, columns]`.

    Raises:
        ValueError: If a shape is wrong or a row has no token.
    """
    if input_ids.ndim != 2 or not input_ids.numel():  # noqa: PLR2004 - batch and columns
        raise ValueError(
            f"input_ids must have the shape [batch, columns] and hold a token, got {tuple(input_ids.shape)}"
        )
    mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape {tuple(input_ids.shape)} of input_ids, got {tuple(mask.shape)}"
        )
    real = mask.to(input_ids.device).bool()
    if not bool(real.any(dim=1).all()):
        raise ValueError(f"attention_mask leaves no token in row {int((~real.any(dim=1)).nonzero()[0])}: drop the row")
    return real
