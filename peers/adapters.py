"""One way to decode each, behind the same calls: today's caches. Imports torch and the environment's transformers only.

`others.py` has those that need an older transformers or a package of their own.
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
    """A peer cannot do what was asked for; the message is shown in the table."""


@dataclass(frozen=True)
class Size:
    """The size of a cache: S first tokens and a window of W [tokens]."""

    sinks: int
    window: int

    @property
    def limit(self) -> int:
        """All that is kept [tokens]."""
        return self.sinks + self.window


class Adapter(ABC):
    """A model with one way to remember.

    Attributes:
        packages: distributions whose versions are reported, besides torch and transformers.
        exact_calls: whether a long call is meant to be the same as one call per token, so that a text may be scored in
            long calls; the others read all that they can hold in one call, then token by token.
        streams: whether it evicts while it decodes.
        batch_prompt: length of the prompt with which batches are tried [tokens].
    """

    packages: ClassVar[tuple[str, ...]] = ()
    exact_calls: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    batch_prompt: ClassVar[int] = 12

    def __init__(self, folder: str) -> None:
        """Loads the model.

        Args:
            folder: weights in float32 and a configuration.
        """
        self.model = self.load(folder)
        self.model.eval()
        self.size = Size(4, 1020)
        self.memory: Any = None

    def load(self, folder: str) -> Any:
        """The model in the dtype of its weights."""
        return importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(folder)

    def start(self, size: Size) -> None:
        """Forgets everything; what follows is kept in a cache of this size."""
        self.size = size
        self.memory = self.fresh()

    @abstractmethod
    def fresh(self) -> Any:
        """An empty cache of the present size."""

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the model over new tokens.

        Args:
            ids: [batch, tokens].
            mask: 1 for all real tokens so far, 0 for padding [batch, tokens so far].

        Returns:
            Logits [batch, tokens, vocab].
        """
        options = {} if mask is None else {"attention_mask": mask}
        output = self.model(input_ids=ids, use_cache=True, **{self.keyword: self.memory}, **options)
        logits: torch.Tensor = output.logits
        return logits

    @property
    def keyword(self) -> str:
        """The name by which the model takes its cache: `cache` from transformers 5.24 on."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Feeds tokens until the cache is full.

        Args:
            ids: [1, tokens], at least as many as the limit.
            steps: how many single tokens will follow at most.
        """
        del steps
        for chunk in torch.split(ids[:, : self.size.limit], CHUNK, dim=1):
            self.feed(chunk)

    def begin(self, ids: torch.Tensor) -> None:  # noqa: B027 - only a loop must know its text
        """Announces the text that will be fed [1, tokens]."""

    def hold(self) -> None:  # noqa: B027 - a bounded cache holds its length by itself
        """Brings a cache that grows back to its length, outside of every measured time."""

    def work(self) -> list[tuple[Any, str]]:
        """Calls that cache work happens in besides the attention modules: objects and names of attributes."""
        return []

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that the cache stores."""
        for layer in self.memory.layers:
            yield from (layer.keys, layer.values)

    def cache_bytes(self) -> int:
        """What the cache's tensors occupy [bytes]."""
        return sum(one.numel() * one.element_size() for one in self.tensors())


class Dynamic(Adapter):
    """Stock `DynamicCache`: everything is kept; while speed is measured it is held at the limit."""

    exact_calls = True

    def fresh(self) -> Any:
        """An empty cache."""
        return importlib.import_module("transformers").DynamicCache(config=self.model.config)

    def hold(self) -> None:
        """Drops the newest token."""
        self.memory.crop(-1)


