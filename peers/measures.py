"""The measurements, the same for each peer; they run in the peer's own environment and need only torch."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peers.adapters import CHUNK, Adapter, IndexSelect, RefusalError, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WARM_UP = 8  # steps that are not timed
SMALL = Size(4, 12)  # for tests of correctness: many evictions in few tokens
PADDING = 3  # of the shorter row of the batch [tokens]
SINGLE_STEPS = 24
TAIL = 4  # single tokens after the one call [tokens]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Bench:
    """An adapter, its text, and the measurements."""

    def __init__(self, adapter: Adapter, ids: torch.Tensor) -> None:
        """Store both; `ids` is the text, [1, tokens]."""
        self.adapter = adapter
        self.ids = ids
        self._next = 0

    def fill(self, sinks: int, window: int, steps: int) -> dict[str, float]:
        """Fill the cache and warm up; return its size, and how much the process grew at most meanwhile [bytes]."""
        size = Size(sinks, window)
        self.adapter.start(size)
        self.adapter.begin(self.ids)
        self.adapter.feed(self.ids[:, : size.sinks])  # reads weights that were only mapped from disk
        self.adapter.start(size)
        before = resident()
        reset_peak()
        self.adapter.fill(self.ids, steps + WARM_UP)
        self._next = size.limit
        self.steps(WARM_UP)
        return {"cache_bytes": self.adapter.cache_bytes(), "growth_bytes": max(0, peak() - before)}

    def steps(self, count: int) -> dict[str, list[float]]:
        """Return the times of single-token steps [ms]: the model's call and one argmax."""
        times = []
        for _ in range(count):
            token = self._token()
            start = time.perf_counter()
            self.adapter.feed(token)[:, -1].argmax(dim=-1)
            times.append(1e3 * (time.perf_counter() - start))
            self.adapter.hold()
        return {"ms": times}

    def attention(self, count: int) -> dict[str, list[float]]:
        """Return the time per step in attention modules, without projections, and in cache work elsewhere [ms]."""
        times = []
        for _ in range(count):
            token = self._token()
            with attention_watched(self.adapter) as seconds:
                self.adapter.feed(token)
            times.append(1e3 * sum(seconds))
            self.adapter.hold()
        return {"ms": times}

    def perplexity(self, sinks: int, window: int, tokens: int) -> dict[str, float]:
        """Return the perplexity of a text from its start [1] under the peer's own rule.

        Raises:
            RefusalError: if the peer does not stream.
        """
        if not self.adapter.streams:
            raise RefusalError("compresses a prompt once and does not evict later tokens")
        self.adapter.start(Size(sinks, window))
        ids = self.ids[:, :tokens]
        self.adapter.begin(ids)
        total, done, start = 0.0, 0, time.perf_counter()
        for length in self._calls(tokens - 1, sinks + window):
            logits = self.adapter.feed(ids[:, done : done + length])[0].float()
            targets = ids[0, done + 1 : done + 1 + length]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            done += length
        return {"perplexity": math.exp(total / done), "seconds": time.perf_counter() - start}

    def prompt(self, sinks: int, window: int, tokens: int) -> dict[str, bool]:
        """Return whether one call with so many tokens, and three single tokens after it, give finite logits."""
        self.adapter.start(Size(sinks, window))
        self.adapter.begin(self.ids)
        finite = [bool(self.adapter.feed(self.ids[:, :tokens])[:, -1].isfinite().all())]
        following = self.ids[:, tokens : tokens + 3].chunk(3, dim=1)
        finite += [bool(self.adapter.feed(one).isfinite().all()) for one in following]
        return {"works": all(finite)}

    def chunks(self) -> dict[str, float]:
        """Return the largest difference of logits between one call and one call per token, over several evictions.

        Single tokens follow the one call as well, since in some caches an error shows only then.
        """
        ids = self.ids[:, : SMALL.limit + SINGLE_STEPS + TAIL]
        whole = self._decode(ids, SMALL.limit + SINGLE_STEPS, None)
        single = self._decode(ids, 1, None)
        return {"difference": float((whole - single).abs().max())}

    def batch(self) -> dict[str, float]:
        """Return the largest difference of logits between a left-padded row of a batch and the row alone.

        A prompt that fits the cache is followed by single steps over several evictions, which all peers support.
        """
        prompt = self.adapter.batch_prompt
        length = prompt + SINGLE_STEPS
        longer, alone = self.ids[:, :length], self.ids[:, length : 2 * length - PADDING]
        padded = torch.cat([alone[:, :1].expand(1, PADDING), alone], dim=1)
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, :PADDING] = 0
        together = self._decode(torch.cat([longer, padded]), prompt, mask)[1, PADDING:]
        single = self._decode(alone, prompt - PADDING, None)[0]
        return {"difference": float((together - single).abs().max())}

    def _decode(self, ids: torch.Tensor, prompt: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the logits of a prompt in one call and of the rest in single steps."""
        self.adapter.start(SMALL)
        bounds = [0, *range(prompt, ids.shape[1] + 1)]
        parts = [
            self.adapter.feed(ids[:, start:stop], None if mask is None else mask[:, :stop])
            for start, stop in pairwise(bounds)
        ]
        return torch.cat(parts, dim=1)

    def _calls(self, tokens: int, limit: int) -> list[int]:
        """Return the lengths of the calls with which the peer reads a text exactly."""
        if self.adapter.exact_calls:
            whole, rest = divmod(tokens, CHUNK)
            return [CHUNK] * whole + [rest] * bool(rest)
        if isinstance(self.adapter, IndexSelect):
            return [1] * tokens
        return [min(tokens, limit)] + [1] * max(0, tokens - limit)

    def _token(self) -> torch.Tensor:
        """Return the next token of the text; after its end, start again."""
        index = self._next % self.ids.shape[1]
        self._next += 1
        return self.ids[:, index : index + 1]


@contextmanager
def attention_watched(adapter: Adapter) -> Iterator[list[float]]:
    """Yield a list of seconds to be summed after the block: those of `self_attn` modules, less their projections.

    Raises:
        RefusalError: if the model has no such modules.
    """
    modules = [module for name, module in adapter.model.named_modules() if name.endswith("self_attn")]
    if not modules:
        raise RefusalError("has no module named self_attn to time")
    seconds: list[float] = []
    inner = [(getattr(module, name), "forward", -1.0) for module in modules for name in PROJECTIONS]
    outer = [(module, "forward", 1.0) for module in modules]
    outer += [(holder, name, 1.0) for holder, name in adapter.work()]
    old = [(holder, name, vars(holder).get(name), name in vars(holder)) for holder, name, _ in outer + inner]
    for holder, name, sign in outer + inner:
        holder.__dict__[name] = timed(getattr(holder, name), seconds, sign)
    try:
        yield seconds
    finally:
        for holder, name, value, had in old:
            if had:
                holder.__dict__[name] = value
            else:
                del holder.__dict__[name]


def timed(function: Callable[..., Any], seconds: list[float], sign: float) -> Callable[..., Any]:
    """Return a function that does the same as another one and records its time, times `sign`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(sign * (time.perf_counter() - start))

    return run


def resident() -> int:
    """Free garbage and return the resident set size [bytes]; 0 if the system does not report it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Reset the peak of the resident set size (Linux only)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Return the peak of the resident set size [bytes]."""
    return _status("VmHWM")


def _status(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0
