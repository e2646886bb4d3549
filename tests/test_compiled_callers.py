"""Other callers beside a compiled step: the attention that its graph uses changes nothing for them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from calling import RULE
from families import FAMILIES, build
from sinkwindow.model.hooks import uncompiled
from sinkwindow_reference import reference_logits
from strategies import EXACT, ModelSpec, call, fresh_model, tokens, worst

if TYPE_CHECKING:
    from torch import Tensor


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


def test_a_step_whose_graph_is_broken_shows_no_other_attention() -> None:
    """Code between the parts of a broken graph calls the model, or fails there: every call is as it is alone."""
    model, ids = fresh_model(ModelSpec(kv_heads=1, heads=2, layers=2)).double(), tokens(4, 1, 20)
    alone, expected = call(model, None, ids), reference_logits(model, ids, **RULE.arguments)
    todo: list[str] = []
    nested: list[Tensor] = []

    @uncompiled
    def outside() -> None:
        match todo.pop() if todo else "":
            case "call":
                nested.append(call(model, None, ids))
            case "fail":
                raise RuntimeError("between the parts")

    cast("Any", model.base_model).layers[1].register_forward_pre_hook(lambda *_: outside())
    cache, compiled = RULE.cache(model, static=True), cast("Any", torch.compile(model, backend="eager"))
    logits = [call(model, cache, ids[:, :10])]
    for column in range(10, 20):
        todo[:] = ["call"] if column % 3 == 0 else []
        logits.append(call(compiled, cache, ids[:, [column]]))
        if column % 5 == 0:
            before = cache.seen_tokens
            todo[:] = ["fail"]
            with pytest.raises(RuntimeError, match="between the parts"):
                call(compiled, cache, ids[:, [column]])
            assert cache.seen_tokens == before
            assert torch.equal(call(model, None, ids), alone)
            call(model, cache, ids[:, [column]])  # uncompiled, with the name that the failure has left
            cache.crop(-1)
            assert model.config._attn_implementation == "sdpa"
    assert len(nested) == 3
    assert all(torch.equal(one, alone) for one in nested)
    assert worst(torch.cat(logits, dim=1) - expected) < EXACT


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere2"])
def test_a_compiled_copy_of_an_attached_model_is_its_own(family: str) -> None:
    """It has inherited the hooks, and no cache of its own: they change nothing, however it passes its arguments."""
    model, ids = build(family), tokens(6, 1, 20)
    alone = call(model, None, ids)
    cache = RULE.cache(model, static=True)
    twin = cast("Any", torch.compile(copy.deepcopy(model), backend="eager"))
    assert torch.equal(call(twin, None, ids), alone)
    expected = call(model, cache, ids)
    assert torch.equal(call(twin, None, ids), alone)
    assert worst(expected - reference_logits(model, ids, **RULE.arguments)) < FAMILIES[family].bound
