"""Other callers beside a compiled step: the attention that its graph uses changes nothing for them."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from shutil import which
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from calling import RULE
from families import build
from releases import traced_error
from sinkwindow.attention.step import STEP_NAME, step_attention, uncompiled
from sinkwindow_reference import reference_logits
from strategies import CACHE_NAME, EXACT, ModelSpec, call, fresh_model, observe, tokens, worst

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

pytestmark = [
    pytest.mark.usefixtures("fresh_graphs"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),  # from torch's whole compiler
]
NO_COMPILER = not which(os.environ.get("CXX", "g++"))
COMPILER = pytest.param("inductor", marks=pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler"))


def test_a_compiled_step_shows_no_other_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention is the tracer's business: nobody ever sees the config with another one than its own."""
    model, ids, seen = fresh_model(ModelSpec(kv_heads=1, heads=2)).double(), tokens(4, 1, 20), []
    cache, compiled = RULE.cache(model, static=True), torch.compile(model, backend="eager")
    call(model, cache, ids[:, :1])
    logits = [call(cast("Any", compiled), cache, ids[:, [1]])]  # traces
    assign: Any = type(model.config).__setattr__

    def watch(config: Any, name: str, value: object) -> None:
        if not torch.compiler.is_compiling():
            seen.append((name, value))
        assign(config, name, value)

    monkeypatch.setattr(type(model.config), "__setattr__", watch)
    logits += [call(cast("Any", compiled), cache, ids[:, [column]]) for column in range(2, 20)]
    assert {value for name, value in seen if "attn_implementation" in name} <= {"sdpa"}
    assert model.config._attn_implementation == "sdpa"
    assert worst(torch.cat(logits, dim=1) - reference_logits(model, ids, **RULE.arguments)[:, 1:]) < EXACT


