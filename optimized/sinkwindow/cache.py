"""``StreamingCache``: the cache that people use, a stream fitted to transformers."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from sinkwindow.attach import attach, close_call, open_call, open_step
from sinkwindow.attention import ATTENTION_NAME, STEP_NAME, banded_attention, step_attention
from sinkwindow.choices import OnOverflow, Positions, check_choices
from sinkwindow.content import Content
from sinkwindow.families import inspect_model
from sinkwindow.inputs import Gate
from sinkwindow.layer_view import views_of
from sinkwindow.plan import (
    call_mask,
    check_lengths,
    check_original_positions,
)
from sinkwindow.retention import EvictMode, Retention
from sinkwindow.ring import check_static

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from sinkwindow.events import Eviction
    from sinkwindow.inputs import Inputs
    from sinkwindow.stream import Snapshot, StreamCall

__all__ = ["StreamingCache"]

AttentionInterface.register(ATTENTION_NAME, banded_attention)
AttentionInterface.register(STEP_NAME, step_attention)


class StreamingCache(Cache):
    """Keep the first ``num_sinks`` and the last ``window`` tokens, for ever (StreamingLLM, arXiv 2309.17453).

    Pass it as ``past_key_values=`` (``cache=`` from transformers 5.24 on) to ``model.generate`` or ``model.forward``.
    Every token's query attends to the retained list of its own time, each token at its rank in that list, whatever the
    length of the calls. What is evicted is gone: memory stays bounded and the text fluent, but the model cannot
    recall it.

    Args:
        model: The model that will use the cache; its weights and forward are left as they are.
        num_sinks: S, first tokens that are never evicted [tokens].
        window: W, most recent tokens that survive an eviction [tokens].
        buffer: B, how far the list may overgrow before one batched eviction [tokens]; 0 is the paper.
        evict: ``"token"`` applies the rule token by token; ``"call"`` lets a whole call see itself and evicts after it.
        on_evict: Called with an ``Eviction`` for each one, after the call that caused it has succeeded.
        positions: ``"rank"``, the paper; ``"original"`` leaves every token at its natural index, which is right only
            below the model's trained length: a call that would go beyond it is refused.
        on_overflow: ``"evict"``, or ``"error"`` to refuse a call that would evict.
        static: Whether calls of one token per row have fixed shapes, for ``torch.compile`` and CUDA graphs:
            ``generate`` compiles them where it would for a ``StaticCache``. Tokens kept and logits stay the same.

    Raises:
        TypeError: A size is not an int, or ``on_evict`` is not callable.
        ValueError: A size is out of range, ``evict`` is unknown, the model's own sliding window is shorter than
            the retained list, or ``static`` does not go with the model or another argument.
        UnsupportedModelError: The model is not known to stream exactly (a ``ValueError``).

    Warns:
        UserWarning: S + W + B + 1 exceeds the positions that the model was trained on, or positions are original.
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
    ) -> None:
        retention = Retention(num_sinks, window, buffer, evict)
        check_choices(on_evict, positions, on_overflow)
        self._choices: dict[str, Any] = {"on_evict": on_evict, "positions": positions, "on_overflow": on_overflow}
        facts = inspect_model(model)
        check_lengths(retention, facts)
        if static:
            check_static(facts, retention, self._choices)
        if positions == "original":
            check_original_positions(facts)
        super().__init__(layers=views_of(facts, is_compileable=static))
        self.retention = retention
        self._on_evict = on_evict
        self._content = Content(facts, retention, ranked=positions == "rank", static=static)
        self._call: StreamCall | None = None
        self._decoder_ref = weakref.ref(facts.decoder)
        last = facts.trained_length if positions == "original" else None
        self._gate = Gate(self._decoder_ref, facts.counts_columns, on_overflow == "evict", last, static)
        self._finalizer = attach(facts.decoder, self)

    # -- what can be observed -----------------------------------------------------------------------------------------

    @property
    def retained_tokens(self) -> list[list[int]]:
        """Natural indices of the retained tokens, one ascending list per row (one list before the first call)."""
        return self._content.stream.per_row(self._content.stream.retained)

    @property
    def seen_tokens(self) -> list[int]:
        """Real tokens fed and not cropped, one count per row."""
        return self._content.stream.per_row([lane.seen for lane in self._content.stream.state.lanes])

    @property
    def num_evictions(self) -> int:
        """Evictions so far, all rows together."""
        return self._content.stream.state.num_evictions

    @property
    def forwarded_tokens(self) -> int:
        """Columns ever run through the model with this cache: shows that a chat's turn feeds its new tokens only."""
        return self._content.stream.state.forwarded

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values: constant from the first call on."""
        return sum(pool.nbytes for pool in self._content.pools)

    def __repr__(self) -> str:
        return f"StreamingCache({self.retention}, seen={self.seen_tokens}, evictions={self.num_evictions})"

    # -- what transformers asks ---------------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Say that the newest tokens can be taken back; ``can_crop`` says how many."""
        return True

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return self._content.stream.state.batch or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers agree
        """Count the columns fed so far, padding included: ``generate`` slices its inputs by it."""
        return self._content.stream.state.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Give the number of keys that a call returns and the column that the first one stands for.

        Args:
            query_length: Columns of the call.
            layer_idx: Index of the decoder layer.
        """
        pool = self._content.pools[self._content.pool_of[layer_idx]]
        if query_length == 1 and self._call is None and pool.laid:
            return pool.size, 0
        held = pool.held(self._content.stream.state.lanes)
        return held + query_length, self.get_query_offset() - held

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Give the column of a call's first query, counted as in ``get_mask_sizes``."""
        return self._content.pools[0].held(self._content.stream.state.lanes)

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Say that there is no maximum."""
        return -1

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values and return all that its queries may look at.

        Args:
            key_states: ``[batch, kv_heads, columns, head_dim]``, rotated.
            value_states: ``[batch, kv_heads, columns, value_dim]``.
            layer_idx: Index of the decoder layer.
            *args: Ignored.
            **kwargs: Ignored.

        Raises:
            RuntimeError: The call does not come from the model that the cache was made for, or the cache is detached.
        """
        if self._call is not None:  # first, and short: this runs for every layer of every token
            return self._call.pools[self._content.pool_of[layer_idx]].update(layer_idx, key_states, value_states)
        if self._content.ring is None or self._content.ring.step is None:
            msg = (
                "This StreamingCache serves the model it was made with, while attached: the call comes from another "
                "model or after detach(). Make a StreamingCache(model, ...) for the model that you call."
            )
            raise RuntimeError(msg)
        return self._content.ring.update(layer_idx, key_states, value_states)

    # -- the life of a call -------------------------------------------------------------------------------------------

    def begin_call(self, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Plan a forward call and give its arguments rewritten. Called by the hook on the decoder.

        Args:
            decoder: The module about to run.
            kwargs: Its arguments, by name.

        Raises:
            ValueError: The model is another one, or the batch size, the mask or the number of tokens does not fit;
                nothing has changed then.
        """
        inputs = self._read(decoder, kwargs)
        if self._content.ring is not None:
            if self._content.ring.laid and inputs.columns == 1 and inputs.real is None:
                arguments, attention = self.begin_step(decoder, kwargs)
                open_step(decoder, self, attention)
                return arguments
            self._content.ring.unroll()
        call = self._content.stream.begin(inputs)
        self._call = call
        open_call(decoder, self, call.banded, self.retention.capacity)
        mask = call_mask(self._content.stream, call, inputs.device)
        return kwargs | {"position_ids": call.positions(inputs.device), "attention_mask": mask}

    def begin_step(self, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Begin a call of one token per row at fixed shapes; traced where the model is compiled. As ``begin_call``.

        Beside the arguments it gives the attention to use, ``None`` for the decoder's own.

        Raises:
            ValueError: The cache is not static, holds nothing yet, or holds another number of rows.
        """
        if self._content.ring is None:
            msg = "Only a StreamingCache(..., static=True) can be compiled, and only calls of one token with it."
            raise ValueError(msg)
        changes, attention = self._content.ring.begin(kwargs, decoder.config._attn_implementation)  # noqa: SLF001
        return kwargs | changes, attention

    def commit_step(self) -> str | None:
        """Take over the step that has just succeeded; give the attention to put back, if there is one to put back."""
        return None if self._content.ring is None else self._content.ring.end()

    def first_cut(self, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> int | None:
        """Give the column at which the hook must split a call, ``None`` for nowhere. Arguments as ``begin_call``."""
        return self._content.stream.first_cut(self._read(decoder, kwargs)) if self._content.stream.splits else None

    def _read(self, decoder: PreTrainedModel, kwargs: dict[str, Any]) -> Inputs:
        self.rollback()
        return self._gate.admit(self._content.stream, decoder, kwargs, attached=self._finalizer.alive)

    def commit_call(self) -> None:
        """Take over the call that has just succeeded. Called by the hook on the decoder.

        Raises:
            RuntimeError: Some layer did not update the cache; the call is dropped then.
        """
        if self._call is None:
            self.commit_step()
            if (decoder := self._decoder_ref()) is not None:
                close_call(decoder)
            return
        events = self._content.stream.commit(self._call)
        self.rollback()
        if self._on_evict is not None:
            for event in events:
                self._on_evict(event)

    def rollback(self) -> None:
        """Drop a call that did not complete; the cache is as it was after the last complete one."""
        self._drop_call()
        self._content.settle()

    def _drop_call(self) -> None:
        under_way = self._call is not None or self._content.stepping
        if under_way and (decoder := self._decoder_ref()) is not None:
            close_call(decoder)
        self._call = None

    def reset(self) -> None:
        """Forget everything, what was interrupted too; the cache is as new."""
        self._drop_call()
        self._content.reset()

    def detach(self) -> None:
        """Take the cache's hooks off the model; the cache can be read but not fed any more."""
        self._finalizer()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` go on from row ``beam_idx[i]``, in everything the cache knows (beam search).

        Args:
            beam_idx: ``[rows]`` int64, of any length.
        """
        self.rollback()
        with self._content.at_rest() as stream:
            stream.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int64, or a bool mask)."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, side by side."""
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    # -- going back ---------------------------------------------------------------------------------------------------

    def can_crop(self, columns: int) -> bool:
        """Say whether the newest ``columns`` columns can be taken back exactly.

        They can while the tokens that they evicted still stand in their slots: always within the last call, unless
        that call was longer than the cache has slots; further back with ``activate_past_recording``.
        """
        self.rollback()
        with self._content.at_rest() as stream:
            return stream.can_crop(columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest columns back, as if they had never been fed.

        Args:
            tokens_to_remove: Minus the number of columns; 0 only tells that the recorded past is not needed any more.

        Raises:
            ValueError: It is positive, more than was fed, or the tokens that the columns evicted are gone; nothing has
                changed then.
        """
        fed = self.get_seq_length()
        if not 0 <= -tokens_to_remove <= fed:
            msg = f"tokens_to_remove must be minus a number between 0 and the {fed} fed, got {tokens_to_remove}."
            raise ValueError(msg)
        self.rollback()
        with self._content.at_rest() as stream:
            if tokens_to_remove:
                stream.crop(-tokens_to_remove)
            stream.forget_past()

    def activate_past_recording(self) -> None:
        """Keep up to 128 evicted tokens until ``crop``; a call too long for the slots begins the record anew.

        A static cache keeps the 7 that its shapes have room for.
        """
        for view in self.layers:
            cast("Any", view).activate_past_recording()
        if self._content.ring is None:
            self._content.stream.record_past()

    def snapshot(self) -> Snapshot:
        """Copy the cache's content, to come back to it with ``restore`` any number of times."""
        self.rollback()
        with self._content.at_rest() as stream:
            return stream.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, or of one with the same sizes on the same model.

        Raises:
            ValueError: The snapshot is of a cache with other sizes.
        """
        self.rollback()
        with self._content.at_rest() as stream:
            stream.restore(snapshot)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingCache:
        decoder = self._decoder_ref()
        if decoder is None:
            msg = "The model of this StreamingCache is gone; there is nothing to copy it for."
            raise RuntimeError(msg)
        rule = self.retention
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said when the original was made
            twin = type(self)(
                decoder,
                rule.num_sinks,
                rule.window,
                rule.buffer,
                rule.evict,
                **self._choices,
                static=self._content.ring is not None,
            )
        memo[id(self)] = twin
        twin.restore(self.snapshot())
        return twin
