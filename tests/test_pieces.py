"""A call that runs in pieces is one call to everybody who looks at it: hooks, outputs, roll-back, other models."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface, AttentionMaskInterface, FalconModel, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from calling import RULE, SPEC, failing
from families import FAMILIES, build
from sinkwindow import StreamingCache
from sinkwindow.lanes import Inputs
from sinkwindow.stream import stream as stream_module
from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    CACHE_NAME,
    EXACT,
    VOCABULARY,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    padding_mask,
    seeds,
    splits,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

LONG = 60  # columns, several pieces of the model below [tokens]


@pytest.fixture
def model() -> PreTrainedModel:
    """Build a model that no other test uses."""
    return fresh_model(SPEC).double()


def _decoded(model: PreTrainedModel, cache: Any, ids: Tensor, **more: Any) -> Any:
    with torch.no_grad():
        return model.base_model(input_ids=ids, **{CACHE_NAME: cache}, **more)


def test_a_later_hook_on_the_decoder_sees_the_whole_call(model: PreTrainedModel) -> None:
    """What a user's hook returns for a long call is what the head gets, for all columns."""
    ids, lengths = tokens(0, 1, LONG), []
    plain = call(model, RULE.cache(model), ids)
    cache = RULE.cache(model)

    def double(_module: object, _args: object, output: Any) -> Any:
        lengths.append(output.last_hidden_state.shape[1])
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    handle = model.base_model.register_forward_hook(double)
    logits = call(model, cache, ids)
    handle.remove()
    assert lengths == [LONG]
    assert worst(logits - 2 * plain) < 1e-6 * float(plain.abs().max())


def _shifted(_module: object, args: Any, kwargs: dict[str, Any]) -> Any:
    """Change the tokens of a call; a pre-hook."""
    ids, args = (args[0], args[1:]) if args else (kwargs["input_ids"], ())
    return ((ids + 1) % VOCABULARY, *args), {name: value for name, value in kwargs.items() if name != "input_ids"}


def _doubled(module: object, _args: object, output: Any) -> Any:
    """Return another output of a decoder; a hook, which may be global."""
    doubled = isinstance(module, LlamaModel | FalconModel)
    return type(output)(last_hidden_state=2 * output.last_hidden_state) if doubled else None


def _register(kind: str, decoder: Any) -> Any:
    """Register a user's hook."""
    if kind == "global":
        return register_module_forward_hook(_doubled)
    if kind == "pre":
        return decoder.register_forward_pre_hook(_shifted, with_kwargs=True)
    return decoder.register_forward_hook(_doubled)


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", ["pre", "after", "global"])
@budget(0.05)
@given(seed=seeds(), lengths=splits(most=30), when=st.integers(0, 20))
@example(seed=0, lengths=[30], when=0)  # before the cache is made,
@example(seed=0, lengths=[30], when=1)  # before its first call,
@example(seed=0, lengths=[9, 21], when=2)  # and later
def test_a_users_hook_on_the_decoder_is_around_all_pieces(
    family: str, kind: str, seed: int, lengths: list[int], when: int, *, alone: bool
) -> None:
    """Whenever it was registered, a call gives what single tokens give; one that cannot is refused, and counts not."""
    model = copy.deepcopy(ModelSpec(max_positions=24).model() if family == "llama" else build(family))
    ids, handles = tokens(seed, 1, sum(lengths)), []
    decoder = cast("Any", model.base_model)
    called = decoder if alone else model

    def feed(cache: Any, part: Tensor) -> Tensor:
        with torch.no_grad():
            output = called(input_ids=part, **{CACHE_NAME: cache})
        return cast("Tensor", output.last_hidden_state if alone else output.logits)

    try:
        when %= len(lengths) + 1
        if not when:
            handles.append(_register(kind, decoder))
        cache, single = RULE.cache(called), RULE.cache(called)
        for number, part in enumerate(torch.split(ids, lengths, dim=1), 1):
            if number == when:
                handles.append(_register(kind, decoder))
            before = cache.seen_tokens
            try:
                found = feed(cache, part)
            except ValueError as error:
                if not re.search(r"a (global forward |pre-)hook .*needs a call in one piece", str(error)):
                    raise
                refused = kind == "global" or (kind == "pre" and alone and number == when)
                assert (family, cache.seen_tokens, refused) == ("falcon", before, True)
                found = torch.cat([feed(cache, one) for one in torch.split(part, 1, dim=1)], dim=1)
            expected = torch.cat([feed(single, one) for one in torch.split(part, 1, dim=1)], dim=1)
            assert worst(found - expected) < max(EXACT, FAMILIES[family].bound)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "falcon", "bloom"])
