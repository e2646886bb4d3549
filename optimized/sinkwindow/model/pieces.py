"""A call that runs in pieces: what each piece is given, and one output made of theirs.

A long call has more evictions, hence more copies of sinks and more masked columns, than attention should see at once;
and a model whose attention takes no 4D mask gets pieces that end where it evicts. Activations stay flat as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkwindow.lanes import Inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

# Outputs that pieces do not add up to: a call that is asked for one of them runs whole.
JOINED = ("last_hidden_state", "hidden_states")  # outputs of pieces that are joined
PER_CALL = ("output_attentions", "output_router_logits")


def tokens_of(kwargs: dict[str, Any]) -> str:
    """Return the name of the argument that holds a call's tokens."""
    return (
        "inputs_embeds" if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is not None else "input_ids"
    )


def arguments_of(kwargs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return a call's arguments for a run of its columns: those that have a value for each column are cut.

    Gemma 4's decoder leaves out columns of which no logits are wanted; here the head alone does.
    """
    shape = kwargs[tokens_of(kwargs)].shape[:2]
    if "logits_to_keep" in kwargs:
        kwargs = kwargs | {"logits_to_keep": 0}
    return {
        name: value[:, start:stop] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in kwargs.items()
    }


def piece_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return a run of a call's columns as a call of its own."""
    if inputs.real is None:
        return Inputs(inputs.batch, stop - start, inputs.device, None)
    real = [[column - start for column in row if start <= column < stop] for row in inputs.real]
    return Inputs(inputs.batch, stop - start, inputs.device, real)


def joined(outputs: Sequence[dict[str, Any]]) -> Any:
    """Return the last piece's output, with all pieces' hidden states joined along the tokens."""
    last = outputs[-1]
    last["last_hidden_state"] = torch.cat([output["last_hidden_state"] for output in outputs], dim=1)
    if "hidden_states" in last:
        layers = zip(*(output["hidden_states"] for output in outputs), strict=True)
        last["hidden_states"] = tuple(torch.cat(states, dim=1) for states in layers)
    return last
