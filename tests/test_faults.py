"""Whatever fails, wherever, an operation has happened or it has not: every fault of every kind of operation in turn.

An operation passes *points* at which it can fail: each write to a tensor, each allocation, each module of the model,
each callback; and, where it is interrupted from the keyboard, each line of the package. They are numbered in a run
without a fault; then each of them fails, before and after its work.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import pytest
import torch

from sinkwindow import StreamingCache
from sinkwindow.model.hooks import attach
from sinkwindow.stream.steps import Steps
from strategies import EXACT, ModelSpec, Rule, call, fresh_model, observe, tokens, worst
from wide_norms import keep_norms_wide

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from torch import Tensor
    from transformers import PreTrainedModel

    from sinkwindow.retention import EvictMode
    from sinkwindow.stream.state import Snapshot

SPEC: Final = ModelSpec(family="qwen2", heads=1, head_dim=4, max_positions=24)  # positions often start again
WINDOWS: Final = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
KINDS: Final = (KeyboardInterrupt, MemoryError, RuntimeError)
# Every point fails with every exception, and every line; else each point with one of them, and a few lines.
ALL: Final = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
LINES: Final = 6
WORK: Final = {
    torch.Tensor: [
        "copy_",
        "__setitem__",
        "index_copy_",
        "zero_",
        "add_",
        "clone",
        "index_select",
        "new_empty",
        "new_zeros",
    ],
    torch: ["clone", "cat", "zeros", "zeros_like", "_foreach_zero_"],
}


@dataclass
class Fault:
    """What fails: a point by its number, with an exception, before or after its work; number -1 lets all pass."""

    number: int = -1
    kind: type[BaseException] = KeyboardInterrupt
    late: bool = False
    passed: int = 0

    def reach(self) -> bool:
        """Pass a point; return whether it is to fail."""
        self.passed += 1
        return self.passed == self.number + 1

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls from the package are points."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            fails = _is_ours(sys._getframe(1)) and self.reach()
            if fails and not self.late:
                raise self.kind("the machine stops")
            result = work(*args, **kwargs)
            if fails:
                raise self.kind("the machine stops")
            return result

        return wrapped

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        """Pass a point at each line of the package."""
        if not _is_ours(frame) or frame.f_code.co_name == "_detach":  # a finalizer: Python drops what it raises
            return None
        if event == "line":
            self.pass_by()
        return self.trace

    def pass_by(self, *_: object) -> None:
        """Pass a point that has no work: a hook."""
        if self.reach():
            raise self.kind("the machine stops")


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("sinkwindow.")


def _traced(function: Callable[..., Any], trace: Any) -> Callable[..., Any]:
    """Return the function with another tracer, or none."""

    def called(*args: Any) -> Any:
        tracer = sys.gettrace()
        sys.settrace(trace)
        try:
            return function(*args)
        finally:
            sys.settrace(tracer)

    return called


class Subject:
    """A cache to which an operation is done.

    Args:
        model: Its model.
        operation: The operation; its preparation is done.
        path: A file.
    """

    def __init__(self, model: PreTrainedModel, operation: Operation, path: Path) -> None:
        self.model, self.path, self.events, self.fault = model, path, list[object](), Fault()
        on_evict = None if operation.static else self._on_evict
        rule = Rule(2, 5, 1, operation.evict)
        self.cache = rule.cache(model, static=operation.static, on_evict=on_evict)
        self._act = operation.act
        self.saved: Snapshot | None = None
        operation.prepare(self)

    def _on_evict(self, event: object) -> None:
        self.events.append(event)
        self.fault.pass_by()

    def feed(self, *lengths: int, pad: int = 0) -> list[Tensor]:
        """Feed calls to two rows, the first of which begins with padding; return logits of the second."""
        found = []
        for length in lengths:
            mask = torch.ones(2, length)
            mask[0, :pad] = 0
            ids = tokens(self.cache.get_seq_length(), 2, length)
            found.append(call(self.model, self.cache, ids, mask if pad else None)[1])
        return found

    def act(self) -> list[Tensor]:
        """Do the operation and return logits, if it gives some."""
        found = self._act(self)
        return found if isinstance(found, list) else []

    def act_interrupted(self, fault: Fault) -> list[Tensor] | None:
        """Do the operation while a line fails; return `None` if it fails too."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sinkwindow.cache.attach", _traced(attach, None))  # has a test of its own
            try:
                return cast("list[Tensor]", _traced(self.act, fault.trace)())
            except fault.kind:
                return None

    def act_with(self, fault: Fault) -> list[Tensor] | None:
        """Do the operation while something fails; return `None` if it fails too."""
        decoder: Any = self.model.base_model
        modules = [self.model, decoder, *decoder.layers, decoder.rotary_emb, self.model.get_submodule("lm_head")]
        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            for module in modules:
                register = module.register_forward_hook if fault.late else module.register_forward_pre_hook
                stack.callback(register(fault.pass_by).remove)
            for owner, names in WORK.items():
                for name in names:
                    patch.setattr(owner, name, fault.around(getattr(owner, name)))
            self.fault = fault
            try:
                return self.act()
            except (fault.kind, MemoryError):  # an allocation that fails is a MemoryError
                return None
            finally:
                self.fault = Fault()

    def seen(self) -> Seen:
        """Return what can be observed, and what a call would give."""
        twin, events = copy.deepcopy(self.cache), list(self.events)
        logits = call(self.model, twin, tokens(1, 2, 3))
        self.events[:] = events
        return observe(self.cache), logits

    def is_in(self, states: list[Seen]) -> int:
        """Return the number of the state in which the cache is, -1 for none of them."""
        shown = [number for number, (observed, _) in enumerate(states) if observed == observe(self.cache)]
        if len(shown) < 2:  # what it holds shows in what follows
            return next(iter(shown), -1)
        logits = self.seen()[1]
        return next((number for number in reversed(shown) if worst(logits - states[number][1]) < EXACT), -1)


