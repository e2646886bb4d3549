"""Which tokens a stream keeps: the rule of the reference's list program, in closed form.

The rule (StreamingLLM, arXiv 2309.17453, section 3.2, with a lazy buffer): append a token, let it attend to the
whole list, and if the list is then longer than ``num_sinks + window + buffer`` keep the first ``num_sinks`` and the
last ``window`` tokens. Every list that this rule can produce is described by two integers: how many tokens were
seen and how many were evicted. The retained list is then ``[0, sinks)`` followed by ``[num_sinks + evicted, seen)``,
and its length is ``seen - evicted``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from sinkwindow.arguments import MOST_TOKENS, read_choice, read_int

EvictMode = Literal["token", "call"]


@dataclass(frozen=True, slots=True)
class Retention:
    """The sizes of a stream's retained list, and what follows from them.

    Attributes:
        num_sinks: First tokens of the sequence, never evicted [tokens], S >= 0.
        window: Most recent tokens that survive an eviction [tokens], W >= 1.
        buffer: How far the list may overgrow before one batched eviction [tokens], B >= 0.
        evict: ``"token"`` applies the rule token by token whatever the call length; ``"call"`` appends the whole
            call and evicts once after it.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is out of range, or ``evict`` is neither ``"token"`` nor ``"call"``.

    Examples:
        >>> rule = Retention(num_sinks=2, window=3, buffer=1)
        >>> rule.retained(seen=6, evicted=0)
        [0, 1, 2, 3, 4, 5]
        >>> rule.evicted_after(seen=7, evicted=0)  # 7 > 2 + 3 + 1: two tokens leave
        2
        >>> rule.retained(seen=7, evicted=2)
        [0, 1, 4, 5, 6]
    """

    num_sinks: int
    window: int
    buffer: int = 0
    evict: EvictMode = "token"

    def __post_init__(self) -> None:
        """Refuse sizes that no stream can have."""
        for name, least in (("num_sinks", 0), ("window", 1), ("buffer", 0)):
            size = read_int(name, getattr(self, name), least, MOST_TOKENS)
            object.__setattr__(self, name, size)  # an int, whatever integer was given
        read_choice("evict", self.evict, ("token", "call"))

    @property
    def limit(self) -> int:
        """Length of the list after an eviction, S + W [tokens]."""
        return self.num_sinks + self.window

    @property
    def capacity(self) -> int:
        """Longest list that a query can attend to when evicting token by token, S + W + B + 1 [tokens]."""
        return self.limit + self.buffer + 1

    @overload
    def evicted_before(self, token: int) -> int: ...

    @overload
    def evicted_before(self, token: Tensor) -> Tensor: ...

    def evicted_before(self, token: int | Tensor) -> int | Tensor:
        """Return how many tokens were evicted before a token attends, evicting token by token.

        The list first overflows right after token ``limit + buffer`` attended, and from then on every
        ``buffer + 1`` tokens; each time ``buffer + 1`` tokens leave.

        Args:
            token: Natural index of the token, or a tensor of them.

        Returns:
            The count, an int or a tensor as ``token`` is.
        """
        step = self.buffer + 1
        overflow = token - (self.num_sinks + self.window + self.buffer)
        overflow = overflow.clamp(min=0) if isinstance(overflow, Tensor) else max(overflow, 0)
        return (overflow + self.buffer) // step * step  # rounded up to whole evictions

    def evicted_after(self, seen: int, evicted: int) -> int:
        """Return how many tokens have been evicted once a call has ended.

        Args:
            seen: Tokens seen, the call's included.
            evicted: Tokens evicted before the call.
        """
        if self.evict == "token":
            return self.evicted_before(seen)
        return seen - self.limit if seen - evicted > self.limit + self.buffer else evicted

    def evictions(self, tokens: int) -> int:
        """Return in how many evictions so many tokens leave, at most one call's where the rule evicts by call."""
        return tokens // (self.buffer + 1) if self.evict == "token" else min(tokens, 1)

    def sinks(self, seen: int) -> int:
        """Return how many of ``seen`` tokens are sinks."""
        return min(self.num_sinks, seen)

    def first(self, evicted: int) -> int:
        """Return the natural index of the oldest token in the window."""
        return self.num_sinks + evicted

    def retained(self, seen: int, evicted: int) -> list[int]:
        """Return the retained natural indices, ascending."""
        return [*range(self.sinks(seen)), *range(self.first(evicted), seen)]
