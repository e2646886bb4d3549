"""The cache's own work per token, without attention: with one eviction per call, and with one per 65 calls."""

from __future__ import annotations

from typing import ClassVar

from .common import DEVICES, EVICTION_PERIOD, LIMITS, filled, per_token_clock, shown_as, without_gpu

NAMES = {"each token": "streaming_4_60_0", "each 65 tokens": "streaming_4_60"}


class CacheWork:
    """Cache work with frequent and with rare evictions; the difference is the cost of evictions."""

    params: ClassVar = [list(NAMES), DEVICES]
    param_names: ClassVar = ["an eviction", "device"]
    skip_params: ClassVar = without_gpu(params)
    number = 1  # a call changes the cache
    repeat = (5, 30, 2.0)
    warmup_time = 0
    timeout = 300

    def setup(self, an_eviction: str, device: str) -> None:
        """Fill the cache, in the first sample only."""
        name = NAMES[an_eviction]
        self.steps = filled(name, device, 10)
        self.steps.rewind(10 * LIMITS[name])
        self.timer = per_token_clock(EVICTION_PERIOD, device)

    @shown_as("Cache work with evictions, per token")
    def time_update(self, *_: object) -> None:
        """Time update and eviction."""
        for _token in range(EVICTION_PERIOD):
            self.steps.update()
