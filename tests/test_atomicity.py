"""A call that fails or is refused leaves the cache unchanged; an interrupted change of its tensors is repaired."""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calling import failing, raising
from families import TRAINED, build
from sinkwindow.storage import journal
from sinkwindow.storage.journal import Writes
from sinkwindow.stream.state import State
from sinkwindow.stream.steps import Steps
from sinkwindow.stream.stream import Stream
from sinkwindow_reference import reference_logits
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    model_specs,
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from sinkwindow import StreamingCache

STORAGE = ("sinkwindow.storage", "sinkwindow.stream")  # the packages that write what is cached


@budget(0.5)
@given(
    spec=model_specs(),
    rule=rules(BOTH),
    seed=seeds(),
    lengths=splits(most=60),
    padded=st.booleans(),
    where=st.integers(0, 10_000),
    kind=st.sampled_from([RuntimeError, MemoryError, KeyboardInterrupt]),
)
def test_a_failed_forward_leaves_the_cache_unchanged(
    spec: ModelSpec, rule: Rule, seed: int, lengths: list[int], where: int, kind: type[BaseException], *, padded: bool
) -> None:
    """A call that raises any exception in any layer changes nothing, and the same call again gives right logits."""
    model, ids, fatal = spec.model(), tokens(seed, 2, sum(lengths)), where % len(lengths)
    mask = padding_mask(seed, 2, lengths, holes=True) if padded else torch.ones_like(ids)
    expected = reference_logits(model, ids, mask, chunks=lengths, **rule.arguments)
    cache, end = rule.cache(model), sum(lengths[:fatal])
    for _ in stepwise(model, cache, ids, lengths[:fatal], mask):
        pass
    before = observe(cache)
    with failing(model.base_model.get_submodule(f"layers.{where % spec.layers}"), kind):
        call(model, cache, ids[:, end : end + lengths[fatal]], mask[:, : end + lengths[fatal]])
    assert observe(cache) == before
    for length in lengths[fatal:]:
        real = mask[:, end : end + length].bool()
        logits = call(model, cache, ids[:, end : end + length], mask[:, : end + length])
        assert worst((logits - expected[:, end : end + length])[real]) < EXACT
        end += length


@pytest.mark.parametrize("steps", range(9))
def test_what_can_be_taken_back_after_a_failed_call_is_exact(steps: int) -> None:
    """Its sinks may have been written over evicted tokens, which can then not come back."""
    rule, model, ids = Rule(2, 5, 1), ModelSpec(max_positions=20).model(), tokens(0, 2, 9 + steps)
    for columns in range(9 + steps):
        cache = rule.cache(model)
        stream(model, cache, ids, [9] + [1] * steps)
        with failing(model.get_submodule("model.layers.1"), RuntimeError):
            call(model, cache, ids[:, :1])
        if cache.can_crop(columns):
            cache.crop(-columns)
            kept = torch.cat([ids[:, : 9 + steps - columns], tokens(1, 2, 6)], dim=1)
            assert (
                worst(call(model, cache, kept[:, -6:]) - reference_logits(model, kept, **rule.arguments)[:, -6:])
                < EXACT
            )


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_after_a_failed_call_another_call_of_the_model_is_a_stock_call(kind: type[BaseException]) -> None:
    """A call across evictions that fails does not affect the model's next call, which has no cache."""
    model, ids = ModelSpec().model(), tokens(0, 1, 30)
    stock = model(ids).logits
    cache = Rule(1, 4, 1).cache(model)
    with failing(model.get_submodule("model.layers.1"), kind):
        call(model, cache, ids)
    assert torch.equal(model(ids).logits, stock)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("padded", [False, True])
