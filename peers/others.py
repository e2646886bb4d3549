"""Peers that need an environment of their own; their packages are imported by name, for they are not in ours."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from peers.adapters import Adapter, RefusalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class AttentionSinks(Adapter):
    """`attention_sinks` 0.4.0: replaced forwards, tuples of keys and values that are cut after each call."""

    packages = ("attention_sinks",)

    def load(self, folder: str) -> Any:
        """The model with its sinks injected."""
        return importlib.import_module("attention_sinks").AutoModelForCausalLM.from_pretrained(folder)

    def fresh(self) -> Any:
        """No keys; the sizes live on the injected object."""
        cut = self.model.model.attention_sink_kv_cache
        cut.attention_sink_size, cut.attention_sink_window_size = self.size.sinks, self.size.window
        cut.cache_size = self.size.limit

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Keys and values travel as tuples; the mask is cut to their length, as its own `generate` does."""
        past = 0 if self.memory is None else self.memory[0][0].shape[2]
        options = {} if mask is None else {"attention_mask": mask[:, : past + ids.shape[1]]}
        output = self.model(input_ids=ids, past_key_values=self.memory, use_cache=True, **options)
        self.memory = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits

    def work(self) -> list[tuple[Any, str]]:
        """The cut after the layers."""
        return [(self.model.model, "attention_sink_kv_cache")]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Keys and values of the layers."""
        for layer in self.memory:
            yield from layer


class Sink(Adapter):
    """`SinkCache` of transformers 4.48, with plain forward calls."""

    def fresh(self) -> Any:
        """An empty cache."""
        cache = importlib.import_module("transformers").SinkCache
        return cache(window_length=self.size.limit, num_sink_tokens=self.size.sinks)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Keys and values of the layers."""
        yield from self.memory.key_cache
        yield from self.memory.value_cache


class KVPress(Adapter):
    """kvpress: `StreamingLLMPress` in its `KeyRerotationPress` compresses a prompt; then the cache grows."""

    packages = ("kvpress",)
    streams = False
    batch_prompt = 24
    ratio: ClassVar[float] = 0.5  # of a prompt that is dropped

    def fresh(self) -> Any:
        """An empty stock cache; the press acts on the prompt."""
        return importlib.import_module("transformers").DynamicCache()

    def prompt(self, ids: torch.Tensor, kept: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Reads a prompt in one call and compresses it.

        Args:
            ids: [batch, tokens].
            kept: how many tokens stay [tokens].
            mask: 1 for real tokens [batch, tokens].

        Returns:
            Logits [batch, tokens, vocab], of the whole prompt attending to all of itself.

        Raises:
            RefusalError: if another number of tokens stayed.
        """
        presses = importlib.import_module("kvpress")
        dropped = 1 - (kept + 0.5) / ids.shape[1]  # half a token against rounding down
        press = presses.StreamingLLMPress(compression_ratio=dropped, n_sink=self.size.sinks)
        with presses.KeyRerotationPress(press=press)(self.model):
            logits = super().feed(ids, mask)
        if self.memory.get_seq_length() != kept:
            raise RefusalError(f"kept {self.memory.get_seq_length()} tokens, not {kept}")
        return logits

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """A first call above the limit is compressed to it; later ones are not, for the press is made for a prompt."""
        seen = self.memory.get_seq_length()
        if seen == 0 and ids.shape[1] > self.size.limit:
            return self.prompt(ids, self.size.limit, mask)
        return super().feed(ids, None if mask is None else mask[:, -(seen + ids.shape[1]) :])

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """A prompt of which half is dropped leaves as many tokens as the limit."""
        del steps
        self.prompt(ids[:, : round(self.size.limit / self.ratio)], self.size.limit)

    def hold(self) -> None:
        """Drops the newest token: nothing else would, after the prompt."""
        self.memory.crop(-1)
