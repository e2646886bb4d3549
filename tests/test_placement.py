"""Layers on different devices: every tensor of a pool stands where its layers' keys are.

The second device is `meta`, which computes shapes and refuses to meet another device's tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkwindow.lanes import Lane, LaneCall, Segment
from sinkwindow.plan import pool_call
from sinkwindow.retention import Retention
from sinkwindow.rotation import Rotary
from sinkwindow.storage import SlotPool

if TYPE_CHECKING:
    from sinkwindow.call import PoolCall

RULE = Retention(num_sinks=2, window=4, buffer=1)
DEVICES = {0: torch.device("cpu"), 1: torch.device("meta"), 2: torch.device("cpu")}


def _feed(pool: SlotPool, lane: Lane, columns: int, offset: int) -> Lane:
    """Run one call of all layers through a pool, on each layer's device."""
    call = LaneCall(lane.seen, columns, None, [Segment(lane.seen, offset)], lane.offset)
    part: PoolCall = pool_call(pool, (Lane(lane.seen, offset),), [call], banded={})
    for layer, device in DEVICES.items():
        keys = torch.randn(1, 1, columns, 4, device=device)
        for states in part.update(layer, keys, keys):
            assert states.device == device
    for layer, banded in (part.banded or {}).items():
        tensors = [banded.sink_keys, banded.sink_values, banded.band.rank_shift, banded.band.sink_columns]
        tensors += [block.hidden for block in banded.band.blocks]
        assert {tensor.device for tensor in tensors} == {DEVICES[layer]}
    pool.apply(part.outcome())
    return call.after


def _tensors(pool: SlotPool) -> list[tuple[list[int], Tensor]]:
    return [(list(bank.layers), tensor) for bank in pool.banks for tensor in (*bank.slots, *bank.sinks)]


def test_no_tensor_is_shared_across_devices() -> None:
    """Prefill, decode, evictions, a move with a rebase and a roll-back's growth all stay on each layer's device."""
    pool = SlotPool(RULE, Rotary(torch.tensor([1.0, 0.5])), list(DEVICES))
    lane = Lane()
    for columns, offset in ((9, 0), (1, 0), (1, 0), (1, 3), (12, 3), (2, 9)):
        lane = _feed(pool, lane, columns, offset)
    pool.recording = True
    pool.apply(pool.relocation((lane,)))
    assert [list(bank.layers) for bank in pool.banks] == [[0, 2], [1]]
    for layers, tensor in _tensors(pool):
        assert {tensor.device} == {DEVICES[layer] for layer in layers}