Seen: TypeAlias = "tuple[tuple[Any, ...], Tensor]"


def _close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(worst(one - other) < EXACT for one, other in zip(found, expected, strict=True))


@dataclass(frozen=True)
class Operation:
    """Something that is done to a cache, after something else."""

    prepare: Callable[[Subject], object]
    act: Callable[[Subject], object]
    static: bool = False
    evict: EvictMode = "token"


def _fed(*lengths: int, pad: int = 0) -> Callable[[Subject], list[Tensor]]:
    return lambda subject: subject.feed(*lengths, pad=pad)


def _reset(subject: Subject) -> None:
    subject.feed(20, 1)
    subject.cache.reset()


def _recorded(*lengths: int, pad: int = 0) -> Callable[[Subject], object]:
    def prepare(subject: Subject) -> None:
        subject.feed(9)
        subject.cache.activate_past_recording()
        subject.feed(*lengths, pad=pad)

    return prepare


def _snapshot(subject: Subject) -> None:
    subject.feed(20)
    subject.saved = subject.cache.snapshot()
    subject.feed(3)


def _restore(subject: Subject) -> None:
    assert subject.saved is not None
    subject.cache.restore(subject.saved)


def _save(subject: Subject) -> None:
    subject.cache.save(subject.path)


def _save_filled(subject: Subject) -> None:
    subject.feed(20)
    _save(subject)


def _load(subject: Subject) -> None:
    StreamingCache.load(subject.path, subject.model)


def _reorder(subject: Subject) -> None:
    subject.cache.reorder_cache(torch.tensor([1, 0]))


