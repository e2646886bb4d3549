"""A chat on one cache: each turn forwards only new tokens, and each answer equals the reference's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from releases import NEW_ALONE
from sinkwindow_reference import reference_logits
from strategies import CACHE_NAME, EXACT, ModelSpec, Rule, budget, call, observe, rules, seeds, stream, tokens, worst

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sinkwindow import StreamingCache

NEW = 6  # length of an answer [tokens]


def _answer(model: PreTrainedModel, cache: StreamingCache, history: Tensor, *, full: bool) -> Tensor:
    """Generate an answer; return the history with the answer."""
    given_ids = history if full else history[:, cache.get_seq_length() :]
    arguments = {"attention_mask": torch.ones_like(history), "max_new_tokens": NEW, "do_sample": False}
    output: Tensor = model.generate(given_ids, **arguments, **{CACHE_NAME: cache})  # type: ignore[operator]
    return torch.cat([history, output[:, -NEW:]], dim=1)


@pytest.mark.parametrize(
    "full", [pytest.param(True, id="full history"), pytest.param(False, id="new tokens", marks=NEW_ALONE)]
)
@given(rule=rules(), seed=seeds(), first=st.integers(1, 40), turns=st.lists(st.integers(1, 15), min_size=2, max_size=4))
@budget(0.15)
def test_a_chat_is_one_stream(rule: Rule, seed: int, first: int, turns: list[int], *, full: bool) -> None:
    """Answers are the reference's on the whole history, even if the first message is longer than the cache.

    Each turn forwards only what is new: the message, and the last token of the answer before it.
    """
    model = ModelSpec().model()
    cache, history = rule.cache(model), tokens(seed, 1, 0)
    for index, length in enumerate([first, *turns]):
        history = torch.cat([history, tokens(seed + index, 1, length)], dim=1)
        start = history.shape[1]
        history = _answer(model, cache, history, full=full)
        likeliest = reference_logits(model, history[:, :-1], **rule.arguments).argmax(-1)
        assert torch.equal(history[:, start:], likeliest[:, start - 1 :])
        assert cache.forwarded_tokens == cache.get_seq_length() == history.shape[1] - 1


def test_a_system_prompt_can_be_pinned() -> None:
    """With as many sinks as it has tokens, the system prompt is retained indefinitely, each token at its own rank."""
    system, model = tokens(0, 1, 7), ModelSpec().model()
    rule = Rule(7, 6, 2)
    cache, history = rule.cache(model), torch.cat([system, tokens(1, 1, 30)], dim=1)
    for turn in range(3):
        history = _answer(model, cache, torch.cat([history, tokens(turn, 1, 20)], dim=1), full=True)
        assert cache.retained_tokens[0][:7] == list(range(7))
        assert cache.retained_tokens[0][7] > 7


@given(rule=rules(), seed=seeds(), first=st.integers(1, 40), second=st.integers(1, 30))
@budget(0.2)
def test_snapshots_and_copies_branch_a_chat(rule: Rule, seed: int, first: int, second: int) -> None:
    """Several continuations of one history, in any order and repeated, are each as if it were the only one."""
    model, ids = ModelSpec().model(), tokens(seed, 2, first)
    cache = rule.cache(model)
    call(model, cache, ids)
    saved, twin, before = cache.snapshot(), copy.deepcopy(cache), observe(cache)
    ways = [tokens(seed + way, 2, second) for way in (1, 2)]
    expected = [reference_logits(model, torch.cat([ids, way], dim=1), **rule.arguments)[:, first:] for way in ways]
    for way in (0, 1, 0):
        cache.restore(saved)
        assert observe(cache) == before
        assert worst(call(model, cache, ways[way]) - expected[way]) < EXACT
    assert observe(twin) == before
    assert worst(call(model, twin, ways[1]) - expected[1]) < EXACT


def test_a_snapshot_of_the_other_kind_of_cache_is_refused() -> None:
    """Static and dynamic caches have different tensors: the error names both kinds, and nothing changes."""
    rule, model = Rule(2, 5, 1), ModelSpec().model()
    static, dynamic = rule.cache(model, static=True), rule.cache(model)
    for cache, other, own in ((static, dynamic, True), (dynamic, static, False)):
        call(model, cache, tokens(14, 1, 9))
        before = observe(cache)
        with pytest.raises(ValueError, match=f"static={not own}, this one has static={own}"):
            cache.restore(other.snapshot())
        assert observe(cache) == before


@given(rule=rules(), seed=seeds(), first=st.integers(1, 40), second=st.integers(1, 40))
@budget(0.2)
def test_reset_is_a_fresh_cache(rule: Rule, seed: int, first: int, second: int) -> None:
    """After `reset` everything observable is as in a new cache, logits bit for bit; the batch size may change."""
    model, ids = ModelSpec().model(), tokens(seed, 3, second)
    used, fresh = rule.cache(model), rule.cache(model)
    call(model, used, tokens(seed, 1, first))
    used.reset()
    assert torch.equal(stream(model, used, ids, [second]), stream(model, fresh, ids, [second]))
    assert observe(used) == observe(fresh)


def test_nothing_new_is_an_error_without_consequences() -> None:
    """A turn without a new token is an error that says so; the next turn is exact."""
    rule, model, ids = Rule(2, 6, 3), ModelSpec().model(), tokens(0, 1, 30)
    cache = rule.cache(model)
    call(model, cache, ids[:, :20])
    before = observe(cache)
    with pytest.raises(ValueError, match="at least one new token"):
        call(model, cache, ids[:, :0])
    assert observe(cache) == before
    assert worst(call(model, cache, ids[:, 20:]) - reference_logits(model, ids, **rule.arguments)[:, 20:]) < EXACT