def test_tuples_hold_what_dicts_do(family: str) -> None:
    """With `return_dict=False` hidden states of all columns come back, in the same order."""
    model, ids = build(family), tokens(1, 1, LONG)
    named = _decoded(model, RULE.cache(model), ids, output_hidden_states=True)
    plain = _decoded(model, RULE.cache(model), ids, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.last_hidden_state)
    states = next(item for item in plain[1:] if isinstance(item, tuple))
    assert [state.shape[1] for state in states] == [LONG] * len(named.hidden_states)
    assert all(map(torch.equal, states, named.hidden_states))


@pytest.mark.parametrize("return_dict", [True, False])
def test_attention_weights_have_the_columns_that_were_promised(*, return_dict: bool) -> None:
    """Weights of copied sinks are in the sinks' own columns, in a tuple too."""
    model, ids = ModelSpec(attention="eager").model(), tokens(2, 2, 50)
    cache = RULE.cache(model)
    call(model, cache, ids[:, :20])
    held = len(cache.retained_tokens[0])
    output = _decoded(model, cache, ids[:, 20:], output_attentions=True, return_dict=return_dict)
    weights = output.attentions if return_dict else output[-1]
    for layer in weights:
        assert layer.shape == (2, 2, 30, held + 30)
        assert worst(layer.sum(dim=-1) - 1) < 1e-5


def test_weights_of_a_call_that_its_table_holds_come_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where positions index a table, attention weights are refused beyond the table only."""
    monkeypatch.setattr(stream_module, "PIECE", 8)
    model, ids = build("gptj", "eager"), tokens(13, 1, 80)
    output = _decoded(model, RULE.cache(model), ids[:, :60], output_attentions=True)
    assert output.attentions[0].shape[-2:] == (60, 60)
    with pytest.raises(ValueError, match="output_attentions=True needs a call in one piece"):
        _decoded(model, RULE.cache(model), ids, output_attentions=True)


@pytest.mark.filterwarnings("ignore:num_sinks")
@pytest.mark.parametrize(("device", "buffer", "columns"), [("cpu", 64, 256), ("cuda", 64, 1024), ("cuda", 0, 512)])
def test_pieces_are_longer_on_a_gpu(device: str, buffer: int, columns: int) -> None:
    """A piece costs a GPU the launch of all kernels, and masked columns little; copies of 8 sinks are limited too."""
    cache = StreamingCache(ModelSpec().model(), 8, 2000, buffer)
    assert cache._stream.piece_length(Inputs(1, 5000, torch.device(device), None), masked=True) == columns


def test_arguments_with_a_value_per_column_are_cut() -> None:
    """GPT-J adds embeddings of `token_type_ids`: those of each piece's own columns."""
    gptj, ids = build("gptj"), tokens(3, 1, LONG)
    types = tokens(4, 1, LONG)
    with torch.no_grad():
        whole = gptj(input_ids=ids, token_type_ids=types, **{CACHE_NAME: RULE.cache(gptj)}).logits
        cache, steps = RULE.cache(gptj), []
        for column in range(LONG):
            part = {"input_ids": ids[:, [column]], "token_type_ids": types[:, [column]]}
            steps.append(gptj(**part, **{CACHE_NAME: cache}).logits)
    assert worst(whole - torch.cat(steps, dim=1)) < FAMILIES["gptj"].bound


@pytest.mark.parametrize("family", ["llama", "qwen2_windows", "gemma3_text"])
def test_an_attention_without_4d_masks_streams(family: str) -> None:
    """As flash attention is called: calls end at evictions, and layers with a window of their own mask themselves."""
    AttentionInterface.register("masks_2d", sdpa_attention_forward)
    AttentionMaskInterface.register("masks_2d", sdpa_mask)
    model, ids = build(family, "masks_2d"), tokens(5, 2, 45)
    expected = reference_logits(build(family), ids, **RULE.arguments)
    logits = stream(model, RULE.cache(model), ids, [20, 10, 1, 1, 13])
    assert worst(logits - expected) < FAMILIES[family].bound
    mask = padding_mask(5, 2, [45], holes=False)
    if family == "llama":
        expected = reference_logits(build(family), ids, mask, **RULE.arguments)
        assert worst((call(model, RULE.cache(model), ids, mask) - expected)[mask.bool()]) < EXACT
    else:
        with pytest.raises(ValueError, match="takes no 4D mask"):
            call(model, RULE.cache(model), ids, mask)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("length", [1, LONG])
