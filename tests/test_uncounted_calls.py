"""What does not count: a call that fails or is interrupted before the module that the user called has returned."""

from __future__ import annotations

import itertools
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from calling import RULE, SPEC, failing, generated, raising
from families import build
from sinkwindow.storage import ring
from sinkwindow.stream.steps import Steps
from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    EXACT,
    ModelSpec,
    Rule,
    call,
    fresh_model,
    observe,
    stream,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from sinkwindow import Eviction

PLACES: Final = {
    "a layer": "model.layers.1",
    "the decoder, in a later hook of the user's": "model",
    "the head": "lm_head",
    "the model, in a later hook of the user's": "",
}


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("length", [1, 4, 30])
@pytest.mark.parametrize("place", PLACES)
def test_a_call_counts_when_what_the_user_called_has_returned(
    place: str, length: int, kind: type[BaseException], *, static: bool
) -> None:
    """A failure before that leaves everything as it was, at once, for every reader; the same call again is right."""
    model, ids = SPEC.model(), tokens(6, 2, 40)
    expected = reference_logits(model, ids, **RULE.arguments)
    cache = RULE.cache(model, static=static)
    stream(model, cache, ids[:, :10], [8, 1, 1])
    before = observe(cache)
    for after in range(1 if place != "a layer" else 4):  # in the pieces of a long call, too
        try:
            with failing(model.get_submodule(PLACES[place]), kind, after=after):
                call(model, cache, ids[:, 10 : 10 + length])
        except pytest.fail.Exception:  # fewer pieces than that: it went through
            cache.reset()
            stream(model, cache, ids[:, :10], [8, 1, 1])
            break
        assert observe(cache) == before
    logits = call(model, cache, ids[:, 10 : 10 + length])
    assert worst(logits - expected[:, 10 : 10 + length]) < EXACT
    assert cache.seen_tokens == [10 + length] * 2
    rest = call(model, cache, ids[:, 10 + length :]) if length < 30 else logits[:, :0]
    assert worst(rest - expected[:, 10 + length :]) < EXACT


@pytest.mark.parametrize("after", [0, 3, 9])
@pytest.mark.parametrize("family", ["falcon", "mpt", "bloom", "llama", "gemma3_text"])
def test_the_same_generate_again_gives_the_same_text(family: str, after: int) -> None:
    """However a prompt is interrupted, in whatever piece: `generate` feeds it again, all of it."""
    model, ids = build(family), tokens(7, 1, 40)
    expected = generated(model, ids, RULE.cache(model))
    cache = RULE.cache(model)
    layers = [module for name, module in model.named_modules() if name.endswith((".layers.1", ".h.1", ".blocks.1"))]
    in_pieces = family in ("falcon", "mpt", "bloom")
    with failing(layers[0], KeyboardInterrupt, after=after if in_pieces else 0):
        generated(model, ids, cache)
    assert (cache.seen_tokens, cache.get_seq_length()) == ([0], 0)
    assert generated(model, ids, cache) == expected


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("fatal", [1, 2, 5])
def test_a_callback_that_raises_loses_nothing(family: str, fatal: int) -> None:
    """The call counts, every eviction is reported once, and the first exception is raised; the same in all families."""
    model, ids, told = build(family), tokens(8, 1, 60), []

    def on_evict(event: Eviction) -> None:
        told.append(event)
        if len(told) == fatal:
            raise ValueError(f"callback {fatal}")

    cache, quiet = RULE.cache(model, on_evict=on_evict), RULE.cache(model, on_evict=None)
    heard: list[Eviction] = []
    loud = RULE.cache(model, on_evict=heard.append)
    for length, stop in ((5, 5), (40, 45), (15, 60)):
        part = ids[:, stop - length : stop]
        call(model, quiet, part)
        call(model, loud, part)
        with pytest.raises(ValueError, match=f"callback {fatal}") if stop == 45 else nullcontext():
            call(model, cache, part)
        assert observe(cache) == observe(quiet)
        assert told == heard


def test_a_callback_that_is_interrupted_is_told_the_rest_later() -> None:
    """Ctrl-C in a callback ends the call at once; the evictions that it has not heard of come with the next call's."""
    model, ids, told = SPEC.model(), tokens(9, 1, 60), []

    def on_evict(event: Eviction) -> None:
        told.append(event)
        if len(told) == 2:
            raise KeyboardInterrupt

    cache, heard = RULE.cache(model, on_evict=on_evict), list["Eviction"]()
    loud = RULE.cache(model, on_evict=heard.append)
    stream(model, loud, ids, [40, 20])
    with pytest.raises(KeyboardInterrupt):
        call(model, cache, ids[:, :40])
    assert (len(told), cache.seen_tokens) == (2, [40])
    call(model, cache, ids[:, 40:])
    assert told == heard


