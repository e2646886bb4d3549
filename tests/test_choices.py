"""Options that a user chooses by name: original positions, and an error instead of an eviction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from strategies import CACHE_NAME, EXACT, ModelSpec, Rule, budget, call, stream, tokens

if TYPE_CHECKING:
    from torch import Tensor

    from sinkwindow import StreamingCache

RULE = Rule(num_sinks=2, window=5, buffer=2)
LENGTH = 40
SPEC = ModelSpec(max_positions=LENGTH)


def _original(model: Any) -> StreamingCache:
    with pytest.warns(UserWarning, match=rf"right only below the {LENGTH} positions"):
        return RULE.cache(model, positions="original")


def _by_hand(model: Any, ids: Tensor) -> Tensor:
    """Feed token by token at natural positions, evicting from a stock cache by index."""
    cache: Any = DynamicCache()
    logits = []
    for token in range(ids.shape[1]):
        part, position = ids[:, token : token + 1], torch.tensor([[token]])
        with torch.no_grad():
            logits.append(model(input_ids=part, position_ids=position, **{CACHE_NAME: cache}).logits)
        length = cache.layers[0].keys.shape[2]
        if length > RULE.limit + RULE.buffer:
            kept = torch.tensor([*range(RULE.num_sinks), *range(length - RULE.window, length)])
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    return torch.cat(logits, dim=1)


@given(seed=st.integers(0, 99), cut=st.integers(1, LENGTH - 1))
@budget(0.2)
def test_original_positions_never_change(seed: int, cut: int) -> None:
    """With original positions, any two calls give the logits of a stock cache that is cut at natural positions.

    The stock model computes its angles in float32, hence the tolerance.
    """
    model, ids, lengths = SPEC.model(), tokens(seed, 1, LENGTH), [cut, LENGTH - cut]
    logits = stream(model, _original(model), ids, lengths)
    torch.testing.assert_close(logits, _by_hand(model, ids), atol=1e-4, rtol=0)
    ranked = stream(model, RULE.cache(model), ids, lengths)
    assert (ranked - logits).abs().max() > 1e-2, "the two position modes must differ, or this test checks nothing"


def test_original_positions_end_at_the_trained_length() -> None:
    """A call beyond the trained length is refused before anything changes; the next call that fits works."""
    model, ids = SPEC.model(), tokens(0, 1, LENGTH)
    cache = _original(model)
    call(model, cache, ids[:, : LENGTH - 1])
    before = cache.retained_tokens
    with pytest.raises(OverflowError, match=f"token {LENGTH + 1}, beyond the {LENGTH} positions"):
        call(model, cache, ids[:, :2])
    assert cache.retained_tokens == before
    call(model, cache, ids[:, -1:])
    assert cache.seen_tokens == [LENGTH]


def test_overflow_can_be_an_error() -> None:
    """A call that would evict is refused before anything changes; all others give the streaming logits."""
    model, ids = SPEC.model(), tokens(1, 1, LENGTH)
    room = RULE.limit + RULE.buffer
    cache = RULE.cache(model, on_overflow="error")
    logits = call(model, cache, ids[:, : room - 1])
    with pytest.raises(OverflowError, match=f"brings {room + 1} tokens and would evict"):
        call(model, cache, ids[:, room - 1 : room + 1])
    assert cache.num_evictions == 0
    logits = torch.cat([logits, call(model, cache, ids[:, room - 1 : room])], dim=1)
    assert (logits - call(model, RULE.cache(model), ids[:, :room])).abs().max() < EXACT


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"positions": "absolute"}, ValueError, 'positions must be "rank" or "original", got \'absolute\''),
        ({"on_overflow": "raise"}, ValueError, 'on_overflow must be "evict" or "error", got \'raise\''),
        ({"on_evict": 3}, TypeError, "on_evict must be callable or None, got 3"),
    ],
)
def test_unknown_choices_are_refused(choice: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error names the argument, its value and the valid values."""
    with pytest.raises(error, match=message):
        RULE.cache(SPEC.model(), **choice)