def test_an_interruption_while_rows_get_lanes_of_their_own_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, *, padded: bool
) -> None:
    """Padding gives each row a lane of its own; if that is interrupted, calls with and without padding still work."""
    rule, model, ids = Rule(1, 4, 1), ModelSpec().model(), tokens(0, 2, 12)
    mask = torch.ones_like(ids)
    cache = rule.cache(model)
    call(model, cache, ids[:, :9])
    before = observe(cache)
    mask[0, 9] = 0
    with monkeypatch.context() as patch:
        patch.setattr(State, "by_row", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            call(model, cache, ids[:, 9:], mask)
    assert observe(cache) == before
    mask[0, 9] = 0 if padded else 1
    expected = reference_logits(model, ids, mask, **rule.arguments)[:, 9:]
    real = mask[:, 9:].bool()
    assert worst((call(model, cache, ids[:, 9:], mask) - expected)[real]) < EXACT


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("write", "fatal"), [*(("copy_", fatal) for fatal in range(8)), ("__setitem__", 0), ("__setitem__", 1)]
)
def test_an_interrupted_move_of_a_decode_step_is_finished(
    write: str, fatal: int, monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    """A write that fails while windows or sinks move loses nothing: the call does not count, and again it is exact.

    This holds also if the write fails `late`, after it has overwritten its source. With so little scratch memory, each
    layer's row is a write of its own.
    """
    monkeypatch.setitem(journal.SCRATCH, "cpu", 1)
    assert _failures([1] * 60, write, fatal, late=late) > 2


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("write", ["copy_", "__setitem__", "index_copy_"])
def test_a_call_that_fails_in_any_write_does_not_count(write: str, *, late: bool, static: bool) -> None:
    """A prompt on a filled cache with two kinds of layers fails: the cache is unchanged, and later calls are exact."""
    rule, model, ids = Rule(2, 5, 1), build("qwen2_windows"), tokens(0, 2, TRAINED + 9)
    expected = reference_logits(model, ids, **rule.arguments)
    for fatal in itertools.count():
        cache = rule.cache(model, static=static)
        stream(model, cache, ids[:, : TRAINED - 20], [TRAINED - 24, 1, 1, 1, 1])
        before = observe(cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, write, _failing_write(write, fatal, late=late))
            failed = _fails(lambda: call(model, cache, ids[:, TRAINED - 20 : TRAINED]))  # noqa: B023 - called at once
        if not failed:
            break
        assert observe(cache) == before
        for start, stop in ((TRAINED - 20, TRAINED), (TRAINED, TRAINED + 1), (TRAINED + 1, TRAINED + 9)):
            assert worst(call(model, cache, ids[:, start:stop]) - expected[:, start:stop]) < EXACT
    assert (fatal > 5) == (static or write == "__setitem__")  # only a static cache does the other writes here


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_that_cannot_move_can_be_reset(*, static: bool) -> None:
    """If every write fails for lack of memory, `reset` drops the interrupted change and the cache is like new."""
    rule, model, ids = Rule(2, 5, 1), ModelSpec(max_positions=20).model(), tokens(0, 2, 30)
    expected, fresh = reference_logits(model, ids, **rule.arguments), observe(rule.cache(model, static=static))
    cache = rule.cache(model, static=static)
    call(model, cache, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", raising(MemoryError("no memory left")))
        assert _fails(lambda: stream(model, cache, ids, [3] * 10))
        assert not _fails(cache.reset)
    assert observe(cache) == fresh
    assert worst(stream(model, cache, ids, [20, *[1] * 10]) - expected) < EXACT


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("part", [(Stream, "repair"), (Writes, "finish"), (Steps, "follow")])
def test_an_interrupted_reset_is_finished(part: tuple[type, str], *, static: bool) -> None:
    """Wherever a reset is interrupted, after steps counted only in tensors, the next call finds an empty cache."""
    rule, model, ids = Rule(2, 5, 1), ModelSpec(max_positions=20).model(), tokens(0, 2, 30)
    expected, fresh = reference_logits(model, ids, **rule.arguments), observe(rule.cache(model, static=static))
    cache = rule.cache(model, static=static)
    stream(model, cache, ids, [20, *[1] * 10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*part, raising(KeyboardInterrupt()))
        reached = static or part[0] is not Steps
        with pytest.raises(KeyboardInterrupt) if reached else nullcontext():
            cache.reset()
    cache.rollback()
    assert observe(cache) == fresh
    assert worst(stream(model, cache, ids, [20, *[1] * 10]) - expected) < EXACT


@given(sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 8)), most=st.integers(1, 400))
def test_a_move_copies_no_more_to_scratch_than_allowed(sizes: tuple[int, int, int], most: int) -> None:
    """A part has at most `most` bytes or is one layer's row; all parts together write each number exactly once."""
    layers, batch, slots = sizes
    source = torch.arange(layers * batch * slots).reshape(layers, batch, 1, slots, 1).double()
    target = torch.zeros_like(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(journal.SCRATCH, "cpu", most)
        parts = list(journal.in_parts(target, source, torch.clone))
    assert all(part.target.nbytes <= most or part.target.shape[:2] == (1, 1) for part in parts)
    for part in parts:
        part.target.add_(part.source())
    assert torch.equal(target, source)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("write", "fatal"), [*(("__setitem__", fatal) for fatal in range(8)), *(("copy_", fatal) for fatal in range(3))]
)
def test_an_interrupted_write_of_a_long_call_leaves_the_cache_unchanged(write: str, fatal: int, *, late: bool) -> None:
    """The same holds for every write of the window after a call that is longer than the slots."""
    assert _failures([20, 3, 40, 1, 1, 30, 9, 2, 25, 1], write, fatal, late=late) > 2


def _failures(lengths: list[int], write: str, fatal: int, *, late: bool) -> int:
    """Stream while write number `fatal` of every call fails, check everything, and return the number of failures.

    A call that fails does not count and is repeated.
    """
    rule, model, ids = Rule(2, 5, 1), ModelSpec(max_positions=20).model(), tokens(0, 2, sum(lengths))
    expected = reference_logits(model, ids, **rule.arguments)
    cache, failures = rule.cache(model), 0
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        part = ids[:, end - length : end]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, write, _failing_write(write, fatal, late=late))
            failed = _fails(lambda: call(model, cache, part))  # noqa: B023 - called at once
        failures += failed
        assert cache.get_seq_length() == (end - length if failed else end)
        if failed:
            assert worst(call(model, cache, part) - expected[:, end - length : end]) < EXACT
    assert cache.seen_tokens == [sum(lengths)] * 2
    return failures


