"""What transformers and users may rely on, in valid and in invalid calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import build
from sinkwindow import Eviction, StreamingCache
from sinkwindow.model.versions import since
from sinkwindow_reference import reference_logits
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    model_specs,
    observe,
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
    from collections.abc import Callable

    from torch import Tensor

# -- what transformers relies on ------------------------------------------------------------------------------------


@given(
    spec=model_specs(), rule=rules(BOTH), seed=seeds(), batch=st.integers(1, 2), lengths=splits(), padded=st.booleans()
)
@budget(0.6)
def test_update_returns_as_many_keys_as_the_mask_has_columns(
    spec: ModelSpec, rule: Rule, seed: int, batch: int, lengths: list[int], *, padded: bool
) -> None:
    """In every call and every layer, `update` returns the length that `get_mask_sizes` gave, with offset 0."""
    model, ids = spec.model(), tokens(seed, batch, sum(lengths))
    mask = padding_mask(seed, batch, lengths, holes=True) if padded else None
    cache, kept = rule.cache(model), []
    update = cache.update

    def spy(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length, offset = cache.get_mask_sizes(keys.shape[2], layer)
        result = update(keys, values, layer, *args, **kwargs)
        assert [state.shape[2] for state in result] == [length, length]
        assert (offset, cache.get_query_offset(layer)) == (0, length - keys.shape[2])
        kept.append(layer)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "update", spy)
        stream(model, cache, ids, lengths, mask)
    assert kept == list(range(spec.layers)) * (len(kept) // spec.layers)  # a long call may run in pieces
    assert len(kept) >= spec.layers * len(lengths)


@given(rule=rules(BOTH), seed=seeds(), batch=st.integers(1, 3), lengths=splits())
@budget(0.6)
def test_the_sequence_length_counts_columns_indefinitely(rule: Rule, seed: int, batch: int, lengths: list[int]) -> None:
    """`get_seq_length` is the number of columns fed, padding included, in every layer; there is no maximum."""
    model, ids = ModelSpec().model(), tokens(seed, batch, sum(lengths))
    cache = rule.cache(model)
    assert cache.get_seq_length() == 0
    for end, _ in stepwise(model, cache, ids, lengths, padding_mask(seed, batch, lengths, holes=True)):
        assert [cache.get_seq_length(layer) for layer in range(2)] == [end, end]
        assert cache.get_max_length() == -1


# -- memory ---------------------------------------------------------------------------------------------------------


@given(spec=model_specs(), rule=rules(), seed=seeds(), batch=st.integers(1, 3), lengths=splits())
@budget(0.6)
def test_memory_is_flat_from_the_first_call_on(
    spec: ModelSpec, rule: Rule, seed: int, batch: int, lengths: list[int]
) -> None:
    """`nbytes` is 0 before the first call, then what docs/guides/sizes.md says, whatever the calls."""
    model, ids = spec.model(), tokens(seed, batch, sum(lengths))
    cache = rule.cache(model)
    assert cache.nbytes == 0
    sizes = {cache.nbytes for _ in stepwise(model, cache, ids, lengths)}
    slots = rule.capacity + max(8, rule.capacity // 16) + rule.num_sinks
    assert sizes == {_bytes_per_token(spec, 8) * batch * slots}


def test_memory_is_within_a_tenth_of_what_is_kept() -> None:
    """With S=4, W=1020, B=64 the cache takes at most 1.10 times the bytes of S + W + B tokens, filled or not."""
    rule, spec = Rule(4, 1020, 64), ModelSpec(kv_heads=2, max_positions=4096)
    model, ids = spec.model(torch.float32), tokens(0, 1, 3300)
    cache, allowed = rule.cache(model), 1.10 * _bytes_per_token(spec, 4) * (4 + 1020 + 64)
    for _ in stepwise(model, cache, ids, [10, 2000, 1, 1, 1200, 1]):
        assert 0.9 * allowed < cache.nbytes <= allowed
        assert _tensor_bytes(cache) <= allowed


def _bytes_per_token(spec: ModelSpec, itemsize: int) -> int:
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * itemsize


def _tensor_bytes(root: object) -> int:
    """Return the bytes of all storages that can be reached from an object through our own objects."""
    found: dict[int, int] = {}
    todo, seen = [root], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        elif type(item).__module__.startswith("sinkwindow"):
            names = [
                *getattr(item, "__dict__", ()),
                *(n for t in type(item).__mro__ for n in getattr(t, "__slots__", ())),
            ]
            todo += [getattr(item, name) for name in names if name != "__weakref__"]
    return sum(found.values())


# -- evictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1] * 460, [460], [300, *[1] * 160], [7] * 65 + [5]], ids=str)
def test_evictions_are_reported(lengths: list[int]) -> None:
    """With S=8, W=256, B=64 each eviction goes from 329 to 264: the 65 oldest tokens after the sinks, in both rows."""
    model = ModelSpec(layers=1, max_positions=512).model(torch.float32)
    events: list[Eviction] = []
    cache = StreamingCache(model, 8, 256, 64, on_evict=events.append)
    stream(model, cache, tokens(0, 2, 460), lengths)
    times = [(row, start) for start in (8, 73, 138) for row in (0, 1)]
    assert sorted(events, key=lambda event: (event.tokens.start, event.row)) == [
        Eviction(row, range(start, start + 65), 329, 264) for row, start in times
    ]
    assert cache.num_evictions == 6


@given(rule=rules(BOTH), seed=seeds(), batch=st.integers(1, 3), lengths=splits(), padded=st.booleans())
def test_events_add_up_to_what_is_evicted(
    rule: Rule, seed: int, batch: int, lengths: list[int], *, padded: bool
) -> None:
    """Evicted and retained tokens are all tokens, each once; events are in order, and `num_evictions` counts them."""
    model, ids = ModelSpec(layers=1).model(), tokens(seed, batch, sum(lengths))
    mask = padding_mask(seed, batch, lengths, holes=True) if padded else None
    events: list[Eviction] = []
    cache = rule.cache(model, on_evict=events.append)
    for _ in stepwise(model, cache, ids, lengths, mask):
        assert cache.num_evictions == len(events)
        for row in range(batch):
            gone = [token for event in events if event.row == row for token in event.tokens]
            assert gone == sorted(gone)
            assert sorted(gone + cache.retained_tokens[row]) == list(range(cache.seen_tokens[row]))
    for event in events:
        assert event.length_after == event.length_before - len(event.tokens) == rule.limit


def test_a_callback_sees_the_cache_after_the_call() -> None:
    """`on_evict` is called when the call has succeeded: the cache can be read, and an error there undoes nothing."""
    rule, model, ids = Rule(1, 4, 1), ModelSpec().model(), tokens(0, 1, 30)
    seen: list[int] = []

    def react(event: Eviction) -> None:
        seen.extend(cache.seen_tokens)
        if len(seen) == 2:
            raise RuntimeError(f"callback fails at {event}")

    cache = rule.cache(model, on_evict=react)
    expected = reference_logits(model, ids, **rule.arguments)
    stream(model, cache, ids[:, :8], [8])
    with pytest.raises(RuntimeError, match="callback fails"):
        call(model, cache, ids[:, 8:10])
    assert (seen, cache.seen_tokens) == ([8, 10], [10])
    assert worst(call(model, cache, ids[:, 10:]) - expected[:, 10:]) < EXACT


# -- reset ----------------------------------------------------------------------------------------------------------


@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), first=splits(), second=splits())
@budget(0.4)
def test_reset_makes_a_cache_like_new(
    spec: ModelSpec, rule: Rule, seed: int, first: list[int], second: list[int]
) -> None:
    """After `reset` another text, in another batch size, gives bit for bit what it gives with a new cache."""
    model, fresh, used = spec.model(), rule.cache(spec.model()), rule.cache(spec.model())
    stream(model, used, tokens(seed, 2, sum(first)), first, padding_mask(seed, 2, first, holes=True))
    used.reset()
    assert observe(used) == observe(fresh)
    ids = tokens(seed + 1, 1, sum(second))
    assert torch.equal(stream(model, used, ids, second), stream(model, fresh, ids, second))
    assert observe(used) == observe(fresh)


# -- arguments --------------------------------------------------------------------------------------------------------


def test_a_prompt_may_have_fewer_tokens_than_there_are_sinks() -> None:
    """A prompt shorter than S is fine: later tokens become the missing sinks."""
    rule, model, ids = Rule(6, 3, 1), ModelSpec().model(), tokens(0, 1, 40)
    expected = reference_logits(model, ids, **rule.arguments)
    cache = rule.cache(model)
    assert worst(stream(model, cache, ids, [2, 1, 1, 30, 6]) - expected) < EXACT
    assert cache.retained_tokens[0][:6] == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_sinks": -1}, ValueError, "num_sinks must be at least 0, got -1"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": True}, TypeError, "window must be an int, got True"),
        ({"buffer": -3}, ValueError, "buffer must be at least 0, got -3"),
        ({"buffer": 2.0}, TypeError, r"buffer must be an int, got 2\.0"),
        ({"evict": "sometimes"}, ValueError, "evict must be .* got 'sometimes'"),
        ({"on_evict": 3}, TypeError, "on_evict must be callable or None, got 3"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_and_leave_no_hook(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """The error names the argument and its value, and the model is unchanged."""
    model = ModelSpec(layers=3).model()
    with pytest.raises(kind, match=message):
        StreamingCache(model, **({"num_sinks": 1, "window": 4, "buffer": 1} | arguments))
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda cache: cache.batch_repeat_interleave(0), "repeats must be at least 1, got 0"),
        (lambda cache: cache.batch_repeat_interleave(2**16 + 1), "repeats must be at most 65536, got 65537"),
        (lambda cache: cache.reorder_cache(torch.tensor([1])), "beam_idx must be between 0 and 0"),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), "indices must be between 0 and 0"),
        (lambda cache: cache.can_crop(-1), "columns must be at least 0, got -1"),
        (lambda cache: cache.crop(10**30), "tokens_to_remove must be at most"),
    ],
    ids=range(6),
)
def test_methods_name_the_argument_that_they_refuse(act: Callable[[StreamingCache], object], message: str) -> None:
    """The error has the argument's name, what is allowed, and the value."""
    model = ModelSpec().model()
    cache = Rule(1, 4, 1).cache(model)
    cache.batch_repeat_interleave(2**16)  # of no rows yet
    call(model, cache, tokens(0, 1, 3))
    cache.batch_repeat_interleave(1)
    with pytest.raises(ValueError, match=message):
        act(cache)


