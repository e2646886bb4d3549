"""The cache's own work per token, without attention: with one eviction per call, and with one per 65 calls."""

from __future__ import annotations

from typing import Any, ClassVar

from .common import DEVICES, EVICTION_PERIOD, TimedSuite, Work, clock, filled, shown_as

NAMES = {"each token": "streaming_4_60_0", "each 65 tokens": "streaming_4_60"}


class CacheWork(TimedSuite):
    """Cache work with frequent and with rare evictions; the difference is the cost of evictions."""

    params: ClassVar[list[list[Any]]] = [list(NAMES), DEVICES]
    param_names: ClassVar = ["an eviction", "device"]
    repeat = 30

    def setup_cache(self) -> Any:
        """Measure all combinations."""
        return self.measured()

    def work(self, an_eviction: str, device: str) -> Work:
        """Fill the cache to ten limits, its steady state."""
        steps = filled(NAMES[an_eviction], device, 10)
        return Work(EVICTION_PERIOD, {"update": clock().repeated(steps.update, EVICTION_PERIOD)}, lambda: None)

    @shown_as("Cache work with evictions, per token")
    def time_update(self, *_: object) -> None:
        """Update and eviction."""
        self.replay("update")
