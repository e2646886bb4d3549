"""Logits of a whole text, ten limits long: the exact streaming pass beside a dense one and the reference."""

from __future__ import annotations

from typing import Any, ClassVar

from .bench_decode import token_ids
from .common import DEVICES, LIMITS, checked_configuration, lab, model_for, per_token_clock, shown_as, without_gpu

STREAMING = "streaming_4_60"
TOKENS = 10 * LIMITS[STREAMING]
BLOCK = 256  # tokens per call; the reference has one call [tokens]


class Text:
    """Shared: a fresh session reads the text once."""

    number = 1
    repeat = (3, 10, 4.0)
    warmup_time = 0
    timeout = 300
    session: Any = None

    def open(self, configuration: str, device: str, shape: str | None) -> None:
        """Builds the model, the text and a session."""
        self.model = model_for(device, shape=shape)
        self.ids = token_ids(self.model, TOKENS)
        self.timer = per_token_clock(TOKENS, device)
        self.session = lab("sessions").open_session(checked_configuration(configuration), self.model)

    def teardown(self, *_: object) -> None:
        """Takes the cache off the model."""
        if self.session is not None:
            self.session.close()

    def read(self) -> None:
        """Feeds the text block by block."""
        for block in self.ids.split(BLOCK, dim=1):
            self.session.feed(block)


class WholeText(Text):
    """What scoring a text costs per token."""

    params: ClassVar = [["baseline", STREAMING], DEVICES]
    param_names: ClassVar = ["configuration", "device"]
    skip_params: ClassVar = without_gpu(params)

    def setup(self, configuration: str, device: str) -> None:
        """Opens a session."""
        self.open(configuration, device, None)

    @shown_as("Logits of a whole text, per token")
    def time_logits(self, *_: object) -> None:
        """Times blocks through a session."""
        self.read()


class WholeTextByReference(Text):
    """The same on a tiny model, where the reference is fast enough to stand beside it."""

    params: ClassVar = [["optimized", "reference"]]
    param_names: ClassVar = ["implementation"]

    def setup(self, implementation: str) -> None:
        """Opens a session; the reference needs none."""
        self.open(STREAMING, "cpu", "tiny")
        self.reads = {"optimized": self.read, "reference": self.read_by_reference}[implementation]

    def read_by_reference(self) -> None:
        """Reads the text as the rule is written."""
        lab("micro").reference_pass(lab("configurations").parse(STREAMING), self.model, self.ids)

    @shown_as("Logits of a whole text by the reference, tiny model, per token")
    def time_logits(self, *_: object) -> None:
        """Times either implementation."""
        self.reads()
