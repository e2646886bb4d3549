"""Every mode of `generate` gives the same tokens with the cache as with the reference, from the same random seed.

`Reference` is a language model that computes the reference's logits of the whole sequence at every step, without a
cache. The same `generate`, with the same arguments, samples, ranks beams and stops on both sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import torch
from hypothesis import given
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from releases import ready_for_drafts
from sinkwindow_reference import reference_logits, retained_lists
from strategies import (
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    padding_mask,
    rules,
    seeds,
    splits,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedModel

    from sinkwindow import StreamingCache

PROMPT, NEW = 14, 12  # [tokens]; together more than twice the rule below
RULE: Final = Rule(2, 5, 2)
ENDS: Final = [3, 7, 11, 19]  # tokens that end a sequence, so that rows end at different lengths

MODES: Final[dict[str, dict[str, Any]]] = {
    "greedy": {},
    "greedy, different ends": {"eos_token_id": ENDS},
    "repetition penalty": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True},
    "sampling, top-k": {"do_sample": True, "top_k": 4, "temperature": 1.5},
    "sampling, top-p, three each": {"do_sample": True, "top_p": 0.7, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, two each, different ends": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": ENDS},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "beams, early stopping": {"num_beams": 2, "early_stopping": True, "eos_token_id": ENDS, "length_penalty": 0.3},
}


class Reference(LlamaForCausalLM):  # type: ignore[no-untyped-call]  # its __init_subclass__ is not typed
    """A language model that returns the reference's logits of another model; its own weights are not used."""

    def __init__(self, model: PreTrainedModel, rule: Rule) -> None:
        super().__init__(cast("LlamaConfig", model.config))
        self.__dict__["streaming"] = (model, rule)  # not a submodule

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 - called by name, by transformers
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits `[rows, columns, vocab]` of the whole sequence, zeros at padding."""
        assert not use_cache
        model, rule = self.__dict__["streaming"]
        logits = reference_logits(model, input_ids, attention_mask, **rule.arguments)
        return CausalLMOutputWithPast(logits=logits.nan_to_num())


def _generate(
    model: PreTrainedModel,
    ids: Tensor | None,
    mask: Tensor,
    cache: StreamingCache | None = None,
    *,
    seed: int = 0,
    **more: Any,
) -> Tensor:
    """Run `generate`; return prompt and continuation `[sequences, tokens]`."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    common |= {} if cache is None else {CACHE_NAME: cache}
    prompt = {} if ids is None else {"input_ids": ids}
    output: Tensor = model.generate(**prompt, **(common | more))  # type: ignore[operator]  # a mixin's method to mypy
    return output


