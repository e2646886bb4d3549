"""Sessions: a model with one configuration's memory. Feed token ids, get logits.

Every measurement drives a session and never looks at the cache below it, so that all configurations see the same
tokens in the same order.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel

from sinkwindow.lab.errors import LabError

if TYPE_CHECKING:
    from sinkwindow.lab.configurations import Configuration


class Session(ABC):
    """A conversation with a model, one row, no padding."""

    cache: Any = None

    def __init__(self, model: PreTrainedModel) -> None:
        """Remembers the model and how its `forward` wants to be called.

        Args:
            model: a causal language model in eval mode.
        """
        self.model = model
        self._cache_keyword = cache_keyword(model)
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.evictions = 0

    @torch.inference_mode()
    def feed(self, ids: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        """Runs the model over new tokens.

        Args:
            ids: [1, tokens], one token or more.
            last_only: return the last token's logits only (a prefill needs no others).

        Returns:
            Logits [1, tokens, vocab], or [1, 1, vocab].
        """
        return self._feed(ids, last_only=last_only)

    def read(self, ids: torch.Tensor) -> None:
        """Takes tokens in whose logits nobody wants.

        Args:
            ids: [1, tokens], one token or more.
        """
        self.feed(ids, last_only=True)

    @abstractmethod
    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        """What `feed` does, inside inference mode."""

    @property
    @abstractmethod
    def kept_tokens(self) -> int:
        """Tokens that the next query can see besides itself [tokens]."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the stored keys and values [bytes]."""
        return _stored_bytes(self.cache)

    def close(self) -> None:  # noqa: B027 - most sessions leave nothing behind
        """Leaves the model as it was before the session."""

    def _forward(self, ids: torch.Tensor, *, last_only: bool, **kwargs: Any) -> torch.Tensor:
        if self.cache is None:
            kwargs["use_cache"] = False
        else:
            kwargs[self._cache_keyword] = self.cache
        if last_only and self._slices_logits:
            kwargs["logits_to_keep"] = 1
        logits: torch.Tensor = self.model(input_ids=ids, **kwargs).logits
        return logits[:, -1:] if last_only else logits


class DenseSession(Session):
    """Everything is kept: the stock `DynamicCache` of the model's own configuration."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Makes the cache.

        Args:
            model: a causal language model in eval mode.
        """
        super().__init__(model)
        self.cache = DynamicCache(config=model.config)

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        return self._forward(ids, last_only=last_only)

    @property
    def kept_tokens(self) -> int:
        """All tokens so far [tokens]."""
        return int(self.cache.get_seq_length())


class StreamingSession(Session):
    """The product: `sinkwindow.StreamingCache`."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int, buffer: int, **options: Any) -> None:
        """Makes the cache.

        Args:
            model: a causal language model in eval mode.
            num_sinks: S [tokens].
            window: W [tokens].
            buffer: B [tokens].
            **options: further choices of `StreamingCache`, such as `evict="call"`.

        Raises:
            LabError: if the cache refuses the model or the numbers; its own message is kept.
        """
        super().__init__(model)
        # Imported here: everything else in the lab works while the core is being changed.
        from sinkwindow import StreamingCache

        try:
            self.cache = StreamingCache(model, num_sinks=num_sinks, window=window, buffer=buffer, **options)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise LabError(str(error)) from error

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        logits = self._forward(ids, last_only=last_only)
        self.evictions = self.cache.num_evictions
        return logits

    @property
    def kept_tokens(self) -> int:
        """Length of the retained list [tokens]."""
        return sum(map(len, self.cache.retained_tokens))

    @property
    def cache_bytes(self) -> int:
        """Everything that the cache has allocated [bytes]."""
        return int(self.cache.nbytes)

    def close(self) -> None:
        """Takes the cache's hooks off the model."""
        self.cache.detach()


