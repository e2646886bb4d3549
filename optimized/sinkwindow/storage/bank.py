"""Tensors of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


class KeyValue(NamedTuple):
    """Keys ``[batch, kv_heads, tokens, head_dim]`` and values ``[batch, kv_heads, tokens, value_dim]`` of one layer."""

    keys: Tensor
    values: Tensor

    def narrowed(self, start: int, length: int) -> KeyValue:
        """Return views of a run of slots, of tensors ``[layers, batch, kv_heads, slots, ...]``."""
        return KeyValue(self.keys.narrow(3, start, length), self.values.narrow(3, start, length))


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Tensors of the layers that share shape, dtype and device, so that one operation serves them all.

    Attributes:
        layers: The place of each of the model's layer indices, in order.
        slots: Keys ``[layers, batch, kv_heads, slots, head_dim]`` and values likewise.
        sinks: Sinks as first rotated, ``[layers, batch, kv_heads, num_sinks, head_dim]``, never moved.
    """

    layers: dict[int, int]
    slots: KeyValue
    sinks: KeyValue

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, always in the same order."""
        return (*self.slots, *self.sinks)

    def map(self, change: Callable[[Tensor], Tensor]) -> Bank:
        """Return a bank of what ``change`` makes of every tensor; the layers stay."""
        with torch.inference_mode(mode=False):  # a tensor made in inference mode could not be written outside it
            return Bank(self.layers, KeyValue(*map(change, self.slots)), KeyValue(*map(change, self.sinks)))

    def with_slots(self, size: int) -> Bank:
        """Return a bank with other slots, uninitialized, and the same sinks."""
        return Bank(
            self.layers, KeyValue(*(_allocate(tensor, tensor.shape[:3], size) for tensor in self.slots)), self.sinks
        )


def allocate(
    layers: Iterable[int], like: Mapping[int, KeyValue], size: int, num_sinks: int, *, apart: bool
) -> list[Bank]:
    """Return new banks for layers, uninitialized.

    Args:
        layers: The model's layer indices.
        like: Keys and values of each, for their shapes, dtypes and devices.
        size: Slots per row.
        num_sinks: Sinks per row.
        apart: Whether each layer has tensors of its own, as a CUDA graph wants them.
    """
    groups = [[layer] for layer in layers] if apart else _alike(layers, like)
    banks = []
    for group in groups:
        pair = like[group[0]]
        slots, sinks = (
            KeyValue(*(_allocate(tensor, (len(group), *tensor.shape[:2]), tokens) for tensor in pair))
            for tokens in (size, num_sinks)
        )
        banks.append(Bank({layer: place for place, layer in enumerate(group)}, slots, sinks))
    return banks


def _alike(layers: Iterable[int], like: Mapping[int, KeyValue]) -> Iterator[list[int]]:
    """Group layers whose keys and values fit into one tensor."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for layer in layers:
        keys, values = like[layer]
        kind = (keys.device, keys.dtype, keys.shape[:2], keys.shape[3], values.shape[3])
        groups.setdefault(kind, []).append(layer)
    yield from groups.values()


def _allocate(like: Tensor, front: Iterable[int], tokens: int) -> Tensor:
    """Return uninitialized memory for tokens."""
    with torch.inference_mode(mode=False):
        return like.new_empty((*front, tokens, like.shape[-1]))
