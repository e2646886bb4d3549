"""The cache at work: its shape step by step, and every eviction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sinkwindow import Eviction, StreamingCache
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.ways.sessions import cache_keyword

AROUND = 2  # steps shown before and after each eviction; the others only fill the cache


def tiny_model() -> PreTrainedModel:
    """Return a random Llama of two layers: the mechanics do not depend on trained weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.train(mode=False)
    return model


def log(num_sinks: int, window: int, buffer: int, *, evictions: int = 3) -> Iterator[str]:
    """Feed one token at a time, up to a number of evictions, and yield a log of what the cache does, line by line.

    Raises:
        LabError: if a number is out of range.
    """
    if evictions < 1:
        raise LabError(f"evictions={evictions} must be 1 or more")
    model, events = tiny_model(), list[Eviction]()
    cache = _cache(model, num_sinks, window, buffer, events.append)
    limit = num_sinks + window
    yield f"S={num_sinks} sinks, W={window} recent, B={buffer} buffer: evict at {limit + buffer + 1}, down to {limit}"
    try:
        yield from _steps(model, cache, events, limit=limit, buffer=buffer, evictions=evictions)
    finally:
        cache.detach()
    yield f"{cache.seen_tokens[0]} tokens seen, {cache.num_evictions} evictions, {cache.nbytes:,} bytes at every length"


def _cache(
    model: PreTrainedModel, num_sinks: int, window: int, buffer: int, on_evict: Callable[[Eviction], object]
) -> StreamingCache:
    try:
        return StreamingCache(model, num_sinks=num_sinks, window=window, buffer=buffer, on_evict=on_evict)
    except (TypeError, ValueError) as error:
        raise LabError(str(error)) from error


def _steps(
    model: PreTrainedModel, cache: StreamingCache, events: list[Eviction], *, limit: int, buffer: int, evictions: int
) -> Iterator[str]:
    shape, seen, shown_until = _shape(model), 0, 1
    while len(events) < evictions or seen < shown_until:
        before = len(events)
        _feed(model, cache, seen)
        seen += 1
        kept = len(cache.retained_tokens[0])
        if len(events) > before:
            shown_until = seen + AROUND
            yield _eviction_line(seen, events[-1])
        elif seen <= max(shown_until, 1) or kept > limit + buffer - AROUND:
            yield f"step {seen:>6}  seen {seen:>6}  keys per layer {shape.format(kept=kept)}"


@torch.inference_mode()
def _feed(model: PreTrainedModel, cache: StreamingCache, number: int) -> None:
    token = torch.tensor([[number % model.config.vocab_size]])
    model(input_ids=token, **{cache_keyword(model): cache})


def _shape(model: PreTrainedModel) -> str:
    heads = model.config.num_key_value_heads
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    return f"[1, {heads}, {{kept}}, {head_dim}]"


def _eviction_line(seen: int, event: Eviction) -> str:
    gone = f"tokens {event.tokens.start}..{event.tokens.stop - 1} gone"
    return f"step {seen:>6}  seen {seen:>6}  evict {event.length_before} -> {event.length_after}  {gone}"
