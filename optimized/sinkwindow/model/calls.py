"""The life of a call: one at a time on one stream, whoever else calls the model. The hooks (``hooks.py``) drive it."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sinkwindow.attention.step import uncompiled
from sinkwindow.model.inputs import ANOTHER_MODEL, CallChecks, check_flags
from sinkwindow.model.open_call import OpenCall, module_frame
from sinkwindow.model.versions import CROP_REMOVES, TAKES_CACHE_POSITION

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from sinkwindow.model.families import ModelFacts
    from sinkwindow.model.state_layers import StateLayers
    from sinkwindow.stream.events import Eviction
    from sinkwindow.stream.state import State
    from sinkwindow.stream.steps import Steps
    from sinkwindow.stream.stream import Stream


@dataclass(frozen=True, slots=True)
class News:
    """What ``on_evict`` has not heard of.

    Attributes:
        untold: Evictions to report.
        state: The stream after a call that is about to count.
        due: The evictions of that call.
    """

    untold: deque[Eviction] = field(default_factory=deque)
    state: State | None = None
    due: Sequence[Eviction] = ()


class Calls:
    """Serve the calls of one cache; the base of ``StreamingCache``, which has the public methods.

    Attributes:
        _model: The module that the cache was made for: its call is the call, not that of other modules around it.
        _stream: What the calls that count have left.
        _steps: Steps at fixed shapes, if the cache is static.
        _states: The layers that keep a state.
        _call: The call that is open, or one that was interrupted and does not count.
        _news: Evictions to report, and those of a call that counts once the stream has its state.
        _lock: Held while a call opens and while the stream changes between calls.
        _forwarded: Columns that calls before the last one have run.
    """

    _model: weakref.ref[nn.Module]
    _stream: Stream
    _steps: Steps | None
    _states: StateLayers
    _facts: ModelFacts
    _checks: CallChecks
    _pool_of: dict[int, int]
    _finalizer: weakref.finalize[Any, Any]
    _on_evict: Callable[[Eviction], object] | None

    def _serve(self) -> None:
        """Begin to serve calls; once, before hooks can call."""
        self._call: OpenCall | None = None
        self._news = News()
        self._lock = threading.RLock()
        self._forwarded = 0

    @property
    def _state(self) -> State:
        """What the calls that count have left."""
        return self._stream.state if self._steps is None else self._steps.state()

    @uncompiled
    def _front(self, index: int) -> int | None:
        """Return the columns that a pool's layers get in front of those of the call that is running.

        ``None`` if none is, if it is a step at fixed shapes, and before the cache has rewritten its arguments.
        """
        call = self._call
        if call is None or call.plan is None or not call.is_running():
            return None
        return call.plan.parts[index].front

    def _open(self, module: nn.Module) -> None:
        """Open a call of a module, or join the one that the module around it has opened."""
        frame = module_frame()
        above = None if frame is None else frame.f_back  # an interrupted call's frame may have had this one's address
        with self._lock:
            call = self._call
            if call is not None and call.is_running(above):
                if call.stream is None and call.thread == threading.get_ident() and id(module) != call.module:
                    return  # a part of that module, called for the first time in this call
                raise RuntimeError(_in_use(call, "be called"))
            self._call = OpenCall(self._facts, id(self), id(module), 0 if frame is None else id(frame))

    def _begin(self, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Begin the open call; return the decoder's arguments, rewritten."""
        call = self._call
        assert call is not None  # noqa: S101 - `_open` was here
        try:
            self._repair()
            inputs = self._checks.read(self._stream, decoder, kwargs, attached=self._finalizer.alive)
            call.todo, self._forwarded = set(self._pool_of), self._stream.state.forwarded
            if self._states.layers:
                self._states.open(self._stream.state.states, recording=self._stream.state.recording)
            if self._steps is not None and self._steps.ready and inputs.columns == 1 and inputs.real is None:
                return call.begin_step(self._steps, decoder, kwargs)
            return call.begin(self._stream, decoder, kwargs, inputs)
        except BaseException:
            self._call = None
            raise

    def _complete(self, output: Any) -> Any:
        """Return the decoder's output with what earlier pieces have given."""
        call = self._call
        if call is None or call.plan is None or not (call.outputs or call.as_tuple or call.plan.has_copies):
            return output
        return call.completed(output, self._pool_of)

    def _end(self, module: nn.Module) -> None:
        """Count the call if it is of this module: one assignment, in ``Stream.adopt`` or ``Steps.commit``, does it.

        Raises:
            RuntimeError: Some layer never handed over its keys; the call does not count.
        """
        call = self._call
        if call is None or id(module) != call.module:
            return  # a part of the module that the user called
        self._call = None  # counted or not, it is over
        if call.todo:
            call.check_layers()
        if call.plan is None:
            if self._steps is not None and self._steps.step is not None:
                self._steps.commit()
            return
        assert call.stream is not None  # noqa: S101 - a plan has one
        state, evictions = call.stream.after(call.plan)
        if self._states.layers:
            state = replace(state, states=self._states.taken(self._stream.state.states))
        if self._on_evict is not None:
            self._news = News(self._news.untold, state, [*call.evictions, *evictions])
        self._stream.adopt(state)
        if self._steps is not None:
            with suppress(RuntimeError, MemoryError):  # the call counts already; the next one tries again
                self._steps.follow()
        if self._on_evict is not None:
            self._tell()

    def _columns_of(self, tokens_to_remove: int) -> int:
        """Return the number of columns that a crop takes back.

        Raises:
            ValueError: There are not as many, or the number is positive.
        """
        fed, last = self._stream.state.columns, self._stream.state.forwarded - self._forwarded
        if not CROP_REMOVES and tokens_to_remove > max(0, fed - last):
            tokens_to_remove = min(0, tokens_to_remove - fed)  # it says what stays
        if not 0 <= -tokens_to_remove <= fed:
            raise ValueError(
                f"tokens_to_remove must be minus a number between 0 and the {fed} fed, got {tokens_to_remove}."
            )
        return -tokens_to_remove

    def _collect_news(self) -> None:
        """Add the evictions of the last call, if it counts, to those to report."""
        news = self._news
        due = news.due if news.state is self._stream.state else []
        self._news = News(deque([*news.untold, *due]))  # one assignment: no event is lost, and none comes twice

    def _forget_undone(self) -> None:
        """Leave out evictions that a roll-back has undone: they are not reported any more."""
        firsts = self._stream.per_row([self._stream.rule.first(row.evicted) for row in self._state.pools[0].lanes])
        first = dict(enumerate(firsts))  # rows that were taken out are not in it
        news = (event for event in self._news.untold if event.tokens.stop <= first.get(event.row, event.tokens.stop))
        self._news = News(deque(news))

    def _tell(self) -> None:
        """Report evictions, each once; the first exception is raised when all have been reported."""
        self._collect_news()
        errors: list[Exception] = []
        while self._news.untold and self._on_evict is not None:
            try:
                self._on_evict(self._news.untold.popleft())
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
        if errors:
            raise errors[0]

    def _begin_traced(self, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Begin a step while ``torch.compile`` traces it: no call is open then."""
        if self._steps is None:
            raise ValueError(
                "Only a StreamingCache(..., static=True) can be compiled, and only calls of one token with it."
            )
        if decoder is not self._checks.decoder():
            raise ValueError(ANOTHER_MODEL)
        check_flags(decoder, kwargs)
        self._call = None  # what was interrupted does not count
        own = {"cache_position": self._steps.seen[:1].clone()} if TAKES_CACHE_POSITION else {}
        # Not `|`, which old tracers do not know.
        return {**kwargs, **own, **self._steps.begin(kwargs, decoder.config._attn_implementation)}  # noqa: SLF001

    def _commit_traced(self) -> None:
        if self._steps is not None:
            self._steps.commit()

    def _repair(self) -> None:
        """Finish, or undo, what was interrupted."""
        if self._news.state is not None:
            self._collect_news()
        self._stream.repair()
        if self._steps is not None:
            self._steps.follow()
            self._steps.sync()

    @contextmanager
    def _idle(self, what: str, *, repair: bool = True) -> Iterator[Stream]:
        """Yield the stream, to change it between calls.

        Raises:
            RuntimeError: A call is running, in this thread or in another one.
        """
        with self._lock:
            if self._call is not None and self._call.is_running():
                raise RuntimeError(_in_use(self._call, what))
            self._call = None
            self._states.close()
            if repair:
                self._repair()
            yield self._stream
            if self._steps is not None:
                self._steps.follow()


def _in_use(call: OpenCall, what: str) -> str:
    where = "from inside it" if call.thread == threading.get_ident() else "from another thread"
    return (
        f"This StreamingCache is in the middle of a call and cannot {what} {where}; the call goes on. Wait until it "
        "has returned, or make another StreamingCache."
    )
