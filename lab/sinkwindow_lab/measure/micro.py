"""A cache and the attention over it, without a model around them: what asv and pytest-benchmark time.

Keys, queries and values are random: the time of an attention depends on their shapes alone. A model is needed for its
geometry and, by `StreamingCache`, for its rotation; its weights are never read. `check` feeds rotated keys instead and
compares the output with the definition, so that a wrong cache is never timed.
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
from sinkwindow.model.hooks import call_by_hand
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.ways.configurations import Configuration
from sinkwindow_lab.ways.sessions import Session, open_session

FILL = 256  # columns of a call while a cache is being filled [tokens]
PERIOD = 4096  # random tokens repeat after so many [tokens]
TOLERANCE = 1e-4  # largest error that float32 explains at any length; a rank that is off by one costs 0.01 and more


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
    """Return one token's attention over all keys given.

    Shapes: `query` and the result [batch, heads, 1, head_dim], `keys` and `values` [batch, kv_heads, tokens, head_dim].
    """
    grouped = query.shape[1] != keys.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)


def _causal(columns: int, keys: torch.Tensor) -> torch.Tensor:
    """Return the last rows of a causal mask, [1, 1, columns, keys]."""
    length = keys.shape[2]
    return torch.ones((1, 1, columns, length), dtype=torch.bool, device=keys.device).tril(length - columns)


class AttentionSteps:
    """Decode steps through one configuration's cache: only update and attention, in every layer."""

    def __init__(self, configuration: Configuration, model: PreTrainedModel, *, batch: int = 1) -> None:
        """Open the cache and create the tensors of one token; the model gives geometry, device and dtype.

        Attributes:
            session: the session of the cache; the model itself can continue from a filled cache.
            cache: its cache.

        Raises:
            LabError: if the configuration has no cache or does not fit the model.
        """
        self.sizes = geometry(model)
        self._model = model
        self._batch = batch
        self.session: Session = open_session(configuration, model)
        self.cache: Any = self.session.cache
        if self.cache is None:
            raise LabError(f"configuration {configuration.name!r} has no cache: choose baseline or a streaming one")
        self._streams = isinstance(self.cache, StreamingCache)
        self._token = self._ids(1)
        self._query, self._key, self._value = self._made_up(1)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _ids(self, columns: int) -> torch.Tensor:
        return torch.zeros((self._batch, columns), dtype=torch.long, device=self._model.device)

    def _made_up(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return random query, key and value of some tokens."""
        sizes, model = self.sizes, self._model
        random = torch.Generator(device=model.device).manual_seed(columns)

        def draw(heads: int) -> torch.Tensor:
            shape = (self._batch, heads, columns, sizes.head_dim)
            return torch.randn(shape, generator=random, device=model.device, dtype=model.dtype)

        return draw(sizes.heads), draw(sizes.kv_heads), draw(sizes.kv_heads)

    @torch.inference_mode()
    def fill(self, tokens: int) -> None:
        """Feed `tokens` more tokens to the cache, without any attention."""
        longest = FILL if self._streams else max(tokens, 1)  # a stock cache is copied in every call
        for start in range(0, tokens, longest):
            columns = min(longest, tokens - start)
            _, key, value = self._made_up(columns)
            self._feed(columns, key, value)

    def _feed(self, columns: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Run a call without attention, with the same keys and values in all layers."""
        self._call(columns, lambda layer, _: self.cache.update(key, value, layer))

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Run cache update and attention of one token in all layers.

        Returns the last layer's output, [batch, heads, 1, head_dim].
        """
        outputs: list[torch.Tensor] = []

        def layer_work(layer: int, _: Any) -> None:
            outputs.append(attend(self._query, *self.cache.update(self._key, self._value, layer)))

        self._call(1, layer_work)
        return outputs[-1]

    @torch.inference_mode()
    def long_call(self, columns: int) -> torch.Tensor:
        """Feed many tokens in one call, through the attention function that a model would call.

        Returns the last layer's output, [batch, columns, heads, head_dim].
        """
        sizes = self.sizes
        query, key, value = self._made_up(columns)
        module = SimpleNamespace(num_key_value_groups=sizes.heads // sizes.kv_heads, is_causal=True, training=False)
        outputs: list[torch.Tensor] = []

        def layer_work(layer: int, arguments: dict[str, Any]) -> None:
            keys, values = self.cache.update(key, value, layer)
            module.layer_idx = layer
            attention = ALL_ATTENTION_FUNCTIONS[self._model.config._attn_implementation]  # noqa: SLF001
            mask = arguments["attention_mask"] if arguments else _causal(columns, keys)
            outputs.append(attention(cast("torch.nn.Module", module), query, keys, values, mask)[0])

        self._call(columns, layer_work)
        return outputs[-1]

    @torch.inference_mode()
    def update(self) -> None:
        """Run the cache work of one token, evictions included, without attention."""
        self._feed(1, self._key, self._value)

    @torch.inference_mode()
    def hold(self) -> None:
        """Keep what the layers return for one more token, for `attention_alone`."""
        self._held = []
        self._call(1, lambda layer, _: self._held.append(self.cache.update(self._key, self._value, layer)))

    @torch.inference_mode()
    def attention_alone(self) -> torch.Tensor:
        """Run the attention of one token over what `hold` kept, in all layers.

        Returns the last layer's output, [batch, heads, 1, head_dim].
        """
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

    def _call(self, columns: int, layer_work: Callable[[int, dict[str, Any]], object]) -> None:
        """Do what a model's forward does to its cache; `layer_work` gets the decoder's arguments, rewritten."""
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
        """Run the attention of one token in all layers.

        Returns the last layer's output, [batch, heads, 1, head_dim].
        """
        return [attend(self._query, keys, values) for keys, values in self._layers][-1]


@torch.inference_mode()
def check(configuration: Configuration, model: PreTrainedModel, tokens: int) -> float:
    """Compare the last of `tokens` tokens with the definition: attention over its retained list, ranks as positions.

    Returns the largest difference over all layers. `configuration` is `baseline` or a streaming one.

    Raises:
        LabError: if the difference is larger than rounding explains: the cache is wrong, and its speed means nothing.
    """
    from sinkwindow_reference import retained_lists

    steps = AttentionSteps(configuration, model)
    try:
        feed = _Rotated(steps, model)
        feed.take(tokens - 1)
        outputs = feed.take(1)
    finally:
        steps.close()
    kept = list(range(tokens))
    if configuration.kind != "baseline":
        sinks, window, buffer = configuration.limits
        kept = retained_lists(tokens, num_sinks=sinks, window=window, buffer=buffer)[-1]
    difference = max(float((output - feed.expected(kept)).abs().max()) for output in outputs)
    if not difference <= TOLERANCE:
        raise LabError(
            f"{configuration.name} is off by {difference:.3g} after {tokens} tokens: its speed means nothing"
        )
    return difference


@torch.inference_mode()
def check_logits(configuration: Configuration, model: PreTrainedModel, tokens: int) -> float:
    """Compare the logits of one long call and three single tokens with those of the definition.

    Returns the largest difference, relative to the largest logit. `model` should be small and in float32: the reference
    is slow. `tokens` is at least four.

    Raises:
        LabError: if the difference is larger than rounding explains: the cache is wrong, and its speed means nothing.
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
    if not difference <= TOLERANCE:
        raise LabError(
            f"{configuration.name}: logits are off by {difference:.3g} of the largest: its speed means nothing"
        )
    return difference


def reference_pass(configuration: Configuration, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits that the reference computes, [batch, tokens, vocab], for `ids` [batch, tokens]."""
    from sinkwindow_reference import reference_logits

    sinks, window, buffer = configuration.limits
    return reference_logits(model, ids, num_sinks=sinks, window=window, buffer=buffer)


class _Rotated:
    """Feeds keys rotated as a model does, and computes the expected output."""

    def __init__(self, steps: AttentionSteps, model: PreTrainedModel) -> None:
        self._steps = steps
        self._queries, self._keys, self._values = steps._made_up(PERIOD)  # noqa: SLF001 - same module
        frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
        self._frequencies = frequencies.to(self._keys.device)
        self._seen = 0

    def _turn(self, states: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        from sinkwindow_reference import rotate

        return rotate(states[:, :, tokens % PERIOD], positions, self._frequencies)

    def take(self, columns: int) -> list[torch.Tensor]:
        """Feed tokens in calls of at most `FILL`; return each layer's output of the last one."""
        outputs: list[torch.Tensor] = []
        stop = self._seen + columns
        while self._seen < stop:
            count = min(FILL, stop - self._seen)
            tokens = torch.arange(self._seen, self._seen + count, device=self._keys.device)
            outputs = self._all_layers(count, tokens)
            self._seen += count
        return outputs

    def _all_layers(self, count: int, tokens: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        self._steps._call(count, lambda layer, at: outputs.append(self._layer(layer, tokens, at)))  # noqa: SLF001
        return outputs

    def _layer(self, layer: int, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        at = arguments["position_ids"][0] if arguments else tokens
        key = self._turn(self._keys, tokens, at)
        held = self._steps.cache.update(key, self._values[:, :, tokens % PERIOD], layer)
        query = self._turn(self._queries, tokens, at)[:, :, -1:]
        return attend(query, *held)

    def expected(self, kept: list[int]) -> torch.Tensor:
        """Return what the definition gives: every token at its rank."""
        tokens = torch.tensor(kept, device=self._keys.device)
        ranks = torch.arange(len(kept), device=self._keys.device)
        query = self._turn(self._queries, tokens[-1:], ranks[-1:])
        return attend(query, self._turn(self._keys, tokens, ranks), self._values[:, :, tokens % PERIOD])
