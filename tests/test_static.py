"""A static cache keeps the same tokens and gives the same logits, and one graph is enough for all its steps.

Graphs are captured by torch's own tracer and run without a code generator (`backend="eager"`): what is traced, guarded
and recompiled is the same. One test uses the whole compiler if a C++ compiler is installed, as in the workflows.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from shutil import which
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from calling import failing
from families import FAMILIES as EVERY_FAMILY
from families import FLOAT32_ISLAND, TRAINED, build, can_be_static
from releases import MOST_GRAPHS, STATIC_DRAFTS, ready_for_drafts, traced_error
from sinkwindow import StreamingCache
from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    model_specs,
    observe,
    padding_mask,
    real_per_call,
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

ROPES = ("default", "linear", "yarn")  # dynamic frequencies depend on the largest position: refused
pytestmark = pytest.mark.usefixtures("fresh_graphs")


@given(spec=model_specs(ROPES), rule=rules(), seed=seeds(), batch=st.integers(1, 2), lengths=splits())
def test_every_call_equals_the_reference(
    spec: ModelSpec, rule: Rule, seed: int, batch: int, lengths: list[int]
) -> None:
    """Tokens and logits are the reference's for steps, prompts, and prompts after steps."""
    model, ids = spec.model(), tokens(seed, batch, sum(lengths))
    expected = reference_logits(model, ids, **rule.arguments)
    cache = rule.cache(model, static=True)
    for step, (end, logits) in enumerate(stepwise(model, cache, ids, lengths)):
        assert worst(logits - expected[:, end - lengths[step] : end]) < EXACT
        assert cache.retained_tokens == [retained_after(end, **rule.arguments)] * batch
        assert (cache.seen_tokens, cache.get_seq_length()) == ([end] * batch, end)
        gone = end - len(cache.retained_tokens[0])
        assert cache.num_evictions == batch * gone // (rule.buffer + 1)


@budget(0.3)
@given(rule=rules(), seed=seeds(), lengths=splits(most=70), holes=st.booleans())
def test_padded_rows_are_rows_alone(rule: Rule, seed: int, lengths: list[int], *, holes: bool) -> None:
    """Rows of different lengths are at different places of their rings, and each equals the reference."""
    model, ids = ModelSpec().model(), tokens(seed, 3, sum(lengths))
    mask = padding_mask(seed, 3, lengths, holes=holes)
    expected = reference_logits(model, ids, mask, **rule.arguments)
    cache = rule.cache(model, static=True)
    logits = stream(model, cache, ids, lengths, mask)
    assert worst((logits - expected)[mask.bool()]) < EXACT
    for row, real in enumerate(mask):
        assert cache.retained_tokens[row] == retained_after(sum(real_per_call(real, lengths)), **rule.arguments)


STATIC = [family for family in EVERY_FAMILY if can_be_static(build(family))]


def test_only_three_things_keep_a_family_from_being_static() -> None:
    """They are: its own attention, frequencies that depend on the length, and a table of positions."""
    refused = set(EVERY_FAMILY) - set(STATIC)
    assert len(refused) < len(EVERY_FAMILY) / 3
    for family in refused:
        with pytest.raises(ValueError, match=r"attention of its own|largest one"):
            StreamingCache(build(family), 1, 4, 1, static=True)


@pytest.mark.parametrize("family", STATIC)
def test_the_family_streams_as_the_reference_says(family: str) -> None:
    """A family that can be static equals the reference with each attention implementation that takes a mask."""
    rule, lengths, ids = Rule(2, 6, 3), [9, 1, 1, 30, *[1] * 25], tokens(2, 2, 66)
    mask = padding_mask(5, 2, lengths, holes=False)
    for attention in {"sdpa", "eager"} & set(EVERY_FAMILY[family].attention):
        model = build(family, attention)
        expected = reference_logits(model, ids, mask, **rule.arguments)
        logits = stream(model, rule.cache(model, static=True), ids, lengths, mask)
        bound = EVERY_FAMILY[family].bound if attention == "sdpa" else FLOAT32_ISLAND  # eager: softmax in float32
        assert worst((logits - expected)[mask.bool()]) < bound


# -- graphs -----------------------------------------------------------------------------------------------------------


