"""Models whose layers partly attend and partly keep a state: the state belongs to the calls that count, as keys do.

`tests/hybrids.py` has a tiny float64 model of each family. The reference runs a whole row at once, without a cache: its
linear attention, convolution and state-space layers are stock code on the whole text.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calling import failing, generated
from chat_tiny import hearing, says, sizes_of
from chat_tiny import made as made_chat
from hybrids import FLOAT32_LOGITS, HYBRIDS, build, made
from releases import needs
from sinkwindow import StreamingCache
from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    observe,
    padding_mask,
    rules,
    seeds,
    splits,
    stepwise,
    stream,
    tokens,
    worst,
)
from test_generate_modes import ENDS, Reference

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

pytestmark = needs("5.24", "before, hybrids are refused by name")
RULE: Final = Rule(2, 5, 2)
LENGTHS: Final = [9, 1, 1, 14, 1, 3, 1]
# One of each way to keep a state: delta rule, state space with the state changed in place, convolution alone, state
# space or convolution beside attention in one layer.
SOME: Final = ("qwen3_next", "bamba", "lfm2", "falcon_h1", "zaya")
families = pytest.mark.parametrize("family", HYBRIDS)
some = pytest.mark.parametrize("family", SOME)


def _bound(family: str) -> float:
    return 1e-5 if family in FLOAT32_LOGITS else EXACT


def _states(cache: StreamingCache) -> dict[Any, Tensor]:
    """Return copies of what the layers remember."""
    return {key: tensor.clone() for key, tensor in cache._state.states.items()}


def _equal(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _expect(model: PreTrainedModel, ids: Tensor, rule: Rule = RULE) -> Tensor:
    return reference_logits(model, ids, **rule.arguments)


# -- the law ----------------------------------------------------------------------------------------------------------


@families
@given(rule=rules(BOTH), seed=seeds(), lengths=splits(most=60))
@budget(0.05)
def test_a_hybrid_streams_as_the_reference_says(family: str, rule: Rule, seed: int, lengths: list[int]) -> None:
    """After every call, in both eviction modes, logits equal the reference's and the retained tokens are identical."""
    model, ids = build(family), tokens(seed, 2, sum(lengths))
    expected = reference_logits(model, ids, chunks=lengths, **rule.arguments)
    cache = rule.cache(model)
    for step, (end, logits) in enumerate(stepwise(model, cache, ids, lengths)):
        assert worst(logits - expected[:, end - lengths[step] : end]) < _bound(family)
        assert cache.retained_tokens[0] == retained_after(end, chunks=lengths[: step + 1], **rule.arguments)


@families
@given(rule=rules(), seed=seeds(), lengths=splits(most=50), single=st.booleans())
@budget(0.05)
def test_padded_rows_of_a_hybrid_are_rows_alone(
    family: str, rule: Rule, seed: int, lengths: list[int], *, single: bool
) -> None:
    """Padding before a row's first token leaves no trace in any state, be it fed column by column."""
    model, ids = build(family), tokens(seed, 2, sum(lengths))
    mask = padding_mask(seed, 2, [len(ids[0])], holes=False)
    expected = reference_logits(model, ids, mask, **rule.arguments)
    logits = stream(model, rule.cache(model), ids, [1] * len(ids[0]) if single else lengths, mask)
    assert worst((logits - expected)[mask.bool()]) < _bound(family)


@families
def test_with_everything_kept_the_reference_is_the_stock_model(family: str) -> None:
    """Which layers attend and which rotate is read correctly; with a short window the logits differ."""
    model, ids = build(family), tokens(1, 2, 24)
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
    size = float(stock.abs().max())
    assert worst(reference_logits(model, ids, num_sinks=2, window=30) - stock) < 3e-5 * size
    assert worst(reference_logits(model, ids, num_sinks=1, window=3) - stock) > 1e-3 * size


@some
@pytest.mark.parametrize("evict", BOTH)
def test_a_call_in_pieces_hands_the_state_on(family: str, evict: Any) -> None:
    """A prompt much longer than a piece gives the reference's logits, and so does what follows; bytes stay constant."""
    model, ids, rule, lengths = build(family), tokens(2, 1, 700), Rule(2, 5, 1, evict), [20, 640, 1, 39]
    cache, sizes = rule.cache(model), set()
    expected = reference_logits(model, ids, chunks=lengths, **rule.arguments)
    for (end, logits), length in zip(stepwise(model, cache, ids, lengths), lengths, strict=True):
        assert worst(logits - expected[:, end - length : end]) < EXACT
        sizes.add(cache.nbytes)
    assert len(sizes) == 1
    assert 0 < sum(tensor.nbytes for tensor in _states(cache).values()) < cache.nbytes


