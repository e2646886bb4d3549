"""Configurations as data: one registry for perplexity, speed, tables and benchmarks.

A name is a kind and its numbers, such as `streaming_S_W` or `streaming_S_W_B`; `sinkwindow configs` lists the forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sinkwindow_lab.errors import LabError, check_number
from sinkwindow_lab.records import Configuration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkwindow_lab.ways.sessions import Session

W = r"_(?P<window>\d+)"
S_W_B = rf"_(?P<num_sinks>\d+){W}(?:_(?P<buffer>\d+))?"
DIGITS = 15  # most of a number
NO_SINKS = S_W_B.replace(r"\d+", "0", 1)
# What each kind is: S sinks, W recent tokens, buffer B.
MEANINGS = {
    "baseline": "dense attention over the whole text, a growing cache",
    "streaming": "the first S and the last W tokens, positions are ranks in the cache",
    "static": "streaming at fixed shapes, its steps compiled: one graph for all of them",
    "window": "the last W tokens, no sinks, positions are ranks in the cache",
    "call": "evicts once after each call: a call sees itself whole, then the cache is cut to S + W",
    "recompute": "sliding window with re-computation: the last W tokens run again for every token",
    "stale_ranks": "wrong on purpose: cached keys keep the rotation of the rank at which they were inserted",
    "eager_eviction": "wrong on purpose: in calls of B tokens the cache is cut to S + W before attention, not after it",
    "absolute": "the tokens of streaming at their original positions, refused beyond the model's trained length",
}


@dataclass(frozen=True)
class Shape:
    """The form of the names of one kind: the kind, then a pattern of numbers; `buffer` is the default of B."""

    kind: str
    numbers: str
    buffer: int | None
    example: str
    ablation: bool = False


SHAPES = (
    Shape("baseline", "", None, "baseline"),
    Shape("streaming", S_W_B, 64, "streaming_8_256_64"),
    Shape("static", S_W_B, 64, "static_8_256_64"),
    Shape("window", NO_SINKS, 0, "window_0_264"),
    Shape("call", S_W_B, 0, "call_8_256"),
    Shape("recompute", W, None, "recompute_264"),
    Shape("stale_ranks", S_W_B, 64, "stale_ranks_8_256", ablation=True),
    Shape("eager_eviction", S_W_B, 64, "eager_eviction_8_256", ablation=True),
    Shape("absolute", S_W_B, 64, "absolute_8_256", ablation=True),
)


def parse(name: str) -> Configuration:
    """Parse a configuration's name, such as `baseline` or `streaming_8_256`; see `SHAPES`."""
    for shape in SHAPES:
        found = re.fullmatch(shape.kind + shape.numbers, name, re.ASCII)
        if found is not None:
            given = {key: value for key, value in found.groupdict().items() if value is not None}
            if max(map(len, given.values()), default=0) > DIGITS:
                raise LabError(f"configuration {name!r}: no machine keeps so many tokens; choose smaller numbers")
            numbers = {"buffer": shape.buffer} | {key: int(value) for key, value in given.items()}
            if numbers.get("window") == 0:
                raise LabError(f"configuration {name!r} has window 0: it must keep at least one recent token")
            words = {"kind": shape.kind, "ablation": shape.ablation, "meaning": MEANINGS[shape.kind]}
            return Configuration.model_validate({"name": name, **words, **numbers})
    shapes = ", ".join(shape.example for shape in SHAPES)
    raise LabError(f"unknown configuration {name!r}; names look like {shapes}")


def parse_list(names: str) -> list[Configuration]:
    """Parse distinct names separated by commas, such as `baseline,streaming_8_256`, in the given order."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise LabError(f"no configuration in {names!r}; give names such as baseline,streaming_8_256")
    repeated = sorted({name for name in wanted if wanted.count(name) > 1})
    if repeated:
        raise LabError(f"configuration {repeated[0]!r} is given twice; name each one once")
    return [parse(name) for name in wanted]


def streaming(num_sinks: int, window: int, buffer: int) -> Configuration:
    """Return the streaming configuration with these numbers (S >= 0, W >= 1, B >= 0), under its full name."""
    for option, value, least in (("sinks=", num_sinks, 0), ("window=", window, 1), ("buffer=", buffer, 0)):
        check_number(option, value, least)
    return parse(f"streaming_{num_sinks}_{window}_{buffer}")


def open_session(configuration: Configuration, model: PreTrainedModel) -> Session:
    """Open a fresh session; call `close` when done."""
    from sinkwindow_lab.ways import ablations, sessions

    if configuration.kind == "baseline":
        return sessions.DenseSession(model)
    if configuration.kind == "recompute":
        return sessions.RecomputeSession(model, configuration.size)
    kinds: dict[str, Callable[..., Session]] = {
        "stale_ranks": ablations.StaleRanksSession,
        "eager_eviction": ablations.EagerEvictionSession,
        "absolute": ablations.AbsoluteSession,
        "call": partial(sessions.StreamingSession, evict="call"),
        "static": sessions.StaticSession,
    }
    return kinds.get(configuration.kind, sessions.StreamingSession)(model, *configuration.limits)
