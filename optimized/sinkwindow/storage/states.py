"""What layers that keep a state remember of the text: tensors of one size, however long it is.

A convolution keeps its last columns. A linear attention or state-space layer keeps a recurrent state, which has no way
back: only a copy of it has. While the past is recorded, the columns before those of a convolution are kept too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from sinkwindow.storage.slots import RECORDED

CONV, RECURRENT, PAST = "conv", "recurrent", "past"
StateKey: TypeAlias = tuple[int, str, int]  # the model's layer index, the kind, the number within the layer
States: TypeAlias = Mapping[StateKey, Tensor]  # [batch, ...]; of convolutions [batch, channels, columns]


def can_go_back(states: States) -> bool:
    """Return whether there are states, and none of them is recurrent."""
    return bool(states) and all(kind != RECURRENT for _, kind, _ in states)


def without_past(states: States) -> States:
    """Return the same without the recorded past of convolutions."""
    return {key: tensor for key, tensor in states.items() if key[1] != PAST}


def split(columns: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Return what a convolution keeps of its columns, and the recorded past before it."""
    return columns[..., -kernel:].clone(), columns[..., :-kernel][..., -RECORDED:].clone()


def states_before(states: States, columns: int) -> States | None:
    """Return the states from before the newest columns, ``None`` where there is no way back."""
    before: dict[StateKey, Tensor] = {}
    for (layer, kind, number), tensor in states.items():
        past = states.get((layer, PAST, number))
        if kind == RECURRENT or past is None or past.shape[-1] < columns:
            return None
        if kind == CONV:
            whole = torch.cat((past, tensor), dim=-1)[..., :-columns]
            before[layer, CONV, number], before[layer, PAST, number] = split(whole, tensor.shape[-1])
    return before
