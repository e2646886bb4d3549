"""What happens to the model of a cache: casts and moves, wrappers, compilers, copies, processes.

In each a cache does what a ``DynamicCache`` does, or refuses the call by name; one property per surrounding.
"""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from transformers import DynamicCache

from calling import KINDS, LENGTHS, RULE, WIDE, logits_of
from families import build
from releases import needs
from sinkwindow_reference import reference_logits
from strategies import (
    EXACT,
    ModelSpec,
    call,
    fresh_model,
    observe,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

FEW = [9, 1, 7, 1]  # for the compiler, which takes its time


# -- casts and moves of the model ---------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("filled", [False, True])
def test_a_cast_that_rounds_frequencies_is_refused(*, static: bool, filled: bool) -> None:
    """Keys in the cache, and its own rotations, belong to the old frequencies; a cache made after the cast is right."""
    model, ids = fresh_model(ModelSpec(head_dim=16)), tokens(2, 1, 40)
    cache = RULE.cache(model, static=static)
    if filled:
        call(model, cache, ids[:, :9])
    before = observe(cache)
    model.bfloat16()
    with pytest.raises(ValueError, match=r"rotary frequencies are others.*after the cast"):
        call(model, cache, ids[:, 9:12])
    assert observe(cache) == before
    model.double()
    expected = reference_logits(model, ids, **RULE.arguments)
    assert worst(stream(model, RULE.cache(model, static=static), ids, [9, 1, 1, 29]) - expected) < EXACT


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", ["mul_", "data", "data twice", "buffer twice"])
def test_frequencies_that_change_in_place_are_refused(change: str, *, inference: bool) -> None:
    """However they change, also in a model that was made in inference mode; a change to the same values is none."""
    with torch.inference_mode(inference):
        model, ids = fresh_model(ModelSpec()), tokens(2, 1, 40)
        rotary: Any = model.model.rotary_emb
        cache = RULE.cache(model)
        expected = stream(model, RULE.cache(model), ids, [20, 20])
        found = [call(model, cache, ids[:, :20])]
        values = rotary.inv_freq.clone()
        for _ in range(2 if "twice" in change else 1):  # the second one may get the memory of the one before the first
            if change == "mul_":
                rotary.inv_freq.mul_(0.5)
            elif "data" in change:
                rotary.inv_freq.data = rotary.inv_freq.data * 0.5
            else:
                rotary.inv_freq = rotary.inv_freq * 0.5
        before = observe(cache)
        with pytest.raises(ValueError, match="rotary frequencies are others"):
            call(model, cache, ids[:, 20:])
        assert observe(cache) == before
        rotary.inv_freq.copy_(values)
        found.append(call(model, cache, ids[:, 20:]))
        assert torch.equal(torch.cat(found, dim=1), expected)


@KINDS
@pytest.mark.parametrize("filled", [False, True])
def test_a_cast_that_keeps_frequencies_does_what_a_stock_cache_does(*, static: bool, filled: bool) -> None:
    """From float32 to float64 it goes on in float64; a static cache that is filled cannot, and says so."""
    model, ids = fresh_model(ModelSpec(max_positions=128)), tokens(2, 1, 40)
    ours, stock = WIDE.cache(model, static=static), DynamicCache(config=model.config)
    if filled:
        assert torch.equal(call(model, ours, ids[:, :9]), call(model, stock, ids[:, :9]))
    model.double()
    with pytest.raises(ValueError, match=r"was cast, moved, or split") if static and filled else nullcontext():
        for part in torch.split(ids[:, 9:], [1, 30], dim=1):
            assert worst(call(model, ours, part) - call(model, stock, part)) < 1e-4  # stock angles are float32
        banks = [bank for slots in ours._stream.state.pools for bank in slots.banks]
        assert {tensor.dtype for bank in banks for tensor in bank.tensors} == {torch.float64}


@needs("5.5", "before, stock code fails on the device meta")
@KINDS
def test_a_moved_model_is_refused_by_a_filled_cache(*, static: bool) -> None:
    """The devices are named; an empty cache serves the model where it is."""
    model, ids = fresh_model(ModelSpec()), tokens(2, 1, 30)
    filled, empty = RULE.cache(model, static=static), RULE.cache(model, static=static)
    call(model, filled, ids[:, :9])
    before = observe(filled)
    torch.nn.Module.to(model, "meta")
    with pytest.raises(ValueError, match=r"on meta, and this StreamingCache holds .* on cpu"):
        call(model, filled, ids[:, 9:12].to("meta"))
    assert observe(filled) == before
    assert call(model, empty, ids.to("meta")).device.type == "meta"


def test_off_loaded_models_keep_their_caches_content() -> None:
    """Between calls their weights are nowhere; snapshots from before and after are restored where tensors are."""
    model, ids = copy.deepcopy(ModelSpec().model()), tokens(2, 1, 40)
    expected, cache = reference_logits(model, ids, **RULE.arguments), RULE.cache(model)
    call(model, cache, ids[:, :20])
    early = cache.snapshot()
    cpu_offload(model, execution_device=torch.device("cpu"))
    cache = RULE.cache(model)
    cache.restore(early)
    assert worst(call(model, cache, ids[:, 20:30]) - expected[:, 20:30]) < EXACT
    cache.restore(cache.snapshot())
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        assert worst(call(model, one, ids[:, 30:]) - expected[:, 30:]) < EXACT


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bool, torch.uint8, torch.complex64, "sparse", "none"])
def test_parameters_of_every_kind_have_a_fingerprint(kind: Any) -> None:
    """Also those that torch takes no values of: a snapshot is restored, and another weight is seen."""
    model, ids = copy.deepcopy(ModelSpec().model()), tokens(2, 1, 12)
    extra = torch.zeros(0) if kind == "none" else torch.eye(8)
    extra = extra.to_sparse() if kind == "sparse" else extra if kind == "none" else extra.to(kind)
    model.model.layers[0].extra = torch.nn.Parameter(extra, requires_grad=False)
    cache = RULE.cache(model)
    call(model, cache, ids)
    saved = cache.snapshot()
    cache.restore(saved)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match="other weights"):
        cache.restore(saved)


