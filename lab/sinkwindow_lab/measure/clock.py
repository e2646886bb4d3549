"""The one timer: it interleaves the sides of a comparison, so that a slow minute affects all of them equally."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Clock(ABC):
    """Marks points in time, read afterwards."""

    @abstractmethod
    def mark(self) -> Any:
        """Mark a point in time, after the work that was issued before it."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks [s]."""
        return float(end - begin)


def _nothing() -> None:
    """Do nothing: a CPU has nothing to wait for, and most sides need no preparation."""


@dataclass
class HostClock(Clock):
    """Reads a host clock `now` [s], after `wait` has returned: then the device is idle."""

    now: Callable[[], float] = time.perf_counter
    wait: Callable[[], None] = _nothing

    def mark(self) -> float:
        """Return the time [s] at which everything issued so far is done."""
        self.wait()
        return self.now()


class CudaClock(Clock):
    """CUDA events: no synchronization per mark, which would inflate short steps; one wait when times are read."""

    def mark(self) -> torch.cuda.Event:
        """Record an event after everything issued so far."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the time between two events [s]."""
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def waiter(device: torch.device) -> Callable[[], None]:
    """Return a function that returns once a device is idle; on a CPU it does nothing."""
    if device.type == "cuda":
        return torch.cuda.synchronize
    if device.type == "mps":
        return torch.mps.synchronize
    return _nothing


def clock_for(device: torch.device) -> Clock:
    """Return the clock for a device: events on CUDA, otherwise the host's clock with a wait."""
    return CudaClock() if device.type == "cuda" else HostClock(wait=waiter(device))


def repeated(step: Callable[[], object], turn: int) -> Callable[[], object]:
    """Return a function that runs consecutive steps."""

    def steps() -> None:
        for _ in range(turn):
            step()

    return step if turn == 1 else steps


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    run: Callable[[], object]  # what is timed, once per sample
    ready: Callable[[], object] = _nothing  # done before each sample, untimed; leaves no work on the device
    samples: int | None = None  # how many this side gives, if not as many as the others
    event: Callable[[], str] | None = None  # returns after a sample what happened in it, an empty text for nothing


@dataclass
class Timed:
    """The samples of a side [ms], and what happened in some of them, by the sample's index."""

    ms: list[float] = field(default_factory=list)
    events: dict[int, str] = field(default_factory=dict)


def interleave(
    sides: Mapping[str, Side],
    samples: int,
    device: torch.device,
    *,
    warm_up: int = 2,
    clock: Clock | None = None,
    on_sample: Callable[[str], object] | None = None,
) -> dict[str, Timed]:
    """Time sides interleaved: one sample of each, then another one of each.

    Each sample begins and ends with the device idle. `warm_up` counts untimed rounds before the samples. A `clock` that
    advances inside a part of `run` alone times that part. `on_sample` is told the side of each sample.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more")
    clock, wait = clock or clock_for(device), waiter(device)
    counts = {name: samples if side.samples is None else side.samples for name, side in sides.items()}
    found = {name: Timed() for name in sides}
    for number in range(-warm_up, max(counts.values())):
        for name, side in sides.items():
            if number >= counts[name]:
                continue
            side.ready()
            wait()
            begin = clock.mark()
            side.run()
            took = clock.seconds(begin, clock.mark())
            event = "" if side.event is None else side.event()
            if number < 0:
                continue
            found[name].ms.append(round(1e3 * took, 6))
            if event:
                found[name].events[number] = event
            if on_sample is not None:
                on_sample(name)
    return found


def quartiles(samples: Sequence[float]) -> list[float]:
    """Return lower quartile, median and upper quartile of samples; a `ValueError` if there is none."""
    if not samples:
        raise ValueError("samples is empty: nothing was measured")
    return statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [*samples] * 3
