"""A cache and the attention over it, without a model around them: what asv and pytest-benchmark time.

Keys, queries and values are made up: the time of an attention depends on their shapes alone. A model is needed
for its geometry and, by `StreamingCache`, for its rotation; its weights are never read. `check` feeds rotated keys
instead and compares what comes out with the definition, so that no wrong cache gets a time.
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
from sinkwindow.lab.configurations import Configuration
from sinkwindow.lab.errors import LabError
from sinkwindow.lab.sessions import Session, open_session
from sinkwindow.model.hooks import call_by_hand

FILL = 256  # columns of a call while a cache is being filled [tokens]
PERIOD = 4096  # made-up tokens repeat after so many [tokens]
TOLERANCE = 1e-4  # largest error that float32 explains at any length; a rank that is off by one costs 0.01 and more


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide how long an attention takes."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def geometry(model: PreTrainedModel) -> Geometry:
    """Reads a model's sizes.

    Args:
        model: a causal language model.

    Returns:
        Layers, query heads, key-value heads and head size.
    """
    config = model.config
    heads = int(config.num_attention_heads)
    return Geometry(
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One token's attention over everything it is given.

    Args:
        query: [batch, heads, 1, head_dim].
        keys: [batch, kv_heads, tokens, head_dim].
        values: [batch, kv_heads, tokens, head_dim].

    Returns:
        [batch, heads, 1, head_dim].
    """
    grouped = query.shape[1] != keys.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)


def _causal(columns: int, keys: torch.Tensor) -> torch.Tensor:
    """[1, 1, columns, keys]: the last columns of a causal mask."""
    length = keys.shape[2]
    return torch.ones((1, 1, columns, length), dtype=torch.bool, device=keys.device).tril(length - columns)


