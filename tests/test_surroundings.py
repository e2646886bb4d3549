"""What is around a call: the modes that torch is in, and gradients.

In each a cache does what a ``DynamicCache`` does, or refuses the call by name; one property per surrounding.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import DynamicCache

from calling import KINDS, LENGTHS, RULE, WIDE, logits_of
from families import build
from releases import needs
from sinkwindow.model import rope
from sinkwindow_reference import reference_logits
from strategies import (
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    model_specs,
    observe,
    rules,
    seeds,
    splits,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sinkwindow import StreamingCache


# -- modes of torch -----------------------------------------------------------------------------------------------


@budget(0.3)
@given(
    spec=model_specs(),
    rule=rules(),
    seed=seeds(),
    lengths=splits(most=40),
    inside=st.integers(0, 2**20),
    static=st.booleans(),
)
def test_calls_and_changes_may_be_inside_or_outside_of_inference_mode(
    spec: ModelSpec, rule: Rule, seed: int, lengths: list[int], inside: int, *, static: bool
) -> None:
    """Whichever calls, reorderings, copies and restorations are inside it, logits are the reference's."""
    if static and spec.rope == "dynamic":
        spec = spec.with_(rope="default")
    model, ids, dice = spec.model(), tokens(seed, 2, sum(lengths)), inside
    expected, cache, end = reference_logits(model, ids, **rule.arguments), rule.cache(model, static=static), 0
    for length in lengths:
        with torch.inference_mode(mode=bool(dice & 1)):
            logits = logits_of(model, cache, ids[:, end : end + length])
        with torch.inference_mode(mode=bool(dice & 2)):
            cache = _changed(cache, dice % 4)
        assert worst(logits - expected[:, end : end + length]) < EXACT
        end, dice = end + length, dice >> 2 or inside


def _changed(cache: StreamingCache, how: int) -> StreamingCache:
    """Make the tensors of a cache anew, in one of four ways."""
    if how == 1:
        return copy.deepcopy(cache)
    if how == 2:
        cache.reorder_cache(torch.tensor([0, 1]))
    if how == 3:
        cache.restore(cache.snapshot())
    return cache


@budget(0.3)
@given(
    rule=rules(),
    family=st.sampled_from(["llama", "gpt_neox", "qwen3"]),
    seed=seeds(),
    before=st.integers(0, 20),
    columns=st.integers(1, 25),
    only=st.none() | st.integers(0, 20),
)
@example(Rule(3, 4, 1), "llama", 0, 0, 20, None)  # sinks of the call are copied, and moved, for later queries
@example(Rule(3, 4, 1), "llama", 0, 1, 20, None)
@example(Rule(2, 8, 4), "llama", 0, 8, 4, 1)  # the first layer's queries alone
@example(Rule(2, 8, 4), "llama", 0, 8, 4, 10)  # the last layer's
def test_the_gradient_of_a_call_is_right(
    rule: Rule, family: str, seed: int, before: int, columns: int, only: int | None
) -> None:
    """It is the derivative of the call's logits, cached keys and values being constants; later calls are unharmed.

    Also where one parameter alone is trained.
    """
    model = copy.deepcopy(ModelSpec(family=family, kv_heads=2, max_positions=24).model())
    parameters = list(model.parameters())
    trained = parameters if only is None else [parameters[only]]
    for one in trained:
        one.requires_grad_()
    ids = tokens(seed, 2, before + columns + 3)
    cache = rule.cache(model)
    if before:
        call(model, cache, ids[:, :before])
    filled, generator = copy.deepcopy(cache), torch.Generator().manual_seed(seed)
    logits = logits_of(model, cache, ids[:, before : before + columns])
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    ahead = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in trained]
    after = call(model, cache, ids[:, before + columns :])  # what is written does not change what the graph has kept
    (logits * weights).sum().backward()  # type: ignore[no-untyped-call]
    slope = sum(float((one.grad * way).sum()) for one, way in zip(trained, ahead, strict=True) if one.grad is not None)
    sides = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for one, way in zip(trained, ahead, strict=True):
                one.add_(way, alpha=step)
            sides.append(float((call(model, copy.deepcopy(filled), ids[:, before : before + columns]) * weights).sum()))
            for one, way in zip(trained, ahead, strict=True):
                one.sub_(way, alpha=step)
    assert abs((sides[0] - sides[1]) / 2e-6 - slope) < 1e-5 * max(1.0, abs(slope))
    expected = reference_logits(model, ids, **rule.arguments)[:, before + columns :]
    assert worst(after - expected) < EXACT


