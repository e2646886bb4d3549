"""Tensors of keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


class KeyValue(NamedTuple):
    """Keys ``[batch, kv_heads, tokens, head_dim]`` and values ``[batch, kv_heads, tokens, value_dim]`` of one layer."""

    keys: Tensor
    values: Tensor

    def narrowed(self, start: int, length: int) -> KeyValue:
        """Return views of a run of slots, of tensors ``[layers, batch, kv_heads, slots, ...]``."""
        return KeyValue(self.keys.narrow(3, start, length), self.values.narrow(3, start, length))


def unlike(new: KeyValue, cached: KeyValue) -> str:
    """Return an error's text about keys and values that do not go with cached ones."""
    kinds = [
        f"{pair.keys.dtype}, {pair.values.dtype} of {pair.keys.shape[-3]} heads on {pair.keys.device}"
        for pair in (new, cached)
    ]
    return (
        f"The model's keys and values are {kinds[0]}, and this StreamingCache holds {kinds[1]}: the model was cast, "
        "moved, or split over ranks, or autocast was switched, after the cache was filled. Undo that, or feed the text "
        "again after reset()."
    )


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

    def has(self, wanted: Iterable[tuple[Tensor, tuple[int, ...], int]]) -> bool:
        """Return whether its tensors are what ``_allocate`` would return for these arguments."""
        return all(
            (tensor.dtype, tensor.device, tensor.shape) == (like.dtype, like.device, (*front, tokens, like.shape[-1]))
            for tensor, (like, front, tokens) in zip(self.tensors, wanted, strict=True)
        )

    def widened(self, keys: torch.dtype, values: torch.dtype) -> Bank:
        """Return a bank whose keys and values have other dtypes."""
        with torch.inference_mode(mode=False):
            pairs = ((pair.keys.to(keys), pair.values.to(values)) for pair in (self.slots, self.sinks))
            return Bank(self.layers, *(KeyValue(*pair) for pair in pairs))

    def with_slots(self, size: int) -> Bank:
        """Return a bank with other slots, uninitialized, and the same sinks."""
        return Bank(
            self.layers, KeyValue(*(_allocate(tensor, tensor.shape[:3], size) for tensor in self.slots)), self.sinks
        )


def allocate(
    layers: Iterable[int],
    like: Mapping[int, KeyValue],
    size: int,
    num_sinks: int,
    *,
    apart: bool,
    spare: Sequence[Bank] = (),
) -> list[Bank]:
    """Return banks for layers, uninitialized.

    Args:
        layers: The model's layer indices.
        like: Keys and values of each, for their shapes, dtypes and devices.
        size: Slots per row.
        num_sinks: Sinks per row.
        apart: Whether each layer has tensors of its own, as a CUDA graph wants them.
        spare: Banks that are not needed any more, used where they fit.

    Raises:
        MemoryError: There is no memory for them; ``torch.OutOfMemoryError`` where a device says so.
    """
    groups: dict[object, list[int]] = {}
    for layer in layers:
        keys, values = like[layer]
        alike = keys.device, keys.dtype, keys.shape[:2], keys.shape[3], values.shape[3]
        groups.setdefault(layer if apart else alike, []).append(layer)
    banks = []
    for group in groups.values():
        places, pair = {layer: place for place, layer in enumerate(group)}, like[group[0]]
        wanted = [(tensor, (len(group), *tensor.shape[:2]), tokens) for tokens in (size, num_sinks) for tensor in pair]
        kept = next((bank for bank in spare if bank.layers == places and bank.has(wanted)), None)
        if kept is None:
            keys, values, sink_keys, sink_values = (_allocate(*one) for one in wanted)
            kept = Bank(places, KeyValue(keys, values), KeyValue(sink_keys, sink_values))
        banks.append(kept)
    return banks


def _allocate(like: Tensor, front: Sequence[int], tokens: int) -> Tensor:
    """Return uninitialized memory for tokens."""
    shape = (*front, tokens, like.shape[-1])
    with torch.inference_mode(mode=False):
        try:
            return like.new_empty(shape)
        except torch.OutOfMemoryError:  # of a device; names its memory, and people catch it by its type
            raise
        except (RuntimeError, MemoryError) as error:
            raise MemoryError(
                f"No memory for {shape} {like.dtype} ({math.prod(shape) * like.itemsize:,} bytes) of keys or values, "
                "[layers, batch, kv_heads, tokens, width]: choose a smaller window or buffer, or fewer rows."
            ) from error
