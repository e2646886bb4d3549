"""A cache and the attention over it, without a model around them: what asv and pytest-benchmark time.

Keys, queries and values are random: the time of an attention depends on their shapes alone. A model is needed for its
geometry and, by `StreamingCache`, for its rotation; its weights are never read. `check_logits` compares a cache in a
model with the reference, so that a wrong cache is never timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkwindow.cache import StreamingCache
from sinkwindow.fit import pools_of
from sinkwindow.lanes import Lane
from sinkwindow.model.families import inspect_model
from sinkwindow.model.hooks import call_by_hand
from sinkwindow.retention import Retention
from sinkwindow.storage.bank import KeyValue, allocate
from sinkwindow.storage.slots import Slots
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.ways.configurations import Configuration, open_session
from sinkwindow_lab.ways.sessions import Session

FILL = 256  # columns of a call while a cache is being filled [tokens]
TOLERANCE = 1e-4  # largest error that float32 explains at any length; a rank that is off by one costs 0.01 and more
LayerWork = Callable[[int, dict[str, Any]], object]


@dataclass(frozen=True)
class Geometry:
    """The sizes that determine the time of an attention."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def geometry(model: PreTrainedModel) -> Geometry:
    """Read a model's sizes from its configuration."""
    config = model.config
    heads = int(config.num_attention_heads)
    return Geometry(
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return one token's attention over all keys given, [batch, heads, 1, head_dim] as `query`."""
    grouped = query.shape[1] != keys.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)


class AttentionSteps:
    """Decode steps through one configuration's cache: only update and attention, in every layer.

    Attributes:
        session: The session of the cache; the model itself can continue from a filled cache.
        cache: Its cache.
    """

    def __init__(self, configuration: Configuration, model: PreTrainedModel, *, batch: int = 1) -> None:
        """Open the cache and create the tensors of one token; the model gives geometry, device and dtype."""
        self.sizes = geometry(model)
        self.session: Session = open_session(configuration, model)
        self.cache: Any = self.session.cache
        if self.cache is None:
            raise LabError(f"configuration {configuration.name!r} has no cache: choose baseline or a streaming one")
        self._model, self._batch = model, batch
        self._streams = isinstance(self.cache, StreamingCache)
        self._token = self._ids(1)
        self._query, self._key, self._value = self.draw(1)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _ids(self, columns: int) -> torch.Tensor:
        return torch.zeros((self._batch, columns), dtype=torch.long, device=self._model.device)

    def draw(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return random query, key and value of some tokens, [batch, heads, columns, head_dim] each."""
        sizes, model = self.sizes, self._model
        random = torch.Generator(device=model.device).manual_seed(columns)
        query, key, value = (
            torch.randn(
                (self._batch, heads, columns, sizes.head_dim), generator=random, device=model.device, dtype=model.dtype
            )
            for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        )
        return query, key, value

    @torch.inference_mode()
    def fill(self, tokens: int) -> None:
        """Feed `tokens` more tokens to the cache, the same in all layers, without any attention."""
        longest = FILL if self._streams else max(tokens, 1)  # a stock cache is copied in every call
        for start in range(0, tokens, longest):
            columns = min(longest, tokens - start)
            _, key, value = self.draw(columns)
            self.call(columns, lambda layer, _: self.cache.update(key, value, layer))  # noqa: B023 - runs at once

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Run cache update and attention of one token; return the last layer's output, [batch, heads, 1, head_dim]."""
        outputs: list[torch.Tensor] = []

        def layer_work(layer: int, _: dict[str, Any]) -> None:
            outputs.append(attend(self._query, *self.cache.update(self._key, self._value, layer)))

        self.call(1, layer_work)
        return outputs[-1]

    @torch.inference_mode()
    def long_call(self, columns: int) -> torch.Tensor:
        """Feed many tokens in one call, through the attention function that a model would call.

        Returns the last layer's output, [batch, columns, heads, head_dim].
        """
        query, key, value = self.draw(columns)
        groups = self.sizes.heads // self.sizes.kv_heads
        module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)
        attention = ALL_ATTENTION_FUNCTIONS[getattr(self._model.config, "_attn_implementation", "sdpa")]
        outputs: list[torch.Tensor] = []

        def layer_work(layer: int, arguments: dict[str, Any]) -> None:
            keys, values = self.cache.update(key, value, layer)
            module.layer_idx = layer
            shape = (1, 1, columns, keys.shape[2])
            causal = torch.ones(shape, dtype=torch.bool, device=keys.device).tril(shape[3] - columns)
            mask = arguments["attention_mask"] if arguments else causal
            outputs.append(attention(cast("torch.nn.Module", module), query, keys, values, mask)[0])

        self.call(columns, layer_work)
        return outputs[-1]

    @torch.inference_mode()
    def update(self) -> None:
        """Run the cache work of one token, evictions included, without attention."""
        self.call(1, lambda layer, _: self.cache.update(self._key, self._value, layer))

    @torch.inference_mode()
    def hold(self) -> None:
        """Keep what the layers return for one more token, for `attention_alone`."""
        self._held = []
        self.call(1, lambda layer, _: self._held.append(self.cache.update(self._key, self._value, layer)))

    @torch.inference_mode()
    def attention_alone(self) -> torch.Tensor:
        """Run one token's attention over what `hold` kept; return the last layer's, [batch, heads, 1, head_dim]."""
        return [attend(self._query, keys, values) for keys, values in self._held][-1]

    def rewind(self, tokens: int) -> None:
        """Return to the state before the last sample: crop a stock cache to `tokens`, which it was filled to.

        A streaming cache that has seen some tokens does not change: streaming is its steady state.
        """
        if not self._streams:
            self.cache.crop(-(self.cache.get_seq_length() - tokens))
        elif tokens == 0:
            self.cache.reset()

    def close(self) -> None:
        """Remove the cache from the model."""
        self.session.close()

    def call(self, columns: int, layer_work: LayerWork) -> None:
        """Do what a model's forward does to its cache; `layer_work` gets layer and decoder's arguments, rewritten."""
        kwargs = {"input_ids": self._token if columns == 1 else self._ids(columns)}
        decoder = cast("PreTrainedModel", self._model.base_model)
        no_hooks: AbstractContextManager[dict[str, Any]] = nullcontext({})
        with call_by_hand(self.cache, decoder, kwargs) if self._streams else no_hooks as arguments:
            for layer in range(self.sizes.layers):
                layer_work(layer, arguments)


