"""What ``transformers`` asks of a layer; the state is the cache's, since all layers move together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import CacheLayerMixin

from sinkwindow.model.state_layers import StateLayer

if TYPE_CHECKING:
    from torch import Tensor

    from sinkwindow.model.families import ModelFacts


class LayerStub(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers registers subclasses
    """A layer of a ``StreamingCache``: answers about its kind, and refers everything else to the cache.

    Attributes:
        is_sliding: Whether the layer has a window of its own in a model that mixes kinds.
        is_compileable: Whether ``generate`` may compile the steps.
        record_past: Set by ``activate_past_recording``; ``generate`` clears it.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, *, is_sliding: bool = False, is_compileable: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers is not typed there
        self.is_sliding = is_sliding
        self.is_compileable = is_compileable
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Note that the past is recorded; the cache does it."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the cache allocates when its first call commits."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Refuse: only the cache as a whole can be updated.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("Update the StreamingCache, not one of its layers.")

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:  # noqa: ARG002
        """Refuse like ``update``.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("Ask the StreamingCache, not one of its layers.")

    def get_seq_length(self) -> int:
        """Return 0: the cache counts."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # as it is called before transformers 5.13


class HybridStub(StateLayer, LayerStub):  # type: ignore[misc, no-untyped-call]  # as in stock layers of both kinds
    """A layer that attends and keeps a state."""

    def __init__(self, number_of_states: int, *, is_sliding: bool) -> None:
        LayerStub.__init__(self, is_sliding=is_sliding)
        StateLayer.__init__(self, number_of_states)


def stubs_of(facts: ModelFacts, *, is_compileable: bool) -> list[Any]:
    """Return a stub for each layer; transformers makes a mask for each kind."""
    sliding = {layer for kind in facts.kinds if kind.window is not None for layer in kind.layers}
    attending = {layer for kind in facts.kinds for layer in kind.layers}
    stubs: list[Any] = []
    for layer in range(facts.num_layers):
        if layer not in facts.states:
            stubs.append(LayerStub(is_sliding=layer in sliding, is_compileable=is_compileable))
        elif layer in attending:
            stubs.append(HybridStub(facts.states[layer], is_sliding=layer in sliding))
        else:
            stubs.append(StateLayer(facts.states[layer]))
    return stubs
