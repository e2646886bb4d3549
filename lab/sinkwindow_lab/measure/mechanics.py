"""The cache at work: its shape step by step, and every eviction."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkwindow import Eviction, StreamingCache
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.micro import geometry
from sinkwindow_lab.measure.requirements import check_memory
from sinkwindow_lab.ways.sessions import cache_keyword

AROUND = 2  # steps shown before and after each eviction; the others only fill the cache


def log(num_sinks: int, window: int, buffer: int, *, evictions: int = 3) -> Iterator[str]:
    """Feed one token at a time to a tiny model, up to a number of evictions, and yield a log, line by line."""
    if evictions < 1:
        raise LabError(f"evictions={evictions} must be 1 or more")
    model, events = random_model("tiny"), list[Eviction]()
    check_memory(model, sum(max(one, 0) for one in (num_sinks, window, buffer)), "--sinks, --window and --buffer:")
    try:
        cache = StreamingCache(model, num_sinks=num_sinks, window=window, buffer=buffer, on_evict=events.append)
    except (TypeError, ValueError) as error:
        raise LabError(str(error)) from error
    limit, sizes, seen, shown_until = num_sinks + window, geometry(model), 0, 1
    yield f"S={num_sinks} sinks, W={window} recent, B={buffer} buffer: evict at {limit + buffer + 1}, down to {limit}"
    while len(events) < evictions or seen < shown_until:
        before, token = len(events), torch.tensor([[seen % model.config.vocab_size]])
        with torch.inference_mode():
            model(input_ids=token, **{cache_keyword(model): cache})
        seen += 1
        kept, step = len(cache.retained_tokens[0]), f"step {seen:>6}  seen {seen:>6}"
        if len(events) > before:
            shown_until, event = seen + AROUND if before < evictions else shown_until, events[-1]
            gone = f"tokens {event.tokens.start}..{event.tokens.stop - 1} gone"
            yield f"{step}  evict {event.length_before} -> {event.length_after}  {gone}"
        elif seen <= shown_until or kept > limit + buffer - AROUND:
            yield f"{step}  keys per layer [1, {sizes.kv_heads}, {kept}, {sizes.head_dim}]"
    cache.detach()
    yield f"{cache.seen_tokens[0]} tokens seen, {cache.num_evictions} evictions, {cache.nbytes:,} bytes at every length"