def _expected(model: PreTrainedModel, rule: Rule, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    return _generate(Reference(model, rule), ids, mask, use_cache=False, **more)


@pytest.mark.parametrize("mode", MODES)
@given(rule=rules(), seed=seeds())
@budget(0.05)
def test_a_mode_gives_the_same_tokens_with_the_cache_as_with_the_reference(mode: str, rule: Rule, seed: int) -> None:
    """A left-padded batch gives the same sequences, token by token, across several evictions."""
    model, ids = ModelSpec().model(), tokens(seed, 2, PROMPT)
    mask = padding_mask(seed, 2, [PROMPT], holes=False)
    expected = _expected(model, rule, ids, mask, seed=seed, **MODES[mode])
    assert torch.equal(_generate(model, ids, mask, rule.cache(model), seed=seed, **MODES[mode]), expected)


def test_the_reference_itself_depends_on_the_rule() -> None:
    """The test above compares with streaming, not with dense decoding: the two differ in every mode."""
    model, ids = ModelSpec().model(), tokens(1, 2, PROMPT)
    for mode, arguments in MODES.items():
        stock = _generate(model, ids, torch.ones_like(ids), **arguments)
        streaming = _expected(model, RULE, ids, torch.ones_like(ids), **arguments)
        assert stock.shape != streaming.shape or not torch.equal(stock, streaming), mode


@pytest.mark.parametrize("chunk", [1, 3, 7, 13, 100])
def test_a_prompt_may_be_fed_in_chunks(chunk: int) -> None:
    """`prefill_chunk_size` changes nothing, whether it is shorter or longer than the prompt and the list."""
    model, ids = ModelSpec().model(), tokens(2, 2, 30)
    mask = padding_mask(2, 2, [30], holes=False)
    cache = RULE.cache(model)
    generated = _generate(model, ids, mask, cache, prefill_chunk_size=chunk)
    assert torch.equal(generated, _expected(model, RULE, ids, mask))
    assert cache.forwarded_tokens == 30 + NEW - 1


def test_embeddings_can_replace_the_prompt() -> None:
    """`generate(inputs_embeds=...)` continues as `generate(input_ids)` does."""
    model, ids = ModelSpec().model(), tokens(3, 2, PROMPT)
    mask = torch.ones_like(ids)
    embeds: Tensor = model.get_input_embeddings()(ids)
    generated = _generate(model, None, mask, RULE.cache(model), inputs_embeds=embeds)
    assert torch.equal(generated, _expected(model, RULE, ids, mask)[:, PROMPT:])


# -- drafts ---------------------------------------------------------------------------------------------------------


def _assistant() -> PreTrainedModel:
    """Return a model that often predicts the same token as `ModelSpec().model()`, and often another one."""
    model = fresh_model(ModelSpec()).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("rule", [RULE, Rule(0, 1), Rule(4, 8, 5)], ids=str)
@pytest.mark.parametrize("by", ["assistant", "prompt lookup"])
def test_drafts_change_nothing(by: str, rule: Rule) -> None:
    """Assisted and prompt-lookup decoding give the greedy tokens; wrong drafts are taken back exactly."""
    model = ModelSpec().model()
    ids = tokens(4, 1, 5).repeat(1, 4)  # with repetitions, so that prompt lookup finds drafts
    mask = torch.ones_like(ids)
    drafts: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 4} if by == "prompt lookup" else {"assistant_model": _assistant()}
    )
    cache = ready_for_drafts(rule.cache(model))
    generated = _generate(model, ids, mask, cache, max_new_tokens=40, eos_token_id=10_000, **drafts)
    expected = _expected(model, rule, ids, mask, max_new_tokens=40)
    assert torch.equal(generated[:, : expected.shape[1]], expected)  # before 5.4 the last drafts go beyond 40
    assert cache.forwarded_tokens > cache.get_seq_length()  # some drafts were wrong


# -- watching and stopping ------------------------------------------------------------------------------------------


class _Listener(BaseStreamer):
    """A streamer that keeps what it receives."""

    def __init__(self) -> None:
        self.received: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then each token."""
        self.received.append(value.flatten())

    def end(self) -> None:
        """Count the end."""
        self.ended += 1


class _StopAt(StoppingCriteria):
    """A criterion that stops all rows at a length [tokens]."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:  # noqa: ARG002 - the signature in transformers
        """Return whether to stop, for each row."""
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_streamers_receive_every_token_once() -> None:
    """A streamer receives the prompt, then token by token, and one end."""
    model, ids, listener = ModelSpec().model(), tokens(5, 1, PROMPT), _Listener()
    generated = _generate(model, ids, torch.ones_like(ids), RULE.cache(model), streamer=listener)
    assert torch.equal(torch.cat(listener.received), generated[0])
    assert (len(listener.received), listener.ended) == (1 + NEW, 1)


def test_stopping_criteria_stop() -> None:
    """Generation ends where the criteria say, and continues from there as if it had not stopped."""
    model, ids, cache = ModelSpec().model(), tokens(6, 2, PROMPT), RULE.cache(ModelSpec().model())
    expected = _expected(model, RULE, ids, torch.ones_like(ids))
    stop = StoppingCriteriaList([_StopAt(PROMPT + 5)])
    first = _generate(model, ids, torch.ones_like(ids), cache, stopping_criteria=stop)
    assert torch.equal(first, expected[:, : PROMPT + 5])
    rest = _generate(model, first, torch.ones_like(first), cache, max_new_tokens=NEW - 5)
    assert torch.equal(rest, expected)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 17, 3])], ids=str)
