"""How much each study measures, in full and in a quick run: the same questions over fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyPlan:
    """Lengths are in tokens unless they say lines.

    Attributes:
        mistakes: rows of the table of others' mistakes.
        mistakes_tokens: text read for it.
        sinks: numbers of sinks at one size of cache.
        sinks_cache: that size, S + W.
        sinks_tokens: text read for it.
        sizes: sizes of cache, S + W.
        sizes_tokens: text read for it.
        where: configurations, of those in `sizes`, compared with the dense model token by token.
        along: configurations for the loss along a text.
        along_tokens: that text's length.
        along_bin: targets per point of the picture.
        places: tokens seen when a token is timed.
        step_cache: size of cache of streaming and re-computation in that picture.
        step_sizes: sizes of cache in the other picture of time per token.
        step_repeats: timed tokens per place.
        recompute_repeats: the same for re-computation, which runs its whole window for each.
        recall: configurations of the recall test.
        recall_seeds: one text each.
        recall_lines: ordinary lines between a fact and its question [lines].
    """

    mistakes: tuple[str, ...]
    mistakes_tokens: int
    sinks: tuple[int, ...]
    sinks_cache: int
    sinks_tokens: int
    sizes: tuple[int, ...]
    sizes_tokens: int
    where: tuple[str, ...]
    along: tuple[str, ...]
    along_tokens: int
    along_bin: int
    places: tuple[int, ...]
    step_cache: int
    step_sizes: tuple[int, ...]
    step_repeats: int
    recompute_repeats: int
    recall: tuple[str, ...]
    recall_seeds: tuple[int, ...]
    recall_lines: tuple[int, ...]


MISTAKES = (
    "baseline",
    "streaming_8_256",
    "streaming_8_512",
    "window_0_264",
    "call_8_256",
    "absolute_8_256",
    "eager_eviction_8_256",
    "stale_ranks_8_256",
)
FULL = StudyPlan(
    mistakes=MISTAKES,
    mistakes_tokens=2000,
    sinks=(0, 1, 2, 4, 8),
    sinks_cache=264,
    sinks_tokens=2000,
    sizes=(256, 512, 1024, 2048),
    sizes_tokens=3072,
    where=("streaming_4_252_0", "streaming_4_1020_0"),
    along=("baseline", "window_0_1024", "streaming_4_1020_0"),
    along_tokens=16_385,
    along_bin=512,
    places=(512, 1024, 2048, 4096),
    step_cache=1024,
    step_sizes=(256, 512, 1024, 2048, 4096),
    step_repeats=15,
    recompute_repeats=1,
    recall=("baseline", "streaming_4_252_0", "streaming_4_508_0"),
    recall_seeds=(0, 1, 2),
    recall_lines=(1, 4, 8, 12, 20, 28, 40, 64),
)
QUICK = StudyPlan(
    mistakes=MISTAKES,
    mistakes_tokens=700,
    sinks=(0, 1, 2, 4, 8),
    sinks_cache=264,
    sinks_tokens=700,
    sizes=(256, 512),
    sizes_tokens=700,
    where=("streaming_4_252_0",),
    along=("baseline", "window_0_256", "streaming_4_252_0"),
    along_tokens=1281,
    along_bin=128,
    places=(256, 512, 1024),
    step_cache=256,
    step_sizes=(256, 512),
    step_repeats=7,
    recompute_repeats=1,
    recall=("baseline", "streaming_4_252_0"),
    recall_seeds=(0,),
    recall_lines=(1, 8, 20, 40),
)
