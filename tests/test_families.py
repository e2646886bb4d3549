"""Every supported family streams exactly; every other family is refused by name and with a reason.

`bound` is 1e-9 in float64, and 1e-4 for families and attention implementations that compute partly in float32.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import support
from families import FAMILIES, FLOAT32_ISLAND, TRAINED, build, made
from releases import NEWEST
from sinkwindow import Family, StreamingCache, UnsupportedModelError, supports
from sinkwindow.model.rope import Pairing, pairing
from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    BOTH,
    CACHE_NAME,
    Rule,
    budget,
    call,
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

README = Path(__file__).parents[1] / "README.md"
SUPPORT = README.parent / "docs" / "support.md"
# transformers computes angles and norms in float32: the error of a stock model relative to its largest logit.
STOCK = 3e-5
COUNTS_PADDING = {"mpt"}  # its ALiBi counts columns, so padding between tokens is refused
HAS_TABLE = {"codegen", "gptj", "mpt"}  # of TRAINED positions: a call that is not split must fit
# The longest list [tokens] that a family and the reference allow, which a call that is not split can make.
LIMITS = dict.fromkeys((*HAS_TABLE, "gemma3_sliding", "mistral"), TRAINED) | {"ministral3": 32}
families = pytest.mark.parametrize("family", FAMILIES)


@families
@given(rule=rules(BOTH), seed=seeds(), lengths=splits(most=70))
@budget(0.05)
def test_the_family_streams_as_the_reference_says(family: str, rule: Rule, seed: int, lengths: list[int]) -> None:
    """After every call, in both eviction modes, logits are within the bound and the retained tokens identical."""
    assume(rule.evict == "token" or rule.capacity + max(lengths) <= LIMITS.get(family, sum(lengths) + rule.capacity))
    model, ids = build(family), tokens(seed, 1, sum(lengths))
    expected = reference_logits(model, ids, chunks=lengths, **rule.arguments)
    cache = rule.cache(model)
    for step, (end, logits) in enumerate(stepwise(model, cache, ids, lengths)):
        assert worst(logits - expected[:, end - lengths[step] : end]) < FAMILIES[family].bound
        assert cache.retained_tokens == [retained_after(end, chunks=lengths[: step + 1], **rule.arguments)]


@families
@given(rule=rules(), seed=seeds(), lengths=splits(most=70), holes=st.booleans())
@budget(0.05)
def test_padded_rows_of_the_family_are_rows_alone(
    family: str, rule: Rule, seed: int, lengths: list[int], *, holes: bool
) -> None:
    """Real columns are within the bound, none is NaN, and each row retains what it would retain alone."""
    model, ids = build(family), tokens(seed, 2, sum(lengths))
    mask = padding_mask(seed, 2, lengths, holes=holes and family not in COUNTS_PADDING)
    expected = reference_logits(model, ids, mask, **rule.arguments)
    cache = rule.cache(model)
    logits = stream(model, cache, ids, lengths, mask)
    assert worst((logits - expected)[mask.bool()]) < FAMILIES[family].bound
    for row, real in enumerate(mask):
        calls = real_per_call(real, lengths)
        assert cache.retained_tokens[row] == retained_after(sum(calls), **rule.arguments)


@pytest.mark.parametrize("family", sorted(HAS_TABLE & FAMILIES.keys()))
def test_a_call_beyond_the_table_is_refused(family: str) -> None:
    """If it may not be split: the error has both numbers, and the cache is unchanged; one token fewer is fine."""
    model, rule, ids = build(family), Rule(0, 1, 0, "call"), tokens(0, 1, TRAINED + 1)
    cache = rule.cache(model)
    before = observe(cache)
    with pytest.raises(ValueError, match=f"brings {TRAINED + 1} columns and 0 are cached, .* ends at {TRAINED}"):
        call(model, cache, ids)
    assert observe(cache) == before
    logits = call(model, cache, ids[:, :TRAINED])
    expected = reference_logits(model, ids[:, :TRAINED], chunks=[TRAINED], **rule.arguments)
    assert worst(logits - expected) < FAMILIES[family].bound


@pytest.mark.parametrize("family", sorted(COUNTS_PADDING))
def test_padding_that_would_count_as_distance_is_refused(family: str) -> None:
    """If ALiBi counts columns, padding is allowed only before a row's first token; a refused call changes nothing."""
    model, ids = build(family), tokens(0, 2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = StreamingCache(model, 1, 4, 1)
    call(model, cache, ids[:, :6], mask[:, :6])
    before = observe(cache)
    mask[0, 6] = 0
    with pytest.raises(ValueError, match="pads row 0 after its first token"):
        call(model, cache, ids[:, 6:], mask)
    assert observe(cache) == before


def test_a_whole_call_beyond_the_table_of_columns_is_refused() -> None:
    """If ALiBi of columns is a table, a longer call that must run whole is refused with both numbers; others work."""
    rule, model, ids = Rule(1, 4, 1, "call"), build("mpt"), tokens(0, 1, TRAINED + 1)
    cache = rule.cache(model)
    with pytest.raises(ValueError, match=rf"brings {TRAINED + 1} columns and 0 are cached, .* ends at {TRAINED}"):
        call(model, cache, ids)
    assert cache.seen_tokens == [0]
    expected = reference_logits(model, ids, chunks=[TRAINED, 1], **rule.arguments)
    assert worst(stream(model, cache, ids, [TRAINED, 1]) - expected) < FAMILIES["mpt"].bound


def test_padding_beyond_the_table_of_columns_is_split_off() -> None:
    """Padding fills the table too: a call that is mostly padding runs in pieces, some of which are padding only."""
    rule, model, ids = Rule(1, 4, 1), build("mpt"), tokens(0, 2, 3 * TRAINED)
    mask = torch.ones_like(ids)
    mask[0, : 3 * TRAINED - 10] = 0
    mask[1, : 2 * TRAINED + 1] = 0
    logits = call(model, rule.cache(model), ids, mask)
    assert worst((logits - reference_logits(model, ids, mask, **rule.arguments))[mask.bool()]) < FAMILIES["mpt"].bound


@families
def test_with_everything_kept_the_reference_is_the_stock_model(family: str) -> None:
    """Layout, windows, softcaps and learned sinks are read correctly; with a short window the logits differ."""
    model, ids = build(family), tokens(1, 2, 24)
    with torch.no_grad():
        stock = model(ids).logits
    size = float(stock.abs().max())
    assert worst(reference_logits(model, ids, num_sinks=2, window=30) - stock) < STOCK * size
    assert worst(reference_logits(model, ids, num_sinks=1, window=3) - stock) > 1e-2 * size


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # from transformers
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # from torch, same cause
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # on purpose
@pytest.mark.parametrize(
    ("family", "attention"),
    [(name, attention) for name, family in FAMILIES.items() for attention in family.attention[1:]],
)
def test_attention_implementations_agree(family: str, attention: str) -> None:
    """Every attention implementation of a family gives the reference's logits, padded rows included.

    The reference replaces the implementation, except in families that call their own attention: stock Falcon with ALiBi
    gives other logits with eager than with sdpa. flex_attention is not compiled, since its CPU kernels do not support
    float64.
    """
    rule, lengths, ids = Rule(2, 6, 3), [9, 30, 1, 1, 1, 20], tokens(2, 2, 62)
    mask = padding_mask(5, 2, lengths, holes=False)
    model = build(family, attention)
    expected = reference_logits(model, ids, mask, **rule.arguments)
    with torch.compiler.set_stance("force_eager"):
        logits = stream(model, rule.cache(model), ids, lengths, mask)
    assert worst((logits - expected)[mask.bool()]) < FLOAT32_ISLAND


def _hooks(model: torch.nn.Module) -> list[list[int]]:
    return [[*module._forward_pre_hooks, *module._forward_hooks] for module in model.modules()]


@families
def test_supports_answers_without_side_effects(family: str) -> None:
    """`supports` is true with an empty reason, and adds no hook to the model."""
    model = build(family)  # shared: the cache of another test may not have been collected yet
    before = _hooks(model)
    answer = supports(model)
    assert (bool(answer), answer.reason) == (True, "")
    assert _hooks(model) == before


def test_an_encoder_decoder_is_refused_by_name_and_reason() -> None:
    """`supports` and the constructor give the same reason; `test_verdicts` has all other reasons."""
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    loader: Any = AutoModelForSeq2SeqLM  # untyped in transformers
    model = loader.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(UnsupportedModelError, match="'t5' is an encoder-decoder") as error:
        StreamingCache(model)
    assert supports(model).reason == str(error.value)


def test_a_layer_keeps_a_window_of_its_own() -> None:
    """A layer with a window of its own attends to exactly that many tokens, whether the rule keeps fewer or more."""
    model = build("gemma3_text")
    ids = tokens(3, 1, 60)
    for rule in (Rule(1, 2), Rule(4, 30, 8)):
        logits = stream(model, rule.cache(model), ids, [20, 40])
        assert worst(logits - reference_logits(model, ids, **rule.arguments)) < 1e-9


def test_a_list_longer_than_the_window_of_all_layers_is_refused() -> None:
    """Mistral's window would hide the sinks of a longer list: the error has both numbers; one token fewer is fine."""
    model: Any = build("mistral")
    with pytest.raises(ValueError, match=r"= 65 exceeds the model's own sliding window of 64"):
        StreamingCache(model, 4, 56, 4)
    rule, ids = Rule(4, 55, 4), tokens(4, 1, 150)
    logits = call(model, rule.cache(model), ids)
    assert worst(logits - reference_logits(model, ids, **rule.arguments)) < 1e-9


@pytest.mark.parametrize("family", ["mistral", "gemma3_sliding"])
def test_a_call_longer_than_the_window_of_all_layers_is_refused(family: str) -> None:
    """If it may not be split: the window would hide the sinks; the cache is unchanged, one token fewer is fine."""
    model, rule, ids = build(family), Rule(2, 20, 10, "call"), tokens(4, 1, 2 * TRAINED)
    lengths = [TRAINED, TRAINED - rule.num_sinks - rule.window]
    expected = reference_logits(model, ids[:, : sum(lengths)], chunks=lengths, **rule.arguments)
    cache = rule.cache(model)
    for end, held in ((TRAINED, 0), (sum(lengths), rule.num_sinks + rule.window)):
        start, before = end - TRAINED + held, observe(cache)
        with pytest.raises(ValueError, match=f"and {held} are cached, .* ends at {TRAINED}; .*smaller window, or use"):
            call(model, cache, ids[:, start : end + 1])
        assert observe(cache) == before
        assert worst(call(model, cache, ids[:, start:end]) - expected[:, start:end]) < FAMILIES[family].bound


def test_queries_that_are_scaled_by_position_limit_the_list() -> None:
    """Ministral 3 scales them beyond the length first trained on: cache and reference attend to no more."""
    model, ids = build("ministral3"), tokens(4, 1, 60)
    with pytest.raises(ValueError, match="= 33 exceeds the model's 32 positions, beyond which it scales queries"):
        StreamingCache(model, 2, 30, 0)
    with pytest.raises(ValueError, match="scales queries beyond 32 tokens, the rule attends to 33"):
        reference_logits(model, ids, num_sinks=2, window=30)
    rule = Rule(2, 29, 0)
    for lengths in ([60], [40, *[1] * 20]):
        assert (
            worst(stream(model, rule.cache(model), ids, lengths) - reference_logits(model, ids, **rule.arguments))
            < 1e-9
        )
    with pytest.raises(ValueError, match="ends at 32"):
        call(model, StreamingCache(model, 2, 20, 0, "call"), ids)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_return_what_is_asked_for(family: str) -> None:
    """They return attention weights of their own, which add to 1, and as many logits as wanted, also from pieces."""
    model, ids = build(family, "eager"), tokens(5, 2, 60)
    rule = Rule(2, 6, 3)
    expected = reference_logits(model, ids, **rule.arguments)
    cache = rule.cache(model)
    stream(model, cache, ids, [20])
    with torch.no_grad():
        output = model(ids[:, 20:32], **{CACHE_NAME: cache}, output_attentions=True)
    assert [weights.shape[:3] for weights in output.attentions] == [(2, 4, 12)] * 4
    assert all(worst(weights.sum(dim=-1) - 1) < FLOAT32_ISLAND for weights in output.attentions)
    longer, whole = rule.cache(model), tokens(6, 2, 500)
    with torch.no_grad():
        logits = model(whole, **{CACHE_NAME: longer}, logits_to_keep=3).logits
    assert worst(logits - reference_logits(model, whole, **rule.arguments)[:, -3:]) < FLOAT32_ISLAND
    assert worst(output.logits - expected[:, 20:32]) < FLOAT32_ISLAND


@pytest.mark.parametrize("family", ["phi3_longrope", "phimoe_longrope"])
@pytest.mark.parametrize("columns", [40, 60])
def test_generate_keeps_the_cache_where_frequencies_would_switch(family: str, columns: int) -> None:
    """Stock code leaves out a cache when a text outgrows the 48 tokens at which they do; a stream never gets there."""
    model, ids, rule = build(family), tokens(7, 1, columns).clamp(min=1), Rule(2, 6, 3)
    cache = rule.cache(model)
    text = model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    assert cache.seen_tokens == [columns + 19]
    expected = reference_logits(model, text[:, :-1], **rule.arguments)[:, columns - 1 :]
    assert torch.equal(expected.argmax(dim=-1), text[:, columns:])


def test_a_rotation_that_cannot_be_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with two functions that pair channels differently leaves open which of them a layer calls."""
    model = build("llama")
    assert pairing(model.base_model) == Pairing(interleaved=False, direction=1)
    assert pairing(build("nanochat").base_model) == Pairing(interleaved=False, direction=-1)
    other = vars(sys.modules[type(build("glm")).__module__])["apply_rotary_pos_emb"]
    monkeypatch.setattr(sys.modules[type(model).__module__], "apply_rotary_other", other, raising=False)
    assert supports(model).reason == "LlamaModel has no function that shows how it rotates."


@NEWEST
def test_the_support_table_is_current() -> None:
    """docs/support.md is the output of `python tests/support.py`: 25 families or more, as many as the README says."""
    assert SUPPORT.read_text(encoding="utf-8") == support.page()
    count = len({family.model_type for family in FAMILIES.values()})
    assert count >= 25
    assert f"[{count} families](docs/support.md)" in README.read_text(encoding="utf-8")


def test_a_model_with_its_own_attention_is_refused_unless_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release may be older than a family's use of `AttentionInterface`; the reason says how to upgrade."""
    model = build("llama")
    monkeypatch.delattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    answer = supports(model)
    assert not answer
    assert "'llama' bypasses AttentionInterface" in answer.reason
    assert "pip install -U transformers" in answer.reason


@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_an_attention_that_leaves_the_softcap_out_is_refused(family: str) -> None:
    """Before transformers 5.21 it is the default; a model can also be switched over to it after the cache was made."""
    model = copy.deepcopy(build(family))
    cache = StreamingCache(model, 1, 4, 1)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' leaves out: load it with"):
        call(model, cache, tokens(1, 1, 3))
    assert cache.seen_tokens == [0]
    assert "attn_logit_softcapping" in supports(model).reason


@pytest.mark.parametrize("family", ["cohere2", "exaone4", "afmoe", "cohere2_moe"])
def test_layers_that_only_rotate_with_a_window_do_not_where_none_has_one(family: str) -> None:
    """All their layers attend to everything, and the configuration still names a window."""
    build(family)  # or skip the test, where this release does not have it
    recipe = FAMILIES[family]
    sizes = {**recipe.config, "layer_types": ["full_attention"] * recipe.config["num_hidden_layers"]}
    model = made(replace(recipe, config=sizes))
    ids = tokens(6, 1, 40)
    expected = reference_logits(model, ids, num_sinks=2, window=6, buffer=2)
    assert worst(stream(model, StreamingCache(model, 2, 6, 2), ids, [20, *[1] * 20]) - expected) < recipe.bound


def test_a_family_that_is_known_is_not_told_otherwise() -> None:
    """What the user says of it would be as wrong as what nobody knows."""
    assert supports(build("llama"), Family())
    assert "known as Family(only_sliding_rotate=True" in supports(build("cohere2"), Family()).reason


def test_phimoe_with_other_frequencies_is_refused() -> None:
    """It changes over to another scale with any of them, which only longrope's length tells."""
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0, "short_mscale": 1.2, "long_mscale": 1.4}
    build("phimoe_longrope")  # or skip
    recipe = FAMILIES["phimoe_longrope"]
    sizes = {**recipe.config, "rope_parameters": {**rope, "original_max_position_embeddings": 48}}
    assert "rope type linear, other than default and longrope" in supports(made(replace(recipe, config=sizes))).reason
