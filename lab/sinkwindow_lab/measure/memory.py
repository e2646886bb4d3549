"""Peak memory of a piece of work, counted in its tensors: exact, and the same in every run.

A GPU's allocator records its own peak. For a CPU, torch's profiler records every tensor that is allocated or freed; it
slows the work down, so nothing is timed then. What the process holds besides its tensors is not counted: its resident
set varies by tens of megabytes between runs, more than a small model's cache.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.measure.clock import repeated
from sinkwindow_lab.records import Configuration
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import Reader

COUNTED = ("cpu", "cuda")  # devices that report their memory
PIECE = "sinkwindow: piece {}"  # name of a piece of work in the profiler


def tensor_peak(device: torch.device, work: Callable[[], object]) -> int:
    """Run `work`, slowly, and return the peak of its live tensors above what was allocated before [bytes]."""
    return tensor_peaks(device, [work])[0]


def tensor_peaks(device: torch.device, pieces: Sequence[Callable[[], object]]) -> list[int]:
    """Run pieces of work in order and return the peak of each above what was allocated before the first [bytes]."""
    gc.collect()  # otherwise it would be freed, and subtracted, later
    return _allocator_peaks(device, pieces) if device.type == "cuda" else _profiled_peaks(pieces)


def _allocator_peaks(device: torch.device, pieces: Sequence[Callable[[], object]]) -> list[int]:
    torch.cuda.synchronize()
    before, peaks = torch.cuda.memory_allocated(device), []
    for piece in pieces:
        torch.cuda.reset_peak_memory_stats(device)
        piece()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return peaks


def _profiled_peaks(pieces: Sequence[Callable[[], object]]) -> list[int]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it reports its start and stop on the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for number, piece in enumerate(pieces):
            with torch.profiler.record_function(PIECE.format(number)):
                piece()
    events = cast("Any", profiler).profiler.kineto_results.events()
    changes = [(one.start_ns(), int(one.nbytes())) for one in events if one.name() == "[memory]"]
    changes.sort(key=operator.itemgetter(0))
    begun = {one.name(): one.start_ns() for one in events}
    starts = [begun[PIECE.format(number)] for number in range(len(pieces))]
    peaks, live = [0] * len(pieces), 0
    for number, (start, end) in enumerate(itertools.pairwise([*starts, math.inf])):
        own = [count for time, count in changes if start <= time < end]
        sums = list(itertools.accumulate(own, initial=live))
        peaks[number], live = max(sums), sums[-1]
    return peaks


def generation_peaks(
    configuration: Configuration, model: PreTrainedModel, prompt: torch.Tensor, stages: Sequence[int]
) -> list[int | None]:
    """Return the peak of a generation's tensors up to each number of tokens [bytes]; None if the device has no count.

    The prompt and the last steps of each stage are watched; between them the session is fed in long calls, which leave
    the cache as single tokens would. `prompt` ([1, tokens], on the model's device) is fed repeatedly.
    """
    if prompt.device.type not in COUNTED:
        return [None] * len(stages)
    with open_session(configuration, model) as session:
        reader, seen = Reader(session, prompt), 0
        pieces: list[Callable[[], object]] = [partial(session.feed, prompt, last_only=True)]
        for stage in stages:
            steps = min(_cycle(configuration), stage - 1 - seen)  # the last token is not fed
            seen = stage - 1
            pieces += [partial(reader.read_to, seen - steps), repeated(reader.step, steps)]
        first, *peaks = tensor_peaks(prompt.device, pieces)
    highest = itertools.accumulate([first, *peaks[1::2]], max)  # the long calls are not part of the generation
    found: list[int | None] = [*highest]
    return found[1:]


def _cycle(configuration: Configuration) -> int:
    """Return steps that cover an eviction, the longest list (of B + 1 steps), and a move of the window to the front."""
    if configuration.kind in ("baseline", "recompute"):
        return 1
    sinks, window, buffer = configuration.limits
    return buffer + 1 + max(8, (sinks + window + buffer) // 16) + 1


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the size of a model's parameters [bytes]."""
    return sum(one.nbytes for one in model.parameters())


def give_back() -> None:
    """Free garbage, and return it to the operating system if the C library can (glibc)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
