"""Peak memory of a piece of work, counted in its tensors: exact, and the same in every run.

A GPU's allocator keeps its own peak. A CPU has none, so torch's profiler tells of every tensor that is allocated or
freed; it slows the work down, so nothing is timed then. What the process holds beside its tensors is not counted: its
resident set moves by tens of megabytes from one run to the next, more than a small model's cache.
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

from sinkwindow.lab.configurations import Configuration
from sinkwindow.lab.records import MemoryRecord
from sinkwindow.lab.sessions import Session, open_session

COUNTED = ("cpu", "cuda")  # devices that tell
PIECE = "sinkwindow: piece {}"  # what the profiler calls a piece of work
FEED = 256  # tokens of a call that brings a session to the steps that are looked at [tokens]


def tensor_peak(device: torch.device, work: Callable[[], object]) -> int:
    """Runs `work` and counts what its tensors need at most, all at once.

    Args:
        device: where they are.
        work: what is run; on a CPU how long it takes means nothing.

    Returns:
        The highest sum of live tensors above what there was before [bytes].
    """
    return tensor_peaks(device, [work])[0]


def tensor_peaks(device: torch.device, pieces: Sequence[Callable[[], object]]) -> list[int]:
    """Runs pieces of work, one after the other, and counts what each needs at most, all tensors at once.

    What one piece frees of another's is known only because all are watched together.

    Args:
        device: where the tensors are.
        pieces: what is run; on a CPU how long it takes means nothing.

    Returns:
        For each piece the highest sum of live tensors above what there was before the first one [bytes].
    """
    gc.collect()  # what is garbage now must not be freed, and subtracted, later
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes to the terminal that it starts and stops
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
) -> list[MemoryRecord | None]:
    """Peaks of a generation up to each number of tokens.

    The prompt and the last steps of each stage are looked at; between them the session is fed in long calls, which
    leave the cache as single tokens would.

    Args:
        configuration: how to remember.
        model: a causal language model in eval mode.
        prompt: [1, tokens], on the model's device; its tokens are fed again and again.
        stages: ascending numbers of new tokens [tokens].

    Returns:
        A record per stage; None where the device does not tell.
    """
    if prompt.device.type not in COUNTED:
        return [None] * len(stages)
    session, seen = open_session(configuration, model), prompt.shape[1]
    pieces: list[Callable[[], object]] = [partial(session.feed, prompt, last_only=True)]
    for stage in stages:
        end = prompt.shape[1] + stage - 1  # the last token is not fed
        steps = min(_cycle(configuration), end - seen)
        pieces += [partial(_read_on, session, prompt, end - steps - seen), partial(_take, session, prompt, steps)]
        seen = end
    try:
        first, *peaks = tensor_peaks(prompt.device, pieces)
    finally:
        session.close()
    highest = itertools.accumulate([first, *peaks[1::2]], max)  # the long calls are not the generation's
    return [MemoryRecord(weight_bytes=weight_bytes(model), tensor_bytes=peak) for peak in list(highest)[1:]]


def _cycle(configuration: Configuration) -> int:
    """Steps of which some evicts, some meets the longest list, and some moves the window to the front of its slots.

    A list is longest once in B + 1 steps. The free slots, a sixteenth of it, eight at least, last as many more.
    """
    if configuration.kind in ("baseline", "recompute"):
        return 1
    sinks, window, buffer = configuration.limits
    return buffer + 1 + max(8, (sinks + window + buffer) // 16) + 1


def weight_bytes(model: PreTrainedModel) -> int:
    """A model's parameters [bytes]."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def give_back() -> None:
    """Frees what is garbage, down to the operating system where the C library can (glibc)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _read_on(session: Session, text: torch.Tensor, count: int) -> None:
    """Feeds some more tokens in long calls."""
    step = min(FEED, text.shape[1])
    for start in range(0, count, step):
        session.read(text[:, : min(step, count - start)])


def _take(session: Session, text: torch.Tensor, steps: int) -> None:
    """Feeds single tokens."""
    for _ in range(steps):
        session.feed(text[:, :1], last_only=True)
