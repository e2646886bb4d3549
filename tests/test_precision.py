"""Moved data keeps its bits; computed data is as accurate as the dtype allows.

The error allowed in a dtype comes from the reference computed in that dtype (`upcast=False`), compared with the
reference in float64 on the same weights. The largest error counts, never an average, which would hide one wrong slot.
The streams are long and fixed, since the largest error of a short one depends on chance.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from families import TRAINED, build
from releases import needs
from sinkwindow.model.exact_rope import marked
from sinkwindow_reference import reference_logits
from strategies import (
    BOTH,
    FAMILIES,
    ModelSpec,
    Rule,
    budget,
    call,
    fresh_model,
    model_specs,
    padding_mask,
    rules,
    seeds,
    splits,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sinkwindow import StreamingCache

LOW = [torch.float32, torch.bfloat16]


@needs(
    "5.0", "before, these models are others, and of their few largest errors some are chance; the means are the same"
)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("max_positions", [20, 64, 2048])
@pytest.mark.parametrize(
    ("rule", "lengths"), [(Rule(4, 8, 3), [40, *[1] * 120]), (Rule(2, 8), [7, 1, 1] * 30)], ids=["lazy", "paper"]
)
def test_errors_are_those_of_the_dtype(
    rule: Rule, lengths: list[int], max_positions: int, family: str, dtype: torch.dtype
) -> None:
    """The largest error is at most twice that of the reference computed in the dtype, plus one rounding step.

    With 20 positions windows are rebased often, with 2048 never: neither may cost accuracy.
    """
    spec = ModelSpec(family, head_dim=16, kv_heads=2 if family == "gpt_neox" else 1, max_positions=max_positions)
    ids = tokens(1, 2, sum(lengths))
    exact = reference_logits(spec.model(), ids, **rule.arguments)
    plain = reference_logits(spec.model(dtype), ids, upcast=False, **rule.arguments)
    ours = stream(spec.model(dtype), rule.cache(spec.model(dtype)), ids, lengths)
    step = torch.finfo(dtype).eps * worst(exact)
    assert worst(ours.double() - exact) <= 2 * worst(plain.double() - exact) + step


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_errors_with_padding_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    """The same holds for padded rows."""
    rule, lengths, spec = Rule(3, 8, 2), [30, *[1, 4, 9] * 10], ModelSpec(head_dim=16)
    ids, mask = tokens(2, 3, sum(lengths)), padding_mask(2, 3, lengths, holes=True)
    exact = reference_logits(spec.model(), ids, mask, **rule.arguments)[mask.bool()]
    plain = reference_logits(spec.model(dtype), ids, mask, upcast=False, **rule.arguments)[mask.bool()]
    ours = stream(spec.model(dtype), rule.cache(spec.model(dtype)), ids, lengths, mask)[mask.bool()]
    step = torch.finfo(dtype).eps * worst(exact)
    assert worst(ours.double() - exact) <= 2 * worst(plain.double() - exact) + step


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@given(spec=model_specs(["default"]), rule=rules(BOTH), seed=seeds(), batch=st.integers(1, 2), data=st.data())
@budget(0.3)
def test_nothing_differs_from_a_stock_cache_before_the_first_eviction(
    dtype: torch.dtype, spec: ModelSpec, rule: Rule, seed: int, batch: int, data: st.DataObject
) -> None:
    """Until the list overflows the logits are those of `DynamicCache`: bit for bit in float32 and bfloat16.

    In float64 models transformers computes float32 angles, and the cache computes float64 ones.
    """
    total = rule.limit + rule.buffer
    lengths = data.draw(splits(total, total), label="lengths")
    model, ids = spec.model(dtype), tokens(seed, batch, total)
    ours = stream(model, rule.cache(model), ids, lengths)
    stock = stream(model, DynamicCache(config=model.config), ids, lengths)
    assert worst(ours - stock) < (1e-4 if dtype == torch.float64 else 1e-30)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(rule=rules(BOTH), seed=seeds(), lengths=splits(most=150))
@budget(0.3)
def test_moved_data_keeps_its_bits(dtype: torch.dtype, rule: Rule, seed: int, lengths: list[int]) -> None:
    """Every call gets the retained values in order, bit for bit, and without a rebase also the keys of the window.

    Copies of the sinks, for later evictions in the call, come before them.
    """
    spec = ModelSpec(max_positions=2048)
    model, ids = spec.model(dtype), tokens(seed, 2, sum(lengths))
    cache = rule.cache(model)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(cache, spec.layers)
        patch.setattr(cache, "update", recorder.update)
        stream(model, cache, ids, lengths)
    assert recorder.checked >= spec.layers * len(lengths)  # a long call may run in pieces


class Recorder:
    """Records all keys and values given to a cache, and compares what the cache returns with them."""

    def __init__(self, cache: StreamingCache, layers: int) -> None:
        self._cache, self._update = cache, cache.update
        self._inserted: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]
        self.checked = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Call the cache's `update` and check what it returns."""
        rule, seen = self._cache.retention, sum(keys.shape[2] for keys, _ in self._inserted[layer])
        retained = self._cache.retained_tokens[0]
        if rule.evict == "token":  # pieces of a call are not counted yet
            retained = rule.retained(seen, rule.evicted_before(seen))
        self._inserted[layer].append((keys.clone(), values.clone()))
        all_keys, all_values = (torch.cat(states, dim=2) for states in zip(*self._inserted[layer], strict=True))
        new = list(range(all_keys.shape[2] - keys.shape[2], all_keys.shape[2]))
        result = self._update(keys, values, layer, *args, **kwargs)
        order, sinks = retained + new, min(rule.num_sinks, len(retained))
        copies = result[1].shape[2] - len(order)
        pinned = list(range(rule.num_sinks)) * (copies // max(1, rule.num_sinks))
        assert torch.equal(result[1], all_values[:, :, pinned + order])
        assert torch.equal(result[0][:, :, copies + sinks :], all_keys[:, :, order[sinks:]])
        self.checked += 1
        return result


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("family", ["llama_dynamic", "llama_longrope", "phi3_longrope"])
@pytest.mark.filterwarnings("ignore:num_sinks")
def test_a_list_beyond_the_trained_length_keeps_its_frequencies(family: str, dtype: torch.dtype) -> None:
    """Stock code changes over to others there, in the middle of a stream: logits are off by 8, the bound by 1e-4."""
    model = copy.deepcopy(build(family))
    for parameter in model.parameters():  # the frequencies keep their dtype, as when a model is loaded
        parameter.data = parameter.data.to(dtype)
    rule, lengths, ids = Rule(3, TRAINED, 20), [40, *[1] * 60, 25, 1], tokens(5, 1, 126)
    exact = reference_logits(build(family), ids, **rule.arguments)
    plain = reference_logits(model, ids, upcast=False, **rule.arguments)
    assert worst(stream(model, rule.cache(model), ids, lengths) - exact) <= 5 * worst(plain - exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama_dynamic", "llama_longrope"])
def test_frequencies_that_other_calls_leave_behind_do_not_matter(family: str, dtype: torch.dtype) -> None:
    """A plain long call makes the model overwrite them, and up to transformers 5.8 they stay so."""
    model, ids, rule = copy.deepcopy(build(family)), tokens(6, 1, 50), Rule(3, 12, 4)
    torch.nn.Module.to(model, dtype)
    alone = stream(model, rule.cache(model), ids, [20, *[1] * 20, 10])
    cache, found = rule.cache(model), []
    for part in torch.split(ids, [20, *[1] * 20, 10], dim=1):
        with torch.no_grad():
            model(tokens(7, 1, TRAINED + 30))
        found.append(call(model, cache, part))
    assert torch.equal(torch.cat(found, dim=1), alone)


@pytest.mark.parametrize(
    ("dtype", "own"),
    [(torch.float64, 0), (torch.float32, 33), (torch.float16, 8_192), (torch.bfloat16, 65_536)],
    ids=str,
)
def test_a_model_makes_its_own_angles_where_they_are_fine_enough(dtype: torch.dtype, own: int) -> None:
    """In half dtypes up to positions whose float32 angle is as coarse as they are, and always below the list's end."""
    model, positions = ModelSpec().model(dtype), torch.zeros(1, 1, dtype=torch.long)
    for longest in (33, 100_000):
        last = max(own, longest) if own else 0
        for reach, kind in ((last, torch.float64 if not own else torch.int64), (last + 1, torch.float64)):
            assert marked(positions, model, reach, longest, changes=False, table=False).dtype == kind


def test_a_cache_made_after_a_cast_rotates_as_the_model_does() -> None:
    """A cast rounds the frequencies; keys and sinks are rotated by the same ones, and no call is refused."""
    model, rule, ids = fresh_model(ModelSpec(head_dim=16)).bfloat16(), Rule(3, 8, 2), tokens(8, 1, 60)
    cache, rotary = rule.cache(model), cast("Any", model.base_model.rotary_emb)
    assert torch.equal(cache._stream.pools[0].rotary.inv_freq, rotary.inv_freq)
    ours = stream(model, cache, ids, [20, *[1] * 30, 10])
    exact, plain = (reference_logits(model, ids, upcast=upcast, **rule.arguments) for upcast in (True, False))
    assert worst(ours - exact) <= 5 * worst(plain - exact)
