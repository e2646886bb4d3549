"""Tokens can be taken back exactly while what they evicted is still stored; otherwise an error changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from releases import CROP
from sinkwindow import StreamingCache
from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    BOTH,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    model_specs,
    rules,
    seeds,
    splits,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from pathlib import Path

DRAFTS = 128  # evicted tokens that `activate_past_recording` keeps


@given(spec=model_specs(), rule=rules(), seed=seeds(), lengths=splits(most=60), data=st.data())
@budget(0.5)
def test_other_tokens_after_a_crop_equal_the_reference(
    spec: ModelSpec, rule: Rule, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    """After a crop that `can_crop` allows, other tokens in place of the old ones give the reference's logits."""
    model, ids = spec.model(), tokens(seed, 2, sum(lengths) + 12)
    cache = rule.cache(model)
    stream(model, cache, ids, lengths)
    # A number below an allowed one may not be allowed: taking back everything needs nothing that was evicted.
    allowed = [columns for columns in range(sum(lengths) + 1) if cache.can_crop(columns)]
    columns = data.draw(st.sampled_from(allowed), label="columns")
    cache.crop(-columns)
    kept = sum(lengths) - columns
    assert cache.retained_tokens == [retained_after(kept, **rule.arguments)] * 2
    assert (cache.seen_tokens, cache.get_seq_length()) == ([kept] * 2, kept)
    fresh = torch.cat([ids[:, :kept], tokens(seed + 1, 2, 12)], dim=1)
    logits = torch.cat([call(model, cache, fresh[:, kept : kept + 9]), call(model, cache, fresh[:, kept + 9 :])], dim=1)
    assert worst(logits - reference_logits(model, fresh, **rule.arguments)[:, kept:]) < EXACT


@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), lengths=splits(most=60), columns=st.integers(1, 60))
@budget(0.5)
def test_can_crop_is_exact(spec: ModelSpec, rule: Rule, seed: int, lengths: list[int], columns: int) -> None:
    """`crop` works if `can_crop` is true; otherwise it raises, and the cache continues as if without the attempt."""
    model, ids = spec.model(), tokens(seed, 1, sum(lengths) + 9)
    cache = rule.cache(model)
    stream(model, cache, ids, lengths)
    before = (cache.retained_tokens, cache.seen_tokens, cache.num_evictions, cache.get_seq_length())
    if columns <= sum(lengths) and cache.can_crop(columns):
        cache.crop(-columns)
        assert cache.get_seq_length() == sum(lengths) - columns
        return
    assert not cache.can_crop(columns)
    with pytest.raises(ValueError, match=r"cannot be taken back|between 0 and"):
        cache.crop(-columns)
    assert (cache.retained_tokens, cache.seen_tokens, cache.num_evictions, cache.get_seq_length()) == before
    expected = reference_logits(model, ids, chunks=[*lengths, 9], **rule.arguments)
    assert worst(call(model, cache, ids[:, -9:]) - expected[:, -9:]) < EXACT


@given(rule=rules(), seed=seeds(), first=st.integers(1, 40), second=st.integers(1, 20), data=st.data())
@budget(0.2)
def test_crops_add_up(rule: Rule, seed: int, first: int, second: int, data: st.DataObject) -> None:
    """Taking back a columns and then b is the same as taking back a + b, if both are allowed."""
    model, ids = ModelSpec().model(), tokens(seed, 1, first + second)
    once, twice = rule.cache(model), rule.cache(model)
    for cache in (once, twice):
        cache.activate_past_recording()
        stream(model, cache, ids, [first, second])
    total = data.draw(st.integers(0, second), label="total")
    part = data.draw(st.integers(0, total), label="part")
    once.crop(-total)
    twice.crop(-part)
    if twice.can_crop(total - part):
        twice.crop(part - total)
        assert twice.retained_tokens == once.retained_tokens
        assert twice.num_evictions == once.num_evictions
        assert worst(call(model, twice, ids[:, :5]) - call(model, once, ids[:, :5])) < EXACT


@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), first=st.integers(1, 40), length=st.integers(1, 20))
@budget(0.6)
def test_a_call_that_leaves_a_slot_free_can_be_cropped(
    spec: ModelSpec, rule: Rule, seed: int, first: int, length: int
) -> None:
    """All of its columns, or any number of them, whatever it has evicted, where the slots fit the trained length."""
    model, ids = spec.with_(max_positions=64).model(), tokens(seed, 2, first + length)
    cache = rule.cache(model)
    call(model, cache, ids[:, :first])
    length = min(length, cache.debug_state().size - len(cache.retained_tokens[0]) - 1)
    call(model, cache, ids[:, first : first + length])
    assert all(map(cache.can_crop, range(length + 1)))


@pytest.mark.parametrize("calls", [[DRAFTS], [1] * DRAFTS, [1, 7] * 16])
def test_recorded_drafts_can_be_rolled_back(calls: list[int]) -> None:
    """With `activate_past_recording` up to 128 tokens of one call, or of many short ones, can be taken back."""
    rule, model, ids = Rule(2, 6, 3), ModelSpec().model(), tokens(1, 1, 40 + DRAFTS)
    cache = rule.cache(model)
    call(model, cache, ids[:, :40])
    cache.activate_past_recording()
    stream(model, cache, ids[:, 40:], calls)
    assert cache.can_crop(DRAFTS)
    cache.crop(-DRAFTS)
    other = torch.cat([ids[:, :40], tokens(2, 1, 30)], dim=1)
    assert worst(call(model, cache, other[:, 40:]) - reference_logits(model, other, **rule.arguments)[:, 40:]) < EXACT


