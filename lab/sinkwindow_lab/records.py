"""What the lab writes: measurements in one long format, and beside them what they were measured on.

A measurement is one quantity of one way of remembering at one place, with all its samples. Medians, ratios, targets and
pictures are made from these when a page is written, so that a page can be written again from its JSON.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sinkwindow_lab.errors import LabError

Figures = Mapping[str, tuple[str, Sequence[float]]]  # unit and samples by metric
BosPolicy = Literal["none", "add"]
Documents = Literal["concat", "apart"]


def ppl(nll: float) -> float:
    """Return the exponential of a mean loss; infinite where it is more than a float holds."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


class Record(BaseModel):
    """Immutable, and strict about its fields: a record of another version fails loudly."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class ModelRecord(Record):
    """The model that ran."""

    name: str
    source: str
    revision: str | None = None
    sha256: str | None = None
    model_type: str
    parameters: int
    weight_bytes: int
    dtype: str
    device: str
    max_positions: int | None
    attention: str
    missing_weights: list[str] = []  # that the checkpoint lacks, so that they have random values


class TokenizerRecord(Record):
    """The tokenizer; `sha256` is of the vocabulary, words with their ids."""

    kind: str
    vocabulary: int
    sha256: str


class CorpusRecord(Record):
    """The text that was read; `sha256` is of the UTF-8 text, documents joined by `joiner`."""

    name: str
    source: str
    revision: str | None
    config: str | None
    split: str | None
    documents: int
    joiner: str
    characters: int
    sha256: str


class TextRecord(Record):
    """The tokens that were scored; `sha256` is of the token ids, so equal digests mean the same targets."""

    corpus: str
    tokens: int
    targets: int
    sha256: str
    bos: BosPolicy
    documents: Documents
    texts: int
    target_bytes: int
    tokenizer: TokenizerRecord | None
    bos_id: int | None = None  # of the token in front of each text; None if there is none
    requested: int | None = None  # tokens that were asked for: more than `tokens` if the text ends before
    model: str | None = None  # whose tokenizer made them


class MachineRecord(Record):
    """The machine and software of a measurement."""

    date: str
    cpu: str
    cores: int
    memory_gb: float
    gpu: str | None
    system: str
    threads: int
    python: str
    packages: dict[str, str]
    commit: str | None
    dirty: bool | None


class Configuration(Record):
    """One way of remembering (see `ways/configurations.py`); S, W and B are None if the kind does not have them."""

    name: str
    kind: str
    num_sinks: int | None = None
    window: int | None = None
    buffer: int | None = None
    ablation: bool
    meaning: str

    @property
    def limits(self) -> tuple[int, int, int]:
        """S, W and B of a configuration that evicts; a `LabError` for other kinds."""
        if self.num_sinks is None or self.window is None or self.buffer is None:
            raise LabError(f"configuration {self.name!r} has no sinks, window and buffer")
        return self.num_sinks, self.window, self.buffer

    @property
    def size(self) -> int:
        """S + W, or W."""
        return (self.num_sinks or 0) + (self.window or 0)

    @property
    def depends_on_calls(self) -> bool:
        """Whether losses depend on where one call ends and the next begins; by the paper's rule they do not."""
        return self.kind in ("call", "eager_eviction")

    @property
    def title(self) -> str:
        """The name as tables show it; ablations are marked."""
        return f"{self.name} (ablation)" if self.ablation else self.name

    def explained(self) -> str:
        """Describe it in words, with its numbers."""
        named = (("S", self.num_sinks), ("W", self.window), ("B", self.buffer))
        shown = ", ".join(f"{letter}={value}" for letter, value in named if value is not None)
        return f"**{self.name}**: {self.meaning}{f' ({shown})' if shown else ''}."


class Measurement(Record):
    """One quantity with its samples."""

    part: str  # the part of a report that it belongs to, such as `experiment 1`
    subject: str  # what it was measured on: a text or a model
    configuration: str  # the way of remembering, or what is measured in the place of one
    at: int | None  # where on the axis of its part, such as tokens streamed; None for a part without an axis
    metric: str  # the quantity, such as `TPOT`
    unit: str  # of the samples
    samples: list[float] = Field(min_length=1)  # all of them, in the order in which they were taken

    @property
    def median(self) -> float:
        """Median of the samples."""
        return float(statistics.median(self.samples))


def measured(part: str, subject: str, configuration: str, at: int | None, figures: Figures) -> list[Measurement]:
    """Return measurements of one place."""
    place = {"part": part, "subject": subject, "configuration": configuration, "at": at}
    return [
        Measurement.model_validate({**place, "metric": metric, "unit": unit, "samples": list(samples)})
        for metric, (unit, samples) in figures.items()
    ]


class Report(Record):
    """One run: the machine, the inputs, the plan and the results."""

    schema_version: Literal[4] = 4
    kind: Literal["tables", "speed", "gpu", "lm-eval", "sinks"]
    quick: bool
    plan: dict[str, Any]
    machine: MachineRecord
    models: list[ModelRecord]
    corpora: list[CorpusRecord] = []
    texts: list[TextRecord] = []
    configurations: list[Configuration] = []
    measurements: list[Measurement]
    skipped: list[str] = []
    failed: list[str] = []
    notes: dict[str, str] = {}
    seconds: float
    finished: bool = True
