"""What the lab measures, as records: every number in a table is read from one of these.

Raw samples are kept; medians and ratios are properties, so that a table can be rendered again from its JSON.
Units are in the names: `_s` seconds, `_ms` milliseconds, `_bytes` bytes, `_gb` 10^9 bytes.
"""

from __future__ import annotations

import statistics
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

BosPolicy = Literal["none", "add"]
Documents = Literal["concat", "apart"]


class Record(BaseModel):
    """Immutable, and strict about its fields: a record of another version fails loudly."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecord(Record):
    """The model that ran."""

    name: str
    source: str
    revision: str | None
    sha256: str | None
    model_type: str
    parameters: int
    weight_bytes: int
    dtype: str
    device: str
    max_positions: int | None
    attention: str


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


class ConfigurationRecord(Record):
    """One row's way of remembering (see `configurations.py`)."""

    name: str
    kind: str
    num_sinks: int | None
    window: int | None
    buffer: int | None
    ablation: bool
    meaning: str


class PerplexityRecord(Record):
    """Stateful perplexity: all tokens but the first of each text, each scored once, in natural logarithms.

    `perplexity` is exp of the mean over all targets, never a mean of means. `block` is the number of tokens per call.
    """

    configuration: str
    corpus: str
    tokens: int
    targets: int
    targets_sha256: str
    bos: BosPolicy
    block: int
    mean_nll: float
    standard_error: float
    perplexity: float
    bits_per_byte: float
    text_bytes: int
    seconds: float
    evictions: int
    kept_tokens: int
    cache_bytes: int
    documents: Documents = "concat"
    scored_texts: int = 1
    tokenizer: TokenizerRecord | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens fed per second [tok/s], logits and losses included."""
        return self.targets / self.seconds


class MemoryRecord(Record):
    """Memory of one generation: the weights, and the most that its own tensors take at once."""

    weight_bytes: int
    tensor_bytes: int

    @property
    def peak_gb(self) -> float:
        """Both together [GB]."""
        return (self.weight_bytes + self.tensor_bytes) / 1e9


class GenerationRecord(Record):
    """One greedy generation: `token_times_s[i]` is the time of token i, counted from the start of the prefill.

    The prompt was read several times, `prompt_times_s`; the first token counts with their median. `memory` is None on a
    device that does not report it.
    """

    prompt_tokens: int
    prompt_times_s: list[float] = Field(min_length=1)
    token_times_s: list[float] = Field(min_length=2)
    kept_tokens: int
    cache_bytes: int
    evictions: int
    memory: MemoryRecord | None

    @property
    def generated_tokens(self) -> int:
        """Number of new tokens [tokens]."""
        return len(self.token_times_s)

    @property
    def ttft_s(self) -> float:
        """Time to the first token [s]: the prefill and one argmax."""
        return self.token_times_s[0]

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first [ms]."""
        return 1e3 * (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)

    @property
    def total_s(self) -> float:
        """Prefill and generation [s]."""
        return self.token_times_s[-1]

    @property
    def throughput(self) -> float:
        """New tokens per second of the total time [tok/s]."""
        return self.generated_tokens / self.total_s

    @property
    def step_ms(self) -> list[float]:
        """Every time between two tokens [ms]."""
        pairs = zip(self.token_times_s, self.token_times_s[1:], strict=False)
        return [1e3 * (after - before) for before, after in pairs]


class SpeedRecord(Record):
    """Several generations of one configuration; different configurations were interleaved, a token each."""

    configuration: str
    rounds: list[GenerationRecord] = Field(min_length=1)

    def median(self, name: str) -> float:
        """Return the median over the rounds of a property of `GenerationRecord` such as `tpot_ms`."""
        return float(statistics.median(getattr(one, name) for one in self.rounds))

    @property
    def peak_gb(self) -> float | None:
        """Largest peak of the rounds [GB], None if the device does not report it."""
        peaks = [one.memory.peak_gb for one in self.rounds if one.memory is not None]
        return max(peaks, default=None)


class AttentionProbe(Record):
    """Consecutive decode steps from one place in the generation: time in cache update and attention, all layers."""

    tokens_seen: int
    step_ms: list[float] = Field(min_length=1)


class AttentionRecord(Record):
    """Cache update plus attention of one token, sampled at places spread evenly over the generation."""

    configuration: str
    prompt_tokens: int
    generated_tokens: int
    layers: int
    probes: list[AttentionProbe] = Field(min_length=1)

    @property
    def milliseconds(self) -> float:
        """Mean over the places of each place's median [ms]."""
        return statistics.fmean(statistics.median(probe.step_ms) for probe in self.probes)

    def until(self, new_tokens: int) -> AttentionRecord:
        """Return the record without the places after `new_tokens`, as of a shorter generation."""
        probes = [one for one in self.probes if one.tokens_seen < self.prompt_tokens + new_tokens]
        return self.model_copy(update={"generated_tokens": new_tokens, "probes": probes})


class RowRecord(Record):
    """One row of a table; what was not measured is None or empty and is shown as such."""

    configuration: ConfigurationRecord
    perplexities: list[PerplexityRecord]
    speed: SpeedRecord | None
    attention: AttentionRecord | None


class ExperimentRecord(Record):
    """One table."""

    name: str
    perplexity_tokens: int
    prompt_tokens: int
    generated_tokens: int
    rows: list[RowRecord]
