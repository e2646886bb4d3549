"""Layers that keep a state: what they remember is the stream's, and during a call stock code works on a copy of it.

Models read and write such a layer through ``cache.layers``, in place too. A ``StateLayer`` there holds the copy from
the beginning of a call to its end; what counts afterwards is in the stream's ``State``, like keys and values. So a call
that does not count leaves no trace.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import cache_utils

from sinkwindow.model.versions import INSTALLED, STATES_ARE_KNOWN
from sinkwindow.storage.states import CONV, PAST, RECURRENT, split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from sinkwindow.storage.states import StateKey, States

STATE_ONLY = ("linear_attention", "conv")  # types of layers that keep a state,
BOTH = ("hybrid", "hybrid_sliding")  # that attend as well,
NEITHER = ("mlp", "moe")  # and that do nothing but compute
# Families that cannot stream, and why.
LOSES_IT = (
    "begins with an empty state in a call of several tokens on a filled cache (stock code, up to transformers 5.24): "
    "use a DynamicCache, and only calls of one token after the prompt."
)
OWN_STATE = {
    **dict.fromkeys(("jamba", "zamba"), LOSES_IT),
    "minimax": "takes no cache but its own MiniMaxCache: use that.",
    "recurrent_gemma": "keeps its state in its modules, where every call overwrites it: it streams without a cache.",
}
StockLayer: Any = getattr(cache_utils, "LinearAttentionLayer", object)


def states_of(config: PreTrainedConfig) -> dict[int, int]:
    """Return how many states each layer keeps that keeps any."""
    types = getattr(config, "layer_types", None) or ()
    count: int = getattr(config, "number_of_conv_states", 1)
    return {layer: count for layer, kind in enumerate(types) if kind in STATE_ONLY + BOTH}


def state_refusal(decoder: PreTrainedModel, *, is_hybrid: bool) -> str:
    """Return why the layers of a model cannot keep their states exactly, empty if they can.

    Args:
        decoder: The model.
        is_hybrid: Whether its family is known to keep states, whatever this release calls its layers.
    """
    types, states = getattr(decoder.config, "layer_types", None), states_of(decoder.config)
    if not STATES_ARE_KNOWN and (is_hybrid or states):
        return f"keeps states in a way of its own before transformers 5.24, and you have {INSTALLED}."
    if types and set(types) <= {*STATE_ONLY, *NEITHER}:
        return "keeps a state in all layers and attends in none: it streams without a cache like this."
    parts: list[Any] = list(decoder.modules())
    limits = {tuple(part.time_step_limit) for part in parts if hasattr(part, "time_step_limit")}
    if states and not limits <= {(0.0, math.inf)}:
        return (
            f"limits the time steps of a prompt to {max(limits)} and not those of single tokens (stock code, up to "
            "transformers 5.24), so its state depends on the calls: set time_step_limit = (0.0, math.inf) on the "
            "modules that have it; both then compute as single tokens do."
        )
    return ""


class StateLayer(StockLayer):  # type: ignore[misc]  # not in every release
    """The copy of a layer's state that stock code works on; empty between calls."""

    is_compileable = False  # in the stock layer a property, which says yes

    def __init__(self, number_of_states: int = 1) -> None:
        StockLayer.__init__(self, number_of_states)
        self.is_open = False

    def lazy_initialization(self, **kwargs: Any) -> None:
        """Make room for a state, as stock code does when a text begins.

        Raises:
            RuntimeError: No call is open.
        """
        if not self.is_open:
            raise RuntimeError("A StreamingCache keeps states for calls of the model it was made with, while attached.")
        StockLayer.lazy_initialization(self, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Write a new state: over the old one, as stock code does, unless a backward pass may need that."""
        old = self.recurrent_states[state_idx]
        if old is not None and torch.is_grad_enabled():
            self.recurrent_states[state_idx] = torch.empty_like(old)
        written: Tensor = StockLayer.update_recurrent_state(self, recurrent_states, state_idx, **kwargs)
        return written

    def hold(self, kind: str, number: int, tensor: Tensor) -> None:
        """Take a copy of a state."""
        states, is_there = getattr(self, f"{kind}_states"), getattr(self, f"is_{kind}_states_initialized")
        states[number], is_there[number], self.has_previous_state[number] = tensor.clone(), True, True
        self.device, self.dtype = tensor.device, tensor.dtype
        if kind == CONV:
            self.conv_kernel_size[number] = tensor.shape[-1]


class StateLayers:
    """All layers of a cache that keep a state.

    Attributes:
        layers: By their index in the model.
    """

    def __init__(self, layers: Mapping[int, Any]) -> None:
        self.layers = layers

    def open(self, states: States, *, recording: bool) -> None:
        """Begin a call: give the layers copies of their states.

        Args:
            states: Those that count.
            recording: Whether convolutions keep all columns of the call.
        """
        self.close()
        for layer in self.layers.values():
            layer.is_open, layer.record_past = True, recording
        for (index, kind, number), tensor in states.items():
            if kind != PAST:
                self.layers[index].hold(kind, number, tensor)

    def close(self) -> None:
        """Drop what a call has left."""
        for layer in self.layers.values():
            if layer.is_open:
                StateLayer.__init__(layer, layer.number_of_states)

    def taken(self, before: States) -> States:
        """Return the states after the call, and close it.

        Args:
            before: Those that it began with.
        """
        after: dict[StateKey, Tensor] = {}
        for index, layer in self.layers.items():
            for number in range(layer.number_of_states):
                for kind, tensor in ((CONV, layer.conv_states[number]), (RECURRENT, layer.recurrent_states[number])):
                    if tensor is not None:
                        after[index, kind, number] = tensor.detach()
                if layer.record_past and layer.conv_states[number] is not None:
                    after |= _recorded(index, layer, number, before)
        self.close()
        return after


def _recorded(index: int, layer: StateLayer, number: int, before: States) -> dict[StateKey, Tensor]:
    """Return what a convolution keeps of all its columns, and the past before it."""
    key, past = (index, CONV, number), before.get((index, PAST, number))
    kernel, columns = layer.conv_kernel_size[number], layer.conv_states[number].detach()
    if key not in before:  # before a text there are zeros
        columns = functional.pad(columns, (kernel, 0))
    elif past is not None:
        columns = torch.cat((past, columns), dim=-1)
    kept, past = split(columns, kernel)
    return {key: kept} if layer.recurrent_states[number] is not None else {key: kept, (index, PAST, number): past}
