"""What is measured of a peer, the same for each; runs inside the peer's own environment, on torch alone."""

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
SMALL = Size(4, 12)  # for questions of right or wrong: many evictions in few tokens
PADDING = 3  # of the shorter row [tokens]
SINGLE_STEPS = 24
TAIL = 4  # single steps after the one call [tokens]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Bench:
    """An adapter, its text, and the measurements."""

    def __init__(self, adapter: Adapter, ids: torch.Tensor) -> None:
        """Remembers both.

        Args:
            adapter: the peer.
            ids: [1, tokens], the text.
        """
        self.adapter = adapter
        self.ids = ids
        self._next = 0

    def fill(self, sinks: int, window: int, steps: int) -> dict[str, float]:
        """Fills the cache and warms up, and watches the memory meanwhile.

        Args:
            sinks: S [tokens].
            window: W [tokens].
            steps: how many steps will follow at most.

        Returns:
            Bytes of the cache, and the growth of the process's memory at its peak [bytes].
        """
        size = Size(sinks, window)
        self.adapter.start(size)
        self.adapter.begin(self.ids)
        self.adapter.feed(self.ids[:, : size.sinks])  # reads weights that were only mapped from the disk
        self.adapter.start(size)
        before = resident()
        reset_peak()
        self.adapter.fill(self.ids, steps + WARM_UP)
        self._next = size.limit
        self.steps(WARM_UP)
        return {"cache_bytes": self.adapter.cache_bytes(), "growth_bytes": max(0, peak() - before)}

    def steps(self, count: int) -> dict[str, list[float]]:
        """Times of single-token steps [ms]; a stop-watch around the model's call and one argmax."""
        times = []
        for _ in range(count):
            token = self._token()
            start = time.perf_counter()
            self.adapter.feed(token)[:, -1].argmax(dim=-1)
            times.append(1e3 * (time.perf_counter() - start))
            self.adapter.hold()
        return {"ms": times}

    def attention(self, count: int) -> dict[str, list[float]]:
        """Times inside the attention modules less their projections, and in cache work elsewhere, per step [ms]."""
        times = []
        for _ in range(count):
            token = self._token()
            with attention_watched(self.adapter) as seconds:
                self.adapter.feed(token)
            times.append(1e3 * sum(seconds))
            self.adapter.hold()
        return {"ms": times}

    def perplexity(self, sinks: int, window: int, tokens: int) -> dict[str, float]:
        """Perplexity of a text from its start [1], as the peer's own rule streams it.

        Raises:
            RefusalError: if the peer does not stream.
        """
        if not self.adapter.streams:
            raise RefusalError("compresses a prompt once: what follows it is not evicted")
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
        """Whether one call with so many tokens, and three single ones after it, give finite logits."""
        self.adapter.start(Size(sinks, window))
        self.adapter.begin(self.ids)
        finite = [bool(self.adapter.feed(self.ids[:, :tokens])[:, -1].isfinite().all())]
        following = self.ids[:, tokens : tokens + 3].chunk(3, dim=1)
        finite += [bool(self.adapter.feed(one).isfinite().all()) for one in following]
        return {"works": all(finite)}

    def chunks(self) -> dict[str, float]:
        """Largest difference of logits between one call and one call per token, over several evictions.

        Single tokens follow the one call, too: some caches only show then what they did to it.
        """
        ids = self.ids[:, : SMALL.limit + SINGLE_STEPS + TAIL]
        whole = self._decode(ids, SMALL.limit + SINGLE_STEPS, None)
        single = self._decode(ids, 1, None)
        return {"difference": float((whole - single).abs().max())}

    def batch(self) -> dict[str, float]:
        """Largest difference of logits between a left-padded row of a batch and the row alone, over several evictions.

        A prompt that fits, then single steps: the calls in which every peer is at its best.
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
        """Logits of a prompt in one call and of the rest in single steps."""
        self.adapter.start(SMALL)
        bounds = [0, *range(prompt, ids.shape[1] + 1)]
        parts = [
            self.adapter.feed(ids[:, start:stop], None if mask is None else mask[:, :stop])
            for start, stop in pairwise(bounds)
        ]
        return torch.cat(parts, dim=1)

    def _calls(self, tokens: int, limit: int) -> list[int]:
        """Lengths of the calls that read a text exactly."""
        if self.adapter.exact_calls:
            whole, rest = divmod(tokens, CHUNK)
            return [CHUNK] * whole + [rest] * bool(rest)
        if isinstance(self.adapter, IndexSelect):
            return [1] * tokens
        return [min(tokens, limit)] + [1] * max(0, tokens - limit)

    def _token(self) -> torch.Tensor:
        """The next token of the text, from its start again at its end."""
        index = self._next % self.ids.shape[1]
        self._next += 1
        return self.ids[:, index : index + 1]


@contextmanager
def attention_watched(adapter: Adapter) -> Iterator[list[float]]:
    """Times attention while the block runs: the modules named `self_attn` without their projections.

    Args:
        adapter: a started peer.

    Yields:
        Seconds, to be summed once the block has ended; those of the projections are negative.

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
    """A function that notes how long it took.

    Args:
        function: any function.
        seconds: where the time is added.
        sign: 1, or -1 for time that does not count.

    Returns:
        The function that does the same.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(sign * (time.perf_counter() - start))

    return run


def resident() -> int:
    """Resident set after garbage has been given back [bytes]; 0 where the system does not say."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Lets Linux start a new high-water mark of this process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """The high-water mark of the resident set [bytes]."""
    return _status("VmHWM")


def _status(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0
