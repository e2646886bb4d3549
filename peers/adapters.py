"""Adapters of the caches that run on current transformers. Imports only torch and the environment's transformers.

`others.py` has the adapters that need an older transformers or another package.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 256  # tokens per call while a cache is being filled [tokens]


class RefusalError(Exception):
    """A peer cannot do what was requested; the message is shown in the table."""


@dataclass(frozen=True)
class Size:
    """The size of a cache: S first tokens and a window of W [tokens]."""

    sinks: int
    window: int

    @property
    def limit(self) -> int:
        """Number of tokens kept [tokens]."""
        return self.sinks + self.window


class Adapter(ABC):
    """A model with one kind of cache.

    Attributes:
        packages: distributions whose versions are reported, in addition to torch and transformers.
        exact_calls: whether a long call is meant to be the same as one call per token, so that a text may be scored in
            long calls; other peers read as much as they can hold in one call, then token by token.
        streams: whether it evicts while it decodes.
        batch_prompt: length of the prompt for tests of batches [tokens].
    """

    packages: ClassVar[tuple[str, ...]] = ()
    exact_calls: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    batch_prompt: ClassVar[int] = 12

    def __init__(self, folder: str) -> None:
        """Load the model from a folder with weights in float32 and a configuration."""
        self.model = self.load(folder)
        self.model.eval()
        self.size = Size(4, 1020)
        self.memory: Any = None

    def load(self, folder: str) -> Any:
        """Return the model in the dtype of its weights."""
        auto = importlib.import_module("transformers").AutoModelForCausalLM
        return auto.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)

    def start(self, size: Size) -> None:
        """Replace the cache by an empty one of this size."""
        self.size = size
        self.memory = self.fresh()

    @abstractmethod
    def fresh(self) -> Any:
        """Return an empty cache of the current size."""

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of new tokens, [batch, tokens, vocab]; `mask` is of all tokens so far, 0 for padding."""
        options = {} if mask is None else {"attention_mask": mask}
        output = self.model(input_ids=ids, use_cache=True, **{self.keyword: self.memory}, **options)
        logits: torch.Tensor = output.logits
        return logits

    @property
    def keyword(self) -> str:
        """Name of the model's argument for the cache: `cache` from transformers 5.24 on."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Feed tokens until the cache is full; at most `steps` single tokens will follow."""
        del steps
        for chunk in torch.split(ids[:, : self.size.limit], CHUNK, dim=1):
            self.feed(chunk)

    def begin(self, ids: torch.Tensor) -> None:  # noqa: B027 - only the index_select loop must know the text
        """Set the text that will be fed [1, tokens]."""

    def hold(self) -> None:  # noqa: B027 - a bounded cache keeps its length by itself
        """Crop a growing cache to its previous length, outside the measured time."""

    def work(self) -> list[tuple[Any, str]]:
        """Return the calls outside the attention modules in which the cache works: objects and names of attributes."""
        return []

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors that the cache stores."""
        for layer in self.memory.layers:
            yield from (layer.keys, layer.values)

    def cache_bytes(self) -> int:
        """Return the size of the cache's tensors [bytes]."""
        return sum(one.numel() * one.element_size() for one in self.tensors())


class Dynamic(Adapter):
    """Stock `DynamicCache`: keeps all tokens; while speed is measured, it is held at the limit."""

    exact_calls = True

    def fresh(self) -> Any:
        """Return an empty cache."""
        return importlib.import_module("transformers").DynamicCache(config=self.model.config)

    def hold(self) -> None:
        """Drop the newest token."""
        self.memory.crop(-1)


