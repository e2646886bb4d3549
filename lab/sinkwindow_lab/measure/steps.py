"""Single tokens of several ways, timed at places of a text: whole steps, or their cache update and attention alone.

Cache update and attention are timed with the device idle before and after. That is never part of a run that reports
TPOT: the waiting alone would change it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkwindow.model.hooks import CACHE_WORK
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.clock import Clock, HostClock, Side, interleave, waiter
from sinkwindow_lab.records import Configuration, Measurement, measured
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import Reader

PROBES = 16  # places in a generation
STEPS = 3  # consecutive tokens at each place; their median is used
WARM_UP = 1  # untimed tokens before the timed ones; for re-computation one takes a whole window
Row: TypeAlias = tuple[Configuration, Sequence[int], int]  # a way, its places, and how many tokens are timed at each


@dataclass
class StopWatch(Clock):
    """A clock that advances only inside wrapped calls; a call inside a wrapped call is part of it."""

    clock: HostClock
    elapsed: float = 0.0
    calls: int = 0
    _inside: bool = False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            start = self.clock.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.elapsed += self.clock.mark() - start
                self.calls += 1
                self._inside = False

        return timed

    def mark(self) -> float:
        """Return the time inside wrapped calls so far [s]."""
        return self.elapsed


@contextmanager
def attention_watched(caches: Sequence[Any], clock: HostClock) -> Iterator[StopWatch]:
    """Time the work of caches and the attention functions of transformers while the block runs.

    A cache's work is `update`; `StreamingCache` evicts before and after the layers, and that is counted too.
    """
    watch, attention = StopWatch(clock), 0
    look_up = ALL_ATTENTION_FUNCTIONS.get_interface

    def timed_look_up(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        nonlocal attention
        attention += 1
        return watch.wrap(look_up(*args, **kwargs))

    # Set on the objects, not on their classes: other caches and the code of transformers do not change.
    ALL_ATTENTION_FUNCTIONS.get_interface = timed_look_up  # type: ignore[method-assign]
    work = [(cache, name) for cache in caches for name in CACHE_WORK if hasattr(cache, name)]
    for cache, name in work:
        setattr(cache, name, watch.wrap(getattr(cache, name)))
    try:
        yield watch
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface
        for cache, name in work:
            delattr(cache, name)
    if attention == 0:
        raise LabError("this model does not call its attention through AttentionInterface: its time cannot be isolated")


def places(prompt_tokens: int, new_tokens: int, probes: int) -> list[int]:
    """Return where to probe, from the prompt's end on; fewer than `probes` if each has less than `STEPS` tokens."""
    count = max(1, min(probes, new_tokens // STEPS))
    return [prompt_tokens + new_tokens * index // count for index in range(count)]


def longest(rows: Sequence[Row]) -> int:
    """Return the number of tokens that the rows read."""
    return max(max(own) + WARM_UP + repeats for _, own, repeats in rows)


def measure(
    part: str,
    subject: str,
    rows: Sequence[Row],
    model: PreTrainedModel,
    text: torch.Tensor,
    on_step: Callable[[str], object] | None = None,
) -> list[Measurement]:
    """Time single tokens of all rows, interleaved, at places: tokens streamed, or S + W in the part `step sizes`.

    `text` ([1, tokens]) is fed in long calls between the places, and repeats from its start if it is too short. In the
    part `attention` only cache update and attention are timed.
    """
    readers, found = {}, {way.name: list[Measurement]() for way, _, _ in rows}
    with ExitStack() as stack:
        for way, _, _ in rows:
            readers[way.name] = Reader(stack.enter_context(open_session(way, model)), text.to(model.device))
        caches = [one.session.cache for one in readers.values() if one.session.cache is not None]
        watch = None
        if part == "attention":
            watch = stack.enter_context(attention_watched(caches, HostClock(wait=waiter(model.device))))
        for stops in itertools.zip_longest(*(own for _, own, _ in rows)):
            going = [(way, stop, repeats) for (way, _, repeats), stop in zip(rows, stops, strict=True) if stop]
            for way, stop, _ in going:
                readers[way.name].read_to(stop)
            sides = {way.name: Side(readers[way.name].step, samples=repeats) for way, _, repeats in going}
            timed = interleave(sides, 1, model.device, warm_up=WARM_UP, clock=watch, on_sample=on_step)
            for way, stop, _ in going:
                figures = {"TPOT" if watch is None else "attention": ("ms", timed[way.name].ms)}
                if watch is None:
                    figures["cache"] = "bytes", [float(readers[way.name].session.cache_bytes)]
                at = way.size if part == "step sizes" else stop
                found[way.name] += measured(part, subject, way.name, at, figures)
    return [one for own in found.values() for one in own]