def test_a_gradient_through_pieces_or_a_static_step_is_refused() -> None:
    """Where a call must run in pieces, or writes in place, the error says how to do without a gradient."""
    model, ids = copy.deepcopy(build("falcon")).requires_grad_(), tokens(0, 1, 40)
    cache = RULE.cache(model)
    with pytest.raises(ValueError, match=r"a gradient needs a call in one piece.*no_grad"):
        logits_of(model, cache, ids)
    assert cache.seen_tokens == [0]
    model = copy.deepcopy(ModelSpec().model()).requires_grad_()
    cache = RULE.cache(model, static=True)
    logits_of(model, cache, ids[:, :9])
    with pytest.raises(RuntimeError, match="has no gradient"):
        logits_of(model, cache, ids[:, 9:10])
    assert cache.seen_tokens == [9]
    expected = reference_logits(model, ids, **RULE.arguments)
    assert worst(call(model, cache, ids[:, 9:]) - expected[:, 9:]) < EXACT


def test_a_gradient_that_only_a_hook_asks_for_is_refused_where_pieces_would_cut_it() -> None:
    """The decoder's parameters do not show it; the first piece's output does."""
    model, ids = copy.deepcopy(ModelSpec().model()), tokens(0, 1, 300)
    shift = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] + shift, *args[1:]))
    cache = RULE.cache(model)
    with pytest.raises(ValueError, match="a gradient needs a call in one piece"):
        logits_of(model, cache, ids)
    assert cache.seen_tokens == [0]
    logits_of(model, cache, ids[:, :9]).sum().backward()  # type: ignore[no-untyped-call]
    assert shift.grad is not None


@budget(0.2)
@given(seed=seeds(), lengths=splits(most=12), eager=st.booleans(), static=st.booleans())
@example(seed=0, lengths=[8, 4], eager=True, static=False)
@example(seed=0, lengths=[8, 1, 1], eager=False, static=True)
def test_a_gradient_that_only_a_query_asks_for_is_a_stock_caches(
    seed: int, lengths: list[int], *, eager: bool, static: bool
) -> None:
    """In the last layer, so that no key depends on it: one backward pass goes through several calls, and steps."""
    model = copy.deepcopy(ModelSpec(attention="eager" if eager else "sdpa", max_positions=128).model())
    lengths = [lengths[0], 1, 1, 1] if static else lengths
    shift = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_hook(lambda *args: args[2] + shift)
    gradients = []
    for cache in (WIDE.cache(model, static=static), DynamicCache(config=model.config)):
        parts = torch.split(tokens(seed, 2, sum(lengths)), lengths, dim=1)
        logits = torch.cat([logits_of(model, cache, part) for part in parts], dim=1)
        gradients.append(torch.autograd.grad(logits.square().sum(), shift)[0])
    assert worst(gradients[0] - gradients[1]) < 1e-5 * (1 + float(gradients[1].abs().max()))  # float32 angles


