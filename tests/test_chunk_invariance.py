"""A call with n tokens gives the logits of n calls with one token. The reference is not used here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from strategies import (
    EXACT,
    ModelSpec,
    Rule,
    budget,
    model_specs,
    rules,
    seeds,
    splits,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from sinkwindow import Eviction


@st.composite
def two_splits(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw two ways to split the same sequence into calls."""
    one = draw(splits())
    total = sum(one)
    return one, draw(st.one_of(splits(total, total), st.just([1] * total), st.just([total])))


@given(spec=model_specs(), rule=rules(), seed=seeds(), batch=st.integers(1, 2), cuts=two_splits())
def test_any_two_splits_give_the_same(
    spec: ModelSpec, rule: Rule, seed: int, batch: int, cuts: tuple[list[int], list[int]]
) -> None:
    """Logits, retained tokens, and every eviction with its lengths are the same however the sequence is split."""
    model, ids = spec.model(), tokens(seed, batch, sum(cuts[0]))
    events: list[list[Eviction]] = [[], []]
    caches = [rule.cache(model, on_evict=received.append) for received in events]
    one, other = (stream(model, cache, ids, lengths) for cache, lengths in zip(caches, cuts, strict=True))
    assert worst(one - other) < EXACT
    assert caches[0].retained_tokens == caches[1].retained_tokens
    assert caches[0].num_evictions == caches[1].num_evictions
    assert sorted(events[0], key=_in_order) == sorted(events[1], key=_in_order)


@given(spec=model_specs(), rule=rules(), seed=seeds(), total=st.integers(1, 60))
@budget(0.3)
def test_one_token_per_call_makes_the_modes_equal(spec: ModelSpec, rule: Rule, seed: int, total: int) -> None:
    """Evicting after each call of one token is the same as evicting after each token."""
    model, ids = spec.model(), tokens(seed, 1, total)
    by_call = Rule(rule.num_sinks, rule.window, rule.buffer, "call")
    caches = [rule.cache(model), by_call.cache(model)]
    one, other = (stream(model, cache, ids, [1] * total) for cache in caches)
    assert worst(one - other) < EXACT
    assert caches[0].retained_tokens == caches[1].retained_tokens
    assert caches[0].num_evictions == caches[1].num_evictions


@given(spec=model_specs(), rule=rules(), seed=seeds(), lengths=splits(), extra=st.integers(1, 20))
@budget(0.3)
def test_later_tokens_change_nothing(spec: ModelSpec, rule: Rule, seed: int, lengths: list[int], extra: int) -> None:
    """Other tokens later in the same call do not change the logits before them: attention is causal."""
    total = sum(lengths)
    model, ids = spec.model(), tokens(seed, 1, total + extra)
    changed = ids.clone()
    changed[:, total:] = (changed[:, total:] + 1) % 7
    calls = [*lengths[:-1], lengths[-1] + extra]
    one, other = (stream(model, rule.cache(model), version, calls)[:, :total] for version in (ids, changed))
    assert worst(one - other) < EXACT


def _in_order(event: Eviction) -> tuple[int, int]:
    return event.row, event.tokens.start
