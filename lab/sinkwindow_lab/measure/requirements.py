"""What a measurement needs of the model and of the machine, checked before hours of work instead of after them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError, require
from sinkwindow_lab.measure.micro import geometry
from sinkwindow_lab.records import Configuration
from sinkwindow_lab.ways.configurations import open_session


def check(configurations: Iterable[Configuration], model: PreTrainedModel, tokens: int, asked: str) -> None:
    """Check that all fit the model, the memory, and `tokens` of one text; errors begin with what the user `asked`."""
    for one in configurations:
        numbers = (one.num_sinks, one.window, one.buffer)
        kept = tokens if one.kind == "baseline" else sum(number or 0 for number in numbers)
        if one.kind != "recompute":
            check_memory(model, kept, f"{asked}: {one.name}")
        session = open_session(one, model)
        session.close()
        if session.reach is not None and tokens > session.reach:
            raise LabError(
                f"{asked}: {one.name} reads {tokens} tokens, and this model has {session.reach} positions: "
                "ask for fewer tokens, or for a configuration that keeps fewer"
            )


def check_memory(model: PreTrainedModel, tokens: int, asked: str) -> None:
    """Check that the keys and values of so many tokens are not more than all the memory that there is."""
    with suppress(AttributeError):  # a model without heads keeps something else
        sizes, there = geometry(model), memory(model.device)
        needed = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * model.dtype.itemsize * tokens
        if needed > there:
            raise LabError(
                f"{asked} keeps {tokens} tokens, {needed / 1e9:.3g} GB of keys and values, and {model.device} has "
                f"{there / 1e9:.3g} GB: choose smaller sizes"
            )


def memory(device: torch.device) -> int:
    """Return the memory of a device; that of the machine for a CPU [bytes]."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(require("psutil").virtual_memory().total)
