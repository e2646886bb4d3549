"""Three deliberate mistakes, measured: they explain numbers that others have published.

Two run on the stock `DynamicCache` and compress it with `index_select`, as a hand-written loop would.
"""

from __future__ import annotations

from warnings import catch_warnings, filterwarnings

import torch
from transformers import DynamicCache, PreTrainedModel

from sinkwindow.model.families import inspect_model
from sinkwindow.model.state_layers import states_of
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.ways.sessions import Session, StreamingSession


class CompressedSession(Session):
    """A stock cache that is cut to the first S and some of the last tokens."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int, buffer: int) -> None:
        super().__init__(model)
        if states_of(model.config.get_text_config()):
            raise LabError("stale_ranks and eager_eviction cut keys, and layers of this model keep states: omit them")
        self.cache = DynamicCache()  # no sliding layers
        self._sinks, self._window, self._buffer = num_sinks, window, buffer

    def _at_ranks(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        """Run a forward with each new token at the rank at which it is inserted."""
        kept = self.kept_tokens
        ranks = torch.arange(kept, kept + ids.shape[1], device=ids.device)[None]
        return self._forward(ids, last_only=last_only, position_ids=ranks)

    def _keep(self, last: int) -> int:
        """Cut every layer to the first S and the `last` tokens; return by how much these moved [tokens]."""
        kept = self.kept_tokens
        for layer in self.cache.layers:
            chosen = torch.arange(kept, device=layer.keys.device)
            chosen = chosen[(chosen < self._sinks) | (chosen >= kept - last)]
            layer.keys = layer.keys.index_select(2, chosen)
            layer.values = layer.values.index_select(2, chosen)
        self.evictions += 1
        return kept - self.kept_tokens


class StaleRanksSession(CompressedSession):
    """The right tokens at the wrong positions: a key keeps the rotation of the rank at which it was inserted.

    After the first eviction new queries get ranks that older keys already had, so these keys appear to be at or after
    the query's position. Nothing else is wrong: the retained tokens are exactly those of `streaming_S_W_B`.
    """

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        parts = []
        while ids.shape[1]:
            room = self._sinks + self._window + self._buffer + 1 - self.kept_tokens
            piece, ids = ids[:, :room], ids[:, room:]
            parts.append(self._at_ranks(piece, last_only=last_only))
            if piece.shape[1] == room:  # the rule evicts here; no query attends to too many tokens
                self._keep(self._window)
        return parts[-1] if last_only else torch.cat(parts, dim=1)


class EagerEvictionSession(CompressedSession):
    """The right positions for too few tokens: the cache is cut to S + W *before* the attention of every call.

    A call has B tokens (one if B is 0; the last piece may be shorter). Appending its n tokens and cutting to S + W at
    once leaves room for W - n older ones, so the call's first query misses n - 1 tokens of its window and the buffer,
    intended to delay evictions, has no effect. Keys that move are rotated to their new ranks.
    """

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int, buffer: int) -> None:
        super().__init__(model, num_sinks, window, buffer)
        if buffer > window:
            raise LabError(
                f"eager_eviction with buffer {buffer} above window {window}: a call would evict its own tokens"
            )
        try:
            kinds = inspect_model(model).kinds
        except ValueError as error:
            raise LabError(f"eager_eviction rotates keys itself: {error}") from error
        self._rotary = {layer: kind.rotary for kind in kinds for layer in kind.layers}

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        pieces = torch.split(ids, max(self._buffer, 1), dim=1)
        parts = [self._cut_and_attend(piece, last_only=last_only) for piece in pieces]
        return parts[-1] if last_only else torch.cat(parts, dim=1)

    def _cut_and_attend(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        if self.kept_tokens + ids.shape[1] > self._sinks + self._window:
            moved = self._keep(self._window - ids.shape[1])
            for number, layer in enumerate(self.cache.layers):  # rotations add up: the old angle is not needed
                sinks, recent = layer.keys[:, :, : self._sinks], layer.keys[:, :, self._sinks :]
                layer.keys = torch.cat((sinks, self._rotary[number].rotate_by(recent, -moved)), dim=2)
        return self._at_ranks(ids, last_only=last_only)


class AbsoluteSession(StreamingSession):
    """The right tokens at their original positions: valid only while the whole text fits the trained positions.

    The author of the original reproduction chose this in the end. The gap between sinks and window grows indefinitely,
    and the positions with it.
    """

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int, buffer: int) -> None:
        with catch_warnings():  # about original positions: this session measures exactly that
            filterwarnings("ignore", message=".*positions.*", category=UserWarning)
            super().__init__(model, num_sinks, window, buffer, positions="original")
        self.reach = inspect_model(model).trained_length