def _steps(compiled: Any, cache: StreamingCache, ids: Tensor) -> Tensor:
    """Feed tokens one by one to a compiled model; return logits `[batch, columns, vocab]`."""
    with torch.no_grad():
        logits = [compiled(input_ids=ids[:, [column]], **{CACHE_NAME: cache}).logits for column in range(ids.shape[1])]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_one_graph_is_enough_for_all_steps(prompt: int, attention: str) -> None:
    """Nothing is recompiled while the cache fills, at the first eviction, at the ring's end, or at far positions.

    `prompt` is shorter than the sinks, shorter than the list, or longer than the list.
    """
    rule, model = Rule(3, 6, 2), ModelSpec(max_positions=24, attention=attention).model()
    ids = tokens(1, 2, prompt + 80)
    expected = reference_logits(model, ids, **rule.arguments)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    cache = rule.cache(model, static=True)
    bound = EXACT if attention == "sdpa" else FLOAT32_ISLAND
    assert worst(call(model, cache, ids[:, :prompt]) - expected[:, :prompt]) < bound
    assert worst(_steps(compiled, cache, ids[:, prompt:]) - expected[:, prompt:]) < bound
    assert cache.retained_tokens == [retained_after(prompt + 80, **rule.arguments)] * 2
    assert counter.frame_count == 1


def test_one_graph_is_enough_for_several_caches() -> None:
    """Another cache of the same sizes, `reset`, `restore`, and a prompt between steps do not recompile it."""
    rule, model, ids = Rule(2, 5, 1), ModelSpec().model(), tokens(2, 1, 60)
    expected = reference_logits(model, ids, **rule.arguments)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def run(cache: StreamingCache, start: int = 0) -> None:
        for stop, one_by_one in ((start + 7, False), (start + 14, True), (start + 20, False), (60, True)):
            part = ids[:, start:stop]
            logits = _steps(compiled, cache, part) if one_by_one else call(model, cache, part)
            assert worst(logits - expected[:, start:stop]) < EXACT
            start = stop

    cache = rule.cache(model, static=True)
    run(cache)
    cache.reset()
    run(cache)
    twin = rule.cache(model, static=True)
    call(model, twin, ids[:, :9])
    snapshot = twin.snapshot()
    run(twin, 9)
    twin.restore(snapshot)
    run(twin, 9)
    assert 1 <= counter.frame_count <= MOST_GRAPHS


def test_generate_compiles_the_steps() -> None:
    """`generate` compiles steps as for a `StaticCache`; on a CPU, as here, only if forced. The batch is padded."""
    rule, model, ids = Rule(2, 5, 2), ModelSpec().model(), tokens(3, 2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    how = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    cache = rule.cache(model, static=True)
    assert cache.is_compileable
    found = model.generate(ids, **{CACHE_NAME: cache}, compile_config=config, **how)  # type: ignore[operator]
    again = model.generate(ids, **{CACHE_NAME: rule.cache(model)}, **how)  # type: ignore[operator]
    assert torch.equal(found, again)
    assert not rule.cache(model).is_compileable
    assert cache.seen_tokens == [37, 41]
    seen = {name for counts in torch._dynamo.utils.counters.values() for name in counts}
    assert "calls_captured" in seen


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # from torch
@pytest.mark.skipif(not which(os.environ.get("CXX", "g++")), reason="no C++ compiler, which torch.compile needs")
def test_the_whole_compiler_agrees() -> None:
    """Code generated for the CPU gives the reference's logits."""
    rule, model, ids = Rule(2, 5, 1), ModelSpec(layers=2).model(), tokens(4, 2, 40)
    expected = reference_logits(model, ids, **rule.arguments)
    cache = rule.cache(model, static=True)
    call(model, cache, ids[:, :6])
    logits = _steps(torch.compile(model, fullgraph=True), cache, ids[:, 6:])
    assert worst(logits - expected[:, 6:]) < EXACT


@pytest.mark.parametrize("columns", [2, 5])
def test_a_compiled_prompt_is_refused(columns: int) -> None:
    """The error says what to do; the cache is unchanged."""
    model, ids = ModelSpec().model(), tokens(5, 1, 20)
    cache = StreamingCache(model, 2, 5, 1, static=True)
    call(model, cache, ids[:, :9])
    before = observe(cache)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=traced_error("one token for each row")), torch.no_grad():
        compiled(input_ids=ids[:, :columns], **{CACHE_NAME: cache})
    assert observe(cache) == before