FILLED: Final = _fed(20)
OPERATIONS: Final = {
    "a first prompt": Operation(_fed(), _fed(4)),
    "a first prompt that evicts": Operation(_fed(), _fed(20)),
    "a first prompt in pieces": Operation(_fed(), _fed(30)),
    "a first prompt after reset": Operation(_reset, _fed(12)),
    "a step": Operation(FILLED, _fed(1)),
    "a step that evicts": Operation(_fed(20, 1, 1), _fed(1)),
    "a step that moves": Operation(_fed(9, 1, 1, 1, 1, 1, 1, 1, 1), _fed(1)),
    "a block": Operation(FILLED, _fed(4)),
    "a long call in pieces": Operation(FILLED, _fed(20)),
    "a padded call": Operation(FILLED, _fed(6, pad=2)),
    "a padded call in pieces": Operation(FILLED, _fed(20, pad=5)),
    "a call that evicts at its end": Operation(_fed(9), _fed(12), evict="call"),
    "a recorded call": Operation(_recorded(3), _fed(4)),
    "crop": Operation(_recorded(6), lambda subject: subject.cache.crop(-3)),
    "crop into padding": Operation(_recorded(6, pad=3), lambda subject: subject.cache.crop(-4)),
    "reorder_cache": Operation(FILLED, _reorder),
    "restore": Operation(_snapshot, _restore),
    "reset": Operation(FILLED, lambda subject: subject.cache.reset()),
    "activate_past_recording": Operation(FILLED, lambda subject: subject.cache.activate_past_recording()),
    "deepcopy": Operation(FILLED, lambda subject: copy.deepcopy(subject.cache)),
    "save": Operation(FILLED, _save),
    "load": Operation(_save_filled, _load),
    "a first prompt, static": Operation(_fed(), _fed(12), static=True),
    "a first prompt after reset, static": Operation(_reset, _fed(12), static=True),
    "a step, static": Operation(_fed(20, 1), _fed(1), static=True),
    "a block, static": Operation(_fed(20, 1), _fed(4), static=True),
    "a padded call, static": Operation(_fed(20, 1), _fed(6, pad=2), static=True),
    "crop, static": Operation(_fed(20, 1, 1), lambda subject: subject.cache.crop(-2), static=True),
    "reorder_cache, static": Operation(_fed(20, 1), _reorder, static=True),
    "restore, static": Operation(_snapshot, _restore, static=True),
    "reset, static": Operation(_fed(20, 1), lambda subject: subject.cache.reset(), static=True),
    "load, static": Operation(_save_filled, _load, static=True),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Build a model with two kinds of layers."""
    made = fresh_model(SPEC, **WINDOWS).double()
    keep_norms_wide(made)
    return made


class Law:
    """An operation without a fault, and what must hold with one."""

    def __init__(self, name: str, model: PreTrainedModel, path: Path, how: Callable[[Subject, Fault], Any]) -> None:
        self._operation, self._how, counting = OPERATIONS[name], how, Fault()
        self._arguments = model, self._operation, path
        self._twin = Subject(*self._arguments)
        before, self._expected, after = self._twin.seen(), how(self._twin, counting), self._twin.seen()
        self._states, self._rest, self.points = [before, after], self._twin.feed(1, 6), counting.passed
        self._twin.cache.detach()

    def check(self, fault: Fault) -> None:
        """Check that the operation has happened or not, and that what follows is what follows without the fault.

        Done again if it has not happened, it gives the same logits; every eviction is reported once; no hook is left.
        """
        subject = Subject(*self._arguments)
        found = self._how(subject, fault)
        if not self._operation.static:  # see `test_an_interrupted_reset_shows_one_state`
            assert observe(subject.cache) in [seen for seen, _ in self._states], fault
        subject.cache.rollback()
        state = subject.is_in(self._states)
        assert state == 1 or (state == 0 and found is None), fault
        if not state:
            found = subject.act()
        assert found is None or _close(found, self._expected), fault
        assert _close(subject.feed(1, 6), self._rest), fault
        assert (observe(subject.cache), subject.events) == (observe(self._twin.cache), self._twin.events), fault
        subject.cache.detach()
        assert _hooks(subject.model) == 0, fault


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_with_a_fault_has_happened_or_not(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    """Every write, allocation, module and callback fails in turn, before and after its work."""
    law = Law(name, model, tmp_path / "saved", Subject.act_with)
    assert law.points > 0 or name.startswith(("crop", "reset"))  # which need not touch a tensor
    for number, late, which in itertools.product(range(law.points), (False, True), range(3)):
        if which == (number + late) % 3 or ALL:
            law.check(Fault(number, KINDS[which], late))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_is_interrupted_has_happened_or_not(
    name: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    """The same where Ctrl-C comes between any two lines of the package."""
    law = Law(name, model, tmp_path / "saved", Subject.act_interrupted)
    assert law.points > 50
    last = range(law.points - 40, law.points) if name == "save" else ()  # where a file is written
    for number in (*range(0, law.points, 1 if ALL else law.points // LINES), *last):
        law.check(Fault(number))


def test_an_interrupted_reset_shows_one_state(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the interruption and its repair a static cache shows what it was, or that it is new."""
    cache = Rule(2, 5, 1).cache(model, static=True)
    fresh = observe(cache)
    call(model, cache, tokens(0, 2, 9))
    before = observe(cache)
    monkeypatch.setattr(Steps, "follow", Fault(0).pass_by)
    with pytest.raises(KeyboardInterrupt):
        cache.reset()
    assert observe(cache) in (before, fresh)


def test_a_cache_that_is_interrupted_while_it_is_made_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a trace of itself that keeps the hooks of later caches, wherever Ctrl-C comes while it is attached."""
    for number in itertools.count():
        model, fault = fresh_model(SPEC), Fault(number)
        # A tracer, unlike a signal, can raise between the end of a `with` and its release: others get another lock.
        monkeypatch.setattr("sinkwindow.model.hooks._lock", threading.RLock())
        monkeypatch.setattr("sinkwindow.cache.attach", _traced(attach, fault.trace))
        try:
            Rule(2, 5, 1).cache(model).detach()
        except KeyboardInterrupt:
            assert _hooks(model) == 0, fault
        else:
            break
    assert number > 20
