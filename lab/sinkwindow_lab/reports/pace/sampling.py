"""Sides of a comparison timed interleaved, so that a slow minute of the machine affects all of them equally."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sinkwindow_lab.measure.timing import Clock, clock_for, milliseconds, waiter
from sinkwindow_lab.reports.pace.records import Series


def _nothing() -> None:
    """Do nothing: most sides need no preparation."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        run: what is timed, once per sample.
        ready: done before each sample, outside the timed region; it must not leave work on the device.
        event: returns after a sample what the cache did in it, an empty text for nothing.
    """

    run: Callable[[], object]
    ready: Callable[[], object] = _nothing
    event: Callable[[], str] | None = None


def in_turns(
    sides: Mapping[str, Side],
    samples: int,
    device: torch.device,
    *,
    warm_up: int = 2,
    clock: Clock | None = None,
) -> dict[str, Series]:
    """Time sides interleaved, one sample each; return a series [ms] per side.

    Each sample begins and ends with the device idle; the first `warm_up` rounds do not count.

    Raises:
        ValueError: if `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more")
    clock, wait = clock or clock_for(device), waiter(device)
    values: dict[str, list[float]] = {name: [] for name in sides}
    events: dict[str, dict[int, str]] = {name: {} for name in sides}
    for number in range(-warm_up, samples):
        for name, side in sides.items():
            side.ready()
            wait()
            took = round(milliseconds(side.run, clock), 6)
            event = "" if side.event is None else side.event()
            if number < 0:
                continue
            values[name].append(took)
            if event:
                events[name][number] = event
    return {name: Series(name=name, unit="ms", values=values[name], events=events[name]) for name in sides}
