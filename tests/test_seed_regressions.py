"""The three bugs of the original reproduction, and the ablation that explains its perplexities.

The original reproduction of StreamingLLM, "the seed", is the program from which this project started.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache

from sinkwindow_reference import reference_logits
from strategies import CACHE_NAME, EXACT, ModelSpec, Rule, call, stepwise, stream, tokens, worst

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SEED = Rule(8, 256, 64)
SPEC = ModelSpec(layers=2, max_positions=512)


def _lengths(rule: Rule, calls: list[int]) -> tuple[list[int], list[int]]:
    """Stream; return, call by call, how many keys the call attended to and how many tokens were retained after it."""
    model = SPEC.model(torch.float32)
    cache = rule.cache(model)
    update = cache.update
    attended: list[int] = []

    def spy(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result = update(keys, values, layer, *args, **kwargs)
        if layer == 0:
            attended.append(result[0].shape[2])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "update", spy)
        kept = [len(cache.retained_tokens[0]) for _ in stepwise(model, cache, tokens(0, 1, sum(calls)), calls)]
    return attended, kept


def test_the_buffer_is_used() -> None:
    """Bug 1, eager eviction: nothing is evicted until the list has S + W + B + 1 tokens, then B + 1 at once."""
    attended, kept = _lengths(SEED, [1] * 400)
    assert attended[:329] == list(range(1, 330))
    assert kept[326:331] == [327, 328, 264, 265, 266]
    assert attended[328:331] == [329, 265, 266]
    assert (kept[393], attended[393]) == (264, 329)


@pytest.mark.parametrize("chunk", [64, 100, 256])
def test_chunks_do_not_grow_the_cache(chunk: int) -> None:
    """Bug 2, growth with chunked input: with B=0 each call attends to 264 + chunk keys, and 264 are kept."""
    attended, kept = _lengths(Rule(8, 256, 0, "call"), [300] + [chunk] * 12)
    assert attended == [300] + [264 + chunk] * 12
    assert kept == [264] * 13


def test_chunks_grow_the_cache_no_further_than_the_buffer() -> None:
    """With B=64 no more than 264 + 64 tokens are kept, and every eviction leaves 264."""
    _, kept = _lengths(Rule(8, 256, 64, "call"), [300] + [40] * 20)
    assert kept == [300, *[264, 304] * 10]


def test_evictions_are_counted_over_steps() -> None:
    """Bug 3, the count: one eviction per B + 1 tokens once the list is full, none before; B=0 is one per token."""
    model = SPEC.model(torch.float32)
    lazy, paper = {328: 0, 329: 1, 393: 1, 394: 2, 459: 3}, {28: 0, 29: 1, 30: 2, 128: 100}
    for rule, counts in ((SEED, lazy), (Rule(8, 20), paper)):
        cache = rule.cache(model)
        steps = {end: cache.num_evictions for end, _ in stepwise(model, cache, tokens(0, 1, 460), [1] * 460)}
        assert {end: steps[end] for end in counts} == counts


def test_an_eviction_moves_no_window_and_joins_no_tensors() -> None:
    """After the first call the cache's tensors stay in place: decoding does not concatenate keys or values."""
    model, ids = SPEC.model(torch.float32), tokens(0, 1, 200)
    cache = Rule(4, 20, 6).cache(model)
    call(model, cache, ids[:, :40])
    with pytest.MonkeyPatch.context() as patch:
        joined: list[str] = []
        cat = torch.cat

        def counting(*args: Any, **kwargs: Any) -> Tensor:
            joined.append(str(sys._getframe(1).f_globals["__name__"]))
            return cat(*args, **kwargs)

        patch.setattr(torch, "cat", counting)
        stream(model, cache, ids[:, 40:], [1] * 160)
    ours = [name for name in joined if name.startswith("sinkwindow")]
    assert cache.num_evictions > 20
    assert set(ours) <= {"sinkwindow.attention.rotation"}  # the sinks' rotation, once per eviction, not per step
    assert len(ours) < 2 * cache.num_evictions


def test_the_cache_does_not_stream_with_stale_ranks() -> None:
    """Keys that keep the rank of their insertion give clearly different logits; the cache's are the reference's."""
    rule, model, ids = Rule(2, 8), SPEC.model(), tokens(0, 1, 60)
    expected = reference_logits(model, ids, **rule.arguments)
    ours = stream(model, rule.cache(model), ids, [1] * 60)
    stale = _stale_ranks(model, rule, ids)
    assert worst(ours - expected) < EXACT
    assert worst((stale - expected)[:, : rule.limit + 1]) < 1e-4  # before the first eviction nothing is stale
    assert float((stale - expected)[:, 2 * rule.limit :].abs().amax(dim=-1).median()) > 0.1


def _stale_ranks(model: PreTrainedModel, rule: Rule, ids: Tensor) -> Tensor:
    """Stream as the seed did: queries at their rank, cached keys at the rank of insertion, evictions by slicing."""
    cache, outputs = DynamicCache(config=model.config), []
    for token in ids[0]:
        length = cache.get_seq_length()
        with torch.no_grad():
            outputs.append(model(token.view(1, 1), position_ids=torch.tensor([[length]]), **{CACHE_NAME: cache}).logits)
        if length + 1 > rule.limit + rule.buffer:
            layers: list[Any] = list(cache.layers)
            for layer in layers:
                layer.keys, layer.values = (
                    torch.cat([state[:, :, : rule.num_sinks], state[:, :, -rule.window :]], dim=2)
                    for state in (layer.keys, layer.values)
                )
    return torch.cat(outputs, dim=1)
