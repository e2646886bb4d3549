"""What a cache holds: a stream, and for a static cache the ring through which its steps go."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sinkwindow.plan import position_bound, rule_of
from sinkwindow.ring import Ring
from sinkwindow.storage import SlotPool
from sinkwindow.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sinkwindow.families import ModelFacts
    from sinkwindow.retention import Retention

__all__ = ["Content"]


class Content:
    """A stream that is asked between steps, and changed between layings of the ring.

    Args:
        facts: Of the model.
        retention: The rule.
        ranked: Whether a token's position is its rank; otherwise its natural index.
        static: Whether single-token calls go through a ring.

    Attributes:
        ring: The ring, ``None`` where there is none.
        pool_of: For each layer, the index of its pool.
    """

    def __init__(self, facts: ModelFacts, retention: Retention, *, ranked: bool, static: bool) -> None:
        pools = [
            SlotPool(rule_of(kind, retention), kind.rotary, kind.layers, ranked, ring=static) for kind in facts.kinds
        ]
        self.pool_of = {layer: index for index, pool in enumerate(pools) for layer in pool.layers}
        longest = facts.trained_length if facts.counts_columns else None
        self._stream = Stream(pools, position_bound(retention, facts), splits=facts.own_attention, longest=longest)
        self.ring = Ring(self._stream, [kind.window is not None for kind in facts.kinds]) if static else None

    @property
    def stream(self) -> Stream:
        """The stream, its counts up to date."""
        if self.ring is not None:
            self.ring.sync()
        return self._stream

    @property
    def pools(self) -> list[SlotPool]:
        """The pools, whose counts may lag behind."""
        return self._stream.pools

    @property
    def stepping(self) -> bool:
        """Whether a step is under way."""
        return self.ring is not None and self.ring.step is not None

    def settle(self) -> None:
        """Finish what was interrupted; the next call may be a step."""
        self._stream.complete()
        if self.ring is not None:
            self.ring.lay()

    def reset(self) -> None:
        """Forget everything, with nothing finished or moved first: memory may be what is lacking."""
        self._stream.reset()
        if self.ring is not None:
            self.ring.forget()  # last: until the stream has forgotten, only the ring knows what the steps have done

    @contextmanager
    def at_rest(self) -> Iterator[Stream]:
        """Give the stream, to change it."""
        if self.ring is not None:
            self.ring.unroll()
        try:
            yield self._stream
        finally:
            if self.ring is not None:
                self.ring.lay()
