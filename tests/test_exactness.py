"""The cache gives the logits and keeps the tokens of the reference, whatever the model, the rule and the calls.

Everything runs in float64: a key that is one position off changes logits by far more than the allowed 1e-9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    model_specs,
    rules,
    seeds,
    splits,
    stepwise,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sinkwindow import StreamingCache

# `past_key_values=` still works in releases that replaced it with `cache=`, and warns.
OLD_NAME = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")


@budget(1.5)
@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), batch=st.integers(1, 2), lengths=splits())
def test_every_call_equals_the_reference(
    spec: ModelSpec, rule: Rule, seed: int, batch: int, lengths: list[int]
) -> None:
    """After every call the retained tokens are identical, and the logits are within 1e-9."""
    model, ids = spec.model(), tokens(seed, batch, sum(lengths))
    expected = reference_logits(model, ids, chunks=lengths, **rule.arguments)
    cache = rule.cache(model)
    for step, (end, logits) in enumerate(stepwise(model, cache, ids, lengths)):
        assert worst(logits - expected[:, end - lengths[step] : end]) < EXACT
        assert cache.retained_tokens == [retained_after(end, chunks=lengths[: step + 1], **rule.arguments)] * batch
        assert (cache.seen_tokens, cache.get_seq_length()) == ([end] * batch, end)


@budget(0.3)
@given(spec=model_specs(), rule=rules(), seed=seeds(), data=st.data())
def test_one_call_may_be_longer_than_the_whole_cache(
    spec: ModelSpec, rule: Rule, seed: int, data: st.DataObject
) -> None:
    """A prompt several times as long as the cache, in one call, and the decode steps after it equal the reference."""
    lengths = [data.draw(st.integers(2 * rule.capacity, 4 * rule.capacity), label="prompt"), 1, 1, 1]
    model, ids = spec.model(), tokens(seed, 1, sum(lengths))
    expected = reference_logits(model, ids, **rule.arguments)
    assert worst(stream(model, rule.cache(model), ids, lengths) - expected) < EXACT


@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), lengths=splits(most=60))
@budget(0.2)
def test_eager_attention_is_exact_within_its_own_softmax(
    spec: ModelSpec, rule: Rule, seed: int, lengths: list[int]
) -> None:
    """With `eager` the same holds to float32 accuracy: its softmax is in float32, even in float64 models."""
    model, ids = spec.with_(attention="eager").model(), tokens(seed, 1, sum(lengths))
    expected = reference_logits(model, ids, chunks=lengths, **rule.arguments)
    assert worst(stream(model, rule.cache(model), ids, lengths) - expected) < 1e-4


@pytest.mark.parametrize("columns", [127, 128, 129, 300])
def test_long_calls_are_exact_where_their_pieces_join(columns: int) -> None:
    """A long call runs in pieces; no query at the end or the start of a piece attends to more or less."""
    rule, model, ids = Rule(2, 6, 3), ModelSpec(max_positions=512).model(), tokens(columns, 1, columns + 150)
    expected = reference_logits(model, ids, **rule.arguments)
    assert worst(stream(model, rule.cache(model), ids, [columns, 150]) - expected) < EXACT


@OLD_NAME
@pytest.mark.parametrize("name", sorted({CACHE_NAME, "past_key_values"}))
@given(spec=model_specs(), rule=rules(), seed=seeds(), prompt=st.integers(1, 40))
@budget(0.15)
def test_generate_takes_the_reference_s_most_likely_token(
    name: str, spec: ModelSpec, rule: Rule, seed: int, prompt: int
) -> None:
    """Greedy `generate`, the cache under either name, takes the reference's argmax long after the cache is full."""
    model, ids = spec.model(), tokens(seed, 2, prompt)
    cache = rule.cache(model)
    generated = _generate(model, ids, cache, name)
    assert generated.shape == (2, prompt + 30)
    _assert_greedy(model, rule, generated, prompt)
    assert cache.seen_tokens == [prompt + 29] * 2  # the last token was not fed


def test_generate_continues_a_chat() -> None:
    """Three turns on one cache, each given the whole history, equal one stream; only new tokens are forwarded."""
    rule, model = Rule(2, 6, 3), ModelSpec().model()
    cache, history = rule.cache(model), tokens(0, 1, 20)
    for turn in range(1, 4):
        prompt = torch.cat([history, tokens(turn, 1, 7)], dim=1)
        history = _generate(model, prompt, cache, CACHE_NAME)
        _assert_greedy(model, rule, history, prompt.shape[1])
        assert cache.seen_tokens == [history.shape[1] - 1]


@OLD_NAME
@given(spec=model_specs(), rule=rules(), seed=seeds(), lengths=splits(most=40))
@budget(0.15)
def test_forward_takes_the_cache_under_both_names(spec: ModelSpec, rule: Rule, seed: int, lengths: list[int]) -> None:
    """`past_key_values=`, positional arguments, and calls of the bare decoder give what `cache=` gives, bit for bit."""
    model, ids = spec.model(), tokens(seed, 1, sum(lengths))
    caches = [rule.cache(model) for _ in range(3)]
    for part in torch.split(ids, lengths, dim=1):
        expected = call(model, caches[0], part)
        with torch.no_grad():
            assert torch.equal(model(input_ids=part, past_key_values=caches[1]).logits, expected)
            hidden = model.base_model(part, **{CACHE_NAME: caches[2]}).last_hidden_state
            head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # not typed in transformers
            assert torch.equal(head(hidden), expected)


@given(rule=rules(BOTH), seed=seeds(), lengths=splits(most=40))
@budget(0.15)
def test_embeddings_can_replace_tokens(rule: Rule, seed: int, lengths: list[int]) -> None:
    """`inputs_embeds` gives the logits of the corresponding `input_ids`."""
    model, ids = ModelSpec().model(), tokens(seed, 2, sum(lengths))
    expected = stream(model, rule.cache(model), ids, lengths)
    cache, outputs = rule.cache(model), []
    for part in torch.split(ids, lengths, dim=1):
        with torch.no_grad():
            embedded = model.get_input_embeddings()(part)
            outputs.append(model(inputs_embeds=embedded, **{CACHE_NAME: cache}).logits)
    assert torch.equal(torch.cat(outputs, dim=1), expected)


def _generate(model: PreTrainedModel, ids: Tensor, cache: StreamingCache, name: str) -> Tensor:
    """Generate 30 tokens greedily; return prompt and continuation `[batch, tokens]`."""
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, name: cache}
    generated: Tensor = model.generate(ids, **arguments)  # type: ignore[operator]  # a mixin's method to mypy
    return generated


def _assert_greedy(model: PreTrainedModel, rule: Rule, generated: Tensor, prompt: int) -> None:
    """Check each generated token against the reference's argmax; in float64 there are no ties."""
    expected = reference_logits(model, generated[:, :-1], **rule.arguments).argmax(dim=-1)
    assert torch.equal(generated[:, prompt:], expected[:, prompt - 1 :])