def test_eager_attention_gets_its_masks_too() -> None:
    """Attention weights come back for the layers that attend, with copied sinks in their own columns."""
    model, ids = made("qwen3_next", "eager"), tokens(3, 2, 24)
    mask = padding_mask(3, 2, [12], holes=False)
    mask = torch.cat((mask, torch.ones_like(mask)), dim=1)
    cache = RULE.cache(model)
    call(model, cache, ids[:, :12], mask[:, :12])
    with torch.no_grad():
        output = model(ids[:, 12:], attention_mask=mask, output_attentions=True, **{CACHE_NAME: cache})
    (weights,) = output.attentions
    assert worst(weights.sum(dim=-1) - 1) < 1e-6
    assert worst(output.logits - reference_logits(model, ids, mask, **RULE.arguments)[:, 12:]) < 1e-4


# -- a call that does not count ---------------------------------------------------------------------------------------


@some
@given(seed=seeds(), fatal=st.integers(0, len(LENGTHS) - 1), where=st.integers(0, 50), long=st.booleans())
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@budget(0.05)
def test_a_failed_call_leaves_every_state_as_it_was(
    family: str, kind: type[BaseException], seed: int, fatal: int, where: int, *, long: bool
) -> None:
    """At once, bit for bit, wherever it fails, in a later piece too; the same call again gives the right logits."""
    model, ids = build(family), tokens(seed, 2, sum(LENGTHS) + 40)
    lengths = [*LENGTHS[:fatal], LENGTHS[fatal] + 40 * long, *LENGTHS[fatal + 1 :]]
    expected, cache, end = _expect(model, ids), RULE.cache(model), sum(lengths[:fatal])
    for _ in stepwise(model, cache, ids, lengths[:fatal]):
        pass
    before = observe(cache), _states(cache)
    modules = list(model.modules())
    modules = [part for part in modules if type(part).__name__.endswith(("DecoderLayer", "ForCausalLM"))]
    with failing(modules[where % len(modules)], kind):
        call(model, cache, ids[:, end : end + lengths[fatal]])
    assert (observe(cache), True) == (before[0], _equal(_states(cache), before[1]))
    if seed % 2:
        cache.rollback()
    for length in lengths[fatal:]:
        logits = call(model, cache, ids[:, end : end + length])
        assert worst(logits - expected[:, end : end + length]) < EXACT
        end += length


def test_a_state_is_kept_for_calls_of_its_model_only() -> None:
    """Another model of the same family cannot use it, nor can anyone once the cache is detached."""
    model, ids = build("qwen3_next"), tokens(0, 1, 12)
    cache, other = RULE.cache(model), build.__wrapped__("qwen3_next")  # never attached: nobody sees its calls
    call(model, cache, ids)
    before = _states(cache)
    with pytest.raises(RuntimeError, match="keeps states for calls of the model it was made with"):
        call(other, cache, ids[:, :3])
    cache.detach()
    with pytest.raises(RuntimeError, match="keeps states for calls of the model it was made with"):
        cache.update_recurrent_state(torch.zeros(1, 4, 6, 5), 0)
    assert _equal(_states(cache), before)


