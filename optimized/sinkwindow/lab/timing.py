"""Clocks that wait for the device, and summaries that keep their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

Done = TypeVar("Done")


class Clock(Protocol):
    """Marks places in a program; the time between them is read afterwards."""

    def mark(self) -> Any:
        """A place in time, after the work that was issued before it."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Times of the marks counted from the first one [s]."""


def _nothing() -> None:
    """A CPU has nothing to wait for."""


class HostClock:
    """Reads a host clock, after waiting for the device."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, wait: Callable[[], None] = _nothing) -> None:
        """Remembers both callables.

        Args:
            now: the time [s]; a test passes a fake.
            wait: returns when the device is idle.
        """
        self._now = now
        self._wait = wait

    def mark(self) -> float:
        """The time [s] at which everything issued so far is done."""
        self._wait()
        return self._now()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Times of the marks counted from the first one [s]."""
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """CUDA events: no synchronisation per mark, which would inflate short steps; one wait when times are read."""

    def mark(self) -> torch.cuda.Event:
        """An event recorded behind everything issued so far."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Times of the events counted from the first one [s]."""
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) / 1e3 for mark in marks]


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that returns once a device is idle.

    Args:
        device: any torch device.

    Returns:
        The function; on a CPU it does nothing.
    """
    if device.type == "cuda":
        return torch.cuda.synchronize
    if device.type == "mps":
        return torch.mps.synchronize
    return _nothing


def clock_for(device: torch.device) -> Clock:
    """The right clock for a device.

    Args:
        device: where the model runs.

    Returns:
        Events on CUDA, the host's clock with a wait elsewhere.
    """
    return CudaClock() if device.type == "cuda" else HostClock(wait=waiter(device))


def milliseconds(run: Callable[[], object], clock: Clock) -> float:
    """Times one call; the device must be idle before it.

    Args:
        run: what to time.
        clock: of the device that it runs on.

    Returns:
        The time until its work is done [ms].
    """
    marks = [clock.mark()]
    run()
    marks.append(clock.mark())
    return 1e3 * clock.seconds(marks)[1]


class Laps:
    """Times pieces of work between which others have their turn; each begins with the device idle."""

    def __init__(self, clock: Clock, wait: Callable[[], None]) -> None:
        """Starts without laps.

        Args:
            clock: of the device.
            wait: returns once the device is idle, or a piece would be launched while another's work goes on.
        """
        self._clock = clock
        self._wait = wait
        self._marks: list[tuple[Any, Any]] = []

    def lap(self, work: Callable[[], Done]) -> Done:
        """Times one piece.

        Args:
            work: what is timed.

        Returns:
            What it returns.
        """
        self._wait()
        before = self._clock.mark()
        done = work()
        self._marks.append((before, self._clock.mark()))
        return done

    def seconds(self) -> list[float]:
        """Time of each piece [s]."""
        return [self._clock.seconds(pair)[1] for pair in self._marks]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples, in the samples' unit."""

    median: float
    lower: float
    upper: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """Summarises samples without losing their spread.

    Args:
        samples: one or more numbers.

    Returns:
        Median, first and third quartile, and how many there were.

    Raises:
        ValueError: if there is no sample.
    """
    if not samples:
        message = "samples is empty: nothing was measured"
        raise ValueError(message)
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, lower, upper, len(samples))
