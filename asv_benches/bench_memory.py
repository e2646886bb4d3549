"""Memory in bytes: what the cache allocates, and the peak of a generation above the weights."""

from __future__ import annotations

from typing import ClassVar

from .bench_decode import token_ids
from .common import DEVICES, STREAMED, checked_configuration, filled, lab, model_for, shown_as, without_gpu

PROMPT = 2048  # [tokens]
NEW_TOKENS = 64  # [tokens]


class CacheBytes:
    """Allocated bytes, including slots that are not filled yet; the same on every machine."""

    params: ClassVar = [["baseline", "streaming_4_252", "streaming_4_1020"], STREAMED[1::2]]
    param_names: ClassVar = ["configuration", "streamed [limits]"]
    timeout = 300

    @shown_as("Cache bytes", unit="bytes")
    def track_bytes(self, configuration: str, streamed: int) -> int:
        """Return the bytes of keys and values after a number of tokens."""
        return int(filled(configuration, "cpu", streamed).session.cache_bytes)


class PeakMemory:
    """Peak of the tensors other than the weights during a prefill and some tokens."""

    params: ClassVar = [["baseline", "streaming_4_252", "streaming_4_1020"], DEVICES]
    param_names: ClassVar = ["configuration", "device"]
    skip_params: ClassVar = without_gpu(params)
    timeout = 300

    def setup(self, configuration: str, device: str) -> None:
        """Build a model whose cache is larger than everything else that grows."""
        self.configuration = checked_configuration(configuration)
        self.memory = lab("measure.memory", needs="generation_peaks")
        self.model = model_for(device, shape="smollm2-135m-heads" if device == "cpu" else None)

    @shown_as("Peak memory above the weights", unit="bytes", version="2")  # version 1 sampled the resident set size
    def track_peak(self, *_: object) -> int:
        """Return the peak in bytes, counted as for the tables."""
        ids = token_ids(self.model, PROMPT)
        return int(self.memory.generation_peaks(self.configuration, self.model, ids, (NEW_TOKENS,))[0].tensor_bytes)