def test_two_caches_in_two_threads_keep_their_own_states() -> None:
    """Each gives the reference's logits of its own text, whatever the other one does."""
    model, texts = build("qwen3_next"), [tokens(seed, 1, 40) for seed in (1, 2)]
    errors: list[float] = []

    def run(ids: Tensor) -> None:
        errors.append(worst(stream(model, RULE.cache(model), ids, [7] + [1] * 20 + [13]) - expected[id(ids)]))

    expected = {id(ids): _expect(model, ids) for ids in texts}
    threads = [threading.Thread(target=run, args=(ids,)) for ids in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert max(errors) < EXACT


def test_gradients_stop_at_the_cached_state() -> None:
    """A call under autograd leaves states without a graph, and the next one can be differentiated."""
    model, ids = copy.deepcopy(build("qwen3_next")), tokens(4, 1, 12)
    cache = RULE.cache(model)
    model(ids[:, :8], **{CACHE_NAME: cache}).logits.sum().backward()
    assert not any(tensor.requires_grad for tensor in _states(cache).values())
    for part in (ids[:, 8:9], ids[:, 9:]):
        model(part, **{CACHE_NAME: cache}).logits.sum().backward()
    with torch.inference_mode():
        model(ids[:, :2], **{CACHE_NAME: cache})
    model(ids[:, :2], **{CACHE_NAME: cache}).logits.sum().backward()


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("columns", [1, 4])
def test_the_gradient_of_one_parameter_needs_the_state_that_it_met(family: str, columns: int) -> None:
    """Also of one that the new state does not depend on: what a call has read is not written over."""
    model, ids = copy.deepcopy(build(family)).requires_grad_(requires_grad=False), tokens(4, 1, 12)
    cache = RULE.cache(model)
    for name, parameter in model.named_parameters():
        call(model, cache, ids[:, :8])
        parameter.requires_grad_()
        logits = [model(part, **{CACHE_NAME: cache}).logits.sum() for part in torch.split(ids[:, 8:], columns, dim=1)]
        (gradient,) = torch.autograd.grad(sum(logits[1:], logits[0]), parameter, materialize_grads=True)
        assert gradient.isfinite().all(), name
        parameter.requires_grad = False
        cache.reset()


# -- copies -----------------------------------------------------------------------------------------------------------


@some
def test_copies_go_on_bit_for_bit(family: str, tmp_path: Path) -> None:
    """A snapshot, a deep copy and a file have the states; `reset` forgets them."""
    model, ids, path = build(family), tokens(5, 2, 60), tmp_path / "cache.safetensors"
    cache = RULE.cache(model)
    stream(model, cache, ids[:, :30], [20, 1, 9])
    snapshot, twin, before = cache.snapshot(), copy.deepcopy(cache), _states(cache)
    cache.save(path)
    wanted = stream(model, cache, ids[:, 30:], [1, 25, 4])
    assert torch.equal(stream(model, twin, ids[:, 30:], [1, 25, 4]), wanted)
    cache.restore(snapshot)
    assert _equal(_states(cache), before)
    assert torch.equal(stream(model, cache, ids[:, 30:], [1, 25, 4]), wanted)
    loaded = StreamingCache.load(path, model)
    assert _equal(_states(loaded), before)
    assert torch.equal(stream(model, loaded, ids[:, 30:], [1, 25, 4]), wanted)
    cache.reset()
    assert (_states(cache), cache.nbytes) == ({}, 0)
    assert worst(stream(model, cache, ids, [11, 49]) - _expect(model, ids)) < EXACT


def test_a_file_that_lacks_a_state_is_refused(tmp_path: Path) -> None:
    """One without the states of the first layer is no file of a cache."""
    model, path = build("qwen3_next"), tmp_path / "cache.safetensors"
    cache = RULE.cache(model)
    call(model, cache, tokens(0, 1, 9))
    state = cache._stream.state
    cache._stream.state = replace(state, states={key: tensor for key, tensor in state.states.items() if key[0]})
    cache.save(path)
    with pytest.raises(ValueError, match="what no cache of its sizes holds"):
        StreamingCache.load(path, model)


@some
def test_rows_move_with_their_states(family: str) -> None:
    """Reordered, repeated and selected rows go on as if they had been fed alone."""
    model, ids, more = build(family), tokens(6, 3, 20), tokens(7, 4, 11)
    cache = RULE.cache(model)
    stream(model, cache, ids, [13, 1, 6])
    cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    cache.batch_select_indices(torch.tensor([False, True, False, True]))
    cache.batch_repeat_interleave(2)
    texts = torch.cat((ids[[0, 0, 1, 1]], more), dim=1)
    assert worst(stream(model, cache, more, [1, 10]) - _expect(model, texts)[:, 20:]) < EXACT


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_next", "bamba", "zaya"])
def test_a_recurrent_state_cannot_be_taken_back(family: str) -> None:
    """`crop` refuses by name with the way out, recorded or not, and changes nothing; `can_crop` says so before."""
    model, ids = build(family), tokens(8, 1, 20)
    cache = RULE.cache(model)
    cache.activate_past_recording()
    logits = stream(model, cache, ids, [6, 1, 2, 1])
    assert worst(logits - _expect(model, ids[:, :10])) < EXACT
    before = observe(cache), _states(cache)
    assert (cache.is_croppable, cache.can_crop(0), cache.can_crop(1)) == (False, True, False)
    with pytest.raises(ValueError, match=r"state has no way back. Call snapshot\(\)"):
        cache.crop(-1)
    cache.crop(0)
    assert (observe(cache), True) == (before[0], _equal(_states(cache), before[1]))
    assert worst(call(model, cache, ids[:, 10:]) - _expect(model, ids)[:, 10:]) < EXACT


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe", "lfm3"])
@given(seed=seeds(), lengths=splits(most=25), drop=st.integers(0, 25), again=st.booleans())
@budget(0.2)
def test_a_recorded_convolution_can_be_taken_back(
    family: str, seed: int, lengths: list[int], drop: int, *, again: bool
) -> None:
    """While the past is recorded `crop` is exact from the first column on, more than once too."""
    model, total = build(family), sum(lengths)
    ids, drop, rule = tokens(seed, 2, total + 8), min(drop, sum(lengths)), Rule(2, 20, 2)
    cache = rule.cache(model)
    cache.activate_past_recording()
    stream(model, cache, ids[:, :total], lengths)
    assert cache.is_croppable
    assert cache.can_crop(drop)
    cache.crop(-drop)
    assert all(kind != "past" for _, kind, _ in cache._state.states)  # which is not needed any more
    text = torch.cat((ids[:, : total - drop], ids[:, total:]), dim=1)
    if again:
        call(model, cache, ids[:, :3])
        cache.crop(-3)
    assert worst(call(model, cache, ids[:, total:]) - _expect(model, text, rule)[:, -8:]) < EXACT


def test_a_convolution_that_was_not_recorded_cannot_be_taken_back() -> None:
    """The error names the way out, and nothing has changed; with 0 nothing is taken back."""
    model, cache = build("lfm2"), RULE.cache(build("lfm2"))
    assert not cache.is_croppable  # as of stock caches before their first call
    call(model, cache, tokens(0, 1, 5))
    before = observe(cache), _states(cache)
    with pytest.raises(ValueError, match=r"Call activate_past_recording\(\) before"):
        cache.crop(-1)
    cache.crop(0)
    assert (observe(cache), True) == (before[0], _equal(_states(cache), before[1]))


# -- generate ---------------------------------------------------------------------------------------------------------

MODES: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"do_sample": False},
    "different ends": {"do_sample": False, "eos_token_id": ENDS},
    "sampling": {"do_sample": True, "top_k": 6},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "chunks": {"do_sample": False, "prefill_chunk_size": 4},
}


