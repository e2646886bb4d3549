"""``StreamingCache``: the cache that people use."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from sinkwindow.attach import attach
from sinkwindow.attention import ATTENTION_NAME, banded_attention, enter_call, leave_call
from sinkwindow.call import PoolCall
from sinkwindow.families import inspect_model
from sinkwindow.inputs import read_inputs
from sinkwindow.lanes import Lane, LaneCall, segments_for
from sinkwindow.retention import EvictMode, Retention
from sinkwindow.storage import Row, SlotPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Token

    from transformers import PreTrainedModel

    from sinkwindow.attention import BandedLayer

__all__ = ["Eviction", "StreamingCache"]

AttentionInterface.register(ATTENTION_NAME, banded_attention)


@dataclass(frozen=True, slots=True)
class Eviction:
    """One eviction in one row.

    Attributes:
        row: Index in the batch.
        tokens: Natural indices of the evicted tokens.
        length_before: Retained tokens before it.
        length_after: Retained tokens after it.
    """

    row: int
    tokens: range
    length_before: int
    length_after: int


@dataclass(slots=True, eq=False)
class _Call:
    """A forward call under way."""

    columns: int
    batch: int
    lanes: list[LaneCall]
    pools: list[PoolCall]
    attention: str | None  # the model's own implementation, to be put back
    token: Token[dict[int, BandedLayer] | None]


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

    Raises:
        TypeError: A size is not an int, or ``on_evict`` is not callable.
        ValueError: A size is out of range, ``evict`` is unknown, or the model's own sliding window is shorter than
            the retained list.
        UnsupportedModelError: The model is not known to stream exactly (a ``ValueError``).

    Warns:
        UserWarning: S + W + B + 1 exceeds the positions that the model was trained on.
    """

    def __init__(
        self,
        model: nn.Module,
        num_sinks: int = 4,
        window: int = 1020,
        buffer: int = 64,
        evict: EvictMode = "token",
        on_evict: Callable[[Eviction], object] | None = None,
    ) -> None:
        retention = Retention(num_sinks, window, buffer, evict)
        if on_evict is not None and not callable(on_evict):
            msg = f"on_evict must be callable or None, got {on_evict!r}."
            raise TypeError(msg)
        facts = inspect_model(model)
        _check_lengths(retention, facts.trained_length, facts.native_window)
        self.retention = retention
        self._on_evict = on_evict
        self._position_bound = _position_bound(retention, facts.trained_length, facts.length_dependent)
        self._pools = [SlotPool(retention, facts.rotary, list(range(facts.num_layers)))]
        self._pool_of = {layer: index for index, pool in enumerate(self._pools) for layer in pool.layers}
        self._lanes = [Lane()]
        self._columns = 0
        self._batch: int | None = None
        self._num_evictions = 0
        self._call: _Call | None = None
        super().__init__(layers=[_LayerView() for _ in range(facts.num_layers)])
        self._decoder_ref = weakref.ref(facts.decoder)
        self._finalizer = attach(facts.decoder, self)

    # -- what can be observed -----------------------------------------------------------------------------------------

    @property
    def retained_tokens(self) -> list[list[int]]:
        """Natural indices of the retained tokens, one ascending list per row (one list before the first call)."""
        rows = [
            self.retention.retained(lane.seen, row.evicted)
            for lane, row in zip(self._lanes, self._pools[0].rows, strict=True)
        ]
        return self._per_row(rows)

    @property
    def seen_tokens(self) -> list[int]:
        """Real tokens fed so far, one count per row."""
        return self._per_row([lane.seen for lane in self._lanes])

    @property
    def num_evictions(self) -> int:
        """Evictions so far, all rows together."""
        return self._num_evictions

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values: constant from the first call on."""
        return sum(pool.nbytes for pool in self._pools)

    def __repr__(self) -> str:
        """Show the sizes and the state."""
        rule = self.retention
        return (
            f"StreamingCache(num_sinks={rule.num_sinks}, window={rule.window}, buffer={rule.buffer}, "
            f"evict={rule.evict!r}, seen={self.seen_tokens}, evictions={self.num_evictions})"
        )

    def _per_row(self, lanes: list[Any]) -> list[Any]:
        return lanes if len(lanes) > 1 else lanes * (self._batch or 1)

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers agree
        """Count the columns fed so far, padding included: ``generate`` slices its inputs by it."""
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Give the column of the next query among the keys that a call returns."""
        return self._held(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Give the number of keys that a call with ``query_length`` columns returns, and their offset, 0."""
        return self._held(layer_idx) + int(query_length), 0

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
        if self._call is None:
            msg = (
                "This StreamingCache serves the model it was made with, while attached: the call comes from another "
                "model or after detach(). Make a StreamingCache(model, ...) for the model that you call."
            )
            raise RuntimeError(msg)
        return self._call.pools[self._pool_of[layer_idx]].update(layer_idx, key_states, value_states)

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        self.rollback()
        self._lanes, self._columns, self._batch, self._num_evictions = [Lane()], 0, None, 0
        for pool in self._pools:
            pool.clear()

    def _held(self, layer_idx: int) -> int:
        pool = self._pools[self._pool_of[layer_idx]]
        return pool.held(self._lanes)

    # -- the life of a call -------------------------------------------------------------------------------------------

    def begin_call(self, decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Plan a forward call and rewrite its arguments. Called by the hook on the decoder.

        Args:
            decoder: The module about to run.
            kwargs: Its arguments, by name.

        Returns:
            The arguments with ``position_ids`` and ``attention_mask`` rewritten.

        Raises:
            ValueError: The batch size, the mask or the number of tokens does not fit; nothing has changed then.
        """
        self.rollback()
        if decoder is not self._decoder():
            msg = "This StreamingCache was made for another model; make a StreamingCache(model, ...) for this one."
            raise ValueError(msg)
        for pool in self._pools:
            pool.recover()
        inputs = read_inputs(kwargs, self._columns, self._batch)
        if inputs.real is not None and len(self._lanes) < inputs.batch:
            self._split_lanes(inputs.batch)
        real = inputs.real or [None] * len(self._lanes)
        fresh = [inputs.columns if columns is None else len(columns) for columns in real]
        self._rebase_if_needed(fresh)
        lanes = [
            self._lane_call(lane, inputs.columns, columns) for lane, columns in zip(self._lanes, real, strict=True)
        ]
        return self._install(decoder, kwargs, inputs.batch, inputs.device, lanes)

    def commit_call(self) -> None:
        """Take over the call that has just succeeded. Called by the hook on the decoder."""
        call = self._call
        if call is None:
            return
        lanes = [Lane(lane.seen_after, lane.segments[-1].offset) for lane in call.lanes]
        before = [row.evicted for row in self._pools[0].rows]
        for pool in call.pools:
            pool.commit(lanes)
        self._lanes, self._batch = lanes, call.batch
        self._columns += call.columns
        self.rollback()
        self._report(call.lanes, before)

    def rollback(self) -> None:
        """Drop a call that did not complete; the cache is as it was after the last complete one."""
        call, self._call = self._call, None
        if call is not None:
            leave_call(call.token)
            decoder = self._decoder()
            if call.attention is not None and decoder is not None:
                decoder.config._attn_implementation = call.attention  # noqa: SLF001

    def detach(self) -> None:
        """Take the cache's hooks off the model; the cache can be read but not fed any more."""
        self._finalizer()

    def _decoder(self) -> PreTrainedModel | None:
        return self._decoder_ref()

    def _split_lanes(self, batch: int) -> None:
        """Give every row a lane of its own, from now on; the state itself stays as it is."""
        self._lanes = [Lane(lane.seen, lane.offset) for lane in self._lanes * batch]
        for pool in self._pools:
            pool.rows = [Row(row.evicted, row.floor, row.placed) for row in pool.rows * batch]

    def _rebase_if_needed(self, fresh: list[int]) -> None:
        """Rotate all windows back to their ranks when the next positions would leave the trained range."""
        reach = max(lane.seen - lane.offset + count for lane, count in zip(self._lanes, fresh, strict=True))
        if reach <= self._position_bound:
            return
        offsets = [row.evicted for row in self._pools[0].rows]
        if offsets == [lane.offset for lane in self._lanes]:
            return
        for pool in self._pools:
            pool.relocate(self._lanes, offsets)
        for lane, offset in zip(self._lanes, offsets, strict=True):
            lane.offset = offset

    def _lane_call(self, lane: Lane, columns: int, real: list[int] | None) -> LaneCall:
        fresh = columns if real is None else len(real)
        segments = segments_for(lane, fresh, self._position_bound, self.retention.capacity - 1)
        return LaneCall(lane.seen, columns, real, segments, lane.offset)

    def _install(
        self, decoder: nn.Module, kwargs: dict[str, Any], batch: int, device: torch.device, lanes: list[LaneCall]
    ) -> dict[str, Any]:
        """Make every pool ready, and the model's arguments with it."""
        banded: dict[int, BandedLayer] | None = {} if any(self._needs_band(lanes)) else None
        pools = [self._pool_call(pool, lanes, banded) for pool in self._pools]
        self._call = _Call(lanes[0].columns, batch, lanes, pools, None, enter_call(banded))
        if banded is not None:
            config = cast("PreTrainedModel", decoder).config
            self._call.attention = config._attn_implementation  # noqa: SLF001
            config._attn_implementation = ATTENTION_NAME  # noqa: SLF001
        positions = torch.stack([lane.positions(device) for lane in lanes])
        return kwargs | {"position_ids": positions, "attention_mask": self._padding_mask(lanes, device)}

    def _needs_band(self, lanes: list[LaneCall]) -> list[bool]:
        """Say for each pool whether its queries see different lists, or padding, in this call."""
        needs = []
        for pool in self._pools:
            rule = pool.retention
            crossing = [
                rule.evict == "token" and rule.evicted_before(lane.seen_after - 1) > row.evicted
                for lane, row in zip(lanes, pool.rows, strict=True)
            ]
            needs.append(any(crossing) or any(lane.padded or len(lane.segments) > 1 for lane in lanes))
        return needs

    def _pool_call(self, pool: SlotPool, lanes: list[LaneCall], banded: dict[int, BandedLayer] | None) -> PoolCall:
        columns = lanes[0].columns
        in_slots = not any(lane.padded for lane in lanes) and pool.fits(self._lanes, columns)
        pool.make_ready(self._lanes, columns if in_slots else 0)
        evicted = [
            pool.retention.evicted_after(lane.seen_after, row.evicted)
            for lane, row in zip(lanes, pool.rows, strict=True)
        ]
        return PoolCall(pool, lanes, in_slots, pool.held(self._lanes), evicted, banded)

    def _padding_mask(self, lanes: list[LaneCall], device: torch.device) -> Tensor | None:
        """Hide the columns in front of the shorter rows, ``[batch, held + columns]``; ``None`` when rows agree."""
        lengths = [self._pools[0].length(lane, row) for lane, row in zip(self._lanes, self._pools[0].rows, strict=True)]
        if min(lengths) == max(lengths):
            return None
        columns = torch.arange(max(lengths) + lanes[0].columns, device=device)
        start = max(lengths) - torch.tensor(lengths, device=device)
        return (columns >= start[:, None]).long()

    def _report(self, lanes: list[LaneCall], before: list[int]) -> None:
        """Count the call's evictions and tell the callback."""
        events = [
            list(_evictions(self.retention, lane, gone, row.evicted))
            for lane, gone, row in zip(lanes, before, self._pools[0].rows, strict=True)
        ]
        for index, evictions in enumerate(self._per_row(events)):
            self._num_evictions += len(evictions)
            if self._on_evict is not None:
                for tokens, length in evictions:
                    self._on_evict(Eviction(index, tokens, length, length - len(tokens)))


def _evictions(rule: Retention, lane: LaneCall, before: int, after: int) -> list[tuple[range, int]]:
    """List a lane's evictions in a call: the tokens, and the length of the list before it."""
    if after == before:
        return []
    step = rule.buffer + 1 if rule.evict == "token" else after - before
    length = rule.capacity if rule.evict == "token" else lane.seen_after - before
    return [(range(rule.first(gone), rule.first(gone + step)), length) for gone in range(before, after, step)]


def _check_lengths(rule: Retention, trained_length: int, native_window: int | None) -> None:
    """Compare the longest list with what the model can rotate and see.

    Raises:
        ValueError: The model's own sliding window would hide retained tokens.
    """
    if native_window is not None and rule.capacity > native_window:
        msg = (
            f"num_sinks + window + buffer + 1 = {rule.capacity} exceeds the model's own sliding window of "
            f"{native_window} tokens, which would hide the sinks; choose a smaller window or buffer."
        )
        raise ValueError(msg)
    if rule.capacity > trained_length:
        warnings.warn(
            f"num_sinks + window + buffer + 1 = {rule.capacity} exceeds the {trained_length} positions that the model "
            "was trained on; beyond them quality falls. Choose a smaller window or buffer.",
            UserWarning,
            stacklevel=3,
        )


def _position_bound(rule: Retention, trained_length: int, length_dependent: bool) -> int:  # noqa: FBT001
    """Choose the position that rotations stay below.

    The trained length, if a list fits. Rotations see differences only, so where the list nearly fills the trained
    length, positions may exceed it by a window: otherwise every eviction would rotate (and round) every key again.
    Frequencies that depend on the largest position do not allow that.
    """
    roomy = rule.capacity + 1 if length_dependent else rule.capacity + rule.window
    return max(trained_length, roomy)


class _LayerView(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers registers subclasses
    """What ``transformers`` asks of a layer; the state is the cache's, since all layers move together."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers is not typed there

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the pools allocate when the first call commits."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Refuse: only the cache as a whole can be updated.

        Raises:
            RuntimeError: Always.
        """
        msg = "Update the StreamingCache, not one of its layers."
        raise RuntimeError(msg)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Refuse like ``update``.

        Raises:
            RuntimeError: Always.
        """
        msg = "Ask the StreamingCache, not one of its layers."
        raise RuntimeError(msg)

    def get_seq_length(self) -> int:
        """Give 0: the cache counts."""
        return 0

    def get_max_length(self) -> int:
        """Say that there is no maximum."""
        return -1
