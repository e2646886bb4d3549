"""Hybrid models that cannot stream exactly, and what a hybrid cannot do, are refused by name with the way out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hybrids import HYBRIDS, build, limit_time_steps, made
from releases import needs
from sinkwindow import StreamingCache, UnsupportedModelError, supports
from strategies import ModelSpec, Rule, call, observe, stream, tokens, worst

pytestmark = needs("5.24", "before, hybrids are refused by name")


def test_padding_after_a_rows_first_token_is_refused() -> None:
    """It would be a step of the state; nothing has changed then."""
    model, ids = build("qwen3_next"), tokens(0, 2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6] = 0
    cache = Rule(2, 5, 2).cache(model)
    call(model, cache, ids[:, :6])
    before = observe(cache), cache._state
    with pytest.raises(ValueError, match=r"pads row 0 after its first token.*step of a layer's state"):
        call(model, cache, ids[:, 6:], mask)
    assert (observe(cache), cache._state) == before


@pytest.mark.parametrize("family", HYBRIDS)
def test_static_steps_of_a_hybrid_are_refused(family: str) -> None:
    """By name, with the way out."""
    with pytest.raises(ValueError, match=r"some of .* keep a state instead: use static=False"):
        StreamingCache(build(family), 2, 5, 2, static=True)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("jamba", {}, "begins with an empty state"),
        ("zamba", {}, "begins with an empty state"),
        ("minimax", {}, "MiniMaxCache"),
        ("recurrent_gemma", {}, "keeps its state in its modules"),
        ("zamba2", {"time_step_min": 0.01}, r"limits the time steps of a prompt to \(0.01, inf\)"),
        ("bamba", {"time_step_limit": (0.0, 1.0)}, r"limits the time steps of a prompt to \(0.0, 1.0\)"),
        ("bamba", {"attn_layer_indices": []}, "attends in none"),
        ("qwen3_5_text", {"layer_types": ["linear_attention"] * 3}, "attends in none"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(model_type: str, changes: dict[str, Any], reason: str) -> None:
    """`supports` and the constructor give the same reason."""
    model = made(model_type, **changes)
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' .*{reason}") as error:
        StreamingCache(model)
    assert supports(model).reason == str(error.value)


@pytest.mark.parametrize(("family", "lengths"), [("jamba", [8, 4]), ("zamba", [8, 4]), ("zamba2", [1] * 12)])
def test_a_refusal_is_due_to_stock_code(family: str, lengths: list[int]) -> None:
    """With a stock cache, logits depend on the calls: when that is mended, the family can be supported."""
    model, ids = copy.deepcopy(build(family)), tokens(0, 1, 12)
    limit_time_steps(model, (0.5, math.inf))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    found = stream(model, DynamicCache(config=model.config), ids, lengths)
    assert worst(found - whole) > 1e-2


def test_before_transformers_5_24_hybrids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names both releases."""
    monkeypatch.setattr("sinkwindow.model.state_layers.STATES_ARE_KNOWN", False)
    assert "before transformers 5.24, and you have" in supports(build("qwen3_next")).reason
    assert supports(ModelSpec().model())
