"""After `reset` a cache is as new, in its old tensors; what a roll-back needs is bounded and counted."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calling import KINDS
from families import build
from releases import STATIC_DRAFTS, ready_for_drafts
from strategies import (
    BOTH,
    CACHE_NAME,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    model_specs,
    observe,
    padding_mask,
    rules,
    seeds,
    splits,
    stream,
    tokens,
)

if TYPE_CHECKING:
    from sinkwindow import StreamingCache


def _everything(cache: StreamingCache) -> tuple[Any, ...]:
    """Return all that a caller can ask."""
    layers = range(len(cache.layers))
    return (
        observe(cache),
        cache.debug_state(),
        (cache.batch_size, cache.forwarded_tokens, cache.is_croppable, cache.is_initialized),
        [
            (cache.get_query_offset(layer), cache.get_max_length(layer), cache.debug_state().recording)
            for layer in layers
        ],
        [cache.get_mask_sizes(1, layer) for layer in layers],
        repr(cache),
    )


def _tensors(cache: StreamingCache) -> list[torch.Tensor]:
    """Return the tensors of keys and values, and what a static cache counts in tensors."""
    kept = [tensor for slots in cache._stream.state.pools for bank in slots.banks for tensor in bank.tensors]
    return kept if cache._steps is None else [*kept, cache._steps.seen]


@budget(0.4)
@given(
    spec=model_specs(["default", "yarn"]),
    rule=rules(BOTH),
    seed=seeds(),
    first=splits(most=50),
    second=splits(most=50),
    rows=st.integers(1, 3),
    how=st.integers(0, 2**4 - 1),
)
def test_a_reset_cache_equals_a_new_one(
    spec: ModelSpec, rule: Rule, seed: int, first: list[int], second: list[int], rows: int, how: int
) -> None:
    """In all that can be observed, before the next text, in each of its calls, and after them; recording is over."""
    static = bool(how & 1) and rule.evict == "token"
    model, new, used = spec.model(), rule.cache(spec.model(), static=static), rule.cache(spec.model(), static=static)
    if how & 2:
        used.activate_past_recording()
    stream(model, used, tokens(seed, 2, sum(first)), first, padding_mask(seed, 2, first, holes=True))
    if how & 4 and used.can_crop(1):
        used.crop(-1)
    if how & 8:
        used.activate_past_recording()
    used.reset()
    assert _everything(used) == _everything(new)
    ids = tokens(seed + 1, rows, sum(second))
    for part in torch.split(ids, second, dim=1):
        assert torch.equal(call(model, used, part), call(model, new, part))
        assert _everything(used) == _everything(new)


@KINDS
@pytest.mark.parametrize("family", ["llama", "qwen2_windows"])
def test_the_next_text_is_written_to_the_same_tensors(family: str, *, static: bool) -> None:
    """Addresses stay while the number of rows does, so that CUDA graphs need no new recording."""
    model, ids, rule = build(family), tokens(0, 2, 40), Rule(2, 6, 1)
    cache = rule.cache(model, static=static)
    stream(model, cache, ids, [12, 1, 27])
    kept, size = _tensors(cache), cache.nbytes
    cache.reset()
    cache.reset()
    assert cache.nbytes == 0
    stream(model, cache, ids[:, :20], [9, 1, 10])
    assert [tensor.data_ptr() for tensor in _tensors(cache)] == [tensor.data_ptr() for tensor in kept]
    assert cache.nbytes == size
    cache.reset()
    call(model, cache, ids[:1])
    assert cache.nbytes == size // 2


def test_a_reset_after_recording_gives_the_memory_back() -> None:
    """Recording enlarges the slots; the next text has those of a new cache."""
    model, ids, rule = ModelSpec().model(), tokens(0, 1, 30), Rule(3, 7, 2)
    used, new = rule.cache(model), rule.cache(model)
    used.activate_past_recording()
    call(model, used, ids)
    enlarged = used.nbytes
    used.reset()
    assert not used.debug_state().recording
    assert not used._stream.state.pools[0].spare  # it is free at once, not with the next text's first call
    stream(model, used, ids, [10, *[1] * 20])
    stream(model, new, ids, [10, *[1] * 20])
    assert used.nbytes == new.nbytes < enlarged


# -- what can be taken back ---------------------------------------------------------------------------------------


@budget(0.6)
@given(rule=rules(BOTH), seed=seeds(), lengths=splits(most=60), static=st.booleans(), padded=st.booleans())
def test_the_last_call_can_be_taken_back_where_the_slots_hold_it(
    rule: Rule, seed: int, lengths: list[int], *, static: bool, padded: bool
) -> None:
    """As `can_crop` says: if there is a slot left beside the list before the call and the call."""
    static = static and rule.evict == "token"
    model, ids = ModelSpec(max_positions=24).model(), tokens(seed, 2, sum(lengths))
    mask = padding_mask(seed, 2, lengths, holes=True) if padded else torch.ones_like(ids)
    cache, end = rule.cache(model, static=static), 0
    for length in lengths:
        held = max(map(len, cache.retained_tokens))
        call(model, cache, ids[:, end : end + length], mask[:, : end + length])
        end += length
        size = rule.capacity + max(8, rule.capacity // 16)
        assert cache.debug_state().size == size
        if held + length < size:
            assert all(cache.can_crop(columns) for columns in range(length + 1))


@STATIC_DRAFTS
@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 7}, "assisted"])
def test_drafts_are_right_on_static_caches_through_evictions(mode: Any) -> None:
    """Prompt lookup and assisted decoding give the greedy text, with a text that repeats itself and no buffer."""
    model, rule = ModelSpec(max_positions=128).model(), Rule(4, 8)
    ids = torch.cat([tokens(2, 1, 9)] * 4, dim=1)
    how: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": 10_000}  # no token ends it
    if mode == "assisted":  # a model of its own, since generate counts drafts in its generation_config
        assistant = fresh_model(ModelSpec(max_positions=128)).double()
        config: Any = assistant.generation_config
        config.update(num_assistant_tokens=7, num_assistant_tokens_schedule="constant")
        mode = {"assistant_model": assistant}
    expected = model.generate(ids, **{CACHE_NAME: rule.cache(model)}, **how)  # type: ignore[operator]
    cache = ready_for_drafts(rule.cache(model, static=True))
    assert torch.equal(model.generate(ids, **{CACHE_NAME: cache}, **how, **mode), expected)  # type: ignore[operator]
    assert cache.num_evictions > 50


# -- what recording holds -----------------------------------------------------------------------------------------


@KINDS
def test_what_recording_holds_is_bounded_and_counted(*, static: bool) -> None:
    """With many sinks and no buffer, after any number of evictions, no tensor is held beside those of `nbytes`."""
    model, rule, ids = ModelSpec(max_positions=128).model(), Rule(40, 8), tokens(1, 2, 400)
    cache = rule.cache(model, static=static)
    cache.activate_past_recording()
    stream(model, cache, ids[:, :60], [50, *[1] * 10])
    sizes = []
    for part in torch.split(ids[:, 60:], 85, dim=1):
        stream(model, cache, part, [1] * 85)
        gc.collect()
        sizes.append((cache.nbytes, _live_bytes()))
    assert sizes == [sizes[0]] * 4
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(cache)}
    assert cache.nbytes == sum(own.values()) - (cache._steps.seen.nbytes if cache._steps else 0)


def _live_bytes() -> int:
    """Return the bytes of all tensors of keys and values' dtype that are alive."""
    tensors = [one for one in gc.get_objects() if type(one) in {torch.Tensor, torch.nn.Parameter}]
    return sum(
        {one.data_ptr(): one.untyped_storage().nbytes() for one in tensors if one.dtype == torch.float64}.values()
    )


def test_the_record_of_a_padded_prompt_is_small() -> None:
    """Where padding is only in front, a call's record holds no list of its columns, however long the prompt."""
    model, ids = ModelSpec(max_positions=24).model(), tokens(1, 2, 300)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = Rule(2, 6, 1).cache(model)
    call(model, cache, ids, mask)
    (record,) = cache._stream.state.past  # of the first piece: there is no padding in the others
    assert record.real == (range(7, record.columns), range(record.columns))
    cache.reset()
    stream(model, cache, ids[:, :20], [12, 8], mask[:, :20])
    cache.crop(-2)
    assert cache.seen_tokens == [11, 18]