def _autocast(*, on: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext()


@budget(0.2)
@given(seed=seeds(), on=st.lists(st.booleans(), min_size=len(LENGTHS), max_size=len(LENGTHS)))
def test_autocast_may_be_on_in_some_calls(seed: int, on: list[bool]) -> None:
    """Without evictions logits are a stock cache's; with them the cache goes on, and keeps the wider dtype."""
    model, ids = ModelSpec(max_positions=128).model(torch.float32), tokens(seed, 2, sum(LENGTHS))
    ours, stock, narrow = WIDE.cache(model), DynamicCache(config=model.config), RULE.cache(model)
    for part, mode in zip(torch.split(ids, LENGTHS, dim=1), on, strict=True):
        with torch.no_grad(), _autocast(on=mode):
            expected = logits_of(model, stock, part)
            assert worst(logits_of(model, ours, part) - expected) <= 2 * torch.finfo(torch.bfloat16).eps * worst(
                expected
            )
            logits_of(model, narrow, part)
    with torch.no_grad():
        expected = reference_logits(model, ids, **RULE.arguments)[:, -1:]
    again = RULE.cache(model)
    assert worst(stream(model, again, ids, LENGTHS)[:, -1:] - expected) < 1e-4  # nothing of autocast is left
    assert narrow.seen_tokens == again.seen_tokens
    assert narrow.retained_tokens == again.retained_tokens


@KINDS
@pytest.mark.parametrize("first", [False, True])
def test_switching_autocast_never_breaks_a_call_of_a_static_cache_in_silence(*, static: bool, first: bool) -> None:
    """A static cache cannot widen its tensors in place: it says what has changed, and goes on when that is undone."""
    model, ids = ModelSpec().model(torch.float32), tokens(3, 1, 30)
    cache = RULE.cache(model, static=static)
    with torch.no_grad():
        with _autocast(on=first):
            logits_of(model, cache, ids[:, :9])
        before = observe(cache)
        with _autocast(on=not first), ExitStack() as stack:
            if static:
                stack.enter_context(pytest.raises(ValueError, match="autocast was switched"))
            logits_of(model, cache, ids[:, 9:10])
        assert not static or observe(cache) == before
        with _autocast(on=first):
            logits_of(model, cache, ids[:, 10:])


@needs("5.24", "before, layers that would be run again are given no cache, with a gradient or not")
def test_training_mode_is_a_mode_like_another_and_checkpointing_is_refused() -> None:
    """Where dropout is 0 the logits are those of evaluation; layers that are run again would be given no cache."""
    model, ids = fresh_model(ModelSpec()).double(), tokens(1, 1, 30)
    expected = stream(model, RULE.cache(model), ids, [12, 1, 17])
    model.train()
    assert torch.equal(stream(model, RULE.cache(model), ids, [12, 1, 17]), expected)
    model.requires_grad_()
    layers: Any = model.base_model.layers
    for layer in layers:
        layer.gradient_checkpointing = True  # what the methods do, which have other names in each release
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    cache = RULE.cache(model)
    with pytest.raises(ValueError, match="Gradient checkpointing gives no cache"):
        logits_of(model, cache, ids)
    assert cache.seen_tokens == [0]
    assert torch.equal(stream(model, cache, ids, [12, 1, 17]), expected)  # without a gradient nothing is run again
    model.train(mode=False)
    assert worst(logits_of(model, RULE.cache(model), ids).detach() - expected) < EXACT


@budget(0.2)
@given(rule=rules(("token", "call")), seed=seeds(), lengths=splits(most=30), static=st.booleans(), padded=st.booleans())
def test_another_default_device_changes_nothing(
    rule: Rule, seed: int, lengths: list[int], *, static: bool, padded: bool
) -> None:
    """Tensors are made where the model's are, under any ``torch.set_default_device``."""
    static = static and rule.evict == "token"
    model, ids = ModelSpec(max_positions=24).model(), tokens(seed, 2, sum(lengths))
    mask = torch.ones_like(ids)
    mask[0, : lengths[0] - 1] = 0
    more = mask if padded else None
    expected, cache = stream(model, rule.cache(model, static=static), ids, lengths, more), None
    with torch.device("meta"):
        cache = rule.cache(model, static=static)
        found = stream(model, cache, ids, lengths, more)
        twin = copy.deepcopy(cache)
        cache.crop(0)
        cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
        cache.restore(twin.snapshot())
    assert torch.equal(found, expected)
    assert observe(cache) == observe(twin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["codegen", "falcon", "gptj", "llama"])
def test_another_default_dtype_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """Floats are made in a dtype of their own: frequencies, and what finds out how a model rotates."""
    model, ids, lengths = build(family), tokens(1, 2, 40), [20, 1, 1, 18]
    expected, twin = stream(model, RULE.cache(model), ids, lengths), copy.deepcopy(model)
    monkeypatch.setattr(rope, "_pairing_of", rope._pairing_of.__wrapped__)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = stream(twin, RULE.cache(twin), ids, lengths)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)
