"""Time in cache update and attention, isolated: all layers of one token, with the device idle before and after.

This is never part of a run that reports TPOT: the waiting alone would change it. The probed steps are spread evenly
over a generation; between them the text is fed in long calls, which leave every session in the state that single tokens
would. Compared configurations are probed interleaved, place by place, so that a slow minute affects all of them
equally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.timing import HostClock, waiter
from sinkwindow_lab.records import AttentionProbe, AttentionRecord
from sinkwindow_lab.ways.configurations import Configuration
from sinkwindow_lab.ways.sessions import Session, open_session

PROBES = 16  # places in a generation
STEPS = 3  # consecutive tokens at each place; their median is used
CACHE_WORK = ("_begin", "update", "_end")
FEED = 256  # tokens of a call between two places [tokens]


@dataclass
class StopWatch:
    """Adds up the time inside wrapped calls; a call inside a wrapped call is part of it, not counted twice."""

    clock: HostClock
    seconds: float = 0.0
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
                self.seconds += self.clock.mark() - start
                self.calls += 1
                self._inside = False

        return timed


@contextmanager
def attention_watched(cache: Any, clock: HostClock) -> Iterator[StopWatch]:
    """Time a cache's work and the attention functions of transformers while the block runs.

    A cache's work is `update`; `StreamingCache` evicts before and after the layers, and that is counted too.
    """
    watch = StopWatch(clock)
    attention = StopWatch(clock)
    look_up = ALL_ATTENTION_FUNCTIONS.get_interface

    def timed_look_up(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        attention.calls += 1
        return watch.wrap(look_up(*args, **kwargs))

    # Set on the two objects, not on their classes: other caches and the code of transformers do not change.
    ALL_ATTENTION_FUNCTIONS.get_interface = timed_look_up  # type: ignore[method-assign]
    work = [name for name in CACHE_WORK if hasattr(cache, name)]
    for name in work:
        setattr(cache, name, watch.wrap(getattr(cache, name)))
    try:
        yield watch
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface
        for name in work:
            delattr(cache, name)
    if attention.calls == 0:
        raise LabError("this model does not call its attention through AttentionInterface: its time cannot be isolated")


def measure(
    configurations: Sequence[Configuration],
    model: PreTrainedModel,
    text: torch.Tensor,
    *,
    prompt_tokens: int,
    new_tokens: int,
    probes: Sequence[int],
    on_probe: Callable[[int], None] | None = None,
) -> list[AttentionRecord]:
    """Measure the isolated attention time of several configurations over a generation, interleaved.

    `text` ([1, tokens]) repeats from its start if it is shorter than prompt and generation. `probes` is the number of
    places to measure for each configuration.

    Raises:
        LabError: if a configuration or the model does not allow it.
    """
    device = next(model.parameters()).device
    clock = HostClock(wait=waiter(device))
    todo = [places(prompt_tokens, new_tokens, count) for count in probes]
    found: list[list[AttentionProbe]] = [[] for _ in configurations]
    with ExitStack() as stack:
        streams = []
        for configuration in configurations:
            session = open_session(configuration, model)
            stack.callback(session.close)
            streams.append(_Stream(session, text.to(device)))
        for place in sorted({place for own in todo for place in own}):
            for stream, own, samples in zip(streams, todo, found, strict=True):
                if place in own:
                    stream.feed_until(place)
                    samples.append(AttentionProbe(tokens_seen=place, step_ms=_probe(stream, clock)))
                    if on_probe is not None:
                        on_probe(place)
    return [
        AttentionRecord(
            configuration=configuration.name,
            prompt_tokens=prompt_tokens,
            generated_tokens=new_tokens,
            layers=int(model.config.num_hidden_layers),
            probes=samples,
        )
        for configuration, samples in zip(configurations, found, strict=True)
    ]


def places(prompt_tokens: int, new_tokens: int, probes: int) -> list[int]:
    """Return the numbers of tokens seen at which to probe, ascending and spread evenly from the prompt's end on.

    Returns fewer than `probes`, but at least one, if the generation is too short for `STEPS` tokens at each.
    """
    count = max(1, min(probes, new_tokens // STEPS))
    return [prompt_tokens + new_tokens * index // count for index in range(count)]


class _Stream:
    """A text that a session reads in order, repeated from its start."""

    def __init__(self, session: Session, text: torch.Tensor) -> None:
        self.session = session
        self._text = text
        self._seen = 0

    def feed(self, count: int) -> None:
        columns = torch.arange(self._seen, self._seen + count, device=self._text.device) % self._text.shape[1]
        self._seen += count
        self.session.feed(self._text[:, columns], last_only=True)

    def feed_until(self, place: int) -> None:
        while self._seen < place:
            self.feed(min(FEED, place - self._seen))


def _probe(stream: _Stream, clock: HostClock) -> list[float]:
    """Return the milliseconds of `STEPS` decode steps, each with one token."""
    stream.feed(1)  # the step after a long call warms the caches of the CPU
    samples = []
    for _ in range(STEPS):
        with attention_watched(stream.session.cache, clock) as watch:
            stream.feed(1)
        samples.append(1e3 * watch.seconds)
    return samples
