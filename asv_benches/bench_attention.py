"""Attention of one token, with and without the work of the cache around it, all layers summed."""

from __future__ import annotations

from typing import Any, ClassVar

from .common import DEVICES, LIMITS, STREAMED, TimedSuite, Work, clock, filled, sample_tokens, shown_as


class Attention(TimedSuite):
    """Time of one token in attention, after a number of tokens."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], STREAMED, DEVICES]
    param_names: ClassVar = ["configuration", "streamed [limits]", "device"]
    repeat = 20

    def setup_cache(self) -> Any:
        """Measure all combinations."""
        return self.measured()

    def work(self, configuration: str, streamed: int, device: str) -> Work:
        """Fill the cache."""
        steps, tokens = filled(configuration, device, streamed), sample_tokens(configuration)

        def ready() -> None:
            steps.rewind(streamed * LIMITS[configuration])
            steps.hold()

        timed = {"attention": steps.attention_alone, "attention_and_update": steps.step}
        return Work(tokens, {name: clock().repeated(run, tokens) for name, run in timed.items()}, ready)

    @shown_as("Attention alone, per token")
    def time_attention(self, *_: object) -> None:
        """Attention over what the cache returns."""
        self.replay("attention")

    @shown_as("Attention and cache update, per token")
    def time_attention_and_update(self, *_: object) -> None:
        """Cache update, eviction and attention."""
        self.replay("attention_and_update")