def test_another_model_is_refused_after_a_failed_call(model: PreTrainedModel, length: int, *, static: bool) -> None:
    """What a failed call has left open serves nobody else."""
    cache, other, ids = RULE.cache(model, static=static), fresh_model(ModelSpec()).double(), tokens(6, 1, 80)
    call(model, cache, ids[:, :12])
    with failing(model.get_submodule("model.layers.0"), RuntimeError):
        call(model, cache, ids[:, 12 : 12 + length])
    with pytest.raises(RuntimeError, match="serves the model it was made with"):
        call(other, cache, ids[:, :length])
    expected = reference_logits(model, ids, **RULE.arguments)
    assert worst(call(model, cache, ids[:, 12:]) - expected[:, 12:]) < EXACT


def test_a_call_outlives_the_cache_that_hooked_the_outer_module(model: PreTrainedModel) -> None:
    """A cache made for the decoder counts when the decoder has returned, whoever else hooks or leaves the model."""
    other, cache, ids = RULE.cache(model), RULE.cache(model.base_model), tokens(7, 1, 8)
    handle = model.get_submodule("lm_head").register_forward_pre_hook(lambda *_: other.detach())
    call(model, cache, ids)
    handle.remove()
    assert cache.seen_tokens == [8]


@pytest.mark.parametrize("family", ["llama", "falcon", "bloom"])
def test_a_recorded_draft_across_evictions_is_taken_back(family: str) -> None:
    """Also where each eviction ends a piece: what a call evicts stays in its slots."""
    model, rule, ids = build(family), Rule(2, 20), tokens(8, 1, 60)
    cache = rule.cache(model)
    call(model, cache, ids[:, :40])
    cache.activate_past_recording()
    stream(model, cache, ids[:, 40:50], [4, 6])
    assert cache.can_crop(10)
    cache.crop(-10)
    assert cache.retained_tokens == [retained_after(40, **rule.arguments)]
    other = torch.cat([ids[:, :40], tokens(9, 1, 20)], dim=1)
    expected = reference_logits(model, other, **rule.arguments)
    assert worst(call(model, cache, other[:, 40:]) - expected[:, 40:]) < FAMILIES[family].bound


def test_a_call_that_fits_the_slots_is_taken_back() -> None:
    """However long: it runs in one piece, and what it evicts stays where it is."""
    rule, model, ids = Rule(4, 100, 450), ModelSpec(layers=1, max_positions=2048).model(), tokens(10, 1, 600)
    cache = rule.cache(model)
    call(model, cache, ids[:, :300])
    call(model, cache, ids[:, 300:580])  # longer than a piece, no longer than the free slots
    assert cache.num_evictions == 1
    assert cache.can_crop(280)


def test_padding_of_many_calls_is_taken_back_or_refused() -> None:
    """Calls of padding alone are remembered one by one; a roll-back over them gives the counts of that time."""
    rule, model, ids = Rule(2, 3), ModelSpec().model(), tokens(11, 2, 12)
    cache, mask = rule.cache(model), torch.zeros(2, 12, dtype=torch.long)
    mask[:, 8:] = 1
    stream(model, cache, ids, [1] * 8 + [4], mask)
    cache.crop(-4)
    cache.crop(-3)
    assert (cache.seen_tokens, cache.get_seq_length()) == ([0, 0], 5)
    cache.crop(-4)
    assert (cache.seen_tokens, cache.get_seq_length()) == ([0, 0], 1)


def test_a_failed_long_call_keeps_no_cycle(model: PreTrainedModel) -> None:
    """`del cache` frees it at once, though earlier pieces of the failed call had returned."""
    cache, ids = RULE.cache(model), tokens(12, 1, LONG)
    gc.collect()
    gc.disable()
    try:
        with failing(model.get_submodule("lm_head"), RuntimeError):
            call(model, cache, ids)
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()