class AttentionSteps:
    """Decode steps through one configuration's cache: update and attention in every layer, nothing else."""

    def __init__(self, configuration: Configuration, model: PreTrainedModel, *, batch: int = 1) -> None:
        """Opens the cache and makes the tensors of one token.

        Args:
            configuration: one with a cache.
            model: gives the geometry, the device and the dtype.
            batch: rows.

        Attributes:
            session: the session whose cache it is; the model itself may go on from a filled cache.
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
            message = f"configuration {configuration.name!r} has no cache: choose baseline or a streaming one"
            raise LabError(message)
        self._streams = isinstance(self.cache, StreamingCache)
        self._token = self._ids(1)
        self._query, self._key, self._value = self._made_up(1)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _ids(self, columns: int) -> torch.Tensor:
        return torch.zeros((self._batch, columns), dtype=torch.long, device=self._model.device)

    def _made_up(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of some tokens."""
        sizes, model = self.sizes, self._model
        random = torch.Generator(device=model.device).manual_seed(columns)

        def draw(heads: int) -> torch.Tensor:
            shape = (self._batch, heads, columns, sizes.head_dim)
            return torch.randn(shape, generator=random, device=model.device, dtype=model.dtype)

        return draw(sizes.heads), draw(sizes.kv_heads), draw(sizes.kv_heads)

    @torch.inference_mode()
    def fill(self, tokens: int) -> None:
        """Brings the cache to where it has seen `tokens` more, without any attention.

        Args:
            tokens: how many [tokens].
        """
        longest = FILL if self._streams else max(tokens, 1)  # a stock cache copies itself in every call
        for start in range(0, tokens, longest):
            columns = min(longest, tokens - start)
            _, key, value = self._made_up(columns)
            self._feed(columns, key, value)

    def _feed(self, columns: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """A call without attention, the same keys and values in all layers."""
        self._call(columns, lambda layer, _: self.cache.update(key, value, layer))

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """One token: cache update and attention, all layers.

        Returns:
            The last layer's output, [batch, heads, 1, head_dim].
        """
        outputs: list[torch.Tensor] = []

        def layer_work(layer: int, _: Any) -> None:
            outputs.append(attend(self._query, *self.cache.update(self._key, self._value, layer)))

        self._call(1, layer_work)
        return outputs[-1]

    @torch.inference_mode()
    def long_call(self, columns: int) -> torch.Tensor:
        """Many tokens in one call, through the attention function that a model would call.

        Args:
            columns: how many [tokens].

        Returns:
            The last layer's output, [batch, columns, heads, head_dim].
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
        """One token's cache work, evictions included, without attention."""
        self._feed(1, self._key, self._value)

    @torch.inference_mode()
    def hold(self) -> None:
        """Keeps what the layers return for one more token, for `attention_alone`."""
        self._held = []
        self._call(1, lambda layer, _: self._held.append(self.cache.update(self._key, self._value, layer)))

    @torch.inference_mode()
    def attention_alone(self) -> torch.Tensor:
        """Attention of one token over what `hold` kept, all layers.

        Returns:
            The last layer's output, [batch, heads, 1, head_dim].
        """
        return [attend(self._query, keys, values) for keys, values in self._held][-1]

    def rewind(self, tokens: int) -> None:
        """Makes the next sample start like the one before.

        Args:
            tokens: what the cache had seen when it was filled; a stock cache is cut to it. A streaming cache that has
                seen some is left alone: streaming is its steady state [tokens].
        """
        if not self._streams:
            self.cache.crop(-(self.cache.get_seq_length() - tokens))
        elif tokens == 0:
            self.cache.reset()

    def close(self) -> None:
        """Takes the cache off the model."""
        self.session.close()

    def _call(self, columns: int, layer_work: Callable[[int, dict[str, Any]], object]) -> None:
        """Does what a model's forward does to its cache; `layer_work` gets the decoder's arguments, rewritten."""
        kwargs = {"input_ids": self._token if columns == 1 else self._ids(columns)}
        decoder = cast("PreTrainedModel", self._model.base_model)
        no_hooks: AbstractContextManager[dict[str, Any]] = nullcontext({})
        with call_by_hand(self.cache, decoder, kwargs) if self._streams else no_hooks as arguments:
            for layer in range(self.sizes.layers):
                layer_work(layer, arguments)


class BareAttention:
    """The floor: attention over ready-made, contiguous keys and values of the same length."""

    def __init__(self, model: PreTrainedModel, tokens: int, *, batch: int = 1) -> None:
        """Makes the tensors.

        Args:
            model: gives the geometry, the device and the dtype.
            tokens: keys, the query's own included [tokens].
            batch: rows.
        """
        sizes = geometry(model)

        def draw(heads: int, columns: int) -> torch.Tensor:
            return torch.randn((batch, heads, columns, sizes.head_dim), device=model.device, dtype=model.dtype)

        self._query = draw(sizes.heads, 1)
        self._layers = [(draw(sizes.kv_heads, tokens), draw(sizes.kv_heads, tokens)) for _ in range(sizes.layers)]

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """One token's attention, all layers.

        Returns:
            The last layer's output, [batch, heads, 1, head_dim].
        """
        return [attend(self._query, keys, values) for keys, values in self._layers][-1]


@torch.inference_mode()
def check(configuration: Configuration, model: PreTrainedModel, tokens: int) -> float:
    """Compares the last of `tokens` tokens with the definition: attention of its retained list, ranks as positions.

    Args:
        configuration: `baseline` or one of the streaming ones.
        model: one with rotary positions.
        tokens: how many to feed, the compared one included [tokens].

    Returns:
        The largest difference over all layers.

    Raises:
        LabError: if it is larger than rounding explains: the cache is wrong, and its speed means nothing.
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
        message = f"{configuration.name} is off by {difference:.3g} after {tokens} tokens: its speed means nothing"
        raise LabError(message)
    return difference


@torch.inference_mode()
def check_logits(configuration: Configuration, model: PreTrainedModel, tokens: int) -> float:
    """Compares the logits of a configuration, one long call and three single tokens, with those of the definition.

    Args:
        configuration: `baseline` or one of the streaming ones.
        model: a small one in float32; the reference is slow.
        tokens: how many to feed, four or more [tokens].

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        LabError: if it is larger than rounding explains: the cache is wrong, and its speed means nothing.
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
        message = f"{configuration.name}: logits are off by {difference:.3g} of the largest: its speed means nothing"
        raise LabError(message)
    return difference


def reference_pass(configuration: Configuration, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits as the reference defines them: the slowest way to read a text, and the right one.

    Args:
        configuration: one of the streaming ones.
        model: a small one.
        ids: [batch, tokens].

    Returns:
        [batch, tokens, vocab].
    """
    from sinkwindow_reference import reference_logits

    sinks, window, buffer = configuration.limits
    return reference_logits(model, ids, num_sinks=sinks, window=window, buffer=buffer)


class _Rotated:
    """Feeds keys that a model would have rotated, and knows what must come out."""

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
        """Feeds tokens in calls of at most `FILL`; returns each layer's output of the last one."""
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
        """The definition: every token at its rank."""
        tokens = torch.tensor(kept, device=self._keys.device)
        ranks = torch.arange(len(kept), device=self._keys.device)
        query = self._turn(self._queries, tokens[-1:], ranks[-1:])
        return attend(query, self._turn(self._keys, tokens, ranks), self._values[:, :, tokens % PERIOD])
