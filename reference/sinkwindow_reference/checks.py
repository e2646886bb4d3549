"""Argument checks of the reference: each error names the argument, its value and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

EVICTION_RULES = ("token", "call")


def check_int(name: str, value: int, *, at_least: int) -> int:
    """Return `value`.

    Raises:
        TypeError: If it is not an int; a bool is refused, it is nearly always a misplaced argument.
        ValueError: If it is below `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name} must be an int, got {value!r}"
        raise TypeError(msg)
    if value < at_least:
        msg = f"{name} must be at least {at_least}, got {value}"
        raise ValueError(msg)
    return value


def call_ranges(num_tokens: int, evict: str, chunks: Sequence[int] | None) -> list[range]:
    """Return the tokens of each call.

    Raises:
        TypeError: If a length is not an int.
        ValueError: If `evict` is unknown, a length not positive, or the sum of `chunks` not `num_tokens`.
    """
    if evict not in EVICTION_RULES:
        msg = f"evict must be one of {EVICTION_RULES}, got {evict!r}"
        raise ValueError(msg)
    check_int("num_tokens", num_tokens, at_least=0)
    lengths = [num_tokens] if chunks is None and num_tokens else list(chunks or [])
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    for i, length in enumerate(lengths):
        check_int(f"chunks[{i}]", length, at_least=1)
    if sum(lengths) != num_tokens:
        msg = f"chunks must add up to the {num_tokens} tokens given, got {lengths} with the sum {sum(lengths)}"
        raise ValueError(msg)
    return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
