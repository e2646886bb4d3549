"""A cache and the attention over it, without a model around them: what asv and pytest-benchmark time.

Keys, queries and values are random: the time of an attention depends on their shapes alone. A model is needed for its
geometry and, by `StreamingCache`, for its rotation; its weights are never read. `check_logits` compares a cache in a
model with the reference, so that a wrong cache is never timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, cast

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
from sinkwindow_lab.inputs.shapes import token_ids
from sinkwindow_lab.records import Configuration
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import Session

FILL = 256  # columns of a call while a cache is being filled [tokens]
TOLERANCE = 1e-4  # largest error that float32 explains at any length; a rank that is off by one costs 0.01 and more
T = TypeVar("T")


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


def draw(
    heads: int, model: PreTrainedModel, tokens: int, batch: int = 1, random: torch.Generator | None = None
) -> torch.Tensor:
    """Return random queries, keys or values, [batch, heads, tokens, head_dim]."""
    shape = (batch, heads, tokens, geometry(model).head_dim)
    return torch.randn(shape, generator=random, device=model.device, dtype=model.dtype)


@dataclass(frozen=True)
class BareAttention:
    """Attention of one token over ready-made keys and values of each layer."""

    query: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Run the attention of one token in all layers; return the last one's output, [batch, heads, 1, head_dim]."""
        return [attend(self.query, keys, values) for keys, values in self.layers][-1]


def bare_attention(model: PreTrainedModel, tokens: int, *, batch: int = 1) -> BareAttention:
    """Return the lower bound: over random, contiguous tensors; `tokens` counts the keys, the query's own included."""
    sizes = geometry(model)
    keys = [draw(sizes.kv_heads, model, tokens, batch) for _ in range(2 * sizes.layers)]
    return BareAttention(draw(sizes.heads, model, 1, batch), list(itertools.pairwise(keys))[::2])


class AttentionSteps:
    """Decode steps through the `cache` of one `session`: only update and attention, in every layer."""

    def __init__(self, configuration: Configuration, model: PreTrainedModel, *, batch: int = 1) -> None:
        self.sizes = geometry(model)
        self.session: Session = open_session(configuration, model)
        self.cache: Any = self.session.cache
        if self.cache is None:
            raise LabError(f"configuration {configuration.name!r} has no cache: choose baseline or a streaming one")
        self._model, self._batch = model, batch
        self._streams = isinstance(self.cache, StreamingCache)
        self._token = self._ids(1)
        self._query, self._key, self._value = self.draw(1)

    def _ids(self, columns: int) -> torch.Tensor:
        return torch.zeros((self._batch, columns), dtype=torch.long, device=self._model.device)

    def draw(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return random query, key and value of some tokens, [batch, heads, columns, head_dim] each."""
        random = torch.Generator(device=self._model.device).manual_seed(columns)
        shared = self._model, columns, self._batch, random
        query = draw(self.sizes.heads, *shared)
        return query, draw(self.sizes.kv_heads, *shared), draw(self.sizes.kv_heads, *shared)

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
        return self.call(1, lambda layer, _: attend(self._query, *self.cache.update(self._key, self._value, layer)))[-1]

    @torch.inference_mode()
    def long_call(self, columns: int) -> torch.Tensor:
        """Feed many tokens in one call, as models do; return the last layer's output, [batch, columns, heads, size]."""
        query, key, value = self.draw(columns)
        groups = self.sizes.heads // self.sizes.kv_heads
        module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)
        attention = ALL_ATTENTION_FUNCTIONS[getattr(self._model.config, "_attn_implementation", "sdpa")]

        def layer_work(layer: int, arguments: dict[str, Any]) -> torch.Tensor:
            keys, values = self.cache.update(key, value, layer)
            module.layer_idx = layer
            shape = (1, 1, columns, keys.shape[2])
            causal = torch.ones(shape, dtype=torch.bool, device=keys.device).tril(shape[3] - columns)
            mask = arguments["attention_mask"] if arguments else causal
            return cast("torch.Tensor", attention(cast("torch.nn.Module", module), query, keys, values, mask)[0])

        return self.call(columns, layer_work)[-1]

    @torch.inference_mode()
    def update(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Run the cache work of one token, evictions included, without attention; return what layers attend to."""
        return self.call(1, lambda layer, _: self.cache.update(self._key, self._value, layer))

    def hold(self) -> None:
        """Keep what the layers return for one more token, for `attention_alone`."""
        self._held = BareAttention(self._query, self.update())

    def attention_alone(self) -> torch.Tensor:
        """Run one token's attention over what `hold` kept; return the last layer's, [batch, heads, 1, head_dim]."""
        return self._held.step()

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

    def call(self, columns: int, layer_work: Callable[[int, dict[str, Any]], T]) -> list[T]:
        """Do what a model's forward does to its cache; `layer_work` gets layer and decoder's arguments, rewritten.

        Returns what it returned, by layer.
        """
        kwargs = {"input_ids": self._token if columns == 1 else self._ids(columns)}
        decoder = cast("PreTrainedModel", self._model.base_model)
        no_hooks: AbstractContextManager[dict[str, Any]] = nullcontext({})
        with call_by_hand(self.cache, decoder, kwargs) if self._streams else no_hooks as arguments:
            return [layer_work(layer, arguments) for layer in range(self.sizes.layers)]


def relocation(configuration: Configuration, model: PreTrainedModel, *, stay: bool) -> Callable[[], object]:
    """Return the work of a rebase of full slots of random keys: rotated where they are, or moved to the front."""
    rule, sizes = Retention(*configuration.limits), geometry(model)
    (pool,) = pools_of(inspect_model(model), rule, ranked=True, static=False)
    one = torch.empty((1, sizes.kv_heads, 1, sizes.head_dim), device=model.device, dtype=model.dtype)
    size, like = pool.size(Slots(), recording=False), dict.fromkeys(pool.layers, KeyValue(one, one))
    (bank,) = allocate(pool.layers, like, size, rule.num_sinks, apart=False)
    for tensor in bank.tensors:
        tensor.normal_()
    slots, lane = Slots((bank,), end=size), Lane(rule.num_sinks + rule.window, rule.buffer + 1)
    return lambda: pool.relocation(slots, [lane], recording=False, stay=stay)[0].finish()  # noqa: PLW0108 - planned each time


@torch.inference_mode()
def check_logits(configuration: Configuration, model: PreTrainedModel, tokens: int) -> float:
    """Compare a long call and three single tokens with the definition, which is slow: `model` should be small.

    Returns the largest difference of a logit, relative to the largest one.
    """
    ids = token_ids(model, tokens)
    with open_session(configuration, model) as session:
        pieces = torch.split(ids, [tokens - 3, 1, 1, 1], dim=1)
        logits = torch.cat([session.feed(piece) for piece in pieces], dim=1)
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
