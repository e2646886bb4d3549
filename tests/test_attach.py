"""A cache adds hooks to its model and changes nothing else: other calls of the model are not affected."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from sinkwindow import StreamingCache, UnsupportedModelError, supports
from sinkwindow.model.hooks import call_by_hand
from sinkwindow_reference import reference_logits
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    model_specs,
    rules,
    seeds,
    splits,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

RULE = Rule(1, 4, 1)
ATTENTIONS = ["sdpa", "eager"]


def _hooks(model: torch.nn.Module) -> int:
    """Count the hooks anywhere in a model."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return everything of a model that a cache might change."""
    forwards = [(type(module), "forward" in vars(module)) for module in model.modules()]
    return forwards, model.config.to_dict(), model.config._attn_implementation, list(model.state_dict())


@pytest.fixture
def model() -> PreTrainedModel:
    """Build a model that no other test uses."""
    return fresh_model(ModelSpec()).double()


# -- other calls of the model ---------------------------------------------------------------------------------------


@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), lengths=splits(most=40))
@budget(0.3)
def test_other_calls_are_not_affected(spec: ModelSpec, rule: Rule, seed: int, lengths: list[int]) -> None:
    """Without a cache, and with a stock one, the model gives the same bits before, between and after other calls."""
    model, ids = spec.model(torch.float32), tokens(seed, 1, sum(lengths))

    def others() -> list[torch.Tensor]:
        return [call(model, None, ids), stream(model, DynamicCache(config=model.config), ids, lengths)]

    before, cache = others(), rule.cache(model)
    between = others()
    for part in torch.split(ids, lengths, dim=1):
        call(model, cache, part)
        between += others()
    cache.detach()
    for output in [*between, *others()]:
        assert any(torch.equal(output, expected) for expected in before)


@given(rule_one=rules(BOTH), rule_two=rules(BOTH), seed=seeds(), lengths=splits(most=60))
@budget(0.3)
def test_two_caches_on_one_model_are_independent(rule_one: Rule, rule_two: Rule, seed: int, lengths: list[int]) -> None:
    """Interleaved streams with different rules and texts each give what they give alone, also after one is deleted."""
    model, texts = ModelSpec().model(), [tokens(seed + n, 1, sum(lengths)) for n in range(2)]
    both = (rule_one, rule_two)
    alone = [stream(model, rule.cache(model), ids, lengths) for rule, ids in zip(both, texts, strict=True)]
    caches: list[StreamingCache | None] = [rule.cache(model) for rule in both]
    parts = [torch.split(ids, lengths, dim=1) for ids in texts]
    for step, end in enumerate(torch.tensor(lengths).cumsum(0).tolist()):
        for n in range(2):
            if caches[n] is not None:
                logits = call(model, caches[n], parts[n][step])
                assert torch.equal(logits, alone[n][:, end - lengths[step] : end])
        if step == len(lengths) // 2:
            caches[0] = None


def test_calls_in_two_threads_are_independent(model: PreTrainedModel) -> None:
    """A stock call in another thread, in the middle of a streaming call, gives stock logits."""
    ids = tokens(0, 1, 20)
    expected = call(model, None, ids)
    results: list[torch.Tensor] = []

    def other(*_: object) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: results.append(call(model, None, ids)))
        thread.start()
        thread.join()

    handle = model.get_submodule("model.layers.0.mlp").register_forward_hook(other)
    logits = stream(model, RULE.cache(model), ids, [5, 1, 1, 13])
    assert worst(results[0] - expected) < EXACT
    assert worst(logits - reference_logits(model, ids, **RULE.arguments)) < EXACT


