"""Which tokens a query attends to: the whole eviction rule as a program on a plain list."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class RetainedList:
    """The natural indices of the tokens that one sequence keeps; the rank of a token is its place in the list.

    Args:
        num_sinks: First tokens of the sequence, never evicted [tokens].
        window: Most recent tokens that survive an eviction [tokens].
        buffer: Extra tokens allowed before one batched eviction [tokens]; 0 is the paper.
    """

    def __init__(self, num_sinks: int, window: int, buffer: int = 0) -> None:
        self.num_sinks = check_int("num_sinks", num_sinks, at_least=0)
        self.window = check_int("window", window, at_least=1)
        self.buffer = check_int("buffer", buffer, at_least=0)
        self.tokens: list[int] = []

    def append(self, token: int) -> None:
        """Step 1 of the rule: append the new token. Step 2: its query attends to the whole list, itself included."""
        self.tokens.append(token)

    def evict_if_full(self) -> list[int]:
        """Step 3 of the rule: beyond the buffer, keep only the sinks and the window. Return the evicted tokens."""
        if len(self.tokens) <= self.num_sinks + self.window + self.buffer:
            return []
        evicted = self.tokens[self.num_sinks : -self.window]
        self.tokens = self.tokens[: self.num_sinks] + self.tokens[-self.window :]
        return evicted


def retained_lists(
    num_tokens: int, *, evict: str = "token", chunks: Sequence[int] | None = None, **sizes: int
) -> list[list[int]]:
    """Return the natural indices that each query of a sequence attends to, its own included.

    Args:
        num_tokens: Length of the sequence [tokens].
        evict: "token" evicts after every token; "call", as in the original reproduction, once after every call.
        chunks: Lengths of the calls [tokens], by default one call; they matter only to "call".
        **sizes: `num_sinks`, `window` and `buffer` of `RetainedList` [tokens].

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is too small, `evict` is unknown, or `chunks` do not add up to `num_tokens`.
    """
    kept = RetainedList(**sizes)
    return [list(kept.tokens) for _ in _each_query(kept, num_tokens, evict, chunks)]


def retained_after(
    num_tokens: int, *, evict: str = "token", chunks: Sequence[int] | None = None, **sizes: int
) -> list[int]:
    """Return the list after the last call. Arguments and errors are those of `retained_lists`."""
    kept = RetainedList(**sizes)
    for _ in _each_query(kept, num_tokens, evict, chunks):
        pass
    return kept.tokens


def _each_query(kept: RetainedList, num_tokens: int, evict: str, chunks: Sequence[int] | None) -> Iterator[None]:
    """Run the rule on `kept` and yield at step 2 of each token."""
    ends = set(accumulate(call_lengths(num_tokens, evict, chunks)))
    for token in range(num_tokens):
        kept.append(token)
        yield
        if evict == "token" or token + 1 in ends:
            kept.evict_if_full()


def call_lengths(num_tokens: int, evict: str, chunks: Sequence[int] | None) -> list[int]:
    """Return the length of each call [tokens]. Errors are those of `retained_lists`."""
    if evict not in ("token", "call"):
        raise ValueError(f"evict must be one of ('token', 'call'), got {evict!r}")
    lengths = [check_int("num_tokens", num_tokens, at_least=0)] if chunks is None else list(chunks)
    for i, length in enumerate(chunks or ()):
        check_int(f"chunks[{i}]", length, at_least=1)
    if (total := sum(lengths)) != num_tokens:
        raise ValueError(f"chunks must add up to the {num_tokens} tokens given, got {lengths} with the sum {total}")
    return lengths


def check_int(name: str, value: int, *, at_least: int) -> int:
    """Return `value` if it is an int of at least `at_least`; a bool is refused, as it is usually a mistake."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return value