class Static(Adapter):
    """Stock `StaticCache`, as long as the limit; it has no room for more."""

    def fresh(self) -> Any:
        """An empty cache."""
        cache = importlib.import_module("transformers").StaticCache
        return cache(config=self.model.config, max_cache_len=self.size.limit)

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Feeds tokens until the room that is left is what the steps need; all of it is attended to anyway."""
        if steps >= self.size.limit:
            raise RefusalError(f"{steps} steps do not fit a static cache of {self.size.limit} tokens")
        for chunk in torch.split(ids[:, : self.size.limit - steps], CHUNK, dim=1):
            self.feed(chunk)

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """As the others, with an error where transformers would write behind the end."""
        seen = int(self.memory.get_seq_length())
        if seen + ids.shape[1] > self.size.limit:
            raise RefusalError(f"full after {self.size.limit} tokens")
        return super().feed(ids, mask)


class Ours(Adapter):
    """`sinkwindow.StreamingCache` with buffer 0: the paper's algorithm, the size that the others have."""

    packages = ("sinkwindow",)
    exact_calls = True
    buffer: ClassVar[int] = 0

    def start(self, size: Size) -> None:
        """Takes the hooks of the cache before off the model."""
        if self.memory is not None:
            self.memory.detach()
        super().start(size)

    def fresh(self) -> Any:
        """An empty cache."""
        cache = importlib.import_module("sinkwindow").StreamingCache
        return cache(self.model, num_sinks=self.size.sinks, window=self.size.window, buffer=self.buffer)

    def work(self) -> list[tuple[Any, str]]:
        """Evictions happen before and after the layers."""
        return [(self.memory, name) for name in ("_begin", "_end")]

    def cache_bytes(self) -> int:
        """All that is allocated [bytes]."""
        return int(self.memory.nbytes)


class OursBuffered(Ours):
    """The same with the buffer that `StreamingCache` has by default."""

    buffer = 64


class IndexSelect(Adapter):
    """Our reference's loop: a stock cache compressed with `index_select` between steps; one row, token by token."""

    packages = ("sinkwindow",)

    def fresh(self) -> Any:
        """Nothing: the loop starts with the first token."""
        self._stream: Any = None

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The loop's logits of tokens that `begin` announced."""
        if ids.shape[0] != 1 or mask is not None:
            raise RefusalError("takes one row without padding")
        if self._stream is None:
            raise RefusalError("reads a text token by token, it has no calls to compare")
        return torch.stack([next(self._stream) for _ in range(ids.shape[1])])[None]

    def begin(self, ids: torch.Tensor) -> None:
        """Announces the text [1, tokens]."""
        stream = importlib.import_module("sinkwindow_reference").stream_by_index_select
        sizes = {"num_sinks": self.size.sinks, "window": self.size.window}
        self._stream = stream(self.model, ids, max_new_tokens=0, **sizes)

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Feeds as many tokens as the limit, one by one."""
        self.begin(ids[:, : self.size.limit + steps + 1])
        self.feed(ids[:, : self.size.limit])

    def work(self) -> list[tuple[Any, str]]:
        """The loop compresses behind the layers."""
        return [(importlib.import_module("sinkwindow_reference.models.loop"), "_compress")]

    def tensors(self) -> Iterator[torch.Tensor]:
        """The layers of the loop's own cache."""
        for layer in self._stream.gi_frame.f_locals["cache"].layers:
            yield from (layer.keys, layer.values)


class Reference(Adapter):
    """Our reference: no cache, every call starts again from the first token."""

    packages = ("sinkwindow",)
    exact_calls = True

    def fresh(self) -> Any:
        """Token ids are all that is remembered."""
        return

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """All tokens so far again, the last ones' logits."""
        self.memory = ids if self.memory is None else torch.cat([self.memory, ids], dim=1)
        logits: torch.Tensor = importlib.import_module("sinkwindow_reference").reference_logits(
            self.model, self.memory, mask, num_sinks=self.size.sinks, window=self.size.window, upcast=False
        )
        return logits[:, -ids.shape[1] :]

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Has nothing to fill."""
        del ids, steps
        raise RefusalError("keeps no cache: every step reads all from the first token again")