def _failing_write(name: str, fatal: int, *, late: bool) -> Callable[..., object]:
    """Return a tensor method whose call number `fatal` from the storage modules raises; all other calls do their work.

    If `late`, it raises after the work is done.
    """
    method, count = getattr(torch.Tensor, name), [0]

    def write(target: Tensor, *args: Any, **kwargs: Any) -> object:
        if sys._getframe(1).f_globals["__name__"].startswith(STORAGE):
            count[0] += 1
            if count[0] == fatal + 1:
                if late:
                    method(target, *args, **kwargs)
                raise MemoryError("a write fails")
        return method(target, *args, **kwargs)

    return write


def _fails(act: Callable[[], object]) -> bool:
    try:
        act()
    except MemoryError:
        return True
    return False


# -- bad calls ------------------------------------------------------------------------------------------------------


def _bad_calls() -> dict[str, tuple[type[Exception], str, Callable[[StreamingCache, PreTrainedModel], object]]]:
    """Return what can be wrong with a call: the error, its message, and the call."""
    ids, embeddings = tokens(1, 2, 3), torch.zeros(2, 0, 16, dtype=torch.float64)
    other, streaming = ModelSpec(heads=1).model(), ModelSpec(heads=4).model()
    mask_4d = torch.zeros(2, 1, 3, 14, dtype=torch.float64)
    return {
        "another model": (RuntimeError, "the model it was made with", lambda c, _: call(other, c, ids)),
        "another model in use": (ValueError, "made for another model", lambda c, _: call(streaming, c, ids)),
        "a smaller batch": (ValueError, "batch size 1.*holds 2 rows", lambda c, m: call(m, c, ids[:1])),
        "a larger batch": (ValueError, "batch size 4.*holds 2 rows", lambda c, m: call(m, c, ids.repeat(2, 1))),
        "no columns": (ValueError, "at least one new token", lambda c, m: call(m, c, ids[:, :0])),
        "no rows": (ValueError, "at least one new token", lambda c, m: call(m, c, ids[:0])),
        "no embeddings": (
            ValueError,
            "at least one new token",
            lambda c, m: m(inputs_embeds=embeddings, **{CACHE_NAME: c}),
        ),
        "a short mask": (
            ValueError,
            r"\(2, 2\).*11 columns.*\(2, 14\)",
            lambda c, m: call(m, c, ids, torch.ones(2, 2)),
        ),
        "a long mask": (ValueError, r"\(2, 15\).*\(2, 14\)", lambda c, m: call(m, c, ids, torch.ones(2, 15))),
        "a mask of one row": (ValueError, r"\(1, 14\).*\(2, 14\)", lambda c, m: call(m, c, ids, torch.ones(1, 14))),
        "a 4D mask": (ValueError, "attend to later ones", lambda c, m: call(m, c, ids, mask_4d)),
    }


@pytest.mark.parametrize("name", _bad_calls())
def test_a_bad_call_is_refused_before_anything_changes(name: str) -> None:
    """The error says what is wrong; the cache is unchanged, and the next valid call is exact."""
    kind, message, act = _bad_calls()[name]
    rule, model, ids = Rule(1, 4, 1), ModelSpec().model(), tokens(0, 2, 30)
    cache, elsewhere = rule.cache(model), rule.cache(ModelSpec(heads=4).model())
    stream(model, cache, ids[:, :11], [11])
    before = observe(cache), observe(elsewhere)
    with pytest.raises(kind, match=message):
        act(cache, model)
    assert (observe(cache), observe(elsewhere)) == before
    expected = reference_logits(model, ids, **rule.arguments)
    assert worst(call(model, cache, ids[:, 11:]) - expected[:, 11:]) < EXACT
