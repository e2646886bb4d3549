"""Peak memory of a run: of the process, sampled while the run is timed, or of its tensors, exact, in a run of its own.

A GPU's allocator keeps its own peak. A CPU has none, so a thread samples the resident set of the process, after the
garbage collector and the C library have given back what earlier runs left behind. Where a few percent matter, torch's
profiler tells of every tensor that is allocated or freed; it slows a run down, so nothing is timed then.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch

from sinkwindow.lab.errors import require
from sinkwindow.lab.records import MemoryRecord

INTERVAL = 0.01  # between two samples [s]: a decode step of a small model on a CPU takes four times as long


def _nothing() -> None:
    """Nothing runs any more."""


@dataclass
class Watch:
    """What a block needs, so far and once it has ended."""

    device: torch.device
    weight_bytes: int
    before_bytes: int = 0
    peak_bytes: int = 0
    reserved_peak_bytes: int | None = None
    look: Callable[[], None] = _nothing  # brings the figures up to date while the block runs

    def record(self) -> MemoryRecord:
        """What was seen so far."""
        self.look()
        return MemoryRecord(
            device="cuda" if self.device.type == "cuda" else "cpu",
            weight_bytes=self.weight_bytes,
            before_bytes=self.before_bytes,
            peak_bytes=self.peak_bytes,
            reserved_peak_bytes=self.reserved_peak_bytes,
        )


@contextmanager
def peak_memory(device: torch.device, weight_bytes: int) -> Iterator[Watch]:
    """Watches the memory of a block.

    Args:
        device: where the model runs.
        weight_bytes: the model's parameters [bytes].

    Yields:
        A watch, complete once the block has ended.
    """
    give_back()
    watch = Watch(device, weight_bytes)
    manager = _cuda_peak(watch) if device.type == "cuda" else _resident_peak(watch)
    with manager:
        yield watch


def tensor_peak(device: torch.device, work: Callable[[], object]) -> int:
    """Runs `work` and counts what its tensors need at most, all at once.

    Args:
        device: where they are.
        work: what is run; how long it takes means nothing.

    Returns:
        The highest sum of live tensors above what there was before [bytes].
    """
    if device.type == "cuda":
        with peak_memory(device, 0) as watch:
            work()
        return watch.peak_bytes - watch.before_bytes
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes to the terminal that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = cast("Any", profiler).profiler.kineto_results
    changes = sorted((one.start_ns(), int(one.nbytes())) for one in results.events() if one.name() == "[memory]")
    return max(itertools.accumulate((count for _, count in changes), initial=0))


def give_back() -> None:
    """Frees what is garbage, down to the operating system where the C library can (glibc)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def _cuda_peak(watch: Watch) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(watch.device)
    watch.before_bytes = torch.cuda.memory_allocated(watch.device)

    def look() -> None:
        watch.peak_bytes = torch.cuda.max_memory_allocated(watch.device)
        watch.reserved_peak_bytes = torch.cuda.max_memory_reserved(watch.device)

    watch.look = look
    try:
        yield
    finally:
        torch.cuda.synchronize()
        look()
        watch.look = _nothing


@contextmanager
def _resident_peak(watch: Watch) -> Iterator[None]:
    process = require("psutil").Process()

    def resident() -> int:
        return int(process.memory_info().rss)

    def look() -> None:
        watch.peak_bytes = max(watch.peak_bytes, resident())

    watch.before_bytes = watch.peak_bytes = resident()
    watch.look, stop = look, threading.Event()
    sampler = threading.Thread(target=_sample, args=(look, stop), daemon=True)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join()
        look()
        watch.look = _nothing


def _sample(look: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(INTERVAL):
        look()