def test_slots_are_there_from_the_first_call_on() -> None:
    """`debug_state` shows none before it, then S + W + B + 1 and the free ones."""
    model = ModelSpec().model()
    cache = Rule(1, 4, 1).cache(model)
    assert (cache.debug_state().size, cache.nbytes) == (0, 0)
    call(model, cache, tokens(0, 1, 3))
    assert cache.debug_state().size == 1 + 4 + 1 + 1 + 8


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("static", [True, False])
def test_a_4d_mask_that_hides_cached_tokens_is_refused(columns: int, *, static: bool) -> None:
    """It is compared with what was fed, whoever made it; one that hides nothing is the call without a mask."""
    model, ids = ModelSpec().model(), tokens(14, 1, 16)
    mask = torch.ones(1, 1, columns, 12 + columns, dtype=torch.bool).tril(12)
    cache, twin = (StreamingCache(model, 2, 5, 1, static=static) for _ in range(2))
    for one in (cache, twin):
        call(model, one, ids[:, :12])
    before, hidden = observe(cache), mask.clone()
    hidden[..., 3] = False
    biased = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    biased[..., -1:, 3] = -0.5
    for wrong, why in ((hidden, "cannot be hidden"), (biased, "adds other numbers")):
        with pytest.raises(ValueError, match=why):
            call(model, cache, ids[:, :columns], wrong)
    assert observe(cache) == before
    assert torch.equal(call(model, cache, ids[:, :columns], mask), call(model, twin, ids[:, :columns]))


