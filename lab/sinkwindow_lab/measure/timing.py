"""Clocks that wait for the device, and summaries that keep the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

Done = TypeVar("Done")


class Clock(Protocol):
    """Marks points in time, read afterwards."""

    def mark(self) -> Any:
        """Mark a point in time, after the work that was issued before it."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Return the times of the marks counted from the first one [s]."""


def _nothing() -> None:
    """Do nothing: a CPU has nothing to wait for."""


class HostClock:
    """Reads a host clock, after waiting for the device."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, wait: Callable[[], None] = _nothing) -> None:
        """Store a function that returns the time [s] and one that returns when the device is idle."""
        self._now = now
        self._wait = wait

    def mark(self) -> float:
        """Return the time [s] at which everything issued so far is done."""
        self._wait()
        return self._now()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Return the times of the marks counted from the first one [s]."""
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """CUDA events: no synchronization per mark, which would inflate short steps; one wait when times are read."""

    def mark(self) -> torch.cuda.Event:
        """Record an event after everything issued so far."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Return the times of the events counted from the first one [s]."""
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) / 1e3 for mark in marks]


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


def milliseconds(run: Callable[[], object], clock: Clock) -> float:
    """Time one call until its work is done [ms]; the device must be idle before it."""
    marks = [clock.mark()]
    run()
    marks.append(clock.mark())
    return 1e3 * clock.seconds(marks)[1]


class Laps:
    """Times pieces of work that are interleaved with others; each begins with the device idle."""

    def __init__(self, clock: Clock, wait: Callable[[], None]) -> None:
        """Start without laps.

        `wait` returns once the device is idle; without it a piece would be launched while other work is running.
        """
        self._clock = clock
        self._wait = wait
        self._marks: list[tuple[Any, Any]] = []

    def lap(self, work: Callable[[], Done]) -> Done:
        """Time one piece of work and return its result."""
        self._wait()
        before = self._clock.mark()
        done = work()
        self._marks.append((before, self._clock.mark()))
        return done

    def seconds(self) -> list[float]:
        """Return the time of each piece [s]."""
        return [self._clock.seconds(pair)[1] for pair in self._marks]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples, in the samples' unit."""

    median: float
    lower: float
    upper: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """Summarize samples as median and quartiles, with their number.

    Raises:
        ValueError: if there is no sample.
    """
    if not samples:
        raise ValueError("samples is empty: nothing was measured")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, lower, upper, len(samples))