@pytest.mark.parametrize("columns", [pytest.param(1, marks=CROP), -51, -1000])
def test_impossible_crops_are_named(columns: int) -> None:
    """A positive number (it once meant tokens to keep) and more than was fed are errors with both numbers."""
    rule, model, ids = Rule(2, 6, 3), ModelSpec().model(), tokens(1, 1, 50)
    cache = rule.cache(model)
    call(model, cache, ids)
    with pytest.raises(ValueError, match=rf"between 0 and the 50 fed, got {columns}"):
        cache.crop(columns)
    assert cache.retained_tokens == [retained_after(50, **rule.arguments)]


def test_the_padding_of_a_batch_is_taken_back_row_by_row() -> None:
    """A crop takes back fewer tokens of a row with padding there, and each row continues as if it were alone."""
    rule, model, ids = Rule(2, 6, 3), ModelSpec().model(), tokens(1, 2, 42)
    mask = torch.ones_like(ids)
    mask[0, 20:26] = 0
    cache = rule.cache(model)
    cache.activate_past_recording()
    stream(model, cache, ids[:, :32], [20, 12], mask[:, :32])
    cache.crop(-8)  # into the padding
    assert cache.seen_tokens == [20, 24]
    kept = torch.cat([ids[:, :24], ids[:, 32:]], dim=1)
    kept_mask = torch.cat([mask[:, :24], mask[:, 32:]], dim=1)
    expected = reference_logits(model, kept, kept_mask, **rule.arguments)[:, 24:]
    assert worst(call(model, cache, kept[:, 24:]) - expected) < EXACT


def test_evictions_are_counted_row_by_row(tmp_path: Path) -> None:
    """Rows that evicted in other calls than their neighbors keep their own counts, in copies, files and roll-backs."""
    rule, model, ids = Rule(2, 4, 0, "call"), ModelSpec().model(), tokens(1, 2, 60)
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    cache = rule.cache(model)
    stream(model, cache, ids, [50, 2, 2, 2, 2, 2], mask)
    cache.save(tmp_path / "cache")
    for row, evictions in enumerate((2, 6)):
        alone = StreamingCache.load(tmp_path / "cache", model)
        alone.batch_select_indices(torch.tensor([row]))
        assert alone.num_evictions == evictions
        alone.batch_repeat_interleave(3)
        assert alone.num_evictions == 3 * evictions
        alone.crop(-2)
        assert alone.num_evictions == 3 * (evictions - 1)


def test_rows_that_get_lanes_of_their_own_keep_their_recorded_past() -> None:
    """Padding that comes while evicted tokens are recorded gives each row a lane and a recorded past of its own."""
    rule, model, ids = Rule(1, 1), ModelSpec(max_positions=24).model(), tokens(1, 2, 27)
    mask = torch.ones_like(ids)
    mask[0, 23] = 0
    cache = rule.cache(model)
    call(model, cache, ids[:, :1])
    cache.activate_past_recording()
    call(model, cache, ids[:, 1:23])
    logits = call(model, cache, ids[:, 23:25], mask[:, :25])  # rebases positions: the windows move
    assert worst((logits - reference_logits(model, ids[:, :25], mask[:, :25], **rule.arguments)[:, 23:])[1]) < EXACT
    cache.crop(-2)
    assert cache.seen_tokens == [23, 23]
    expected = reference_logits(model, ids, **rule.arguments)[:, 23:]
    assert worst(call(model, cache, ids[:, 23:]) - expected) < EXACT


def test_evictions_before_a_complete_crop_do_not_limit_later_crops() -> None:
    """After everything is taken back, new tokens can be taken back too, whatever the old text had evicted."""
    rule, model, ids = Rule(1, 1, 4), ModelSpec(max_positions=18).model(), tokens(0, 2, 19)
    cache = rule.cache(model)
    stream(model, cache, ids[:, :11], [1] * 11)
    cache.crop(-11)
    call(model, cache, ids[:, 11:16])
    assert all(map(cache.can_crop, range(6)))
    cache.crop(-2)
    kept = torch.cat([ids[:, 11:14], ids[:, 16:]], dim=1)
    expected = reference_logits(model, kept, **rule.arguments)[:, 3:]
    assert worst(call(model, cache, ids[:, 16:]) - expected) < EXACT


def test_a_complete_crop_forgets_the_sinks() -> None:
    """After everything is taken back, as many evictions as before rotate the sinks of the new text, not the old."""
    rule, model, ids = Rule(1, 1, 4), ModelSpec(max_positions=18).model(), tokens(0, 2, 23)
    cache = rule.cache(model)
    stream(model, cache, ids[:, :11], [1] * 11)
    cache.crop(-11)
    logits = stream(model, cache, ids[:, 11:], [9, 3])
    assert worst(logits - reference_logits(model, ids[:, 11:], **rule.arguments)) < EXACT
