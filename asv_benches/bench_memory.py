"""Memory in bytes: what the cache allocates, and the peak of a generation above the weights."""

from __future__ import annotations

from typing import Any, ClassVar

from .common import (
    DEVICES,
    STREAMED,
    Combination,
    Suite,
    attempt,
    checked_configuration,
    filled,
    lab,
    model_for,
    shown_as,
    token_ids,
)

PROMPT = 2048  # [tokens]
NEW_TOKENS = 64  # [tokens]


class CacheBytes(Suite):
    """Allocated bytes, including slots that are not filled yet; the same on every machine."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], STREAMED[1::2]]
    param_names: ClassVar = ["configuration", "streamed [limits]"]

    def setup_cache(self) -> dict[Combination, Any]:
        """Measure all combinations."""
        return {one: attempt(self.measure, *one) for one in self.combinations()}

    def measure(self, configuration: str, streamed: int) -> int:
        """Return the bytes of keys and values after a number of tokens."""
        return int(filled(configuration, "cpu", streamed).session.cache_bytes)

    @shown_as("Cache bytes", unit="bytes")
    def track_bytes(self, *_: object) -> int:
        """Return what was measured."""
        return int(self.found)


class PeakMemory(Suite):
    """Peak of the tensors other than the weights during a prefill and some tokens."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], DEVICES]
    param_names: ClassVar = ["configuration", "device"]
    version = "2"  # version 1 sampled the resident set size

    def setup_cache(self) -> dict[Combination, Any]:
        """Measure all combinations."""
        return {one: attempt(self.measure, *one) for one in self.combinations()}

    def measure(self, configuration: str, device: str) -> int:
        """Return the peak in bytes, counted as for the tables, of a model whose cache is what grows most."""
        memory = lab("measure.memory", needs="generation_peaks")
        model = model_for(device, shape="smollm2-135m-heads" if device == "cpu" else None)
        ids = token_ids(model, PROMPT)
        (peak,) = memory.generation_peaks(checked_configuration(configuration), model, ids, (NEW_TOKENS,))
        return int(getattr(peak, "tensor_bytes", peak))  # earlier commits return records

    @shown_as("Peak memory above the weights", unit="bytes")
    def track_peak(self, *_: object) -> int:
        """Return what was measured."""
        return int(self.found)
