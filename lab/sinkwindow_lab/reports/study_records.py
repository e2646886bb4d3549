"""What the studies measure, as records: each table and picture is rendered from one of these alone."""

from __future__ import annotations

import statistics

from pydantic import Field

from sinkwindow_lab.records import ConfigurationRecord, PerplexityRecord, Record


class ScoreStudy(Record):
    """Perplexities of several configurations on the same texts."""

    tokens: int
    configurations: list[ConfigurationRecord]
    scores: list[PerplexityRecord]

    def score(self, configuration: str, corpus: str) -> PerplexityRecord | None:
        """Return the score of a configuration on a text, if there is one."""
        found = (one for one in self.scores if (one.configuration, one.corpus) == (configuration, corpus))
        return next(found, None)


class Curve(Record):
    """Mean loss of consecutive bins of a text; the last one may be shorter."""

    configuration: str
    mean_nll: list[float]


class AlongStudy(Record):
    """Loss along a text, in bins of `bin_tokens` targets."""

    corpus: str
    tokens: int
    bin_tokens: int
    trained_length: int | None
    configurations: list[ConfigurationRecord]
    curves: list[Curve]
    scores: list[PerplexityRecord]


class StepsRecord(Record):
    """Decode steps at one place: `tokens_seen` were fed before, `cache_tokens` is S + W, or W."""

    configuration: str
    kind: str
    cache_tokens: int | None
    tokens_seen: int
    cache_bytes: int
    step_ms: list[float] = Field(min_length=1)

    @property
    def milliseconds(self) -> float:
        """Median time of a token [ms]."""
        return float(statistics.median(self.step_ms))


class StepsStudy(Record):
    """Time and memory of a token: against the text's length, and against the cache's size."""

    configurations: list[ConfigurationRecord]
    along: list[StepsRecord]
    sizes: list[StepsRecord]


class DistanceBin(Record):
    """Targets whose 4-gram occurred last `nearest` to `farthest` tokens ago; both None: never before."""

    nearest: int | None
    farthest: int | None
    targets: int
    mean_difference: float
    standard_error: float


class WhereCurve(Record):
    """Loss of a configuration minus the dense one, by distance."""

    configuration: str
    corpus: str
    mean_difference: float
    bins: list[DistanceBin]


class WhereStudy(Record):
    """Where the loss occurs; targets before the first eviction are left out, since nothing was lost there."""

    ngram: int
    tokens: int
    configurations: list[ConfigurationRecord]
    curves: list[WhereCurve]


class RecallPoint(Record):
    """Questions at one distance: `found` were answered to the last digit."""

    configuration: str
    lines_back: int
    nearest_tokens: int
    farthest_tokens: int
    asked: int
    found: int

    @property
    def share(self) -> float:
        """Answered [0..1]."""
        return self.found / self.asked


class RecallStudy(Record):
    """Facts in a text and questions about them, by distance."""

    seeds: list[int]
    corpus: str
    tokens: int
    example: str
    configurations: list[ConfigurationRecord]
    points: list[RecallPoint]


class Studies(Record):
    """Everything beyond the two experiments of the original reproduction; what was not requested is None."""

    mistakes: ScoreStudy | None = None
    sinks: ScoreStudy | None = None
    sizes: ScoreStudy | None = None
    along: AlongStudy | None = None
    steps: StepsStudy | None = None
    where: WhereStudy | None = None
    recall: RecallStudy | None = None
