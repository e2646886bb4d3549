"""Reading a forward call's arguments: how many columns, which of them hold real tokens, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inputs", "check_padding_is_leading", "read_inputs"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a call brings.

    Attributes:
        batch: Rows.
        columns: Columns of this call, padding included.
        device: Where positions are wanted.
        real: Columns of each row that hold real tokens; ``None`` when all columns do.
    """

    batch: int
    columns: int
    device: torch.device
    real: list[list[int] | None] | None


def read_inputs(kwargs: dict[str, Any], seen_columns: int, batch: int | None) -> Inputs:
    """Read and check the arguments of a decoder's forward.

    Args:
        kwargs: The arguments by name.
        seen_columns: Columns that the cache was fed before.
        batch: Rows of the cache, ``None`` before its first call.

    Raises:
        ValueError: No tokens, another batch size than before, or a mask that is not a left-padding 2D mask over all
            columns (or over the new ones).
    """
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or 0 in tokens.shape[:2]:  # noqa: PLR2004 - [batch, columns]
        msg = "input_ids must hold at least one new token per call; the cache has the earlier ones already."
        raise ValueError(msg)
    rows, columns = tokens.shape[:2]
    if batch is not None and rows != batch:
        msg = f"input_ids has batch size {rows}, but the cache holds {batch} rows; use a fresh cache or reset()."
        raise ValueError(msg)
    mask = _new_columns(kwargs.get("attention_mask"), rows, columns, seen_columns)
    real = None if mask is None or bool(mask.all()) else _real_columns(mask)
    return Inputs(rows, columns, tokens.device, real)


def check_padding_is_leading(inputs: Inputs, seen: list[int]) -> None:
    """Refuse padding between a row's tokens, for models that count it.

    Args:
        inputs: The call.
        seen: Real tokens of each row before it, or of all rows.

    Raises:
        ValueError: A row has padding after its first token.
    """
    for index, real in enumerate(inputs.real or []):
        before = seen[index if len(seen) > 1 else 0]
        if real is None or len(real) == inputs.columns:
            continue
        if before or real != list(range(inputs.columns - len(real), inputs.columns)):
            msg = (
                f"attention_mask pads row {index} after its first token, and this model's ALiBi counts padding as "
                "distance; pad on the left of the first call only."
            )
            raise ValueError(msg)


def _new_columns(mask: object, rows: int, columns: int, seen_columns: int) -> Tensor | None:
    """Give the new columns of a mask, ``[rows, columns]`` bool."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # noqa: PLR2004
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        msg = (
            f"attention_mask must be 2D, [batch, tokens], with 0 for padding; got {shape}. The cache makes the 4D mask."
        )
        raise ValueError(msg)
    if mask.shape[0] != rows or mask.shape[1] not in (seen_columns + columns, columns):
        msg = (
            f"attention_mask has shape {tuple(mask.shape)}; with {seen_columns} columns in the cache and {columns} new "
            f"ones it must be ({rows}, {seen_columns + columns}), or ({rows}, {columns}) for the new ones alone."
        )
        raise ValueError(msg)
    return mask[:, -columns:].bool()


def _real_columns(mask: Tensor) -> list[list[int] | None]:
    """List each row's real columns.

    Raises:
        ValueError: A row has padding on the right.
    """
    rows: list[list[int] | None] = [row.nonzero()[:, 0].tolist() for row in mask.cpu()]
    for index, real in enumerate(rows):
        if real and real[-1] != mask.shape[1] - 1:
            msg = (
                f"attention_mask pads row {index} on the right, so its last column is no token to go on from; "
                'pad on the left (tokenizer.padding_side = "left").'
            )
            raise ValueError(msg)
    return rows
