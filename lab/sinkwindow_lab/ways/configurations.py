"""Configurations as data: one registry for perplexity, speed, tables and benchmarks.

| name | what it is |
|---|---|
| `baseline` | dense attention over everything, a growing `DynamicCache` |
| `streaming_S_W[_B]` | `StreamingCache`: S sinks, W recent tokens, buffer B (64 by default) |
| `static_S_W[_B]` | the same at fixed shapes: `static=True`, its steps compiled |
| `window_0_W[_B]` | the same without sinks (B is 0 by default) |
| `call_S_W[_B]` | the original reproduction's rule: a call attends to itself, then evicts once (B is 0 by default) |
| `recompute_W` | sliding window with re-computation: no cache, the last W tokens run again for every token |
| `stale_ranks_S_W[_B]` | ablation: keys keep the rotation of the rank at which they were inserted |
| `eager_eviction_S_W[_B]` | ablation: calls of B tokens, the cache cut to S + W *before* attention |
| `absolute_S_W[_B]` | ablation: the right tokens at their original positions, refused beyond the trained length |

B is 64 by default in the ablations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.records import ConfigurationRecord

Kind = Literal[
    "baseline", "streaming", "static", "window", "call", "recompute", "stale_ranks", "eager_eviction", "absolute"
]


@dataclass(frozen=True)
class Shape:
    """The form of the names of one kind."""

    kind: Kind
    pattern: str
    example: str
    buffer: int | None
    meaning: str
    ablation: bool = False


SHAPES = (
    Shape("baseline", r"baseline", "baseline", None, "dense attention over the whole text, a growing cache"),
    Shape(
        "streaming",
        r"streaming_(?P<sinks>\d+)_(?P<window>\d+)(?:_(?P<buffer>\d+))?",
        "streaming_8_256_64",
        64,
        "the first S and the last W tokens, positions are ranks in the cache",
    ),
    Shape(
        "static",
        r"static_(?P<sinks>\d+)_(?P<window>\d+)(?:_(?P<buffer>\d+))?",
        "static_8_256_64",
        64,
        "streaming at fixed shapes, its steps compiled: one graph for all of them",
    ),
    Shape(
        "window",
        r"window_(?P<sinks>0)_(?P<window>\d+)(?:_(?P<buffer>\d+))?",
        "window_0_264",
        0,
        "the last W tokens, no sinks, positions are ranks in the cache",
    ),
    Shape(
        "call",
        r"call_(?P<sinks>\d+)_(?P<window>\d+)(?:_(?P<buffer>\d+))?",
        "call_8_256",
        0,
        "the seed's chunk-wise rule: a call sees itself whole, the cache is cut to S + W after it",
    ),
    Shape(
        "recompute",
        r"recompute_(?P<window>\d+)",
        "recompute_264",
        None,
        "sliding window with re-computation: the last W tokens run again for every token",
    ),
    Shape(
        "stale_ranks",
        r"stale_ranks_(?P<sinks>\d+)_(?P<window>\d+)(?:_(?P<buffer>\d+))?",
        "stale_ranks_8_256",
        64,
        "wrong on purpose: cached keys keep the rotation of the rank at which they were inserted",
        ablation=True,
    ),
    Shape(
        "eager_eviction",
        r"eager_eviction_(?P<sinks>\d+)_(?P<window>\d+)(?:_(?P<buffer>\d+))?",
        "eager_eviction_8_256",
        64,
        "wrong on purpose: in calls of B tokens the cache is cut to S + W before attention, not after it",
        ablation=True,
    ),
    Shape(
        "absolute",
        r"absolute_(?P<sinks>\d+)_(?P<window>\d+)(?:_(?P<buffer>\d+))?",
        "absolute_8_256",
        64,
        "the tokens of streaming at their original positions: the text cannot outgrow the model's trained length",
        ablation=True,
    ),
)


@dataclass(frozen=True)
class Configuration:
    """One way of remembering; S, W and B are None if the kind does not have them."""

    name: str
    kind: Kind
    num_sinks: int | None
    window: int | None
    buffer: int | None
    ablation: bool
    meaning: str

    @property
    def limits(self) -> tuple[int, int, int]:
        """S, W and B of a configuration that evicts.

        Raises:
            LabError: if the kind has no such limits.
        """
        if self.num_sinks is None or self.window is None or self.buffer is None:
            raise LabError(f"configuration {self.name!r} has no sinks, window and buffer")
        return self.num_sinks, self.window, self.buffer

    @property
    def depends_on_calls(self) -> bool:
        """Whether losses depend on where one call ends and the next begins; by the paper's rule they do not."""
        return self.kind in ("call", "eager_eviction")

    def record(self) -> ConfigurationRecord:
        """Return the configuration as it is written with its measurements."""
        return ConfigurationRecord(
            name=self.name,
            kind=self.kind,
            num_sinks=self.num_sinks,
            window=self.window,
            buffer=self.buffer,
            ablation=self.ablation,
            meaning=self.meaning,
        )


def parse(name: str) -> Configuration:
    """Parse a configuration's name, such as `baseline` or `streaming_8_256`; see the table above.

    Raises:
        LabError: if no kind has names of this shape, or a number is out of range; the message lists the shapes.
    """
    for shape in SHAPES:
        found = re.fullmatch(shape.pattern, name)
        if found is not None:
            return _from_match(name, shape, found.groupdict())
    shapes = ", ".join(shape.example for shape in SHAPES)
    raise LabError(f"unknown configuration {name!r}; names look like {shapes}")


def parse_list(names: str) -> list[Configuration]:
    """Parse names separated by commas, such as `baseline,streaming_8_256`, in the given order.

    Raises:
        LabError: if a name is unknown, appears twice, or there is none.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise LabError(f"no configuration in {names!r}; give names such as baseline,streaming_8_256")
    repeated = sorted({name for name in wanted if wanted.count(name) > 1})
    if repeated:
        raise LabError(f"configuration {repeated[0]!r} is given twice; name each one once")
    return [parse(name) for name in wanted]


def streaming(num_sinks: int, window: int, buffer: int) -> Configuration:
    """Return the streaming configuration with these numbers (S >= 0, W >= 1, B >= 0), under its full name.

    Raises:
        LabError: if a number is out of range.
    """
    for option, value, least in (("sinks", num_sinks, 0), ("window", window, 1), ("buffer", buffer, 0)):
        if value < least:
            raise LabError(f"{option}={value} is too small: it must be {least} or more")
    return parse(f"streaming_{num_sinks}_{window}_{buffer}")


def _from_match(name: str, shape: Shape, groups: dict[str, str | None]) -> Configuration:
    numbers = {key: int(value) for key, value in groups.items() if value is not None}
    if numbers.get("window", 1) < 1:
        raise LabError(f"configuration {name!r} has window 0: it must keep at least one recent token")
    return Configuration(
        name=name,
        kind=shape.kind,
        num_sinks=numbers.get("sinks"),
        window=numbers.get("window"),
        buffer=numbers.get("buffer", shape.buffer),
        ablation=shape.ablation,
        meaning=shape.meaning,
    )