def test_a_replaced_forward_has_its_own_argument_names(model: PreTrainedModel) -> None:
    """If `forward` was replaced on one decoder, its positional arguments get their names from the replacement."""
    ids = tokens(0, 1, 12)
    expected = reference_logits(model, ids, **RULE.arguments)
    decoder = model.base_model
    stock = decoder.forward

    def forward(cache: StreamingCache, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return stock(input_ids=input_ids, **{CACHE_NAME: cache}, **kwargs)

    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # not typed in transformers
    with torch.no_grad():
        plain = decoder(ids, **{CACHE_NAME: RULE.cache(model)}).last_hidden_state
        decoder.forward = forward
        swapped = decoder(RULE.cache(model), ids).last_hidden_state
    assert worst(head(plain) - expected) < EXACT
    assert worst(head(swapped) - expected) < EXACT


# -- what is changed, and restored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nothing_of_the_model_is_replaced(model: PreTrainedModel, attention: str) -> None:
    """Neither a new cache nor any kind of call replaces a forward or changes weights or config."""
    model.config._attn_implementation = attention
    before = _state(model)
    cache = RULE.cache(model)
    assert _state(model) == before
    for length in (3, 1, 12, 1):  # within the list, across evictions
        call(model, cache, tokens(0, 2, length))
        assert _state(model) == before
    with pytest.raises(ValueError, match="batch size"):
        call(model, cache, tokens(0, 1, 3))
    assert _state(model) == before


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_failed_forward_leaves_the_attention_implementation_unchanged(model: PreTrainedModel, attention: str) -> None:
    """After a call across evictions raises, the config names the same attention implementation as before."""
    model.config._attn_implementation = attention
    cache = RULE.cache(model)
    with pytest.raises(IndexError):
        call(model, cache, torch.full((1, 20), 10_000))  # no such token
    assert model.config._attn_implementation == attention
    assert cache.seen_tokens == [0]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("static", [False, True])
def test_a_call_by_hand_counts(model: PreTrainedModel, attention: str, *, static: bool) -> None:
    """A benchmark's call of the cache alone counts like a call of the model, and leaves the model unchanged."""
    model.config._attn_implementation = attention
    cache = StreamingCache(model, 2, 5, 3, static=static)
    call(model, cache, tokens(6, 1, 4))
    before, decoder = _state(model), cast("PreTrainedModel", model.base_model)
    for _ in range(2):
        with call_by_hand(cache, decoder, {"input_ids": tokens(1, 1, 1)}) as arguments:
            assert arguments["position_ids"].shape == (1, 1)
            for layer in range(2):
                cache.update(torch.zeros(1, 1, 1, 8).double(), torch.zeros(1, 1, 1, 8).double(), layer)
        assert _state(model) == before
    assert cache.seen_tokens == [6]


@pytest.mark.parametrize("count", [1, 3])
def test_detach_leaves_no_hook(model: PreTrainedModel, count: int) -> None:
    """The last cache to be detached removes the hooks; others work until then, and detaching twice is harmless."""
    caches = [RULE.cache(model) for _ in range(count)]
    ids = tokens(0, 1, 12)
    expected = reference_logits(model, ids, **RULE.arguments)
    for cache in caches:
        assert _hooks(model) > 0
        assert worst(call(model, cache, ids) - expected) < EXACT
        cache.detach()
        cache.detach()
    assert _hooks(model) == 0


def test_a_detached_cache_can_be_read_but_not_fed(model: PreTrainedModel) -> None:
    """After `detach` a call is an error that says so; the cache's counts and retained tokens can still be read."""
    cache = RULE.cache(model)
    call(model, cache, tokens(0, 1, 12))
    seen = cache.retained_tokens
    cache.detach()
    with pytest.raises(RuntimeError, match=r"detach\(\)"):
        call(model, cache, tokens(0, 1, 2))
    assert (cache.retained_tokens, cache.seen_tokens) == (seen, [12])


# -- garbage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Disable the garbage collector, so that only reference counts free objects."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("lengths", [[3], [20], [9, 1, 1, 1, 30, 1]], ids=str)
def test_a_dropped_cache_frees_its_tensors_and_hooks_at_once(model: PreTrainedModel, lengths: list[int]) -> None:
    """`del cache` is enough: there is no reference cycle that only the garbage collector would free."""
    cache = RULE.cache(model)
    stream(model, cache, tokens(0, 1, sum(lengths)), lengths)
    banks = [weakref.ref(tensor) for tensor in _tensors(cache)]
    assert banks
    del cache
    assert [ref() for ref in banks] == [None] * len(banks)
    assert _hooks(model) == 0


@pytest.mark.usefixtures("no_collector")
def test_a_cache_does_not_keep_its_model(model: PreTrainedModel) -> None:
    """A cache has a weak reference to its model, so deleting the model frees its weights."""
    model_ = fresh_model(ModelSpec(layers=1))
    cache, gone = RULE.cache(model_), weakref.ref(model_)
    call(model_, cache, tokens(0, 1, 12))
    del model_
    gc.collect()  # torch itself makes reference cycles of a module and its hooks
    assert gone() is None
    assert cache.seen_tokens == [12]
    with pytest.raises(RuntimeError, match="model"):
        call(model, cache, tokens(0, 1, 1))


def _tensors(cache: StreamingCache) -> list[torch.Tensor]:
    return [tensor for slots in cache._stream.state.pools for bank in slots.banks for tensor in bank.tensors]


# -- copies of the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_of_the_model_is_an_ordinary_model(model: PreTrainedModel, how: str) -> None:
    """A model with a cache can be copied and pickled; the copy is not attached, and can have a cache of its own."""
    ids, cache = tokens(0, 1, 24), RULE.cache(model)
    stock, expected = call(model, None, ids), reference_logits(model, ids, **RULE.arguments)
    first = call(model, cache, ids[:, :12])
    twin = copy.deepcopy(model) if how == "deepcopy" else _saved_and_loaded(model)
    assert torch.equal(call(twin, None, ids), stock)
    with pytest.raises((ValueError, RuntimeError), match="another model"):
        call(twin, cache, ids[:, 12:])
    assert worst(stream(twin, RULE.cache(twin), ids, [7, 17]) - expected) < EXACT
    rest = call(model, cache, ids[:, 12:])
    assert worst(torch.cat([first, rest], dim=1) - expected) < EXACT


def _saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: PreTrainedModel = torch.load(file, weights_only=False)
    return loaded


# -- which models are supported -------------------------------------------------------------------------------------


@given(spec=model_specs(), wrapped=st.booleans())
@budget(0.2)
def test_known_families_are_supported(spec: ModelSpec, *, wrapped: bool) -> None:
    """`supports` is true, with an empty reason, for a model and for its bare decoder."""
    model = spec.model()
    answer = supports(model if wrapped else model.base_model)
    assert (bool(answer), answer.reason) == (True, "")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (torch.nn.Linear(2, 2), "Linear"),
        (GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)), "gpt2"),
    ],
    ids=["no transformer", "learned positions"],
)
def test_other_models_are_refused_before_anything_changes(other: torch.nn.Module, says: str) -> None:
    """The error names the kind of model; `supports` gives the same reason; no hook is added."""
    before = _hooks(other)
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        StreamingCache(other)
    answer = supports(other)
    assert (bool(answer), answer.reason) == (False, str(caught.value))
    assert _hooks(other) == before
