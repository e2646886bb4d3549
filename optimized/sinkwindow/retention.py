"""Which tokens a stream keeps: the rule of the reference's list program, in closed form.

The rule (StreamingLLM, arXiv 2309.17453, section 3.2, with a lazy buffer): append a token, let it attend to the
whole list, and if the list is then longer than ``num_sinks + window + buffer`` keep the first ``num_sinks`` and the
last ``window`` tokens. Every list that this rule can produce is described by two integers: how many tokens were
seen and how many were evicted. The retained list is then ``[0, sinks)`` followed by ``[num_sinks + evicted, seen)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EvictMode", "Retention"]

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
    """

    num_sinks: int
    window: int
    buffer: int = 0
    evict: EvictMode = "token"

    def __post_init__(self) -> None:
        """Refuse sizes that no stream can have.

        Raises:
            TypeError: A size is not an int.
            ValueError: A size is out of range, or ``evict`` is neither ``"token"`` nor ``"call"``.
        """
        for name, least in (("num_sinks", 0), ("window", 1), ("buffer", 0)):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                msg = f"{name} must be an int, got {size!r} of type {type(size).__name__}."
                raise TypeError(msg)
            if size < least:
                msg = f"{name} must be at least {least}, got {size}."
                raise ValueError(msg)
        if self.evict not in ("token", "call"):
            msg = f'evict must be "token" or "call", got {self.evict!r}.'
            raise ValueError(msg)

    @property
    def limit(self) -> int:
        """Length of the list after an eviction, S + W [tokens]."""
        return self.num_sinks + self.window

    @property
    def capacity(self) -> int:
        """Longest list that a query can meet when evicting token by token, S + W + B + 1 [tokens]."""
        return self.limit + self.buffer + 1

    def evicted_before(self, token: int) -> int:
        """Count the tokens evicted before natural index ``token`` attends, evicting token by token.

        The list first overflows right after token ``limit + buffer`` attended, and from then on every
        ``buffer + 1`` tokens; each time ``buffer + 1`` tokens leave.
        """
        step = self.buffer + 1
        overflow = token - self.limit - self.buffer
        return -(-overflow // step) * step if overflow > 0 else 0

    def evicted_after(self, seen: int, evicted: int) -> int:
        """Count the tokens evicted once a call has ended.

        Args:
            seen: Tokens seen, the call's included.
            evicted: Tokens evicted before the call.
        """
        if self.evict == "token":
            return self.evicted_before(seen)
        return seen - self.limit if seen - evicted > self.limit + self.buffer else evicted

    def sinks(self, seen: int) -> int:
        """Count the sinks among ``seen`` tokens."""
        return min(self.num_sinks, seen)

    def first(self, evicted: int) -> int:
        """Give the natural index of the oldest token in the window part."""
        return self.num_sinks + evicted

    def window_length(self, seen: int, evicted: int) -> int:
        """Count the retained tokens that are not sinks."""
        return max(0, seen - self.num_sinks - evicted)

    def length(self, seen: int, evicted: int) -> int:
        """Count the retained tokens."""
        return seen - evicted

    def retained(self, seen: int, evicted: int) -> list[int]:
        """List the retained natural indices, ascending."""
        return [*range(self.sinks(seen)), *range(self.first(evicted), seen)]
