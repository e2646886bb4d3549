"""A call belongs to its caller: whatever else runs on the model, each gets what it gets alone, to the last bit.

Interleavings are drawn: threads pass a turn to each other at every layer, in a drawn order.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from calling import RULE, SPEC, failing, fed, generated
from sinkwindow_reference import reference_logits
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    Rule,
    budget,
    call,
    fresh_model,
    rules,
    seeds,
    splits,
    tokens,
    worst,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    from sinkwindow import StreamingCache

KINDS: Final = ("streaming", "static", "stock", "plain")
kinds = st.sampled_from(KINDS)


def _state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return what a call might change of a model, hooks aside."""
    names = [(type(module), "forward" in vars(module)) for module in model.modules()]
    buffers = [(name, buffer.clone()) for name, buffer in model.named_buffers()]
    return names, model.config.to_dict(), model.config._attn_implementation, [(n, b.tolist()) for n, b in buffers]


def _cache(kind: str, model: PreTrainedModel, rule: Rule) -> Any:
    """Return a cache of a kind, `None` for calls without one."""
    if kind == "stock":
        return DynamicCache(config=model.config)
    return None if kind == "plain" else rule.cache(model, static=kind == "static")


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# -- threads ----------------------------------------------------------------------------------------------------------


class Turns:
    """Lets threads run from layer to layer of a model in a given order; those that are done are left out."""

    def __init__(self, order: Sequence[int], count: int) -> None:
        self._order, self._running = list(order), set(range(count))
        self._numbers: dict[int, int] = {}
        self._changed = threading.Condition()

    def __call__(self, *_: object) -> None:
        """Wait for the turn of this thread; a hook."""
        number = self._numbers.get(threading.get_ident())
        if number is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._next() in (None, number), timeout=20)
            if self._order:
                self._order.pop(0)
            self._changed.notify_all()

    def _next(self) -> int | None:
        while self._order and self._order[0] not in self._running:
            self._order.pop(0)
        return self._order[0] if self._order else None

    def run(self, actors: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run each actor in a thread of its own; return what they return, or the exceptions that they raise."""
        results: list[Any] = [None] * len(actors)

        def work(number: int) -> None:
            self._numbers[threading.get_ident()] = number
            try:
                results[number] = actors[number]()
            except Exception as error:  # noqa: BLE001 - compared by the test
                results[number] = error
            with self._changed:
                self._running.discard(number)
                self._changed.notify_all()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(actors))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@contextmanager
def _at_every_layer(model: PreTrainedModel, hook: Callable[..., object]) -> Iterator[None]:
    """Call a hook before every layer, and before the language model's head."""
    modules: list[Module] = [*model.get_submodule("model.layers").children(), model.get_submodule("lm_head")]
    handles = [module.register_forward_pre_hook(lambda *args: hook(*args) and None) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@given(
    who=st.tuples(kinds, kinds),
    rule=rules(BOTH),
    seed=seeds(),
    lengths=st.tuples(splits(most=40), splits(most=40)),
    order=st.lists(st.integers(0, 1), max_size=40),
)
@budget(0.6)
def test_threads_do_not_meet(
    who: tuple[str, str], rule: Rule, seed: int, lengths: tuple[list[int], list[int]], order: list[int]
) -> None:
    """Two callers of one model in two threads, in a drawn order: each gets the bits that it gets alone."""
    if rule.evict == "call":
        who = (who[0].replace("static", "streaming"), who[1].replace("static", "streaming"))
    model = SPEC.model()
    texts = [tokens(seed + n, 1, sum(lengths[n])) for n in range(2)]
    alone = [fed(model, _cache(who[n], model, rule), texts[n], lengths[n]) for n in range(2)]
    before, turns = _state(model), Turns(order, 2)
    caches = [_cache(kind, model, rule) for kind in who]

    def actor(n: int) -> Callable[[], list[Tensor]]:
        return lambda: fed(model, caches[n], texts[n], lengths[n])

    with _at_every_layer(model, turns):
        found = turns.run([actor(0), actor(1)])
    assert all(_same(found[n], alone[n]) for n in range(2))
    assert _state(model) == before


class _Listener(BaseStreamer):
    """Keep the tokens that `generate` puts, and do something at each."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.heard: list[int] = []
        self._act = act

    def put(self, value: Tensor) -> None:
        """Keep tokens."""
        self._act()
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        """Do nothing."""


@given(who=st.tuples(kinds, kinds), rule=rules(), seed=seeds(), order=st.lists(st.integers(0, 1), max_size=60))
@budget(0.2)
def test_generating_threads_do_not_meet(who: tuple[str, str], rule: Rule, seed: int, order: list[int]) -> None:
    """The same of `generate`, with a streamer in each thread."""
    model, texts = SPEC.model(), [tokens(seed + n, 1, 15) for n in range(2)]
    alone = [generated(model, texts[n], _cache(who[n], model, rule)) for n in range(2)]
    before, turns, listeners = _state(model), Turns(order, 2), [_Listener(), _Listener()]
    caches = [_cache(kind, model, rule) for kind in who]

    def actor(n: int) -> Callable[[], list[int]]:
        return lambda: generated(model, texts[n], caches[n], streamer=listeners[n])

    with _at_every_layer(model, turns):
        found = turns.run([actor(0), actor(1)])
    assert found == alone
    assert [listener.heard for listener in listeners] == alone
    assert _state(model) == before


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("length", [1, 4, 30])
def test_one_cache_in_two_threads_is_refused(length: int, *, static: bool) -> None:
    """The second call is refused before anything changes, and so are methods; the first one goes on unharmed."""
    model, ids = SPEC.model(), tokens(1, 1, 40)
    alone = fed(model, RULE.cache(model, static=static), ids[:, : 10 + length], [10, length])
    cache, refusals = RULE.cache(model, static=static), []
    call(model, cache, ids[:, :10])

    def intrude() -> None:
        for act in (lambda: call(model, cache, ids[:, :3]), cache.reset, cache.detach, lambda: cache.crop(-1)):
            with pytest.raises(RuntimeError, match="from another thread") as caught:
                act()
            refusals.append(caught.value)

    def once(*_: object) -> None:
        if not refusals and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    with _at_every_layer(model, once):
        logits = call(model, cache, ids[:, 10 : 10 + length])
    assert len(refusals) == 4
    assert torch.equal(logits, alone[1])
    assert cache.seen_tokens == [10 + length]


def test_an_interrupted_call_keeps_no_other_thread_out() -> None:
    """Torch runs no hook after a KeyboardInterrupt, yet the next call, of any thread, is served."""
    model, ids = SPEC.model(), tokens(2, 1, 30)
    alone = fed(model, RULE.cache(model), ids, [20, 10])
    cache = RULE.cache(model)
    call(model, cache, ids[:, :20])
    with failing(model.get_submodule("model.layers.1"), KeyboardInterrupt):
        call(model, cache, ids[:, 20:])
    (found,) = Turns([], 1).run([lambda: call(model, cache, ids[:, 20:])])
    assert torch.equal(found, alone[1])


# -- nested calls -----------------------------------------------------------------------------------------------------


@given(
    outer=st.sampled_from(["streaming", "static"]),
    inner=st.sampled_from([*KINDS, "compiled"]),
    rule=rules(),
    seed=seeds(),
    lengths=splits(most=40),
    inner_lengths=splits(most=20),
    place=st.integers(0, 30),
)
@budget(0.5)
def test_a_nested_call_changes_nothing(
    outer: str, inner: str, rule: Rule, seed: int, lengths: list[int], inner_lengths: list[int], place: int
) -> None:
    """From a hook in the middle of a call, anything else is called on the same model: both get their own bits."""
    model, ids, others = SPEC.model(), tokens(seed, 1, sum(lengths)), tokens(seed + 1, 1, sum(inner_lengths))

    def nested() -> list[Tensor]:
        if inner == "compiled":
            return _compiled_steps(model, rule.cache(model, static=True), others)
        return fed(model, _cache(inner, model, rule), others, inner_lengths)

    alone, alone_inside = fed(model, _cache(outer, model, rule), ids, lengths), nested()
    cache, before, passed, found_inside = _cache(outer, model, rule), _state(model), [0], []

    def hook(*_: object) -> None:
        passed[0] += 1
        if passed[0] == place + 1:
            passed[0] += 10**6  # not in the nested call
            found_inside.extend(nested())

    with _at_every_layer(model, hook):
        found = fed(model, cache, ids, lengths)
    assert _same(found, alone)
    assert not found_inside or _same(found_inside, alone_inside)
    assert _state(model) == before


def _compiled_steps(model: PreTrainedModel, cache: StreamingCache, ids: Tensor) -> list[Tensor]:
    """Return the logits of a prompt of one token and of compiled steps."""
    compiled: Any = torch.compile(model, backend="eager")
    return [call(model if step == 0 else compiled, cache, part) for step, part in enumerate(torch.split(ids, 1, dim=1))]


@pytest.mark.parametrize("by", ["streamer", "on_evict", "logits_processor"])
def test_what_generate_calls_back_may_call_the_model(by: str) -> None:
    """A streamer, a callback of another cache and a logits processor call the model in the middle of `generate`."""
    model, ids = SPEC.model(), tokens(3, 1, 15)
    others, plain = fed(model, RULE.cache(model), ids, [9, 6]), call(model, None, ids)
    alone, found = generated(model, ids, RULE.cache(model)), []

    def act(*given_back: Any) -> Any:
        found.append((fed(model, RULE.cache(model), ids, [9, 6]), call(model, None, ids)))
        return given_back[-1] if given_back else None

    cache = RULE.cache(model, on_evict=act if by == "on_evict" else None)
    callers: dict[str, dict[str, Any]] = {
        "streamer": {"streamer": _Listener(act)},
        "logits_processor": {"logits_processor": [act]},
    }
    more = callers.get(by, {})
    assert generated(model, ids, cache, **more) == alone
    assert len(found) > 5
    assert all(_same(inside, others) and torch.equal(outside, plain) for inside, outside in found)


# -- a cache inside its own call --------------------------------------------------------------------------------------

METHODS: Final[dict[str, tuple[str, Callable[[StreamingCache], object]]]] = {
    "activate_past_recording": ("begin to record", lambda cache: cache.activate_past_recording()),
    "batch_repeat_interleave": ("reorder rows", lambda cache: cache.batch_repeat_interleave(2)),
    "batch_select_indices": ("reorder rows", lambda cache: cache.batch_select_indices(torch.tensor([0]))),
    "can_crop": ("be asked what it can crop", lambda cache: cache.can_crop(1)),
    "crop": ("be cropped", lambda cache: cache.crop(-1)),
    "detach": ("be detached", lambda cache: cache.detach()),
    "reorder_cache": ("reorder rows", lambda cache: cache.reorder_cache(torch.tensor([0]))),
    "reset": ("be reset", lambda cache: cache.reset()),
    "rollback": ("roll back", lambda cache: cache.rollback()),
    "save": ("be saved", lambda cache: cache.save("nowhere")),
    "snapshot": ("be copied", lambda cache: cache.snapshot()),
}


@pytest.mark.parametrize("length", [1, 4, 30])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_refused_inside_a_call(method: str, length: int, *, static: bool) -> None:
    """Whatever would change the cache, and a call of it, raises inside its own call, which goes on unharmed."""
    model, ids = SPEC.model(), tokens(5, 1, 50)
    alone = fed(model, RULE.cache(model, static=static), ids, [10, length, 40 - length])
    cache, refused = RULE.cache(model, static=static), []
    parts = torch.split(ids, [10, length, 40 - length], dim=1)
    found = [call(model, cache, parts[0])]

    def hook(*_: object) -> None:
        for words, act in (METHODS[method], ("", lambda cache: call(model, cache, ids[:, :3]))):
            with pytest.raises(RuntimeError, match=f"cannot {words}.* from inside it; the call goes on"):
                act(cache)
            refused.append(cache.seen_tokens)

    handle = model.get_submodule("model.layers.1").register_forward_pre_hook(hook)
    try:
        found.append(call(model, cache, parts[1]))
    finally:
        handle.remove()
    found.append(call(model, cache, parts[2]))
    assert set(map(tuple, refused)) == {(10,)}
    assert _same(found, alone)


# -- who is called ----------------------------------------------------------------------------------------------------


def test_a_cache_made_for_the_decoder_serves_the_model() -> None:
    """And the other way round; the hooks of another cache on the outer module change nothing."""
    model, ids = fresh_model(SPEC).double(), tokens(10, 1, 30)
    expected = reference_logits(model, ids, **RULE.arguments)
    decoder: Any = model.base_model
    inner, outer = RULE.cache(decoder), RULE.cache(model)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # not typed in transformers
    for cache in (inner, outer):
        first = call(model, cache, ids[:, :20])
        with torch.no_grad():
            rest = head(decoder(input_ids=ids[:, 20:], **{CACHE_NAME: cache}).last_hidden_state)
        assert cache.seen_tokens == [30]
        assert worst(torch.cat([first, rest], dim=1) - expected) < EXACT


def test_a_wrapper_that_was_given_to_the_cache_is_what_is_called() -> None:
    """Of two hooked modules, one inside the other, the outer one's return counts."""
    model, ids = fresh_model(SPEC).double(), tokens(11, 1, 30)
    cache = RULE.cache(model)
    call(model, cache, ids[:, :10])
    with failing(model.get_submodule("lm_head"), RuntimeError):
        call(model, cache, ids[:, 10:])
    assert cache.seen_tokens == [10]