def test_masks_of_each_kind_of_layers_are_compared_behind_padded_rows() -> None:
    """Each of them: with what was fed, with the window of its layers, and with the others."""
    model, ids, mask = build("gemma3_text"), tokens(0, 2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    cache, twin = StreamingCache(model, 2, 5, 1), StreamingCache(model, 2, 5, 1)
    for one in (cache, twin):
        call(model, one, ids[:, :10], mask[:, :10])
    right = torch.ones(4, 14, dtype=torch.bool).tril(10) & mask[:, None, None].bool()
    window = right & torch.ones(4, 14, dtype=torch.bool).triu(11 - model.config.sliding_window)
    hidden, padded = right.clone(), window.clone()
    hidden[..., :9], padded[1, :, :, 10] = False, False
    masks = {"full_attention": right, "sliding_attention": window}
    for changes, why in (
        ({"full_attention": hidden}, "cannot be hidden"),
        ({"sliding_attention": right.flip(0)}, "row 0 has|more than the future"),
        ({"sliding_attention": padded}, "different places"),
        ({"other_attention": right}, "got one for .*other_attention"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=why):
            model(input_ids=ids[:, 10:], attention_mask=masks | changes, **{CACHE_NAME: cache})
    with torch.no_grad():
        found = model(input_ids=ids[:, 10:], attention_mask=masks, **{CACHE_NAME: cache}).logits
        assert torch.equal(found, model(input_ids=ids[:, 10:], **{CACHE_NAME: twin}).logits)


@pytest.mark.parametrize("family", ["bloom", "mpt", "llama"])
def test_a_prompt_that_is_cached_is_not_fed_again(family: str) -> None:
    """`generate` passes it with its mask; a call of as many new tokens has a mask over all columns, or none."""
    model, ids, mask = build(family), tokens(3, 2, 20).clamp(min=1), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    caches = [StreamingCache(model, 2, 40, 1) for _ in range(2)]
    for cache in caches:
        call(model, cache, ids[:, :10], mask[:, :10])
    before, how = observe(caches[0]), {"attention_mask": mask[:, :10], "pad_token_id": 0, "use_cache": True}
    ours = ValueError, r"may be the cached text once more|every token its own position"
    error, words = ours if since("5.3") else (IndexError, "index -1")  # generate stops before it calls a model
    with pytest.raises(error, match=words):
        model.generate(ids[:, :10], max_new_tokens=2, **{CACHE_NAME: caches[0]}, **how)  # type: ignore[operator]
    assert observe(caches[0]) == before
    assert torch.equal(call(model, caches[0], ids[:, 10:], mask), call(model, caches[1], ids[:, 10:]))
    assert caches[0].seen_tokens == [17, 20]
