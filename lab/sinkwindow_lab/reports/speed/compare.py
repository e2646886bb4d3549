"""The comparisons of a speed report: two sides of a part, their ratio, the target and the lower bound."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sinkwindow_lab.records import Measurement, Report
from sinkwindow_lab.reports.speed.floors import Place
from sinkwindow_lab.reports.speed.plan import ALONE, BARE, BUFFER, COMPARED, LONG, LONGEST, SHORT, SHORTER, mean_length

READ = ("weights", "keys and values")  # what a step has to read
Sides = dict[str, dict[str, Measurement]]  # by side and metric; the first metric of a side is the one compared


@dataclass(frozen=True)
class Comparison:
    """Our side compared with another: a cost is at most its target, a speed at least."""

    place: Place
    what: str
    ours: Measurement
    other: Measurement
    target: float | None = None  # None if it is only shown
    speed: bool = False  # the ratio is the other's time over ours; else ours over the other's
    floor: float | None = None  # a time that no cache can beat on this machine, if there is one
    note: str = ""

    @property
    def ratio(self) -> float:
        """The number that is compared with the target."""
        return self._ratio_of(self.ours.median)

    @property
    def met(self) -> bool:
        """Whether the target is met; true if there is none, false for a NaN."""
        return self._allows(self.ratio)

    @property
    def possible(self) -> bool:
        """Whether a cache can meet the target on this machine: the floor, if there is one, does not miss it."""
        return self.floor is None or self._allows(self._ratio_of(self.floor))

    def complaint(self) -> str:
        """Describe a missed target with its number, and with the floor's number if the floor misses it too."""
        side, free = "least" if self.speed else "most", self._ratio_of(self.floor or self.ours.median)
        bound = "" if self.possible else f"; the lower bound itself is at {free:.3f}x here"
        what = f"{self.place.subject}, {self.place.part}, {self.what}"
        return f"{what}: {self.ratio:.3f}x, target at {side} {self.target:.2f}x{bound}"

    def _ratio_of(self, time: float) -> float:
        return self.other.median / time if self.speed else time / self.other.median

    def _allows(self, ratio: float) -> bool:
        return self.target is None or (ratio >= self.target if self.speed else ratio <= self.target)


def places(measurements: Sequence[Measurement]) -> dict[Place, Sides]:
    """Return measurements by place, side and metric, in the order measured."""
    found: dict[Place, Sides] = {}
    for one in measurements:
        sides = found.setdefault(Place(one.part, one.subject, one.at), {})
        sides.setdefault(one.configuration, {})[one.metric] = one
    return found


def best_rate(found: Mapping[Place, Sides]) -> float:
    """Return the fastest way's bandwidth [GB/s], which gives the strictest floor; NaN if it was not measured."""
    ways = [way for place, sides in found.items() if place.part == "bandwidth" for way in sides.values()]
    return max((way["rate"].median for way in ways), default=float("nan"))


def least_ms(sides: Sides, rate: float) -> float:
    """Return the time to read the bytes of a step once [ms]."""
    return sum(sides[SHORT][one].median for one in READ) / rate / 1e6


def comparisons(report: Report) -> list[Comparison]:
    """Return all comparisons of a report, in the order measured."""
    found = places(report.measurements)
    return [one for place, sides in found.items() for one in _rows(place, sides, report.plan, best_rate(found))]


def _rows(place: Place, sides: Sides, plan: Mapping[str, Any], rate: float) -> Iterator[Comparison]:
    batch = "" if place.at is None else f"batch {place.at}, "
    seen = int(sides["ours, late"]["seen"].median) if place.part == "tpot" else 0
    if place.part == "tricks":
        for what in dict.fromkeys(metric for metrics in sides.values() for metric in metrics):
            ours, other = (metrics[what] for metrics in sides.values() if what in metrics)
            yield Comparison(place, what, ours, other, note=ours.configuration)
    words = {"prompt": LONG * plan["prompt_limit"], "shorter": SHORTER * plan["prompt_limit"], "longer": BUFFER // 2}
    words |= {"lazy": mean_length(plan["limit"]), "paper": mean_length(plan["limit"], 0), "seen": seen, **plan}
    for one in COMPARED:
        if one.part == place.part:
            ours, other = (next(iter(sides[side.format_map(words)].values())) for side in (one.ours, one.other))
            wanted = one.target[place.at or 1] if isinstance(one.target, Mapping) else one.target
            wanted, floor = wanted if seen >= one.since else None, _floor(place.part, sides, other, rate)
            yield Comparison(place, batch + one.what.format_map(words), ours, other, wanted, one.speed, floor)
    for side, target in LONGEST.items() if place.part == "tpot" else ():
        yield _longest(replace(place, part="longest"), f"{batch}{side}", sides[side], target)


def _floor(part: str, sides: Sides, other: Measurement, rate: float) -> float | None:
    if part == "attention":
        return other.median
    if part == "tpot":  # a step with almost no context and bare attention
        both = zip(sides[SHORT]["TPOT"].samples, sides[BARE]["TPOT"].samples, strict=True)
        return statistics.median(map(sum, both))
    if part == "compiled":
        return least_ms(sides, rate)
    return sides[ALONE]["time"].median if ALONE in sides else None


def _longest(place: Place, what: str, metrics: dict[str, Measurement], target: float) -> Comparison:
    """Compare the longest step in which the cache did something, or of all if it never did, with the median step."""
    steps = metrics["TPOT"]
    events = {metric[6:]: one for metric, one in metrics.items() if metric.startswith("TPOT, ")}
    event = max(events, key=lambda name: max(events[name].samples), default="nothing")
    longest = {"configuration": "longest", "samples": [max(events.get(event, steps).samples)]}
    kinds = ", ".join(sorted({kind for name in events for kind in name.split(" + ")})) or "no event"
    note = f"{event}; {len(steps.samples)} steps with {kinds}; any step: {max(steps.samples) / steps.median:.2f}x"
    median = steps.model_copy(update={"configuration": "median"})
    return Comparison(place, what, steps.model_copy(update=longest), median, target, note=note)
