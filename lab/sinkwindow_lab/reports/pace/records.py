"""Comparisons of two sides measured in one run, with all their samples; ratios and verdicts are computed from them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkwindow_lab.measure.timing import Spread, spread
from sinkwindow_lab.records import MachineRecord, ModelRecord, Record

Ratio = Literal["cost", "speed", "longest"]
SCHEMA = 1


class Series(Record):
    """Samples of one side, in one unit; `events` names what the cache did in a step, by the sample's index."""

    name: str
    unit: str
    values: list[float] = Field(min_length=1)
    events: dict[int, str] = Field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        """Median and quartiles."""
        return spread(self.values)

    @property
    def median(self) -> float:
        """Median of the samples."""
        return self.spread.median

    @property
    def longest_event(self) -> int:
        """Index of the largest sample with an event, or of the largest sample if there is no event."""
        return max(self.events or range(len(self.values)), key=self.values.__getitem__)

    @property
    def longest(self) -> int:
        """Index of the largest sample."""
        return max(range(len(self.values)), key=self.values.__getitem__)


class Comparison(Record):
    """Our cache compared with something else.

    `cost` is our median over the other's, at most `bar`. `speed` is the other's median time over ours, at least `bar`.
    `longest` is our longest step with an event over our median step, at most `bar`. Without a bar it is only shown.
    `floor` is a time, in the unit of `ours`, that no cache can beat on this machine, if there is one.
    """

    part: str
    model: str
    what: str
    ratio_kind: Ratio
    ours: Series
    other: Series
    bar: float | None = None
    floor: Series | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """The number that is compared with the bar."""
        if self.ratio_kind == "longest":
            return self.ours.values[self.ours.longest_event] / self.ours.median
        return self._ratio_of(self.ours)

    @property
    def met(self) -> bool:
        """Whether the bar is met; true if there is none."""
        return self._allows(self.ratio)

    @property
    def over_floor(self) -> float | None:
        """Our median over the floor's; None without a floor."""
        return None if self.floor is None else self.ours.median / self.floor.median

    @property
    def free(self) -> float | None:
        """The ratio of the floor itself, better than any cache's; None without a floor."""
        return None if self.floor is None else self._ratio_of(self.floor)

    @property
    def attainable(self) -> bool:
        """Whether the floor itself meets the bar; true if there is none."""
        return self.free is None or self._allows(self.free)

    def _ratio_of(self, side: Series) -> float:
        return self.other.median / side.median if self.ratio_kind == "speed" else side.median / self.other.median

    def _allows(self, ratio: float) -> bool:
        if self.bar is None:
            return True
        return ratio >= self.bar if self.ratio_kind == "speed" else ratio <= self.bar


class BandwidthRecord(Record):
    """Bytes moved per second [GB/s] for each way to move them, for a tensor of `megabytes`."""

    device: str
    megabytes: float
    rates: dict[str, list[float]]

    @property
    def best(self) -> float:
        """The fastest way's median [GB/s]: the strictest floor."""
        return max(spread(values).median for values in self.rates.values())

    def least_ms(self, count: int) -> float:
        """Return the time to read `count` bytes once the fastest way [ms]."""
        return count / self.best / 1e6


class FloorRecord(Record):
    """Lower bounds of a decode step, for one model and batch size."""

    model: str
    batch: int
    context: int
    weight_bytes: int
    cache_bytes: int
    bare: Series
    short: Series

    @property
    def read_bytes(self) -> int:
        """What a step has to read once, weights and cache."""
        return self.weight_bytes + self.cache_bytes


class SpeedReport(Record):
    """One run of `nox -s speed`."""

    schema_version: int = SCHEMA
    quick: bool
    machine: MachineRecord
    models: list[ModelRecord]
    bandwidth: BandwidthRecord
    floors: list[FloorRecord]
    comparisons: list[Comparison]
    seconds: float

    @property
    def missed(self) -> list[Comparison]:
        """Comparisons whose bar is not met."""
        return [one for one in self.comparisons if not one.met]