def test_logits_to_keep_are_those_of_all(keep: int | Tensor) -> None:
    """`logits_to_keep` selects a number of last columns, or columns by index, in a call that crosses evictions."""
    model, ids = ModelSpec().model(), tokens(7, 2, 30)
    every = call(model, RULE.cache(model), ids)
    with torch.no_grad():
        some = model(input_ids=ids, logits_to_keep=keep, **{CACHE_NAME: RULE.cache(model)}).logits
    assert worst(some - (every[:, -keep:] if isinstance(keep, int) else every[:, keep])) < EXACT


# -- attention weights ----------------------------------------------------------------------------------------------


@given(rule=rules(), seed=seeds(), lengths=splits(most=40))
@budget(0.3)
def test_attention_weights_fall_on_retained_tokens_only(rule: Rule, seed: int, lengths: list[int]) -> None:
    """With eager attention, each query's weights are a distribution over exactly the tokens of its retained list.

    Whatever the calls, the weights of each token are those of calls with one token.
    """
    ids, total = tokens(seed, 1, sum(lengths)), sum(lengths)
    weights = _weights_by_token(rule, ids, lengths)
    lists = retained_lists(total, **rule.arguments)
    visible = torch.zeros(total, total, dtype=torch.bool)
    for query, kept in enumerate(lists):
        visible[query, kept] = True
    assert torch.equal((weights > 0).all(dim=0), visible)
    assert torch.equal((weights != 0).any(dim=0), visible)
    assert worst(weights.sum(dim=-1) - 1) < 1e-5
    assert worst(weights - _weights_by_token(rule, ids, [1] * total)) < 1e-5


def _weights_by_token(rule: Rule, ids: Tensor, lengths: list[int]) -> Tensor:
    """Return attention weights `[layers * heads, queries, tokens]`, the last dimension by natural index."""
    model = ModelSpec(attention="eager").model()
    cache, total = rule.cache(model), ids.shape[1]
    rows, start = [], 0
    for length in lengths:
        columns = [*cache.retained_tokens[0], *range(start, start + length)]
        part = ids[:, start : start + length]
        with torch.no_grad():
            attentions = model(input_ids=part, output_attentions=True, **{CACHE_NAME: cache}).attentions
        given_weights = torch.cat(list(attentions), dim=1)[0]  # [layers * heads, queries, columns]
        assert given_weights.shape[-1] == len(columns)
        rows.append(given_weights.new_zeros(*given_weights.shape[:2], total))
        rows[-1][..., columns] = given_weights
        start += length
    return torch.cat(rows, dim=1)


def test_generate_returns_attention_weights() -> None:
    """`generate` with `output_attentions` returns a tuple per step, with weights over at most the longest list."""
    model, ids = ModelSpec(attention="eager").model(), tokens(8, 2, PROMPT)
    wanted = {"output_attentions": True, "return_dict_in_generate": True}
    output: Any = _generate(model, ids, torch.ones_like(ids), RULE.cache(model), **wanted)
    assert len(output.attentions) == NEW
    assert output.attentions[0][0].shape == (2, 2, PROMPT, PROMPT)
    for step in output.attentions[1:]:
        for layer in step:
            assert layer.shape[:3] == (2, 2, 1)
            assert layer.shape[3] <= RULE.capacity
            assert worst(layer.sum(-1) - 1) < 1e-5


def test_weights_that_sdpa_does_not_return_are_not_missed() -> None:
    """As with the caches of transformers, a call that evicts has none either, and its logits are the usual ones."""
    model, ids = ModelSpec().model(), tokens(9, 1, 3 * RULE.capacity)
    with torch.no_grad():
        output = model(ids, output_attentions=True, **{CACHE_NAME: RULE.cache(model)})
        assert torch.equal(output.logits, model(ids, **{CACHE_NAME: RULE.cache(model)}).logits)
    assert all(weights is None for weights in output.attentions)
