"""Layers on different devices: every tensor of a pool is on the device of its layers' keys.

The second device is `meta`, which computes only shapes, and raises an error if given a tensor of another device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkwindow.attention.rotation import Rotary
from sinkwindow.lanes import Inputs
from sinkwindow.retention import Retention
from sinkwindow.storage.slots import Pool
from sinkwindow.stream.stream import Stream

RULE = Retention(num_sinks=2, window=4, buffer=1)
CPU = torch.device("cpu")
DEVICES = {0: CPU, 1: torch.device("meta"), 2: CPU}


def _feed(stream: Stream, columns: int) -> None:
    """Run one call of all layers through a stream, on each layer's device."""
    call = stream.begin(Inputs(1, columns, CPU, None))
    (part,) = call.parts
    for layer, device in DEVICES.items():
        keys = torch.randn(1, 1, columns, 4, device=device)
        for states in part.update(layer, keys, keys):
            assert states.device == device
            assert states.shape[2] == part.front + columns
        assert part.visible(device).device == device
    stream.commit(call)


def _tensors(stream: Stream) -> list[tuple[list[int], Tensor]]:
    return [(list(bank.layers), tensor) for bank in stream.state.pools[0].banks for tensor in bank.tensors]


def test_no_tensor_is_shared_across_devices() -> None:
    """Prefill, decode, evictions, moves, a rebase, a recorded past and a roll-back stay on each layer's device."""
    stream = Stream([Pool(RULE, Rotary(torch.tensor([1.0, 0.5])), list(DEVICES))], bound=14)
    for columns in (9, 1, 1, 1, 12, 2, 1, 1, 1, 1):
        _feed(stream, columns)
    assert stream.state.lanes[0].offset > 0
    stream.record_past()
    for columns in (1, 3, 1, 12):
        _feed(stream, columns)
    stream.crop(5)
    stream.select_rows(torch.tensor([0]))
    _feed(stream, 2)
    assert [list(bank.layers) for bank in stream.state.pools[0].banks] == [[0, 2], [1]]
    for layers, tensor in _tensors(stream):
        assert {tensor.device} == {DEVICES[layer] for layer in layers}
