"""Logits of a whole text, ten limits long: an exact streaming pass, a dense one and the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .common import DEVICES, LIMITS, Fresh, TimedSuite, Work, lab, model_for, shown_as, token_ids

if TYPE_CHECKING:
    from collections.abc import Callable

STREAMING = "streaming_4_60"
TOKENS = 10 * LIMITS[STREAMING]
BLOCK = 256  # tokens per call; the reference reads the text in one call [tokens]


def reading(fresh: Fresh, ids: Any) -> Callable[[], None]:
    """Return a function that reads a text block by block."""

    def read() -> None:
        for block in ids.split(BLOCK, dim=1):
            fresh.session.feed(block)

    return read


class WholeText(TimedSuite):
    """Time per token to score a text."""

    params: ClassVar[list[list[Any]]] = [["baseline", STREAMING], DEVICES]
    param_names: ClassVar = ["configuration", "device"]

    def setup_cache(self) -> Any:
        """Measure all combinations."""
        return self.measured()

    def work(self, configuration: str, device: str) -> Work:
        """Prepare a fresh session for each sample."""
        model = model_for(device)
        fresh = Fresh(configuration, model)
        return Work(TOKENS, {"text": reading(fresh, token_ids(model, TOKENS))}, fresh.ready)

    @shown_as("Logits of a whole text, per token")
    def time_logits(self, *_: object) -> None:
        """Feed the text in blocks."""
        self.replay("text")


class WholeTextByReference(TimedSuite):
    """The same on a tiny model, for which the reference is fast enough."""

    params: ClassVar[list[list[Any]]] = [["optimized", "reference"]]
    param_names: ClassVar = ["implementation"]
    apart = ()

    def setup_cache(self) -> Any:
        """Measure both."""
        return self.measured()

    def work(self, implementation: str) -> Work:
        """Prepare a fresh session for each sample; the reference does not use it."""
        model = model_for("cpu", shape="tiny")
        ids, fresh = token_ids(model, TOKENS), Fresh(STREAMING, model)
        configuration, reference_pass = lab("ways.configurations").parse(STREAMING), lab("measure.micro").reference_pass
        reads = {"optimized": reading(fresh, ids), "reference": lambda: reference_pass(configuration, model, ids)}
        return Work(TOKENS, {"text": reads[implementation]}, fresh.ready)

    @shown_as("Logits of a whole text by the reference, tiny model, per token")
    def time_logits(self, *_: object) -> None:
        """Either implementation."""
        self.replay("text")
