"""Logits of a whole text, ten limits long: an exact streaming pass, a dense one and the reference."""

from __future__ import annotations

from typing import Any, ClassVar

from .bench_decode import token_ids
from .common import DEVICES, LIMITS, checked_configuration, lab, model_for, per_token_clock, shown_as, without_gpu

STREAMING = "streaming_4_60"
TOKENS = 10 * LIMITS[STREAMING]
BLOCK = 256  # tokens per call; the reference reads the text in one call [tokens]


class Text:
    """Base: a fresh session reads the text once."""

    number = 1
    repeat = (3, 10, 4.0)
    warmup_time = 0
    timeout = 300
    session: Any = None

    def open(self, configuration: str, device: str, shape: str | None) -> None:
        """Build the model, the text and a session."""
        self.model = model_for(device, shape=shape)
        self.ids = token_ids(self.model, TOKENS)
        self.timer = per_token_clock(TOKENS, device)
        self.session = lab("ways.sessions").open_session(checked_configuration(configuration), self.model)

    def teardown(self, *_: object) -> None:
        """Detach the cache from the model."""
        if self.session is not None:
            self.session.close()

    def read(self) -> None:
        """Feed the text block by block."""
        for block in self.ids.split(BLOCK, dim=1):
            self.session.feed(block)


class WholeText(Text):
    """Time per token to score a text."""

    params: ClassVar = [["baseline", STREAMING], DEVICES]
    param_names: ClassVar = ["configuration", "device"]
    skip_params: ClassVar = without_gpu(params)

    def setup(self, configuration: str, device: str) -> None:
        """Open a session."""
        self.open(configuration, device, None)

    @shown_as("Logits of a whole text, per token")
    def time_logits(self, *_: object) -> None:
        """Time feeding the text in blocks."""
        self.read()


class WholeTextByReference(Text):
    """The same on a tiny model, for which the reference is fast enough."""

    params: ClassVar = [["optimized", "reference"]]
    param_names: ClassVar = ["implementation"]

    def setup(self, implementation: str) -> None:
        """Open a session; the reference does not need it."""
        self.open(STREAMING, "cpu", "tiny")
        self.reads = {"optimized": self.read, "reference": self.read_by_reference}[implementation]

    def read_by_reference(self) -> None:
        """Read the text with the reference."""
        lab("measure.micro").reference_pass(lab("ways.configurations").parse(STREAMING), self.model, self.ids)

    @shown_as("Logits of a whole text by the reference, tiny model, per token")
    def time_logits(self, *_: object) -> None:
        """Time either implementation."""
        self.reads()
