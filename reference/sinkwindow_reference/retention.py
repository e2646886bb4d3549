"""Which tokens a query attends to: the whole eviction rule as a program on a plain list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkwindow_reference.checks import call_ranges, check_int

if TYPE_CHECKING:
    from collections.abc import Sequence


class RetainedList:
    """The natural indices of the tokens that one sequence has kept; a token's place in the list is its rank.

    Args:
        num_sinks: First tokens of the sequence, never evicted [tokens].
        window: Most recent tokens that survive an eviction [tokens].
        buffer: How far the list may overgrow before one batched eviction [tokens]; 0 is the paper.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is too small.
    """

    def __init__(self, num_sinks: int, window: int, buffer: int = 0) -> None:
        self.num_sinks = check_int("num_sinks", num_sinks, at_least=0)
        self.window = check_int("window", window, at_least=1)
        self.buffer = check_int("buffer", buffer, at_least=0)
        self.tokens: list[int] = []

    def append(self, token: int) -> None:
        """Step 1 of the rule: the new token joins the list, so that its own query sees it (step 2)."""
        self.tokens.append(token)

    def evict_if_full(self) -> list[int]:
        """Step 3 of the rule: beyond the buffer, keep the sinks and the window; returns what was evicted."""
        if len(self.tokens) <= self.num_sinks + self.window + self.buffer:
            return []
        evicted = self.tokens[self.num_sinks : -self.window]
        self.tokens = self.tokens[: self.num_sinks] + self.tokens[-self.window :]
        return evicted


def retained_lists(
    num_tokens: int,
    *,
    num_sinks: int,
    window: int,
    buffer: int = 0,
    evict: str = "token",
    chunks: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the natural indices that each query of a sequence attends to, its own included.

    Args:
        num_tokens: Length of the sequence [tokens].
        num_sinks: As in `RetainedList` [tokens].
        window: As in `RetainedList` [tokens].
        buffer: As in `RetainedList` [tokens].
        evict: "token" evicts after every token, "call" once after every call.
        chunks: Lengths of the calls [tokens], one call of everything by default; they matter to "call" alone.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is too small, `evict` unknown, or `chunks` do not add up to `num_tokens`.
    """
    kept, lists = RetainedList(num_sinks, window, buffer), []
    for call in call_ranges(num_tokens, evict, chunks):
        for token in call:
            kept.append(token)
            lists.append(list(kept.tokens))
            if evict == "token" or token == call[-1]:
                kept.evict_if_full()
    return lists


def retained_after(
    num_tokens: int,
    *,
    num_sinks: int,
    window: int,
    buffer: int = 0,
    evict: str = "token",
    chunks: Sequence[int] | None = None,
) -> list[int]:
    """Return the list that the last call leaves behind; arguments and errors are those of `retained_lists`."""
    kept = RetainedList(num_sinks, window, buffer)
    for call in call_ranges(num_tokens, evict, chunks):
        for token in call:
            kept.append(token)
            if evict == "token" or token == call[-1]:
                kept.evict_if_full()
    return kept.tokens