class StaticSession(StreamingSession):
    """The product with `static=True`: one compiled graph for every token after the prompt."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int, buffer: int) -> None:
        """Makes the cache; nothing is compiled before the first step.

        Args:
            model: a causal language model in eval mode.
            num_sinks: S [tokens].
            window: W [tokens].
            buffer: B [tokens].

        Raises:
            LabError: if the cache refuses the model or the numbers; its own message is kept.
        """
        super().__init__(model, num_sinks, window, buffer, static=True)
        self.compile_with(**({"mode": "reduce-overhead"} if model.device.type == "cuda" else {}))

    def compile_with(self, **options: Any) -> None:
        """Chooses how the steps are compiled.

        Args:
            **options: of `torch.compile`.
        """
        self._compiled = torch.compile(self.model, fullgraph=True, **options)

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        if ids.shape[1] > 1 or self.cache.batch_size < 1:
            return super()._feed(ids, last_only=last_only)
        logits: torch.Tensor = self._compiled(input_ids=ids, **{self._cache_keyword: self.cache}).logits
        return logits


class RecomputeSession(Session):
    """Sliding window with re-computation: no cache at all, the last W token ids are the whole memory."""

    rows_at_once = 4  # windows per forward while scoring; decoding has one window anyway

    def __init__(self, model: PreTrainedModel, window: int) -> None:
        """Starts with nothing read.

        Args:
            model: a causal language model in eval mode.
            window: W, the longest input of a forward [tokens].
        """
        super().__init__(model)
        self._window = window
        self._context = torch.empty((1, 0), dtype=torch.long)

    def read(self, ids: torch.Tensor) -> None:
        """Remembers the ids: there is nothing else to keep of them."""
        self._append(ids)

    def _append(self, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The known ids with new ones behind them, and how many were known."""
        known = self._context.shape[1]
        text = torch.cat((self._context.to(ids.device), ids), dim=1)
        self._context = text[:, -self._window :].clone()
        self.evictions += max(0, text.shape[1] - max(known, self._window))
        return text, known

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        text, known = self._append(ids)
        if last_only:
            return self._forward(self._context, last_only=True)
        return self._score(text, known)

    def _score(self, text: torch.Tensor, known: int) -> torch.Tensor:
        """Logits of the tokens from `known` on, each from the window that ends with it."""
        parts = []
        if known < self._window:  # these windows start at the first token: one causal pass has all of them
            parts.append(self._forward(text[:, : self._window], last_only=False)[:, known:])
        if text.shape[1] > self._window:  # windows that start later: those ending with token W and after
            windows = text[0, 1:].unfold(0, self._window, 1)
            groups = torch.split(windows, self.rows_at_once)
            parts += [self._forward(rows, last_only=True).transpose(0, 1) for rows in groups]
        return torch.cat(parts, dim=1)

    @property
    def kept_tokens(self) -> int:
        """Tokens in the window [tokens]."""
        return self._context.shape[1]

    @property
    def cache_bytes(self) -> int:
        """Nothing is stored but token ids."""
        return 0


def open_session(configuration: Configuration, model: PreTrainedModel) -> Session:
    """Starts a session.

    Args:
        configuration: how to remember.
        model: a causal language model in eval mode.

    Returns:
        A fresh session; call `close` when done.

    Raises:
        LabError: if the configuration does not work with this model.
    """
    from sinkwindow.lab.ablations import AbsoluteSession, EagerEvictionSession, StaleRanksSession

    if configuration.kind == "baseline":
        return DenseSession(model)
    if configuration.kind == "recompute":
        return RecomputeSession(model, configuration.window or 1)
    kinds: dict[str, Callable[..., Session]] = {
        "stale_ranks": StaleRanksSession,
        "eager_eviction": EagerEvictionSession,
        "absolute": AbsoluteSession,
        "call": partial(StreamingSession, evict="call"),
        "static": StaticSession,
    }
    return kinds.get(configuration.kind, StreamingSession)(model, *configuration.limits)


def cache_keyword(model: PreTrainedModel) -> str:
    """The name by which a model's forward takes its cache.

    Args:
        model: any causal language model.

    Returns:
        `cache` from transformers 5.24 on, `past_key_values` before.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _stored_bytes(cache: Any) -> int:
    """Bytes of the keys and values of a stock cache."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))