class BareAttention:
    """The lower bound: attention over ready-made, contiguous keys and values of the same length."""

    def __init__(self, model: PreTrainedModel, tokens: int, *, batch: int = 1) -> None:
        """Create the tensors; `tokens` counts the keys, the query's own included."""
        sizes = geometry(model)

        def draw(heads: int, columns: int) -> torch.Tensor:
            return torch.randn((batch, heads, columns, sizes.head_dim), device=model.device, dtype=model.dtype)

        self._query = draw(sizes.heads, 1)
        self._layers = [(draw(sizes.kv_heads, tokens), draw(sizes.kv_heads, tokens)) for _ in range(sizes.layers)]

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Run the attention of one token in all layers; return the last one's output, [batch, heads, 1, head_dim]."""
        return [attend(self._query, keys, values) for keys, values in self._layers][-1]


def relocation(configuration: Configuration, model: PreTrainedModel, *, stay: bool) -> Callable[[], object]:
    """Return the work of a rebase of full slots: keys are rotated where they are, or moved to the front as well.

    It acts on random keys and values of its own, in all layers of one row; each call plans it anew.
    """
    rule, sizes = Retention(*configuration.limits), geometry(model)
    (pool,) = pools_of(inspect_model(model), rule, ranked=True, static=False)
    one = torch.empty((1, sizes.kv_heads, 1, sizes.head_dim), device=model.device, dtype=model.dtype)
    size, like = pool.size(Slots(), recording=False), dict.fromkeys(pool.layers, KeyValue(one, one))
    (bank,) = allocate(pool.layers, like, size, rule.num_sinks, apart=False)
    for tensor in bank.tensors:
        tensor.normal_()
    slots, lane = Slots((bank,), end=size), Lane(rule.num_sinks + rule.window, rule.buffer + 1)
    return lambda: pool.relocation(slots, [lane], stay=stay)[0].finish()  # noqa: PLW0108 - planned each time


@torch.inference_mode()
def check_logits(configuration: Configuration, model: PreTrainedModel, tokens: int) -> float:
    """Compare the logits of one long call and three single tokens with those of the definition.

    Returns the largest difference, relative to the largest logit. `model` should be small and in float32: the reference
    is slow. `tokens` is at least four.
    """
    random = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=random).to(model.device)
    session = open_session(configuration, model)
    try:
        pieces = torch.split(ids, [tokens - 3, 1, 1, 1], dim=1)
        logits = torch.cat([session.feed(piece) for piece in pieces], dim=1)
    finally:
        session.close()
    dense = configuration.kind == "baseline"
    right = model(input_ids=ids, use_cache=False).logits if dense else reference_pass(configuration, model, ids)
    difference = float((logits - right).abs().max() / right.abs().max())
    if not difference <= TOLERANCE:  # a NaN is no agreement
        raise LabError(
            f"{configuration.name}: logits are off by {difference:.3g} of the largest: its speed means nothing"
        )
    return difference


def reference_pass(configuration: Configuration, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits that the reference computes, [batch, tokens, vocab], for `ids` [batch, tokens]."""
    from sinkwindow_reference import reference_logits

    sinks, window, buffer = configuration.limits
    return reference_logits(model, ids, num_sinks=sinks, window=window, buffer=buffer)