def padded_pair(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of a plain call of two rows, one of them padded."""
    pair, mask = torch.cat((ids, ids.roll(3))), torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[1, :4] = 0
    return call(model, None, pair, mask)[mask.bool()]


def test_a_step_whose_graph_is_broken_shows_no_other_attention() -> None:
    """Code between the parts of a broken graph calls the model, or fails there: every call is as it is alone."""
    model, ids = fresh_model(ModelSpec(kv_heads=1, heads=2, layers=2)).double(), tokens(4, 1, 20)
    alone, expected = padded_pair(model, ids), reference_logits(model, ids, **RULE.arguments)
    bare = call(model, None, ids)
    todo: list[str] = []
    nested: list[Tensor] = []

    @uncompiled
    def outside() -> None:
        match todo.pop() if todo else "":
            case "call":
                nested.append(padded_pair(model, ids))
            case "fail":
                raise RuntimeError("between the parts")

    cast("Any", model.base_model).layers[1].register_forward_pre_hook(lambda *_: outside())
    cache, compiled = RULE.cache(model, static=True), cast("Any", torch.compile(model, backend="eager"))

    def fail(column: int) -> None:
        before = cache.seen_tokens
        todo[:] = ["fail"]
        with pytest.raises(RuntimeError, match="between the parts"):
            call(compiled, cache, ids[:, [column]])
        assert cache.seen_tokens == before

    logits = [call(model, cache, ids[:, :10])]
    for column in range(10, 20):
        todo[:] = ["call"] if column % 3 == 0 else []
        logits.append(call(compiled, cache, ids[:, [column]]))
        if column % 5 == 0:
            fail(column)
            assert torch.equal(padded_pair(model, ids), alone)
            assert worst(call(compiled, None, ids) - bare) < EXACT  # not padded: transformers 4 could not trace it
            call(model, cache, ids[:, [column]])  # uncompiled
            cache.crop(-1)
            assert model.config._attn_implementation == "sdpa"
    assert len(nested) == 3
    assert all(torch.equal(one, alone) for one in nested)
    assert worst(torch.cat(logits, dim=1) - expected) < EXACT


@pytest.mark.parametrize("way", ["detach", "compiled step", "call"])
def test_what_takes_back_the_attention_that_a_failed_step_has_left(way: str) -> None:
    """The last cache that leaves does, and so does the next call of one, as a whole graph too."""
    model, ids, failing = fresh_model(ModelSpec(layers=2)), tokens(4, 1, 20), list[bool]()

    @uncompiled
    def fail() -> None:
        if failing:
            raise RuntimeError("between the parts")

    hook = cast("Any", model.base_model).layers[1].register_forward_pre_hook(lambda *_: fail())
    cache, compiled = RULE.cache(model, static=True), cast("Any", torch.compile(model, backend="eager"))
    call(model, cache, ids[:, :10])
    call(compiled, cache, ids[:, [10]])
    failing.append(True)
    with pytest.raises(RuntimeError, match="between the parts"):
        call(compiled, cache, ids[:, [11]])
    hook.remove()
    assert model.config._attn_implementation in (STEP_NAME, "sdpa")  # torch 2.7 leaves nothing
    match way:
        case "detach":
            cache.detach()
        case "compiled step":
            torch._dynamo.reset()  # a whole graph, traced now
            call(cast("Any", torch.compile(model, backend="eager", fullgraph=True)), cache, ids[:, [11]])
        case "call":
            call(model, cache, ids[:, [11]])
    assert model.config._attn_implementation == "sdpa"


def test_another_thread_streams_while_one_compiles() -> None:
    """Compilation is the business of its thread: calls of others neither fail nor change."""
    model, ids = fresh_model(ModelSpec(layers=2)).double(), tokens(5, 1, 40)
    expected = reference_logits(model, ids, **RULE.arguments)
    found: list[Tensor] = []

    def others() -> None:
        cache = RULE.cache(model)
        found.append(torch.cat([call(model, cache, part) for part in torch.split(ids, 7, dim=1)], dim=1))

    def backend(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(others).result()
        return graph.forward

    call(cast("Any", torch.compile(model, backend=backend)), None, ids)
    assert found  # one for each part of the graph, which old tracers break
    assert all(worst(one - expected) < EXACT for one in found)


def test_a_step_with_dropout_is_no_step() -> None:
    """A traced call that sees the name gets what `sdpa` gives it: dropout, and masks of any shape."""
    module: Any = torch.nn.Module()
    query, key, value = torch.rand(3, 1, 4, 1, 8)
    key, value = key.expand(-1, -1, 6, -1).contiguous()[:, :2], value.expand(-1, -1, 6, -1).contiguous()[:, :2]
    module.num_key_value_groups = 2
    for mask, dropout in ((torch.rand(1, 1, 1, 6) > 0.3, 0.5), (torch.rand(1, 4, 1, 6) > 0.3, 0.0)):
        found = []
        for function in (step_attention, sdpa_attention_forward):
            torch.manual_seed(1)
            traced = torch.compile(function, backend="eager")
            found.append(traced(module, query, key, value, mask, dropout=dropout)[0])
        assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere2"])
def test_a_compiled_copy_of_an_attached_model_is_its_own(family: str) -> None:
    """It has inherited the hooks, and no cache of its own: they change nothing, however it passes its arguments."""
    model, ids = build(family), tokens(6, 1, 20)
    alone = call(model, None, ids)
    cache = RULE.cache(model, static=True)
    twin = cast("Any", torch.compile(copy.deepcopy(model), backend="eager"))
    assert worst(call(twin, None, ids) - alone) < EXACT
    call(model, cache, ids)
    assert worst(call(twin, None, ids) - alone) < EXACT
    before = observe(cache)
    with pytest.raises(Exception, match="made for another model"):
        call(twin, cache, ids[:, :1])
    assert observe(cache) == before


@pytest.mark.parametrize(("family", "dtype"), [("gptj", torch.int32), ("llama", torch.float64)])
def test_a_copy_of_an_attached_model_takes_positions_of_any_dtype(family: str, dtype: torch.dtype) -> None:
    """The dtypes that mark positions in a call of a cache mean nothing to a model that no cache uses."""
    model, ids = copy.deepcopy(build(family)), tokens(6, 1, 12)  # tests share what `build` returns
    more = {"position_ids": torch.arange(12, dtype=dtype)[None]}
    with torch.no_grad():
        alone = model(input_ids=ids, **more).logits
        cache = RULE.cache(model)
        assert torch.equal(copy.deepcopy(model)(input_ids=ids, **more).logits, alone)
    assert cache.seen_tokens == [0]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"attention_mask": torch.ones(2, 9, dtype=torch.long)}, "must be omitted"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.long)}, "must be omitted"),
        ({"attention_mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)}, "must be omitted"),
        ({"position_ids": torch.full((1, 2), 8)}, "must have shape"),
        ({"use_cache": False}, "use_cache=False contradicts"),
        ({"is_causal": False}, "is_causal=False contradicts"),
        ({"seq_idx": torch.zeros(2, 1, dtype=torch.long)}, "seq_idx packs"),
    ],
)
def test_a_compiled_step_refuses_what_contradicts_its_cache(arguments: dict[str, Any], why: str) -> None:
    """What can be seen while it is traced, before anything changes."""
    model, ids = ModelSpec(layers=1).model(), tokens(0, 2, 12)
    compiled, cache = cast("Any", torch.compile(model, backend="eager", fullgraph=True)), RULE.cache(model, static=True)
    call(model, cache, ids[:, :8])
    before = observe(cache)
    with torch.no_grad(), pytest.raises(Exception, match=traced_error(why)):
        compiled(input_ids=ids[:, [8]], **{CACHE_NAME: cache}, **arguments)
    assert observe(cache) == before


@pytest.mark.parametrize("backend", ["eager", COMPILER])
def test_a_compiled_step_compares_positions_when_it_runs(backend: str) -> None:
    """Natural indices, columns and ranks are taken, and no others; a step that is refused changes nothing."""
    model, ids, mask = ModelSpec(layers=1).model(), tokens(0, 2, 30), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    compiled = cast("Any", torch.compile(model, backend=backend, fullgraph=True))
    cache, twin = RULE.cache(model, static=True), RULE.cache(model, static=True)
    for one in (cache, twin):
        call(model, one, ids[:, :20], mask)
    for column in (20, 21):
        seen = torch.tensor(cache.seen_tokens)[:, None]
        ranks = torch.tensor([len(row) for row in cache.retained_tokens])[:, None]
        for positions, right in ((seen + 1, False), (seen, True), (torch.tensor([[column]]), True), (ranks, True)):
            before = observe(cache)
            with torch.no_grad(), nullcontext() if right else pytest.raises(RuntimeError, match="position_ids are not"):
                compiled(input_ids=ids[:, [column]], position_ids=positions, **{CACHE_NAME: cache})
            if right:
                cache.crop(-1)
            else:
                assert observe(cache) == before
        found, expected = (call(module, one, ids[:, [column]]) for module, one in ((compiled, cache), (model, twin)))
        assert worst(found - expected) < EXACT


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_tensors_of_an_interrupted_first_call_keep_their_addresses(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs are told of each tensor that steps write, also where the call that should have told them stopped."""
    told, mark = list[int](), torch._dynamo.mark_static_address

    def interrupted(tensor: Tensor, **more: Any) -> None:
        told.append(tensor.data_ptr())
        if len(told) == fails_at:
            raise MemoryError
        mark(tensor, **more)

    model = ModelSpec().model()
    cache = RULE.cache(model, static=True)
    monkeypatch.setattr(torch._dynamo, "mark_static_address", interrupted)
    call(model, cache, tokens(0, 2, 9))  # it has happened: what failed is done again before the next one
    assert len(told) == fails_at
    call(model, cache, tokens(0, 2, 1))
    steps = cache._steps
    assert steps is not None
    written = [one for layer in steps.layers.values() for one in (*layer.slots, *layer.sinks)]
    assert {one.data_ptr() for one in (*written, steps.seen, steps.padding)} <= set(told)
