"""The records of the GPU report."""

from __future__ import annotations

from sinkwindow_lab.records import MachineRecord, ModelRecord, Record
from sinkwindow_lab.reports.pace.records import BandwidthRecord, Series

SCHEMA = 2


class LawRecord(Record):
    """One law checked on the device; `plain_error` is that of the reference's mathematics in the same dtype."""

    law: str
    shape: str
    dtype: str
    device: str
    error: float
    plain_error: float
    rounding_step: float
    retained_equal: bool

    @property
    def allowed(self) -> float:
        """Largest error that the dtype explains."""
        return 2 * self.plain_error + self.rounding_step

    @property
    def holds(self) -> bool:
        """Whether the law holds; a NaN does not."""
        return self.error <= self.allowed and self.retained_equal


class PointRecord(Record):
    """One way of remembering at one length: time per output token and attention time [ms].

    `read_bytes` is what a step must read: weights, and keys and values of `context` tokens.
    """

    model: str
    way: str
    limit: int
    streamed: int
    context: int
    read_bytes: int
    cache_bytes: int
    tpot: Series
    short: Series
    attention: Series | None = None
    bare: Series | None = None

    def over_bandwidth(self, rate: float) -> float:
        """Return TPOT over the time of reading `read_bytes` at `rate` [GB/s]."""
        return self.tpot.median / (self.read_bytes / rate / 1e6)


class PromptRecord(Record):
    """A prompt read in chunks: time per token, and the peak of memory."""

    model: str
    way: str
    tokens: int
    chunk: int
    series: Series
    weight_bytes: int
    tensor_bytes: int


class GpuReport(Record):
    """One run of `gpu-report`; `skipped` names what the time did not allow."""

    schema_version: int = SCHEMA
    on_gpu: bool
    machine: MachineRecord
    bandwidth: BandwidthRecord
    models: list[ModelRecord]
    points: list[PointRecord]
    prompts: list[PromptRecord]
    laws: list[LawRecord]
    skipped: list[str]
    seconds: float
    finished: bool
