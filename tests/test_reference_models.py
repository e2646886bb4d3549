"""The reference in whole models, compared with stock models, rows alone, and the hand-written loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference_tools import HALF_SPLIT, INTERLEAVED, STOCK, gap, random_ids, seeds, sizes, tiny_model
from sinkwindow_reference import generate_by_index_select, reference_logits, retained_lists, stream_by_index_select


@pytest.mark.parametrize("kind", HALF_SPLIT + INTERLEAVED)
def test_with_everything_kept_it_is_the_stock_model(kind: str) -> None:
    """Layout, rotary fraction and scaling of each family are read correctly; with a short window the logits differ."""
    model, ids = tiny_model(kind), random_ids(1, 2, 24)
    with torch.no_grad():
        stock = model(ids).logits
    assert gap(reference_logits(model, ids, num_sinks=2, window=24), stock) < STOCK * float(stock.abs().max())
    assert gap(reference_logits(model, ids, num_sinks=2, window=6), stock) > 1e-3 * float(stock.abs().max())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_scaled_rope_is_the_models_own(rope: dict[str, Any]) -> None:
    """Frequencies come from the model, and the attention scaling of yarn is applied once."""
    model = tiny_model(rope_parameters={"rope_theta": 100.0, **rope})
    ids = random_ids(2, 1, 24)
    with torch.no_grad():
        stock = model(ids).logits
    assert gap(reference_logits(model, ids, num_sinks=0, window=24), stock) < STOCK * float(stock.abs().max())


def test_layers_without_rope_do_not_rotate() -> None:
    """SmolLM3 disables RoPE in some layers, with a flag in the layer."""
    model, ids = tiny_model("smollm3", no_rope_layer_interval=2), random_ids(2, 1, 24)
    with torch.no_grad():
        stock = model(ids).logits
    assert gap(reference_logits(model, ids, num_sinks=0, window=24), stock) < STOCK * float(stock.abs().max())


def test_an_earlier_long_call_changes_nothing() -> None:
    """Dynamic RoPE overwrites its frequencies in a call beyond the trained length; the original ones are used."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    model, ids = tiny_model(max_position_embeddings=16, rope_parameters=rope), random_ids(2, 1, 40)
    before = reference_logits(model, ids, num_sinks=2, window=6)
    model(ids)
    assert torch.equal(reference_logits(model, ids, num_sinks=2, window=6), before)


def test_a_layer_that_bypasses_the_rule_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits are returned if a layer did not follow the rule."""
    model: Any = tiny_model()
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match="sent 1 of its 2 layers"):
        reference_logits(model, random_ids(2, 1, 4), num_sinks=1, window=3)


def test_one_layer_equals_stock_calls_over_the_lists() -> None:
    """With one layer a key depends on its token alone: each query equals a stock call over its list."""
    model, ids = tiny_model(num_hidden_layers=1), random_ids(3, 1, 20)
    logits = reference_logits(model, ids, num_sinks=2, window=4, buffer=3)
    with torch.no_grad():
        for token, kept in enumerate(retained_lists(20, num_sinks=2, window=4, buffer=3)):
            assert gap(logits[0, token], model(ids[:, kept]).logits[0, -1]) < 10 * STOCK


def test_a_padded_row_is_the_row_alone() -> None:
    """A row padded on the left, on the right or not at all has the logits of the row alone; padding is NaN."""
    model, ids = tiny_model(), random_ids(4, 3, 16)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, 12:] = 0, 0
    logits = reference_logits(model, ids, mask, num_sinks=2, window=4, buffer=1)
    for row, real in enumerate(mask.bool()):
        alone = reference_logits(model, ids[row : row + 1, real], num_sinks=2, window=4, buffer=1)
        assert torch.equal(logits[row, real], alone[0])
        assert bool(logits[row, ~real].isnan().all())


def test_evict_call_counts_the_columns_of_a_call() -> None:
    """A padded row's calls count only its real tokens, and a call of padding alone does not count."""
    model, ids = tiny_model(), random_ids(5, 1, 18)
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    rule: dict[str, Any] = {"num_sinks": 1, "window": 3, "evict": "call"}
    padded = reference_logits(model, ids, mask, chunks=[5, 6, 7], **rule)
    alone = reference_logits(model, ids[:, 6:], chunks=[5, 7], **rule)
    assert torch.equal(padded[:, 6:], alone)
    assert gap(alone, reference_logits(model, ids[:, 6:], chunks=[6, 6], **rule)) > 1e-3
    assert gap(alone, reference_logits(model, ids[:, 6:], num_sinks=1, window=3)) > 1e-3