def test_a_dynamic_cache_is_not_compiled() -> None:
    """The error names the argument."""
    model = ModelSpec().model()
    cache = StreamingCache(model, 2, 5, 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=traced_error("static=True")), torch.no_grad():
        compiled(input_ids=tokens(6, 1, 1), **{CACHE_NAME: cache})


# -- everything else a cache does -------------------------------------------------------------------------------------


@budget(0.3)
@given(rule=rules(), seed=seeds(), back=st.integers(1, 7), steps=st.integers(8, 30))
def test_steps_are_taken_back(rule: Rule, seed: int, back: int, steps: int) -> None:
    """Up to 7 steps can always be taken back: the ring still holds what they evicted."""
    model, ids = ModelSpec().model(), tokens(seed, 2, 10 + steps + back)
    expected = reference_logits(model, ids, **rule.arguments)
    cache = rule.cache(model, static=True)
    stream(model, cache, ids[:, : 10 + steps], [10] + [1] * steps)
    assert cache.can_crop(back)
    cache.crop(-back)
    assert cache.seen_tokens == [10 + steps - back] * 2
    logits = stream(model, cache, ids[:, 10 + steps - back :], [1] * (2 * back))
    assert worst(logits - expected[:, 10 + steps - back :]) < EXACT


def test_rows_are_reordered_and_caches_copied() -> None:
    """This works between steps; a copy is static too, and independent."""
    rule, model, ids = Rule(2, 5, 2), ModelSpec().model(), tokens(7, 2, 50)
    rows = torch.tensor([1, 1, 0])
    swapped = ids[rows].clone()
    swapped[:, 30:] = tokens(8, 3, 20)
    expected = reference_logits(model, swapped, **rule.arguments)
    cache = rule.cache(model, static=True)
    stream(model, cache, ids[:, :30], [8] + [1] * 22)
    cache.reorder_cache(rows)
    assert not cache.can_crop(20)  # the ring has no room for what they evicted
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        assert one.is_compileable
        assert worst(stream(model, one, swapped[:, 30:], [1] * 20) - expected[:, 30:]) < EXACT


def _generated(model: PreTrainedModel, ids: torch.Tensor, **how: Any) -> list[torch.Tensor]:
    """Return what `generate` gives with a static cache, and with another one."""
    caches = (ready_for_drafts(StreamingCache(model, 2, 6, 2, static=static)) for static in (True, False))
    generate: Any = model.generate
    return [generate(ids, **{CACHE_NAME: cache}, do_sample=False, **how) for cache in caches]


LOOKUP = pytest.param({"prompt_lookup_num_tokens": 3, "eos_token_id": 10_000}, marks=STATIC_DRAFTS)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, LOOKUP, {"prefill_chunk_size": 4}])
def test_generate_modes_are_those_of_a_dynamic_cache(mode: dict[str, int]) -> None:
    """Beams reorder rows between steps; drafts are long calls that are partly taken back."""
    model, ids = ModelSpec().model(), tokens(9, 1, 14)
    assert torch.equal(*_generated(model, ids, max_new_tokens=25, **mode))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2_windows", "gpt_oss"])
def test_generate_takes_prompts_beyond_the_models_own_windows(family: str) -> None:
    """Its 4D masks hide what is behind them: that is no padding."""
    assert torch.equal(*_generated(build(family), tokens(9, 2, TRAINED + 3), max_new_tokens=4))


def test_generate_takes_padding_in_a_later_turn() -> None:
    """Also after evictions, where columns of the mask are not columns of the ring."""
    model, first, second = ModelSpec().model(), tokens(9, 2, 14).clamp(min=1), tokens(10, 2, 6)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    texts, counts = [], []
    for static in (True, False):
        cache = StreamingCache(model, 2, 5, 1, static=static)
        text = model.generate(first, **{CACHE_NAME: cache}, **how)  # type: ignore[operator]
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[0, 18:21] = 0
        arguments = {"attention_mask": mask, CACHE_NAME: cache, **how}
        texts.append(model.generate(torch.cat([text, second], dim=1), **arguments))  # type: ignore[operator]
        counts.append(cache.seen_tokens)
    assert torch.equal(*texts)
    assert counts == [[24, 27]] * 2


