"""The slots of a static cache: a ring, in which nothing ever moves but the sinks.

::

    slots   0 ..... S | S ........................ size
            (sinks)   | token n at S + (n - S) mod R, with R = size - S

With S = 2, R = 6, before and after token 8 is written; list [0, 1, 4, 5, 6, 7, 8] if W = 4, B = 1::

    slots      0  1  2  3  4  5  6  7              0  1  2  3  4  5  6  7
    tokens     s0 s1 2  3  4  5  6  7       ->     s0 s1 8  3  4  5  6  7      (3 is hidden by the mask)

Softmax does not depend on the order of keys, so a step reads all slots and a mask hides those without a retained token.
Everything follows from how many tokens each row has seen: which slot is written, which are visible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkwindow.lanes import batch_slice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinkwindow.lanes import Lane


def slot_of(naturals: Tensor, num_sinks: int, size: int) -> Tensor:
    """Return the slot of each token, same shape as ``naturals``."""
    ahead = naturals - num_sinks
    return torch.where(ahead < 0, naturals, num_sinks + ahead % (size - num_sinks))


def tokens_in(newest: Tensor, num_sinks: int, size: int) -> Tensor:
    """Return the natural index of the token in each slot, ``[batch, size]``, negative where there is none.

    Args:
        newest: Natural index of each row's newest token, ``[batch]``.
        num_sinks: S [tokens].
        size: Slots per row.
    """
    slots, newest = torch.arange(size, device=newest.device), newest[:, None]
    window = newest - (newest - slots) % (size - num_sinks)
    sinks = torch.where(slots <= newest, slots, -1)
    return torch.where(slots < num_sinks, sinks, torch.where(window >= num_sinks, window, -1))


def visible_slots(newest: Tensor, evicted: Tensor, num_sinks: int, size: int) -> Tensor:
    """Return which slots a step's token attends to, itself included, ``[batch, size]`` bool."""
    tokens = tokens_in(newest, num_sinks, size)
    return (tokens >= 0) & ((tokens < num_sinks) | (tokens >= num_sinks + evicted[:, None]))


def list_slots(lanes: Sequence[Lane], firsts: Sequence[int], num_sinks: int, size: int, held: int) -> Tensor:
    """Return the slots of each row's window, right-aligned, ``[lanes, held]``; 0 in front of it."""
    seen, first = (torch.tensor(counts, device="cpu")[:, None] for counts in ([lane.seen for lane in lanes], firsts))
    naturals = seen - held + torch.arange(held, device="cpu")
    return torch.where(naturals >= first, slot_of(naturals, num_sinks, size), 0)


def read(slots: Tensor, index: Tensor) -> Tensor:
    """Return copies of slots, ``[layers, batch, kv_heads, held, ...]``, in the order of an index ``[lanes, held]``."""
    return slots.take_along_dim(index[None, :, None, :, None].to(slots.device), dim=3)


def write(slots: Tensor, window: Tensor, lanes: Sequence[Lane], counts: Sequence[int], num_sinks: int) -> None:
    """Write each row's newest tokens to their slots.

    Args:
        slots: One layer's, ``[batch, kv_heads, size, ...]``.
        window: Right-aligned tokens, ``[batch, kv_heads, longest, ...]``.
        lanes: What each row has seen, these tokens included.
        counts: How many of each row to write.
        num_sinks: S [tokens].
    """
    for r, (lane, count) in enumerate(zip(lanes, counts, strict=True)):
        naturals = torch.arange(lane.seen - count, lane.seen, device=slots.device)
        rows = batch_slice(r, len(lanes))
        index = slot_of(naturals, num_sinks, slots.shape[2])
        slots[rows].index_copy_(2, index, window[rows][:, :, window.shape[2] - count :].to(slots.dtype))