def test_the_model_is_left_as_it_was() -> None:
    """Attention implementation and stock logits are the same before and after, also after an error."""
    model, ids = tiny_model("mistral", sliding_window=8), random_ids(6, 1, 12)
    before = (model.config._attn_implementation, model(ids).logits)
    reference_logits(model, ids, num_sinks=1, window=3)
    with pytest.raises(ValueError, match="own sliding_window is 8 tokens, the rule attends to 12"):
        reference_logits(model, ids, num_sinks=1, window=30)
    assert model.config._attn_implementation == before[0]
    assert torch.equal(model(ids).logits, before[1])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gpt2", "learned absolute positions"),
        ("mamba", "a state rather than keys and values"),
    ],
)
def test_models_that_the_rule_does_not_fit_are_refused(kind: str, says: str) -> None:
    """The reference raises an error rather than return wrong logits."""
    with pytest.raises(ValueError, match=says):
        reference_logits(tiny_model(kind), random_ids(7, 1, 4), num_sinks=1, window=3)


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        (torch.ones(3, dtype=torch.long), None, r"shape \[batch, columns\]"),
        (torch.ones(1, 0, dtype=torch.long), None, r"hold a token, got \(1, 0\)"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4), r"must have the shape \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "no token in row 1"),
    ],
)
def test_bad_inputs_are_named(ids: Tensor, mask: Tensor | None, says: str) -> None:
    """Wrong shapes and empty rows are errors before the model runs."""
    with pytest.raises(ValueError, match=says):
        reference_logits(tiny_model(), ids, mask, num_sinks=1, window=3)


# --- the loop -----------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(sizes, seeds, st.sampled_from(["llama", "gpt_neox", "glm"]))
def test_the_index_select_loop_follows_the_rule(given_sizes: dict[str, Any], seed: int, kind: str) -> None:
    """Every step's logits equal the reference's, across several evictions, after each of which keys are rotated."""
    model, prompt = tiny_model(kind, seed), random_ids(seed, 1, 12)
    ids = generate_by_index_select(model, prompt, max_new_tokens=14, **given_sizes)
    steps = torch.stack(list(stream_by_index_select(model, prompt, max_new_tokens=14, **given_sizes)))
    right = reference_logits(model, ids[:, :-1], **given_sizes)[0]
    assert torch.equal(ids[:, :12], prompt)
    assert torch.equal(ids[0, 12:], steps[11:].argmax(-1))
    assert gap(steps, right) < 10 * STOCK * float(right.abs().max())


def test_the_loop_in_bfloat16_rounds_but_does_not_drift() -> None:
    """Rotating at every step makes an error of the same size as the dtype itself.

    Measured per model: 1.24 to 1.46 times that size if keys are rotated in float32, 1.8 to 2.7 times in bfloat16.
    """
    ratios = []
    for seed in range(4):
        model, prompt = tiny_model(seed=seed, num_hidden_layers=1), random_ids(8, 1, 150)
        exact = reference_logits(model, prompt, num_sinks=2, window=24)[0]
        model.bfloat16()
        plain = reference_logits(model, prompt, num_sinks=2, window=24, upcast=False)[0]
        steps = list(stream_by_index_select(model, prompt, max_new_tokens=0, num_sinks=2, window=24))
        ratios.append(float((torch.stack(steps) - exact).norm() / (plain - exact).norm()))
    assert sum(ratios) / len(ratios) < 1.7


def test_the_loop_takes_one_row() -> None:
    """A batch is an error; with no new token the loop returns the prompt."""
    model, ids = tiny_model(), random_ids(9, 2, 3)
    with pytest.raises(ValueError, match="one row at a time"):
        generate_by_index_select(model, ids, max_new_tokens=1, num_sinks=1, window=3)
    assert torch.equal(generate_by_index_select(model, ids[:1], max_new_tokens=0, num_sinks=1, window=3), ids[:1])
