"""Decoding: attention and cache update over bare SDPA; time per output token over `DynamicCache`, early and late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from sinkwindow.cache import StreamingCache
from sinkwindow_lab.measure.micro import AttentionSteps, BareAttention
from sinkwindow_lab.reports.pace.floors import SHORT, kept_bytes, read_weight_bytes, short_step
from sinkwindow_lab.reports.pace.plans import (
    ATTENTION_BAR,
    BUFFER,
    COMPILED_BAR,
    LATE,
    LATE_BAR,
    LONGEST_BAR,
    TPOT_BARS,
    Plan,
)
from sinkwindow_lab.reports.pace.records import BandwidthRecord, Comparison, FloorRecord, Series
from sinkwindow_lab.reports.pace.sampling import Side, in_turns
from sinkwindow_lab.ways.configurations import Configuration, parse, streaming

if TYPE_CHECKING:
    from sinkwindow_lab.ways.sessions import StaticSession

BEFORE_REBASE = 30  # steps from a late cache to its next rebase [tokens]


def mean_length(limit: int, buffer: int) -> int:
    """Return the mean number of keys per step, its own included, over a cycle of B + 1 steps, rounded down [tokens].

    `limit` is S + W.
    """
    return limit + 1 + buffer // 2


@dataclass(frozen=True)
class Happened:
    """The state of a streaming cache; comparing two of these shows what a step did."""

    evictions: int
    end: int
    offset: int

    @classmethod
    def of(cls, cache: Any) -> Happened:
        """Read the state of a cache."""
        state = cache.debug_state()
        return cls(state.evictions, state.end, state.offsets[0])

    def between(self, later: Happened) -> str:
        """Name what one step did; the text is empty if it did nothing."""
        names = {
            "eviction": later.evictions > self.evictions,
            "rebase": later.offset != self.offset,
            "compaction": later.end != self.end + 1,
        }
        return " + ".join(name for name, did in names.items() if did)


class Decoder:
    """A model with a cache that has seen a number of tokens; `side` decodes from there."""

    def __init__(self, configuration: Configuration, model: PreTrainedModel, batch: int, seen: int) -> None:
        """Fill the cache with `seen` tokens."""
        self.steps = AttentionSteps(configuration, model, batch=batch)
        self.steps.fill(seen)
        self.seen = seen
        self.streams = isinstance(self.steps.cache, StreamingCache)
        self._token = torch.zeros((batch, 1), dtype=torch.long, device=model.device)

    def approach_rebase(self) -> None:
        """Fill the cache further until a rebase is some steps away."""
        state = self.steps.cache.debug_state()
        reach = self.seen - state.offsets[0]
        more = state.bound - reach - BEFORE_REBASE
        if more > 0:
            self.steps.fill(more)
            self.seen += more

    def compile_with(self, **options: str) -> None:
        """Set the options of `torch.compile` for the steps of a static cache."""
        cast("StaticSession", self.steps.session).compile_with(**options)

    def token_side(self) -> Side:
        """Return a side that runs a whole step of the model."""
        return self._side(self._step)

    def attention_side(self) -> Side:
        """Return a side that runs cache update and attention, all layers."""
        return self._side(self.steps.step)

    def close(self) -> None:
        """Remove the cache from the model."""
        self.steps.close()

    def _step(self) -> None:
        self._token = self.steps.session.feed(self._token, last_only=True).argmax(dim=-1)

    def _side(self, run: Any) -> Side:
        if not self.streams:  # held at its length: a step's token is removed before the next step
            return Side(run, ready=lambda: self.steps.rewind(self.seen))
        place = [Happened.of(self.steps.cache)]

        def event() -> str:
            place.append(Happened.of(self.steps.cache))
            return place.pop(0).between(place[0])

        return Side(run, event=event)


def attention(model: PreTrainedModel, name: str, batch: int, plan: Plan) -> list[Comparison]:
    """Compare attention and cache update of one token with bare SDPA of the same length, all layers summed.

    Returns one comparison per buffer, and one for `DynamicCache`.
    """
    lengths = {buffer: mean_length(plan.limit, buffer) for buffer in (BUFFER, 0)}
    ours = {b: Decoder(streaming(plan.sinks, plan.window, b), model, batch, plan.limit) for b in lengths}
    stock = Decoder(parse("baseline"), model, batch, lengths[0] - 1)
    bare = {buffer: BareAttention(model, length, batch=batch) for buffer, length in lengths.items()}
    sides = {_ours(buffer): decoder.attention_side() for buffer, decoder in ours.items()}
    sides |= {_bare(length): Side(bare[buffer].step) for buffer, length in lengths.items()}
    sides |= {"DynamicCache": stock.attention_side()}
    found = in_turns(sides, plan.samples[batch], model.device)
    for decoder in (*ours.values(), stock):
        decoder.close()
    rows: list[tuple[str, Series, Series, float | None]] = [
        (f"B = {buffer}", found[_ours(buffer)], found[_bare(length)], ATTENTION_BAR)
        for buffer, length in lengths.items()
    ]
    rows.append(("DynamicCache, for comparison", found["DynamicCache"], found[_bare(lengths[0])], None))
    return [
        Comparison(
            part="attention",
            model=name,
            what=f"batch {batch}, {what}",
            ratio_kind="cost",
            ours=side,
            other=floor,
            bar=bar,
            floor=floor,
        )
        for what, side, floor, bar in rows
    ]


def _ours(buffer: int) -> str:
    return f"ours, B = {buffer}"


def _bare(length: int) -> str:
    return f"bare SDPA, {length:,} tokens"


def tokens(model: PreTrainedModel, name: str, batch: int, plan: Plan) -> tuple[list[Comparison], FloorRecord]:
    """Compare the time per output token with `DynamicCache` held at the same length: early, late, and the longest step.

    Returns the comparisons, and the lower bounds measured with them.
    """
    lazy, length = streaming(plan.sinks, plan.window, BUFFER), mean_length(plan.limit, BUFFER)
    first = Decoder(lazy, model, batch, plan.limit)
    late = Decoder(lazy, model, batch, plan.late[batch])
    paper = Decoder(streaming(plan.sinks, plan.window, 0), model, batch, plan.limit)
    for decoder in (late, paper):
        decoder.approach_rebase()
    stock = Decoder(parse("baseline"), model, batch, length - 1)
    sides = {
        "ours": first.token_side(),
        "ours, late": late.token_side(),
        "ours, B = 0": paper.token_side(),
        "DynamicCache": stock.token_side(),
        "bare SDPA": Side(BareAttention(model, length, batch=batch).step),
        "short": Side(short_step(model, batch)),
    }
    found = in_turns(sides, plan.samples[batch], model.device)
    for decoder in (first, late, paper, stock):
        decoder.close()
    floors = _floors(model, name, batch, length, found)
    return _token_rows(name, batch, found, late.seen), floors


def compiled(model: PreTrainedModel, name: str, batch: int, plan: Plan, bandwidth: BandwidthRecord) -> list[Comparison]:
    """Compare the compiled steps of a static cache with the dynamic cache of its sizes and with `DynamicCache`.

    An eager step is no lower bound for a compiled one; reading all bytes once at the machine's `bandwidth` is.
    """
    torch.compiler.reset()  # otherwise a graph for another number of rows would be generalized
    sizes, length = (plan.sinks, plan.window, BUFFER), mean_length(plan.limit, BUFFER)
    static = Decoder(parse("static_{}_{}_{}".format(*sizes)), model, batch, plan.limit)
    static.compile_with(backend=plan.backend)
    dynamic = Decoder(streaming(*sizes), model, batch, plan.limit)
    stock = Decoder(parse("baseline"), model, batch, length - 1)
    ways = {"static, compiled": static, "ours": dynamic, "DynamicCache": stock}
    sides = {way: decoder.token_side() for way, decoder in ways.items()}
    found = in_turns(sides, plan.samples[batch], model.device)
    for decoder in ways.values():
        decoder.close()
    bars = {"ours": COMPILED_BAR, "DynamicCache": TPOT_BARS[batch]}
    read = read_weight_bytes(model) + kept_bytes(model, length, batch)
    floor = Series(name="bytes / bandwidth", unit="ms", values=[bandwidth.least_ms(read)])
    return [
        Comparison(
            part="compiled",
            model=name,
            what=f"batch {batch}, over {other}{' at the same length' if other == 'DynamicCache' else ', eager'}",
            ratio_kind="cost",
            ours=found["static, compiled"],
            other=found[other],
            bar=bar,
            floor=floor,
        )
        for other, bar in bars.items()
    ]


def _floors(model: PreTrainedModel, name: str, batch: int, length: int, found: dict[str, Series]) -> FloorRecord:
    short = found["short"].model_copy(update={"name": f"step, {SHORT} tokens of context"})
    return FloorRecord(
        model=name,
        batch=batch,
        context=length,
        weight_bytes=read_weight_bytes(model),
        cache_bytes=kept_bytes(model, length, batch),
        bare=found["bare SDPA"],
        short=short,
    )


def _token_rows(name: str, batch: int, found: dict[str, Series], seen: int) -> list[Comparison]:
    sums = [a + b for a, b in zip(found["short"].values, found["bare SDPA"].values, strict=True)]
    floor = Series(name=f"step with {SHORT} tokens of context + bare SDPA", unit="ms", values=sums)
    bar = TPOT_BARS[batch]
    beside: list[tuple[str, str, str, float | None]] = [
        ("ours", "DynamicCache", "when first full, over DynamicCache at the same length", bar),
        ("ours, late", "DynamicCache", f"after {seen:,} tokens, over DynamicCache at the same length", bar),
        ("ours, B = 0", "DynamicCache", f"B = 0, over DynamicCache at {BUFFER // 2} more tokens", None),
        ("ours, late", "ours", f"after {seen:,} tokens, over when first full", LATE_BAR if seen >= LATE else None),
    ]
    rows = [
        Comparison(
            part="tpot",
            model=name,
            what=f"batch {batch}, {what}",
            ratio_kind="cost",
            ours=found[ours],
            other=found[other],
            bar=limit,
            floor=floor,
        )
        for ours, other, what, limit in beside
    ]
    return rows + [_longest_row(name, batch, found[side]) for side in ("ours, late", "ours, B = 0")]


def _longest_row(name: str, batch: int, series: Series) -> Comparison:
    happened = series.events.get(series.longest_event, "nothing")
    seen = sorted({name for one in series.events.values() for name in one.split(" + ")})
    whole = series.values[series.longest] / series.median
    return Comparison(
        part="longest",
        model=name,
        what=f"batch {batch}, {series.name}",
        ratio_kind="longest",
        ours=series,
        other=series,
        bar=LONGEST_BAR,
        note=f"{happened}; {len(series.values)} steps with {', '.join(seen) or 'no event'}; any step: {whole:.2f}x",
    )