class Static(Adapter):
    """Stock `StaticCache` with a maximum length of the limit; it cannot hold more."""

    def fresh(self) -> Any:
        """Return an empty cache."""
        cache = importlib.import_module("transformers").StaticCache
        return cache(config=self.model.config, max_cache_len=self.size.limit)

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Feed tokens, but leave room for the steps; attention covers the whole cache, empty slots included."""
        if steps >= self.size.limit:
            raise RefusalError(f"{steps} steps do not fit a static cache of {self.size.limit} tokens")
        for chunk in torch.split(ids[:, : self.size.limit - steps], CHUNK, dim=1):
            self.feed(chunk)

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model; refuse tokens that transformers would write past the end of the cache."""
        seen = int(self.memory.get_seq_length())
        if seen + ids.shape[1] > self.size.limit:
            raise RefusalError(f"full after {self.size.limit} tokens")
        return super().feed(ids, mask)


class Ours(Adapter):
    """`sinkwindow.StreamingCache` with buffer 0: the paper's algorithm, with the same size as the other peers."""

    packages = ("sinkwindow",)
    exact_calls = True
    buffer: ClassVar[int] = 0

    def start(self, size: Size) -> None:
        """Detach the previous cache and start an empty one."""
        if self.memory is not None:
            self.memory.detach()
        super().start(size)

    def fresh(self) -> Any:
        """Return an empty cache."""
        cache = importlib.import_module("sinkwindow").StreamingCache
        return cache(self.model, num_sinks=self.size.sinks, window=self.size.window, buffer=self.buffer)

    def work(self) -> list[tuple[Any, str]]:
        """Return the methods that hooks call before and after the layers, in which the cache evicts."""
        return [(self.memory, name) for name in ("_begin", "_end")]

    def cache_bytes(self) -> int:
        """Return the size of all allocated keys and values [bytes]."""
        return int(self.memory.nbytes)


class OursBuffered(Ours):
    """The same with the default buffer of `StreamingCache`."""

    buffer = 64


class IndexSelect(Adapter):
    """The reference's loop: a stock cache compressed with `index_select` between steps; one row, token by token."""

    packages = ("sinkwindow",)

    def fresh(self) -> Any:
        """Forget the loop; the first token starts a new one."""
        self._stream: Any = None

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loop's logits of the next tokens of the text that `begin` has set."""
        if ids.shape[0] != 1 or mask is not None:
            raise RefusalError("takes one row without padding")
        if self._stream is None:
            raise RefusalError("reads a text token by token, so it has no calls to compare")
        return torch.stack([next(self._stream) for _ in range(ids.shape[1])])[None]

    def begin(self, ids: torch.Tensor) -> None:
        """Start the loop on the text [1, tokens]."""
        stream = importlib.import_module("sinkwindow_reference").stream_by_index_select
        sizes = {"num_sinks": self.size.sinks, "window": self.size.window}
        self._stream = stream(self.model, ids, max_new_tokens=0, **sizes)

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Feed as many tokens as the limit, one by one."""
        self.begin(ids[:, : self.size.limit + steps + 1])
        self.feed(ids[:, : self.size.limit])

    def work(self) -> list[tuple[Any, str]]:
        """Return the function that compresses the cache after the layers."""
        return [(importlib.import_module("sinkwindow_reference.models.loop"), "_compress")]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors of the loop's own cache."""
        for layer in self._stream.gi_frame.f_locals["cache"].layers:
            yield from (layer.keys, layer.values)


class Reference(Adapter):
    """The reference: without a cache, every call starts again from the first token."""

    packages = ("sinkwindow",)
    exact_calls = True

    def fresh(self) -> Any:
        """Return nothing: only token ids are kept."""
        return

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run the reference on all tokens so far and return the logits of the new ones."""
        self.memory = ids if self.memory is None else torch.cat([self.memory, ids], dim=1)
        logits: torch.Tensor = importlib.import_module("sinkwindow_reference").reference_logits(
            self.model, self.memory, mask, num_sinks=self.size.sinks, window=self.size.window, upcast=False
        )
        return logits[:, -ids.shape[1] :]

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Refuse: there is no cache to fill."""
        del ids, steps
        raise RefusalError("has no cache: every step reads the whole text again")
