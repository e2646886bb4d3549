"""Attention of one token, with and without the work of the cache around it, all layers summed."""

from __future__ import annotations

from typing import Any, ClassVar

from .common import DEVICES, LIMITS, STREAMED, filled, per_token_clock, sample_tokens, shown_as, without_gpu


class Attention:
    """Time of one token in attention, after a number of tokens."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], STREAMED, DEVICES]
    param_names: ClassVar = ["configuration", "streamed [limits]", "device"]
    skip_params: ClassVar = without_gpu(params)
    number = 1  # a call changes the cache
    repeat = (3, 20, 3.0)
    warmup_time = 0
    timeout = 300

    def setup(self, configuration: str, streamed: int, device: str) -> None:
        """Fill the cache, in the first sample only."""
        self.steps = filled(configuration, device, streamed)
        self.steps.rewind(streamed * LIMITS[configuration])
        self.tokens = sample_tokens(configuration)
        self.timer = per_token_clock(self.tokens, device)
        self.steps.hold()

    @shown_as("Attention alone, per token")
    def time_attention(self, *_: object) -> None:
        """Time attention over what the cache returns."""
        for _token in range(self.tokens):
            self.steps.attention_alone()

    @shown_as("Attention and cache update, per token")
    def time_attention_and_update(self, *_: object) -> None:
        """Time cache update, eviction and attention."""
        for _token in range(self.tokens):
            self.steps.step()