def test_a_failed_step_leaves_the_cache_unchanged() -> None:
    """The token of the failed step can be fed again."""
    rule, model, ids = Rule(2, 5, 1), ModelSpec().model(), tokens(10, 1, 40)
    expected = reference_logits(model, ids, **rule.arguments)
    cache = rule.cache(model, static=True)
    stream(model, cache, ids[:, :20], [5] + [1] * 15)
    before = observe(cache)
    with failing(model.get_submodule("model.layers.1"), RuntimeError):
        call(model, cache, ids[:, 20:21])
    assert observe(cache) == before
    assert worst(stream(model, cache, ids[:, 20:], [1] * 20) - expected[:, 20:]) < EXACT


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("far_on", [1_000_000, 100_000_000])
def test_calls_many_tokens_on_are_exact(length: int, far_on: int) -> None:
    """Positions of a static cache have no bound; angles are computed in float64 for lower dtypes too."""
    rule, ids = Rule(2, 6, 1), tokens(11, 1, 40)
    bounds = ((torch.float64, EXACT), (torch.float32, 2e-5), (torch.float16, 0.05), (torch.bfloat16, 0.4))
    for dtype, bound in bounds:
        model = ModelSpec().model(dtype)
        near, far = rule.cache(model, static=True), rule.cache(model, static=True)
        for cache in (near, far):
            call(model, cache, ids[:, :12])
        _shift(far, far_on)
        pair = [stream(model, cache, ids[:, 12:], [length] * (28 // length)) for cache in (near, far)]
        assert worst(pair[0] - pair[1]) < bound * float(pair[0].abs().max())


def _shift(cache: StreamingCache, tokens_on: int) -> None:
    """Put a static cache in the state of one that has seen (and evicted) that many more tokens."""
    steps, state = cache._steps, cache._state
    assert steps is not None
    (slots,), (lane,), (row,) = state.pools, state.lanes, state.pools[0].lanes
    num_sinks, step = cache.retention.num_sinks, cache.retention.buffer + 1
    ring_size = steps._sizes[0] - num_sinks
    assert tokens_on % ring_size == tokens_on % step == 0  # each token keeps its slot, and its place in the cycle
    for layer in steps.layers.values():
        window = layer.slots.keys[:, :, num_sinks:]
        window.copy_(layer.rotary.rotate_by(window, tokens_on))
    row = replace(row, evicted=row.evicted + tokens_on, floor=row.floor + tokens_on)
    pools, lanes = (replace(slots, lanes=(row,)),), (replace(lane, seen=lane.seen + tokens_on),)
    cache._stream.state = replace(state, pools=pools, lanes=lanes)
    steps.follow()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evict": "call"}, "static=True requires evict='token', got 'call'"),
        ({"on_evict": print}, "static=True requires on_evict=None, got <built-in function print>"),
        ({"positions": "original"}, "static=True requires positions='rank', got 'original'"),
        ({"on_overflow": "error"}, "static=True requires on_overflow='evict', got 'error'"),
    ],
)
def test_arguments_without_a_static_form_are_refused(arguments: dict[str, Any], message: str) -> None:
    """The error names the argument and its value, and no hook is added to the model."""
    model = fresh_model(ModelSpec())
    with pytest.raises(ValueError, match=message):
        StreamingCache(model, 2, 5, 1, static=True, **arguments)
    assert not model.model._forward_hooks


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # from transformers
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # from torch, same cause
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # on purpose
def test_an_attention_without_4d_masks_is_refused() -> None:
    """The error comes at the first step, since the implementation can be set after the cache was made."""
    model, ids = build("llama", "flex_attention"), tokens(12, 1, 9)
    cache = StreamingCache(model, 2, 5, 1, static=True)
    with torch.compiler.set_stance("force_eager"):
        call(model, cache, ids[:, :8])
        before = observe(cache)
        with pytest.raises(ValueError, match="attn_implementation sdpa or eager, got 'flex_attention'"):
            call(model, cache, ids[:, 8:])
    assert observe(cache) == before


def test_a_mask_that_hides_more_is_refused() -> None:
    """A 4D mask must be what `generate` makes from padding; any other one would be misread."""
    model, ids = ModelSpec().model(), tokens(13, 1, 6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, 0, 4, 2] = False
    cache = StreamingCache(model, 2, 5, 1, static=True)
    with pytest.raises(ValueError, match="hides more than the future and padding"):
        call(model, cache, ids, mask)
    assert cache.seen_tokens == [0]
