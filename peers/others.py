"""Peers that need their own environment; their packages are imported by name, since ours does not have them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from peers.adapters import Adapter, RefusalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class AttentionSinks(Adapter):
    """`attention_sinks` 0.4.0: replaces forwards, and cuts tuples of keys and values after each call."""

    packages = ("attention_sinks",)

    def load(self, folder: str) -> Any:
        """Return the model as `attention_sinks` loads it."""
        auto = importlib.import_module("attention_sinks").AutoModelForCausalLM
        return auto.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)

    def fresh(self) -> Any:
        """Set the sizes on the object that cuts the cache; without keys, the cache is empty."""
        cut = self.model.model.attention_sink_kv_cache
        cut.attention_sink_size, cut.attention_sink_window_size = self.size.sinks, self.size.window
        cut.cache_size = self.size.limit

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model with tuples of keys and values; cut the mask to their length, as its `generate` does."""
        past = 0 if self.memory is None else self.memory[0][0].shape[2]
        options = {} if mask is None else {"attention_mask": mask[:, : past + ids.shape[1]]}
        output = self.model(input_ids=ids, past_key_values=self.memory, use_cache=True, **options)
        self.memory = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits

    def work(self) -> list[tuple[Any, str]]:
        """Return the object that cuts the cache after the layers."""
        return [(self.model.model, "attention_sink_kv_cache")]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the keys and values of the layers."""
        for layer in self.memory:
            yield from layer


class Sink(Adapter):
    """`SinkCache` of transformers 4.48, with plain forward calls."""

    def fresh(self) -> Any:
        """Return an empty cache."""
        cache = importlib.import_module("transformers").SinkCache
        return cache(window_length=self.size.limit, num_sink_tokens=self.size.sinks)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the keys and values of the layers."""
        yield from self.memory.key_cache
        yield from self.memory.value_cache


class KVPress(Adapter):
    """kvpress: `StreamingLLMPress` in `KeyRerotationPress` compresses a prompt; after that, the cache grows."""

    packages = ("kvpress",)
    streams = False
    batch_prompt = 24
    ratio: ClassVar[float] = 0.5  # share of a prompt that is dropped

    def fresh(self) -> Any:
        """Return an empty stock cache; the press is applied to the prompt."""
        return importlib.import_module("transformers").DynamicCache()

    def prompt(self, ids: torch.Tensor, kept: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read a prompt in one call and compress it.

        Raises:
            RefusalError: if another number of tokens was kept.
        """
        presses = importlib.import_module("kvpress")
        dropped = 1 - (kept + 0.5) / ids.shape[1]  # half a token more, so that the number is not rounded down
        press = presses.StreamingLLMPress(compression_ratio=dropped, n_sink=self.size.sinks)
        with presses.KeyRerotationPress(press=press)(self.model):
            logits = super().feed(ids, mask)
        if self.memory.get_seq_length() != kept:
            raise RefusalError(f"kept {self.memory.get_seq_length()} tokens, not {kept}")
        return logits

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model; compress a first call that exceeds the limit, and no other, since the press is for prompts."""
        seen = self.memory.get_seq_length()
        if seen == 0 and ids.shape[1] > self.size.limit:
            return self.prompt(ids, self.size.limit, mask)
        return super().feed(ids, None if mask is None else mask[:, -(seen + ids.shape[1]) :])

    def fill(self, ids: torch.Tensor, steps: int) -> None:
        """Read a prompt of twice the limit and drop half of it."""
        del steps
        self.prompt(ids[:, : round(self.size.limit / self.ratio)], self.size.limit)

    def hold(self) -> None:
        """Drop the newest token, since the press does not act after the prompt."""
        self.memory.crop(-1)
