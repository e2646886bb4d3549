"""Sessions: a model with one configuration's memory. Feed token ids, get logits.

Every measurement uses a session and never the cache below it, so that all configurations see the same tokens in the
same order.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel

from sinkwindow.model.families import UnsupportedModelError, inspect_model
from sinkwindow.model.state_layers import states_of
from sinkwindow_lab.errors import LabError

if TYPE_CHECKING:
    from typing_extensions import Self

FEED = 256  # tokens of a call between timed or watched steps [tokens]
MORE_ROWS = 4  # most rows of a table of positions that no position has


class Session:
    """A conversation with a model: one row, no padding."""

    cache: Any = None
    reach: int | None = None  # tokens that can be fed, where the model's positions end [tokens]
    _fed = 0  # tokens so far [tokens]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache_keyword = cache_keyword(model)
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.evictions = 0

    @torch.inference_mode()
    def feed(self, ids: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        """Run the model over new tokens [1, tokens]; return logits [1, tokens, vocab], with `last_only` the last."""
        self._fed += ids.shape[1]
        if self.reach is not None and self._fed > self.reach:
            raise LabError(f"{self._fed} tokens are beyond the {self.reach} positions of this model: read fewer")
        return self._feed(ids, last_only=last_only)

    def read(self, ids: torch.Tensor) -> None:
        """Feed tokens [1, tokens] without returning logits."""
        self.feed(ids, last_only=True)

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        """Do the work of `feed`, inside inference mode."""
        return self._forward(ids, last_only=last_only)

    @property
    def kept_tokens(self) -> int:
        """Tokens that the next query can see in addition to itself [tokens]."""
        return int(self.cache.get_seq_length())

    @property
    def cache_bytes(self) -> int:
        """Bytes of everything stored: keys, values, and states by their number [bytes]."""
        stored = [part for layer in getattr(self.cache, "layers", ()) for part in vars(layer).values()]
        parts = [one for part in stored for one in (part.values() if isinstance(part, dict) else [part])]
        return sum(one.nbytes for one in parts if isinstance(one, torch.Tensor))

    def close(self) -> None:
        """Restore the model to its state before the session; most sessions leave nothing behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
    """Keeps everything: the stock `DynamicCache` of the model's own configuration."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.reach = table_of_positions(model)
        self.cache = DynamicCache(config=model.config)
        asks = "position_ids" in inspect.signature(model.forward).parameters
        self._placed = asks and bool(states_of(model.config.get_text_config()))

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        more = {}
        if self._placed:  # Bamba counts from 0 in every call if it is not told
            more["position_ids"] = torch.arange(self._fed - ids.shape[1], self._fed, device=ids.device)[None]
        return self._forward(ids, last_only=last_only, **more)


class StreamingSession(Session):
    """The product: `sinkwindow.StreamingCache`; `options` are further arguments of it, such as `evict="call"`."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int, buffer: int, **options: Any) -> None:
        super().__init__(model)
        # Imported here: everything else in the lab works while the core is being changed.
        from sinkwindow import StreamingCache

        try:
            self.cache = StreamingCache(model, num_sinks=num_sinks, window=window, buffer=buffer, **options)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise LabError(str(error)) from error

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        logits = super()._feed(ids, last_only=last_only)
        self.evictions = self.cache.num_evictions
        return logits

    @property
    def kept_tokens(self) -> int:
        """Tokens of the retained list [tokens]."""
        return sum(map(len, self.cache.retained_tokens))

    @property
    def cache_bytes(self) -> int:
        """Everything that the cache has allocated [bytes]."""
        return int(self.cache.nbytes)

    def close(self) -> None:
        """Remove the cache's hooks from the model."""
        self.cache.detach()


class StaticSession(StreamingSession):
    """The product with `static=True`: one compiled graph for every token after the prompt."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int, buffer: int) -> None:
        super().__init__(model, num_sinks, window, buffer, static=True)
        self.compile_with(**({"mode": "reduce-overhead"} if model.device.type == "cuda" else {}))

    def compile_with(self, **options: Any) -> None:
        """Set the options of `torch.compile` for the steps."""
        self._compiled = torch.compile(self.model, fullgraph=True, **options)

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        if ids.shape[1] > 1 or self.cache.batch_size < 1:
            return super()._feed(ids, last_only=last_only)
        logits: torch.Tensor = self._compiled(input_ids=ids, **{self._cache_keyword: self.cache}).logits
        return logits


class RecomputeSession(Session):
    """Sliding window with re-computation: no cache at all, only the last W token ids, the longest input, are kept."""

    rows_at_once = 4  # windows per forward while scoring; decoding has one window anyway

    def __init__(self, model: PreTrainedModel, window: int) -> None:
        super().__init__(model)
        table = table_of_positions(model)
        self.reach = table if table is not None and table < window else None
        self._window = window
        self._context = torch.empty((1, 0), dtype=torch.long)

    def read(self, ids: torch.Tensor) -> None:
        """Store the ids: there is nothing else to keep of them."""
        self._append(ids)

    def _append(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the known ids followed by the new ones."""
        text = torch.cat((self._context.to(ids.device), ids), dim=1)
        self.evictions += max(0, text.shape[1] - max(self._context.shape[1], self._window))
        self._context = text[:, -self._window :].clone()
        return text

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        known, text = self._context.shape[1], self._append(ids)
        if last_only:
            return self._forward(self._context, last_only=True)
        parts = []  # the logits of each new token, from the window that ends with it
        if known < self._window:  # these windows start at the first token: one causal pass computes all of them
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


class Reader:
    """A session that reads a text in order, repeated from its start: times do not depend on the words."""

    def __init__(self, session: Session, text: torch.Tensor) -> None:
        self.session, self._text, self._seen = session, text, 0

    def read_to(self, place: int) -> None:
        """Read until so many tokens are seen, in long calls, which leave the cache as single tokens would."""
        while self._seen < place:
            self.session.read(self._next(min(FEED, place - self._seen)))

    def step(self) -> None:
        """Feed one token."""
        self.session.feed(self._next(1), last_only=True)

    def _next(self, count: int) -> torch.Tensor:
        start = self._seen % self._text.shape[1]
        piece = self._text[:, start : start + count]
        self._seen += piece.shape[1]
        return piece


def table_of_positions(model: PreTrainedModel) -> int | None:
    """Return the length of the table that a model looks positions up in [tokens]; None if it computes them."""
    with suppress(UnsupportedModelError):
        facts = inspect_model(model)
        return facts.trained_length if facts.has_table else None
    length = getattr(model.config, "max_position_embeddings", None)
    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    words = model.get_input_embeddings()
    # Some have a few rows more than positions, such as OPT's two.
    found = [one for one in tables if one is not words and length and 0 <= one.num_embeddings - length <= MORE_ROWS]
    return length if found else None


def cache_keyword(model: PreTrainedModel) -> str:
    """Return the name of the cache argument of a model's forward, another one before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