@pytest.mark.parametrize("undo", ["reset", "restore", "crop", "crop some"])
def test_evictions_that_are_undone_are_not_reported(undo: str) -> None:
    """After Ctrl-C in a callback, what it has not heard of is reported only where it still holds."""
    model, ids, told = SPEC.model(), tokens(9, 2, 60), []

    def on_evict(event: Eviction) -> None:
        told.append(event)
        if len(told) == 1:
            raise KeyboardInterrupt

    cache, heard = RULE.cache(model, on_evict=on_evict), list["Eviction"]()
    cache.activate_past_recording()
    call(model, cache, ids[:, :6])
    snapshot = cache.snapshot()
    with pytest.raises(KeyboardInterrupt):
        call(model, cache, ids[:, 6:30])
    undone: dict[str, Callable[[], None]] = {
        "reset": cache.reset,
        "restore": lambda: cache.restore(snapshot),
        "crop": lambda: cache.crop(-24),
        "crop some": lambda: cache.crop(-10),
    }
    undone[undo]()
    kept = cache.get_seq_length()
    call(model, cache, ids[:, 30:])
    again = torch.cat((ids[:, :kept], ids[:, 30:]), dim=1)
    stream(model, RULE.cache(model, on_evict=heard.append), again, [kept, 30] if kept else [30])
    assert told[0 if undo == "crop some" else 1 :] == heard  # the first was told before it was undone


@pytest.mark.parametrize("length", [4, 40])  # the second runs in pieces
def test_no_eviction_is_lost_or_told_twice_wherever_a_call_is_interrupted(length: int) -> None:
    """Ctrl-C before any line of what counts a call and reports its evictions: fed on, all are told once, in order."""
    model, ids = SPEC.model(), tokens(9, 1, 70)
    heard = list["Eviction"]()
    stream(model, RULE.cache(model, on_evict=heard.append), ids, [20, length, 1, 49 - length])
    for fatal in itertools.count():
        told = list["Eviction"]()
        cache = RULE.cache(model, on_evict=told.append)
        call(model, cache, ids[:, :20])
        with _interrupting_line(fatal, ("_end", "adopt", "_collect_news", "_tell")) as interrupted:
            call(model, cache, ids[:, 20 : 20 + length])
        if not interrupted:
            break
        for stop in (20 + length, 21 + length, 70):
            start = cache.seen_tokens[0]
            assert start in (20, 20 + length, 21 + length)
            if start < stop:
                call(model, cache, ids[:, start:stop])
        assert told == heard
    assert fatal > 20


@contextmanager
def _interrupting_line(fatal: int, functions: tuple[str, ...]) -> Iterator[list[int]]:
    """Raise a KeyboardInterrupt before line number `fatal` of some functions of ours; name it if there is one."""
    lines, found = itertools.count(), list[int]()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_name not in functions or "sinkwindow" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == fatal:
            found.append(frame.f_lineno)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield found
    except KeyboardInterrupt:
        assert found
    finally:
        sys.settrace(before)


# -- interrupted steps ------------------------------------------------------------------------------------------------


def test_an_interrupted_step_does_not_count() -> None:
    """Torch runs no hook after a KeyboardInterrupt; the model and the cache are as before, at once."""
    rule, model, ids = Rule(2, 5, 1), fresh_model(ModelSpec()), tokens(15, 1, 12)
    cache = rule.cache(model, static=True)
    call(model, cache, ids[:, :10])
    handle = model.model.layers[1].register_forward_pre_hook(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        call(model, cache, ids[:, 10:11])
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert cache.seen_tokens == [10]
    twin = rule.cache(model, static=True)
    assert torch.equal(call(model, cache, ids[:, 10:]), stream(model, twin, ids, [10, 2])[:, 10:])


@pytest.mark.parametrize(("owner", "part"), [(Steps, "_find_layers"), (ring, "list_slots"), (ring, "write")])
def test_an_interrupted_prompt_between_steps_does_not_count(
    owner: object, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails between two kinds of calls, the stream knows what was fed."""
    rule, model, ids = Rule(2, 5, 1), ModelSpec().model(), tokens(16, 2, 60)
    expected = reference_logits(model, ids, **rule.arguments)
    cache = rule.cache(model, static=True)
    stream(model, cache, ids[:, :20], [5] + [1] * 15)
    with monkeypatch.context() as patch:
        patch.setattr(owner, part, raising(RuntimeError("the machine stops")))
        with pytest.raises(RuntimeError, match="the machine stops") if owner is ring else nullcontext():
            call(model, cache, ids[:, 20:40])  # longer than the ring: nothing of the list before it is left there
    start = 20 if owner is ring else 40
    assert cache.seen_tokens == [start] * 2
    assert cache.retained_tokens == [retained_after(start, **rule.arguments)] * 2
    assert worst(stream(model, cache, ids[:, start:], [1] * (60 - start)) - expected[:, start:]) < EXACT


def test_a_failed_call_is_not_taken_for_a_plain_call_in_its_place() -> None:
    """A plain call may have the stack frame of one that failed: methods of the cache are not refused in it."""
    model, ids, answers = fresh_model(SPEC).double(), tokens(17, 1, 20), []
    cache = RULE.cache(model)
    call(model, cache, ids)

    def ask(*_: object) -> None:
        answers.append(cache.can_crop(0))

    for _ in range(5):
        with failing(model.get_submodule("model.layers.1"), RuntimeError):
            call(model, cache, ids[:, :3])
        handle = model.register_forward_pre_hook(ask)
        call(model, None, ids[:, :3])
        handle.remove()
    assert answers == [True] * 5
