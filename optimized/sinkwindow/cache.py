"""``StreamingCache``: the cache that people use, all that transformers and users call.

docs/design.md has the rooms below it, and the life of a call in order.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from transformers import Cache

from sinkwindow.arguments import read_int, read_rows
from sinkwindow.attention.step import is_tracing, uncompiled
from sinkwindow.copies import Copies
from sinkwindow.fit import OnOverflow, Positions, check_fit, longest_call, pools_of, position_bound
from sinkwindow.model.calls import News
from sinkwindow.model.families import Family, decoder_of, inspect_model
from sinkwindow.model.hooks import attach
from sinkwindow.model.inputs import CallChecks
from sinkwindow.model.layer_stub import stubs_of
from sinkwindow.model.rope import frequencies_of, length_for
from sinkwindow.model.state_layers import StateLayers
from sinkwindow.model.versions import ASKS_QUERY_OFFSET
from sinkwindow.retention import EvictMode, Retention
from sinkwindow.storage.states import can_go_back
from sinkwindow.stream.state import DebugState
from sinkwindow.stream.steps import Steps
from sinkwindow.stream.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from sinkwindow.model.layer_stub import LayerStub
    from sinkwindow.stream.events import Eviction


class StreamingCache(Cache, Copies):
    """Keep the first ``num_sinks`` and the last ``window`` tokens, indefinitely (StreamingLLM, arXiv 2309.17453).

    Pass it as ``past_key_values=`` (``cache=`` from transformers 5.24 on) to ``model.generate`` or ``model.forward``.
    Every token's query attends to the retained list of its own time, each token at its rank in that list, whatever the
    length of the calls. What is evicted is gone: memory stays bounded and the text fluent, but the model cannot
    recall it.

    A call counts when the module that was called has returned: one that fails or is interrupted, wherever, leaves the
    cache as it was. Several caches may serve one model, also in several threads. One cache serves one call at a time:
    while it does, another call of it, and every method that would change it, raises a ``RuntimeError``.

    Args:
        model: The model that you will call with the cache; its weights and forward are left as they are.
        num_sinks: S, first tokens that are never evicted [tokens].
        window: W, most recent tokens that survive an eviction [tokens].
        buffer: B, how far the list may overgrow before one batched eviction [tokens]; 0 is the paper.
        evict: ``"token"`` applies the rule token by token; ``"call"`` lets a whole call attend to itself and evicts
            after it.
        on_evict: Called with an ``Eviction`` for each one, after the call that caused it has been counted. If it
            raises, the other evictions are reported first, and the call still counts.
        positions: ``"rank"``, the paper; ``"original"`` leaves every token at its natural index, which is right only
            below the model's trained length: a call that would go beyond it is refused.
        on_overflow: ``"evict"``, or ``"error"`` to refuse a call that would evict, as beyond original positions with an
            ``OverflowError``.
        static: Whether calls of one token per row have fixed shapes, for ``torch.compile`` and CUDA graphs:
            ``generate`` compiles them where it would for a ``StaticCache``. Tokens kept and logits stay the same.
        family: What ``check_untested`` of the lab has found, for a model that is not in the table of supported ones.

    Raises:
        TypeError: A size is not an int, ``on_evict`` is not callable, or ``family`` is no ``Family``.
        ValueError: A size is out of range, ``evict`` is unknown, the model's own sliding window is shorter than
            the retained list, or ``static`` does not fit the model or another argument.
        UnsupportedModelError: The model is not known to stream exactly (a ``ValueError``).

    Warns:
        UserWarning: S + W + B + 1 exceeds the positions that the model was trained on, or positions are original.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
        >>> cache = StreamingCache(model, num_sinks=2, window=4, buffer=1)
        >>> with torch.no_grad():
        ...     output = model(torch.arange(9)[None], cache=cache)
        >>> cache.retained_tokens
        [[0, 1, 4, 5, 6, 7, 8]]
        >>> cache
        StreamingCache(Retention(num_sinks=2, window=4, buffer=1, evict='token'), seen=[9], evictions=1)
    """

    def __init__(
        self,
        model: nn.Module,
        num_sinks: int = 4,
        window: int = 1020,
        buffer: int = 64,
        evict: EvictMode = "token",
        on_evict: Callable[[Eviction], object] | None = None,
        *,
        positions: Positions = "rank",
        on_overflow: OnOverflow = "evict",
        static: bool = False,
        family: Family | None = None,
    ) -> None:
        retention = Retention(num_sinks, window, buffer, evict)
        options: dict[str, Any] = {"positions": positions, "on_overflow": on_overflow}
        facts = inspect_model(model, family)
        decoder = decoder_of(model)
        check_fit(decoder, facts, retention, {"on_evict": on_evict, **options}, static=static)
        self._settings: dict[str, Any] = {**asdict(retention), **options, "static": static, **facts.given}
        pools = pools_of(facts, retention, ranked=positions == "rank", static=static)
        super().__init__(layers=stubs_of(facts, is_compileable=static))
        self.retention = retention
        self._facts = facts
        self._states = StateLayers({layer: self.layers[layer] for layer in facts.states})
        self._pool_of = {layer: index for index, pool in enumerate(pools) for layer in pool.layers}
        bound = position_bound(retention, facts, static=static)
        self._stream = Stream(pools, bound, longest=longest_call(retention, facts))
        self._steps = Steps(self._stream, [kind.layer_type for kind in facts.kinds]) if static else None
        self._on_evict = on_evict
        self._serve()
        last = facts.trained_length if positions == "original" else None
        may_evict = on_overflow == "evict"
        self._checks = CallChecks(weakref.ref(decoder), frequencies_of(decoder), facts, may_evict, last)
        self._model = weakref.ref(model)  # what the user calls, if not the decoder alone
        self._finalizer = attach(model, decoder, self)

    # -- what can be observed -----------------------------------------------------------------------------------------

    @property
    def retained_tokens(self) -> list[list[int]]:
        """Natural indices of the retained tokens, one ascending list per row (one list before the first call)."""
        rows = zip(self._state.lanes, self._state.pools[0].lanes, strict=True)
        return self._stream.per_row([self.retention.retained(lane.seen, row.evicted) for lane, row in rows])

    @property
    def seen_tokens(self) -> list[int]:
        """Real tokens fed and not cropped, one count per row."""
        return self._stream.per_row([lane.seen for lane in self._state.lanes])

    @property
    def num_evictions(self) -> int:
        """Evictions so far, all rows together."""
        return self._state.num_evictions

    @property
    def forwarded_tokens(self) -> int:
        """Columns run through the model, cropped ones too: shows that a chat's turn feeds its new tokens only.

        ``reset`` and ``restore`` set it back.
        """
        return self._state.forwarded

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's keys, values and states: 0 before the first call, then constant, recording apart.

        Tensors that ``reset`` has kept count when used. With tensor parallelism a rank has its share of heads, or all.
        """
        return self._state.nbytes

    def debug_state(self) -> DebugState:
        """Return where the cache is, for measuring and for bug reports.

        Examples:
            >>> cache.debug_state().evictions
            1
        """
        state = self._state
        slots = state.pools[0]
        return DebugState(
            evictions=state.num_evictions,
            end=slots.end,
            size=self._stream.pools[0].size(slots, recording=state.recording) if slots.banks else 0,
            offsets=tuple(lane.offset for lane in state.lanes),
            bound=self._stream.bound,
            recording=state.recording,
        )

    def __repr__(self) -> str:
        return f"StreamingCache({self.retention}, seen={self.seen_tokens}, evictions={self.num_evictions})"

    # -- what transformers asks ---------------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be taken back; ``can_crop`` says how many."""
        return not self._states.layers or can_go_back(self._state.states)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return self._stream.state.batch or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers agree
        """Return how many columns were fed, padding included: ``generate`` slices its inputs by it."""
        if not ASKS_QUERY_OFFSET and self._steps is None and (front := self._front(0)) is not None:
            return front
        return length_for(self._state.columns, self._facts.switch)

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys that a call returns, and the column of the first one.

        Args:
            query_length: Columns of the call; up to transformers 5.3 a tensor with a number for each of them.
            layer_idx: Index of the decoder layer.

        Raises:
            IndexError: There is no such layer.
        """
        query_length = query_length if isinstance(query_length, int) else len(query_length)
        if layer_idx not in range(len(self.layers)):
            raise IndexError(f"layer_idx must be between 0 and {len(self.layers) - 1}, got {layer_idx!r}.")
        index = self._pool_of.get(layer_idx, 0)  # of layers that attend, if this one does not
        pool = self._stream.pools[index]
        front = None if self._call is None else self._front(index)
        if front is None and query_length == 1 and self._steps is not None and self._steps.ready:
            return pool.size(self._stream.state.pools[index], recording=False), 0
        if front is None:
            state = self._state
            front = pool.held(state.pools[index], state.lanes)
        return front + query_length, self.get_query_offset() - front

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the column of a call's first query, counted as in ``get_mask_sizes``."""
        # Whoever makes a mask before the cache does cuts a 2D one by it, in which evicted columns still have a place.
        front = self._front(0) if self._steps is None else None
        return self._state.columns if front is None else front

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Return -1: there is no maximum."""
        return -1

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values and return all that its queries may attend to.

        Args:
            key_states: ``[batch, kv_heads, columns, head_dim]``, rotated.
            value_states: ``[batch, kv_heads, columns, value_dim]``.
            layer_idx: Index of the decoder layer.
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            Keys and values, ``[batch, kv_heads, cached + columns, ...]``.

        Raises:
            RuntimeError: The call does not come from the model that the cache was made for, or the cache is detached.
        """
        call = self._call  # first, and short: this runs for every layer of every token
        if call is None and self._steps is not None and self._steps.step is not None:  # traced: no call is open
            return self._steps.update(layer_idx, key_states, value_states)
        if is_tracing():
            return self._update_uncompiled(key_states, value_states, layer_idx)
        if call is not None and layer_idx in call.todo and (len(call.todo) < len(self._pool_of) or call.is_served()):
            call.todo.remove(layer_idx)
            return call.targets[self._pool_of[layer_idx]].update(layer_idx, key_states, value_states)
        raise RuntimeError(
            "This StreamingCache serves the model it was made with, while attached: the call comes from another model "
            "or after detach(). Make a StreamingCache(model, ...) for the model that you call."
        )

    @uncompiled
    def _update_uncompiled(self, *states: Any) -> tuple[Tensor, Tensor]:
        return self.update(*states)

    # -- between calls ------------------------------------------------------------------------------------------------

    def rollback(self) -> None:
        """Release what a call that did not complete has left, and finish changes that were interrupted.

        Nothing depends on it: such a call does not count, and the next call does the same.
        """
        with self._idle("roll back"):
            pass

    def reset(self) -> None:
        """Forget everything, what was interrupted too; the cache is as new.

        Its tensors are kept for the next text, at their addresses; ``del cache`` frees them.

        Examples:
            >>> cache.reset()
            >>> cache.seen_tokens
            [0]
        """
        with self._idle("be reset", repair=False) as stream:  # we may be recovering from an out-of-memory error
            self._news = News()
            for stub in self.layers:
                cast("LayerStub", stub).record_past = False
            stream.reset()

    def detach(self) -> None:
        """Remove the cache's hooks from the model; the cache can be read but not fed any more."""
        with self._idle("be detached"):
            self._finalizer()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row ``i`` from row ``beam_idx[i]``, in everything the cache knows (beam search).

        Args:
            beam_idx: ``[rows]`` integers, of any length. Before the first call there are no rows, and nothing happens.

        Raises:
            TypeError: They are not integers.
            ValueError: There are none, or one of them is no row.
        """
        self._select_rows("beam_idx", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, as ``reorder_cache`` does; a bool mask, ``[batch]``, names them too."""
        self._select_rows("indices", indices)

    def _select_rows(self, name: str, indices: object) -> None:
        with self._idle("reorder rows") as stream:
            if stream.state.batch is not None:
                stream.select_rows(read_rows(name, indices, stream.state.batch))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, side by side.

        Raises:
            TypeError: It is not an int.
            ValueError: It is less than 1.

        Examples:
            >>> cache.batch_repeat_interleave(2)
            >>> cache.seen_tokens
            [9, 9]
        """
        repeats = read_int("repeats", repeats, 1, 2**16)
        self._select_rows("rows", [row for row in range(max(0, self.batch_size)) for _ in range(repeats)])

    def can_crop(self, columns: int) -> bool:
        """Return whether the newest ``columns`` columns can be taken back exactly.

        They can while the tokens that they evicted are still in their slots: until the next call begins (even if it
        fails) always within the last call, if the list before it and the call fill fewer than all slots (S + W + B + 1
        and a sixteenth more, at least 8) and no more than the trained length, and the model's attention takes 4D masks;
        further back with ``activate_past_recording``.

        Raises:
            TypeError: ``columns`` is not an int.
            ValueError: It is negative.
        """
        columns = read_int("columns", columns, 0, sys.maxsize)
        with self._idle("be asked what it can crop") as stream:
            return stream.can_crop(columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest columns back, as if they had never been fed.

        Args:
            tokens_to_remove: Minus the number of columns; 0 only says that the recorded past is not needed any more.
                Before transformers 5.14, whose ``generate`` does so, also how many columns stay, in the last call.

        Raises:
            TypeError: It is not an int.
            ValueError: It is positive, more than was fed, or the tokens that the columns evicted are gone; nothing has
                changed then.
        """
        with self._idle("be cropped") as stream:
            columns = self._columns_of(read_int("tokens_to_remove", tokens_to_remove, -sys.maxsize, sys.maxsize))
            if columns:
                stream.crop(columns)
                self._forget_undone()
            stream.forget_past()

    def activate_past_recording(self) -> None:
        """Keep up to 128 evicted tokens until ``crop``; a call too long for the slots begins the record again.

        A static cache keeps the 7 that its shapes have room for.

        Examples:
            >>> cache.activate_past_recording()
            >>> with torch.no_grad():
            ...     output = model(torch.arange(3)[None], cache=cache)
            >>> cache.crop(-3)
            >>> cache.seen_tokens
            [9]
        """
        with self._idle("begin to record") as stream:
            for stub in self.layers:
                cast("LayerStub", stub).activate_past_recording()
            stream.record_past()
