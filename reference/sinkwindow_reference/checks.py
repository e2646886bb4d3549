"""Argument checks of the reference: each error names the argument, its value and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

# Keyword arguments by which a layer asks for what `rank_attention` does not know.
MORE_THAN_SOFTMAX = ("sinks", "position_bias")
EVICTION_RULES = ("token", "call")


def check_int(name: str, value: int, *, at_least: int) -> int:
    """Return `value`.

    Raises:
        TypeError: If it is not an int; a bool is refused, it is nearly always a misplaced argument.
        ValueError: If it is below `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return value


def call_ranges(num_tokens: int, evict: str, chunks: Sequence[int] | None) -> list[range]:
    """Return the tokens of each call.

    Raises:
        TypeError: If a length is not an int.
        ValueError: If `evict` is unknown, a length not positive, or the sum of `chunks` not `num_tokens`.
    """
    if evict not in EVICTION_RULES:
        raise ValueError(f"evict must be one of {EVICTION_RULES}, got {evict!r}")
    check_int("num_tokens", num_tokens, at_least=0)
    lengths = [num_tokens] if chunks is None and num_tokens else list(chunks or [])
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    for i, length in enumerate(lengths):
        check_int(f"chunks[{i}]", length, at_least=1)
    if sum(lengths) != num_tokens:
        raise ValueError(
            f"chunks must add up to the {num_tokens} tokens given, got {lengths} with the sum {sum(lengths)}"
        )
    return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def check_layer(kwargs: Mapping[str, Any], longest: int) -> None:
    """Refuse what a layer asks for and the rule does not know; better no reference than a wrong one.

    Args:
        kwargs: What the layer passed to the attention function.
        longest: Length of the longest retained list [tokens].

    Raises:
        ValueError: If the layer's mathematics or its own sliding window is not that of the rule.
    """
    asked = [name for name in MORE_THAN_SOFTMAX if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"the model's attention uses {asked}, which the reference does not know: take another model")
    own = kwargs.get("sliding_window")
    if own is not None and own < longest:
        raise ValueError(
            f"the model's own sliding_window is {own} tokens, the rule attends to {longest}: lower window or buffer"
        )


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return a bool mask `[batch, columns]`, checked against the tokens.

    Raises:
        ValueError: If a shape does not fit or a row has no token.
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
