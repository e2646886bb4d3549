"""A decode step of many streams, each with a full cache: separate caches, one batch, continuous batching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from sinkwindow import StreamingCache
from sinkwindow.retention import Retention
from sinkwindow_lab.inputs.shapes import token_ids


@dataclass(frozen=True)
class Way:
    """A way to run streams: `step` gives each a token; `nbytes` holds their keys and values."""

    step: Callable[[], object]
    nbytes: int


def one_batch(model: PreTrainedModel, rule: Retention, streams: int) -> Way:
    """Return one cache with a row for each stream, past its first eviction."""
    cache = StreamingCache(model, rule.num_sinks, rule.window, rule.buffer)
    with torch.no_grad():
        model(token_ids(model, rule.capacity + 1, streams), cache=cache, logits_to_keep=1)
    token = token_ids(model, 1, streams)

    @torch.no_grad()
    def step() -> torch.Tensor:
        logits: torch.Tensor = model(token, cache=cache).logits
        return logits.argmax(-1)

    return Way(step, cache.nbytes)


def separate(model: PreTrainedModel, rule: Retention, streams: int) -> Way:
    """Return a cache for each stream, called one after the other."""
    ways = [one_batch(model, rule, 1) for _ in range(streams)]

    def step() -> None:
        for way in ways:
            way.step()

    return Way(step, sum(way.nbytes for way in ways))


def continuous(model: PreTrainedModel, rule: Retention, streams: int) -> Way:
    """Return the requests of a manager, past their first evictions, whose batches are run without its thread."""
    from sinkwindow.continuous import StreamingBatchingManager

    greedy = GenerationConfig(do_sample=False, max_new_tokens=None, eos_token_id=-1)  # type: ignore[no-untyped-call]
    manager = StreamingBatchingManager(
        model,
        rule.num_sinks,
        rule.window,
        rule.buffer,
        generation_config=greedy,
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=streams),
    )
    processor = manager.batch_processor = manager._create_batch_processor()  # noqa: SLF001 - run step by step
    for prompt in token_ids(model, rule.capacity + 1, streams).tolist():
        manager.add_request(prompt)

    def step() -> None:
        if not processor.prepare_next_batch():
            raise RuntimeError("no request is left")
        processor._generation_step(model)  # noqa: SLF001
        processor.update_batch()

    batch: Any = processor.inputs_and_outputs
    step()
    while len(batch.requests_in_batch) < streams or not all(one.has_new_token for one in batch.requests_in_batch):
        step()
    return Way(step, processor.cache.num_sectors * processor.cache.bytes_per_sector)


SEPARATE, CONTINUOUS = "separate caches", "continuous batching"
WAYS = {SEPARATE: separate, "one batch": one_batch, CONTINUOUS: continuous}
