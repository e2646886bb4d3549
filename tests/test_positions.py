"""Positions stay bounded indefinitely, and rebasing them does not change the logits."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkwindow import StreamingCache
from sinkwindow_reference import reference_logits
from strategies import (
    EXACT,
    FAMILIES,
    MAX_CAPACITY,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    model_specs,
    padding_mask,
    rules,
    seeds,
    splits,
    stepwise,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from typing_extensions import Self

LENGTH_DEPENDENT = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 2.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": MAX_CAPACITY,
    },
}


class Spy:
    """Records the positions that the rotary module receives: largest, smallest, and how often they decreased."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.largest, self.smallest, self.latest, self.falls = -1, 0, -1, 0
        self._handle = _rotary(model).register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        self.largest = max(self.largest, int(positions.max()))
        self.smallest = min(self.smallest, int(positions.min()))
        self.falls += int(positions[0, -1]) < self.latest
        self.latest = int(positions[0, -1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _bound(rule: Rule, trained: int) -> int:
    """Return the bound of positions: the trained length, or the longest list plus one window if that is more."""
    return max(trained, rule.capacity + rule.window)


@given(spec=model_specs(["default"]), rule=rules(), seed=seeds(), lengths=splits(most=200), padded=st.booleans())
def test_positions_never_reach_the_bound(
    spec: ModelSpec, rule: Rule, seed: int, lengths: list[int], *, padded: bool
) -> None:
    """However long the stream and its calls, no position is negative or reaches the bound."""
    model, ids = spec.model(), tokens(seed, 2, sum(lengths))
    mask = padding_mask(seed, 2, lengths, holes=True) if padded else None
    cache = rule.cache(model)
    with Spy(model) as spy:
        stream(model, cache, ids, lengths, mask)
    assert 0 <= spy.smallest <= spy.largest < _bound(rule, spec.max_positions)


def test_a_rebase_rotates_keys_in_place() -> None:
    """A rebase rotates keys in place; the window moves to the front in another step, unless no slot is free."""
    model, ids = ModelSpec(max_positions=20).model(), tokens(0, 1, 200)
    cache = Rule(2, 5, 0).cache(model)
    alone, both = 0, 0
    for column in range(ids.shape[1]):
        before = cache.debug_state()
        call(model, cache, ids[:, column : column + 1])
        after = cache.debug_state()
        if column and after.offsets != before.offsets:
            assert (after.end == before.end + 1) == (before.end < before.size)
            alone, both = alone + (before.end < before.size), both + (before.end == before.size)
    assert alone > 5
    assert both > 0


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
@given(rule=rules(), seed=seeds(), lengths=splits(most=200))
@budget(0.3)
def test_frequencies_that_depend_on_the_length_never_switch(
    kind: str, rule: Rule, seed: int, lengths: list[int]
) -> None:
    """If the largest position of a call chooses the frequencies, positions stay below the trained length."""
    model = _length_dependent(kind)
    before = _frequencies(model).clone()
    ids = tokens(seed, 1, sum(lengths))
    expected = reference_logits(model, ids, **rule.arguments)
    with Spy(model) as spy:
        for end, logits in stepwise(model, rule.cache(model), ids, lengths):
            assert torch.equal(_frequencies(model), before)
            assert spy.largest < MAX_CAPACITY
            assert worst(logits - expected[:, end - logits.shape[1] : end]) < EXACT


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_frequencies_do_not_switch_when_the_list_just_fits(kind: str) -> None:
    """A list of exactly the trained length is allowed without a warning, so it must not switch frequencies either."""
    rule, model = Rule(4, 8, 5), _length_dependent(kind)
    assert rule.capacity == MAX_CAPACITY
    ids = tokens(0, 1, 4 * rule.capacity)
    expected = reference_logits(model, ids, **rule.arguments)
    for lengths in ([1] * ids.shape[1], [ids.shape[1]], [rule.capacity] * 4):
        with Spy(model) as spy:
            logits = stream(model, rule.cache(model), ids, lengths)
        assert spy.largest < MAX_CAPACITY
        assert worst(logits - expected) < EXACT


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("rule", [Rule(4, 12, 3), Rule(0, 9, 0), Rule(2, 5, 7)], ids=str)
def test_logits_are_exact_near_and_far(family: str, rule: Rule) -> None:
    """At 0, limit, 10 x limit, and on both sides of every rebase, decoding token by token equals the reference."""
    spec = ModelSpec(family, kv_heads=2 if family == "gpt_neox" else 1, max_positions=rule.capacity + rule.window + 3)
    model, total = spec.model(), 11 * rule.limit
    ids = tokens(0, 1, total)
    expected = reference_logits(model, ids, **rule.arguments)
    with Spy(model) as spy:
        for end, logits in stepwise(model, rule.cache(model), ids, [1] * total):
            assert worst(logits - expected[:, end - 1 : end]) < EXACT, f"token {end - 1}"
    assert spy.falls > 3


def test_a_call_split_into_runs_of_positions_may_fit_in_the_slots() -> None:
    """A call that is split into runs of positions, but fits in the slots, is exact, and so are later calls."""
    rule, model = Rule(0, 5, 5), ModelSpec(max_positions=18).model()
    ids = tokens(0, 1, 24)
    expected = reference_logits(model, ids, **rule.arguments)
    assert worst(stream(model, rule.cache(model), ids, [1, 9, 9, 1, 4]) - expected) < EXACT


def test_positions_far_from_the_start_are_as_accurate_as_the_first() -> None:
    """After 100,000 tokens of a float32 stream the logits are those of the same list at the start of a stream.

    With one layer, keys depend on their tokens alone, so the last list can be fed to a new cache as a text.
    """
    rule, model = Rule(2, 8, 3), ModelSpec(layers=1, max_positions=64).model(torch.float32)
    cache, ids = rule.cache(model), tokens(0, 1, 100_000)
    stream(model, cache, ids, [50_000, 49_990])
    far = stream(model, cache, ids[:, -10:], [1] * 10)[:, -1:]
    length = len(cache.retained_tokens[0])
    kept = torch.tensor(cache.retained_tokens[0])
    assert kept[-1] == 99_999
    near = stream(model, StreamingCache(model, 2, 60, 0), ids[:, kept], [length])[:, -1:]
    assert worst(far - near) < 1e-4


@pytest.mark.parametrize("surplus", [1, 40])
def test_a_list_beyond_the_trained_length_warns_with_both_numbers(surplus: int) -> None:
    """S + W + B + 1 above the trained positions warns, names both, and still streams exactly."""
    rule = Rule(4, 12, 3)
    spec = ModelSpec(max_positions=rule.capacity - surplus)
    with pytest.warns(UserWarning, match=rf"= {rule.capacity} exceeds the {rule.capacity - surplus} positions"):
        cache = rule.cache(spec.model())
    ids = tokens(0, 1, 100)
    expected = reference_logits(spec.model(), ids, **rule.arguments)
    assert worst(stream(spec.model(), cache, ids, [50, *[1] * 50]) - expected) < EXACT


def test_a_list_that_fits_does_not_warn() -> None:
    """S + W + B + 1 may be as large as the number of trained positions, and positions by rank are the default."""
    rule = Rule(4, 12, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule.cache(ModelSpec(max_positions=rule.capacity).model())


def _length_dependent(kind: str) -> PreTrainedModel:
    """Build a model whose frequencies switch beyond `MAX_CAPACITY` positions."""
    spec = ModelSpec(max_positions=MAX_CAPACITY if kind == "dynamic" else 8 * MAX_CAPACITY)
    return fresh_model(spec, rope_parameters=LENGTH_DEPENDENT[kind]).double()


def _rotary(model: PreTrainedModel) -> nn.Module:
    return cast("nn.Module", cast("Any", model).base_model.rotary_emb)


def _frequencies(model: PreTrainedModel) -> torch.Tensor:
    return cast("torch.Tensor", _rotary(model).inv_freq)
