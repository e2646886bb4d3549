"""Time per output token and time to the first token, of a whole model."""

from __future__ import annotations

import importlib
import os
import shutil
from typing import Any, ClassVar

from .common import (
    DEVICES,
    LIMITS,
    STREAMED,
    WARM_UP,
    Fresh,
    SkipError,
    Suite,
    TimedSuite,
    Work,
    checked_configuration,
    filled,
    lab,
    model_for,
    sample_tokens,
    shown_as,
    token_ids,
)

STREAMS_CONFIGURATION = "streaming_4_60_0"  # an eviction in every step
SAME_LENGTH = {"streaming_4_252": 1, "streaming_4_1020": 4}  # when the dense cache has as many tokens [its limits]


def decoding(configuration: str, device: str, streamed: int, batch: int = 1, dtype: str | None = None) -> Work:
    """Return the work of generating tokens by greedy search from a filled cache."""
    steps, tokens = filled(configuration, device, streamed, batch, dtype), sample_tokens(configuration)
    session, first = steps.session, token_ids(model_for(device, dtype), 1, batch)

    def ready() -> None:
        steps.rewind(streamed * LIMITS[configuration])
        session.feed(first, last_only=True)

    def generate() -> None:
        token = first
        for _ in range(tokens):
            token = session.feed(token, last_only=True).argmax(dim=-1)

    return Work(tokens, {"token": generate}, ready)


class OutputToken(TimedSuite):
    """Time per output token, after a number of tokens."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], STREAMED, DEVICES]
    param_names: ClassVar = ["configuration", "streamed [limits]", "device"]

    def setup_cache(self) -> Any:
        """Measure all combinations, and the dense cache where it is as long as the others."""
        more = {("baseline", limits, device) for limits in SAME_LENGTH.values() for device in DEVICES}
        suite = OutputToken()  # `self` may be an OverDynamicCache
        return suite.measured(sorted(more.difference(suite.combinations())))

    def work(self, configuration: str, streamed: int, device: str) -> Work:
        """Fill the cache."""
        return decoding(configuration, device, streamed)

    @shown_as("Time per output token (TPOT)")
    def time_token(self, *_: object) -> None:
        """Decode steps."""
        self.replay("token")


class OverDynamicCache(Suite):
    """TPOT over that of a dense cache with as many tokens: interleaved, so it does not drift with the machine."""

    params: ClassVar[list[list[Any]]] = [list(SAME_LENGTH), STREAMED[1:], DEVICES]
    param_names: ClassVar = ["configuration", "streamed [limits]", "device"]
    setup_cache = OutputToken.setup_cache  # asv calls it once for both classes

    def setup(self, found: dict[Any, Any], *combination: Any) -> None:
        """Keep what was found for both sides."""
        configuration, _, device = combination
        super().setup(found, "baseline", SAME_LENGTH[configuration], device)
        self.dense = self.found
        super().setup(found, *combination)

    @shown_as("TPOT over a DynamicCache of the same length", unit="x")
    def track_token(self, *_: object) -> dict[str, Any]:
        """Return the ratios of all turns: asv takes their median and their spread, as for times."""
        sides = zip(self.found["token"], self.dense["token"], strict=True)
        return {"samples": [ours / dense for ours, dense in sides], "number": 1}


class BatchedOutputToken(TimedSuite):
    """Time per output token of all rows together, by batch size and dtype."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252"], [1, 8], ["float32", "bfloat16"], DEVICES]
    param_names: ClassVar = ["configuration", "batch [rows]", "dtype", "device"]
    apart = (1, 2, 3)

    def setup_cache(self) -> Any:
        """Measure all combinations."""
        return self.measured()

    def work(self, configuration: str, batch: int, dtype: str, device: str) -> Work:
        """Fill the cache to ten limits."""
        return decoding(configuration, device, 10, batch, dtype)

    @shown_as("Time per output token (TPOT), by batch and dtype")
    def time_token(self, *_: object) -> None:
        """Decode steps."""
        self.replay("token")


class ManyStreams(TimedSuite):
    """Time of a step of many streams, each with a full cache, per token: their number and the way they are run."""

    params: ClassVar[list[list[Any]]] = [["one batch", "continuous batching"], [8, 64], DEVICES]
    param_names: ClassVar = ["way", "streams", "device"]
    apart = (1, 2)

    def setup_cache(self) -> Any:
        """Measure all combinations."""
        return self.measured()

    def work(self, way: str, streams: int, device: str) -> Work:
        """Fill all caches."""
        model, ways = model_for(device), lab("measure.streams").WAYS
        sizes = checked_configuration(STREAMS_CONFIGURATION).limits
        rule = importlib.import_module("sinkwindow.retention").Retention(*sizes)
        return Work(streams, {"token": ways[way](model, rule, streams).step}, lambda: None)

    @shown_as("Time per output token (TPOT), many streams")
    def time_token(self, *_: object) -> None:
        """Decode steps."""
        self.replay("token")


class CompiledOutputToken(TimedSuite):
    """Time per output token of all rows together at fixed shapes: one compiled graph runs every step."""

    params: ClassVar[list[list[Any]]] = [["static_4_252"], [1, 8], DEVICES]
    param_names: ClassVar = ["configuration", "batch [rows]", "device"]
    apart = (1, 2)

    def setup_cache(self) -> Any:
        """Measure all combinations."""
        return self.measured()

    def work(self, configuration: str, batch: int, device: str) -> Work:
        """Fill the cache to ten limits; the first tokens compile the step and, on a GPU, record the graph."""
        if shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
            raise SkipError(f"no {compiler!r}, which torch.compile needs: install it, or set CXX to another one")
        model_for(device)
        checked_configuration(configuration)
        importlib.import_module("torch").compiler.reset()  # the graph of another batch would be generalized
        work = decoding(configuration, device, 10, batch)
        for _ in range(1 + WARM_UP):
            work.ready()
        return work

    @shown_as("Time per output token (TPOT), compiled")
    def time_token(self, *_: object) -> None:
        """Decode steps."""
        self.replay("token")


class FirstToken(TimedSuite):
    """Time to the first token: a prompt in one call, during which a streaming cache evicts."""

    params: ClassVar[list[list[Any]]] = [["baseline", "streaming_4_252", "streaming_4_1020"], [64, 1536], DEVICES]
    param_names: ClassVar = ["configuration", "prompt [tokens]", "device"]

    def setup_cache(self) -> Any:
        """Measure all combinations."""
        return self.measured()

    def work(self, configuration: str, prompt: int, device: str) -> Work:
        """Prepare a fresh session for each sample."""
        model = model_for(device)
        ids, fresh = token_ids(model, prompt), Fresh(configuration, model)
        return Work(1, {"first": lambda: fresh.session.feed(ids, last_only=True).argmax(dim=-1)}, fresh.ready)

    @shown_as("Time to the first token (TTFT)")
    def time_first_token(self, *_: object) -> None:
        """Prefill and one argmax."""
        self.replay("first")
