"""Time in cache update and attention, isolated: all layers of one token, with the device idle before and after.

This is never part of a run that reports TPOT: the waiting alone would change it. The probed steps are spread evenly
over a generation; between them the text is fed in long calls, which leave every session in the state that single tokens
would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkwindow.model.hooks import CACHE_WORK
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.clock import HostClock, Side, interleave, waiter
from sinkwindow_lab.records import Measurement, measured
from sinkwindow_lab.ways.configurations import Configuration, open_session
from sinkwindow_lab.ways.sessions import Session

PROBES = 16  # places in a generation
STEPS = 3  # consecutive tokens at each place; their median is used
FEED = 256  # tokens of a call between two places [tokens]


@dataclass
class StopWatch:
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

    def seconds(self, begin: float, end: float) -> float:
        """Return the time between two marks [s]."""
        return end - begin


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
    """Return the numbers of tokens seen at which to probe, ascending and spread evenly from the prompt's end on.

    Returns fewer than `probes`, but at least one, if the generation is too short for `STEPS` tokens at each.
    """
    count = max(1, min(probes, new_tokens // STEPS))
    return [prompt_tokens + new_tokens * index // count for index in range(count)]


class _Stream:
    """A text that a session reads in order, repeated from its start, with a stop at each place."""

    def __init__(self, session: Session, text: torch.Tensor, stops: Sequence[int]) -> None:
        self._session, self._text, self._seen = session, text, 0
        self._stops = iter([stop for place in stops for stop in (place, *[None] * (STEPS - 1))])

    def go_on(self) -> None:
        """Before the first step at a place, read up to it."""
        stop = next(self._stops)
        if stop is not None:
            while self._seen < stop:
                self._feed(min(FEED, stop - self._seen))
            self._feed(1)  # the step after a long call warms the caches of the CPU

    def step(self) -> None:
        """Feed one token."""
        self._feed(1)

    def _feed(self, count: int) -> None:
        columns = torch.arange(self._seen, self._seen + count, device=self._text.device) % self._text.shape[1]
        self._seen += count
        self._session.feed(self._text[:, columns], last_only=True)


def measure(
    configurations: Sequence[Configuration],
    model: PreTrainedModel,
    text: torch.Tensor,
    *,
    subject: str,
    prompt_tokens: int,
    new_tokens: int,
    probes: Sequence[int],
    on_step: Callable[[str], object] | None = None,
) -> list[Measurement]:
    """Measure the isolated attention time of several configurations over a generation, interleaved.

    `text` ([1, tokens]) repeats from its start if it is shorter than prompt and generation. `probes` is the number of
    places to measure for each configuration, `subject` the model's name. Returns a measurement per
    configuration and place.
    """
    todo = {
        one.name: places(prompt_tokens, new_tokens, count) for one, count in zip(configurations, probes, strict=True)
    }
    clock, sides, sessions = HostClock(wait=waiter(model.device)), {}, []
    with ExitStack() as stack:
        for one in configurations:
            session = open_session(one, model)
            stack.callback(session.close)
            stream = _Stream(session, text.to(model.device), todo[one.name])
            sessions.append(session)
            sides[one.name] = Side(stream.step, ready=stream.go_on, samples=STEPS * len(todo[one.name]))
        caches = [session.cache for session in sessions if session.cache is not None]
        with attention_watched(caches, clock) as watch:
            found = interleave(sides, 1, model.device, warm_up=0, clock=watch, on_sample=on_step)
    measurements = []
    for name, own in todo.items():
        for number, place in enumerate(own):
            samples = found[name].ms[STEPS * number : STEPS * (number + 1)]
            measurements += measured("attention", subject, name, place, {"attention": ("ms", samples)})
    return measurements
