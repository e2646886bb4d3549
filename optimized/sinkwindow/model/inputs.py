"""Reading a forward call's arguments: how many columns, which of them hold real tokens, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkwindow.lanes import Inputs
from sinkwindow.model.pieces import tokens_of

if TYPE_CHECKING:
    import weakref

    from transformers import PreTrainedModel

    from sinkwindow.stream.stream import Stream


@dataclass(frozen=True, slots=True)
class CallChecks:
    """What a cache accepts in a call.

    Attributes:
        decoder: The module that the cache serves.
        counts_columns: Whether its ALiBi counts columns, padding included.
        may_evict: Whether tokens may be evicted.
        last_position: The last one that original positions allow; ``None`` where ranks are the positions.
    """

    decoder: weakref.ref[PreTrainedModel]
    counts_columns: bool
    may_evict: bool
    last_position: int | None

    def read(self, stream: Stream, decoder: PreTrainedModel, kwargs: dict[str, Any], *, attached: bool) -> Inputs:
        """Read a call, before anything changes.

        Raises:
            ValueError: The decoder is another one, or its arguments do not fit the stream.
            OverflowError: The call goes beyond what the cache may evict, or the positions it may use.
        """
        if decoder is not self.decoder() or not attached:
            raise ValueError(
                "This StreamingCache was made for another model, or is detached; make a new one for the model you call."
            )
        inputs = read_inputs(kwargs, stream.state.columns, stream.state.batch, static=stream.static)
        if self.counts_columns:
            _check_padding_is_leading(inputs, [lane.seen for lane in stream.state.lanes])
        if not self.may_evict or self.last_position is not None:
            self._check_room(stream, inputs)
        return inputs

    def _check_room(self, stream: Stream, inputs: Inputs) -> None:
        most, evicts = stream.preview(inputs)
        if not self.may_evict and evicts:
            raise OverflowError(
                f"The call brings {most} tokens and would evict: the cache keeps {stream.rule.limit} plus a "
                f'buffer of {stream.rule.buffer}, and on_overflow is "error". Use a larger window or "evict".'
            )
        if self.last_position is not None and most > self.last_position:
            raise OverflowError(
                f"The call reaches token {most}, beyond the {self.last_position} positions that the model was "
                'trained on: positions="original" goes no further, positions="rank" goes on indefinitely.'
            )


def read_inputs(kwargs: dict[str, Any], seen_columns: int, batch: int | None, *, static: bool = False) -> Inputs:
    """Read and check the arguments of a decoder's forward.

    Args:
        kwargs: The arguments by name.
        seen_columns: Columns that the cache was fed before.
        batch: Rows of the cache, ``None`` before its first call.
        static: Whether the cache is, for which ``generate`` makes 4D masks of its own.

    Raises:
        ValueError: No tokens, another batch size than before, or a mask that is not a left-padding 2D mask over all
            columns (or over the new ones).
    """
    tokens = kwargs.get(tokens_of(kwargs))
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or 0 in tokens.shape[:2]:  # noqa: PLR2004 - [batch, columns]
        raise ValueError("input_ids must hold at least one new token per call; the cache has the earlier ones already.")
    rows, columns = tokens.shape[:2]
    if batch is not None and rows != batch:
        raise ValueError(
            f"input_ids has batch size {rows}, but the cache holds {batch} rows; use a fresh cache or reset()."
        )
    mask, real = kwargs.get("attention_mask"), None
    if static:
        mask = _padding_behind(mask, columns)
    if mask is not None:
        new = _new_columns(mask, rows, columns, seen_columns)
        real = None if bool(new.all()) else _real_columns(new)
    return Inputs(rows, columns, tokens.device, real)


def _check_padding_is_leading(inputs: Inputs, seen: list[int]) -> None:
    """Refuse padding between a row's tokens, for models that count it.

    Raises:
        ValueError: A row has padding after its first token.
    """
    for index, real in enumerate(inputs.real or []):
        before = seen[index if len(seen) > 1 else 0]
        if real is None or len(real) == inputs.columns:
            continue
        if before or real != list(range(inputs.columns - len(real), inputs.columns)):
            raise ValueError(
                f"attention_mask pads row {index} after its first token, and this model's ALiBi counts padding as "
                "distance; pad on the left of the first call only."
            )


def _padding_behind(mask: object, columns: int) -> object:
    """Return the 2D mask that ``generate`` has made a 4D one of: a column that attends to itself is a token.

    That of a step says nothing: ``generate`` pads no row after its prompt.

    Raises:
        ValueError: The mask hides more than the future and padding.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if not isinstance(mask, Tensor) or mask.dim() != 4:  # noqa: PLR2004 - [batch, 1, queries, keys]
        return mask
    if columns == 1:
        return None
    seen = mask[:, 0, :, -columns:]
    seen = seen if seen.dtype == torch.bool else seen == 0
    real = seen.diagonal(dim1=-2, dim2=-1)
    if not torch.equal(seen, real[:, None, :].expand_as(seen).tril()):
        raise ValueError(
            "attention_mask is a 4D mask that hides more than the future and padding; pass a 2D one, [batch, tokens]."
        )
    return real


def _new_columns(mask: object, rows: int, columns: int, seen_columns: int) -> Tensor:
    """Return the new columns of a mask, ``[rows, columns]`` bool."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # noqa: PLR2004
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be 2D, [batch, tokens], with 0 for padding; got {shape}. The cache makes the 4D mask."
        )
    if mask.shape[0] != rows or mask.shape[1] not in (seen_columns + columns, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; with {seen_columns} columns in the cache and {columns} new "
            f"ones it must be ({rows}, {seen_columns + columns}), or ({rows}, {columns}) for the new ones alone."
        )
    return mask[:, -columns:].bool()


def _real_columns(mask: Tensor) -> list[list[int] | None]:
    """Return each row's columns with tokens.

    Raises:
        ValueError: A row has padding on the right.
    """
    rows: list[list[int] | None] = [row.nonzero()[:, 0].tolist() for row in mask.cpu()]
    for index, real in enumerate(rows):
        if real and real[-1] != mask.shape[1] - 1:
            raise ValueError(
                f"attention_mask pads row {index} on the right, so its last column holds no token to continue from; "
                'pad on the left (tokenizer.padding_side = "left").'
            )
    return rows