# -- wrappers, compilers, copies, processes -----------------------------------------------------------------------


class _Wrapper(torch.nn.Module):
    """What PEFT, ``DataParallel`` and ``torch.compile`` have in common: a module around the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


@KINDS
@pytest.mark.parametrize("wrap", [_Wrapper, torch.nn.DataParallel])
def test_a_cache_of_the_inner_model_serves_calls_of_its_wrapper(wrap: Callable[..., Any], *, static: bool) -> None:
    """Without a device to copy to, ``DataParallel`` calls the model itself."""
    model, ids = ModelSpec().model(), tokens(3, 1, sum(LENGTHS))
    expected = reference_logits(model, ids, **RULE.arguments)
    cache, wrapper = RULE.cache(model, static=static), wrap(model)
    with torch.no_grad():
        logits = torch.cat([logits_of(wrapper, cache, part) for part in torch.split(ids, LENGTHS, dim=1)], dim=1)
    assert worst(logits - expected) < EXACT


def test_a_replica_of_the_model_is_refused() -> None:
    """``DataParallel`` on several devices calls copies of the model, which the cache does not know."""
    model, ids = ModelSpec().model(), tokens(3, 1, 12)
    cache = RULE.cache(model)
    with pytest.raises((ValueError, RuntimeError), match="another model"):
        call(copy.deepcopy(model), cache, ids)
    assert cache.seen_tokens == [0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, of old masks
@pytest.mark.parametrize(("family", "static"), [("llama", False), ("llama", True), ("falcon", False)])
def test_a_compiled_model_takes_every_call(family: str, *, static: bool) -> None:
    """Steps of a static cache are compiled; all other calls run uncompiled, and all are exact."""
    torch._dynamo.reset()
    model = build(family) if family == "falcon" else ModelSpec(layers=1).model()
    ids = tokens(4, 1, sum(FEW))
    plain, cache = RULE.cache(model, static=static), RULE.cache(model, static=static)
    expected = stream(model, plain, ids, FEW)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = torch.cat([logits_of(compiled, cache, part) for part in torch.split(ids, FEW, dim=1)], dim=1)
    assert worst(logits - expected) < EXACT
    assert observe(cache) == observe(plain)


@KINDS
@pytest.mark.parametrize("order", ["model first", "cache first", "cache alone"])
def test_copies_serve_the_model_that_was_copied_with_them(order: str, *, static: bool) -> None:
    """A copy of model and cache is a pair of its own; where the cache came first, it stays with the old model."""
    model, ids = copy.deepcopy(ModelSpec().model()), tokens(5, 1, 40)
    cache = RULE.cache(model, static=static)
    call(model, cache, ids[:, :20])
    if order == "cache alone":
        twin, served = copy.deepcopy(cache), model
    elif order == "model first":
        served, twin = copy.deepcopy((model, cache))
    else:
        twin, other = copy.deepcopy((cache, model))
        served = model
        with pytest.raises((ValueError, RuntimeError), match="another model"):
            call(other, twin, ids[:, 20:])
    expected = reference_logits(model, ids, **RULE.arguments)[:, 20:]
    assert worst(stream(served, twin, ids[:, 20:], [1, 19]) - expected) < EXACT
    assert worst(stream(model, cache, ids[:, 20:], [19, 1]) - expected) < EXACT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@KINDS
def test_a_forked_process_goes_on_alone(*, static: bool) -> None:
    """Parent and child have each their own cache after a fork, and neither sees the other's calls."""
    model, ids = ModelSpec().model(), tokens(6, 1, 40)
    expected, cache = reference_logits(model, ids, **RULE.arguments)[:, 20:], RULE.cache(model, static=static)
    call(model, cache, ids[:, :20])
    child = os.fork()
    if not child:  # leaves without pytest's clean-up, whatever happens
        try:
            right = worst(stream(model, cache, ids[:, 20:], [1, 1, 18]) - expected) < EXACT
        except BaseException:  # noqa: BLE001 - the parent reports it
            right = False
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cache.seen_tokens == [20]
    assert worst(stream(model, cache, ids[:, 20:], [20]) - expected) < EXACT