@some
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_same_tokens_with_the_cache_as_with_the_reference(family: str, mode: str) -> None:
    """A left-padded batch gives the same sequences across several evictions."""
    model, ids, stand_in = build(family), tokens(9, 2, 13), Reference(ModelSpec().model(), RULE)
    stand_in.__dict__["streaming"] = (model, RULE)
    mask = padding_mask(9, 2, [13], holes=False)
    common: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0, "attention_mask": mask, **MODES[mode]}
    outputs = []
    for module, more in ((model, {CACHE_NAME: RULE.cache(model)}), (stand_in, {"use_cache": False})):
        torch.manual_seed(0)
        outputs.append(module.generate(ids, **common, **more))  # type: ignore[operator]
        common.pop("prefill_chunk_size", None)
    assert torch.equal(*outputs)


def test_drafts_are_verified_where_they_can_be_taken_back() -> None:
    """Prompt lookup gives greedy search's tokens with convolutions, and a stock error with recurrent states."""
    ids = tokens(10, 1, 4).repeat(1, 4)
    model = build("lfm2")
    wanted = generated(model, ids, RULE.cache(model))
    assert generated(model, ids, RULE.cache(model), prompt_lookup_num_tokens=3) == wanted
    model = build("qwen3_next")
    with pytest.raises(ValueError, match=r"assisted generation is not supported|cache that can be cropped"):
        generated(model, ids, RULE.cache(model), prompt_lookup_num_tokens=3)


@some
def test_a_chat_goes_on_from_its_states(family: str) -> None:
    """After three turns, each of which forwards new tokens only, the next logits are those of the whole text."""
    model, probe = build(family), tokens(11, 1, 5)
    with hearing(model) as heard:
        chat = made_chat(model)
        for message in ("abc", "dad", "add a bag"):
            chat.ask(message, **says("a ba<end>"))
    text = torch.cat((torch.tensor([heard]), probe), dim=1)
    expected = reference_logits(model, text, **sizes_of(chat))[:, -5:]
    assert chat.cache.num_evictions > 0
    assert worst(call(model, chat.cache, probe) - expected) < EXACT
