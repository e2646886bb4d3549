"""Decoding: cache update and attention over bare SDPA, and the time per output token early, late and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from sinkwindow import StreamingCache
from sinkwindow.stream.state import DebugState
from sinkwindow_lab.inputs.shapes import token_ids
from sinkwindow_lab.measure.clock import Side, interleave, repeated
from sinkwindow_lab.measure.micro import AttentionSteps, bare_attention
from sinkwindow_lab.records import Configuration, Measurement
from sinkwindow_lab.reports.speed.floors import KERNELS, Place, bytes_read, profiled, short_step
from sinkwindow_lab.reports.speed.plan import (
    BARE,
    BUFFER,
    DENSE,
    SHORT,
    SINKS,
    STOCK,
    Plan,
    lazy,
    mean_length,
    static,
)
from sinkwindow_lab.ways.configurations import open_session, parse
from sinkwindow_lab.ways.sessions import StaticSession, cache_keyword

PROFILED = 5  # steps
BEFORE_REBASE = 30  # steps from a late cache to its next rebase [tokens]


def happened(before: DebugState, after: DebugState) -> str:
    """Name what one step did to a cache; the text is empty if it did nothing."""
    names = {
        "eviction": after.evictions > before.evictions,
        "rebase": after.offsets != before.offsets,
        "compaction": after.end != before.end + 1,
    }
    return " + ".join(name for name, did in names.items() if did)


class Decoder:
    """A model with a cache that has seen a number of tokens and decodes from there."""

    def __init__(
        self,
        way: Configuration,
        model: PreTrainedModel,
        batch: int,
        seen: int,
        compile_with: Mapping[str, str] | None = None,
    ) -> None:
        """Fill the cache with `seen` tokens; `compile_with` are the options of `torch.compile` for static steps."""
        self.steps, self.seen, self._kind = AttentionSteps(way, model, batch=batch), seen, way.kind
        self.steps.fill(seen)
        if way.kind == "static":
            cast("StaticSession", self.steps.session).compile_with(**(compile_with or {}))
        self._token = torch.zeros((batch, 1), dtype=torch.long, device=model.device)

    def approach_rebase(self) -> None:
        """Fill the cache further until a rebase is some steps away."""
        state: DebugState = self.steps.cache.debug_state()
        more = max(0, state.bound - (self.seen - state.offsets[0]) - BEFORE_REBASE)
        self.steps.fill(more)
        self.seen += more

    def side(self, metric: str, turn: int = 1) -> Side:
        """Return a side of whole steps (`TPOT`) or of cache update and attention alone, `turn` per sample."""
        run = repeated(self.step if metric == "TPOT" else self.steps.step, turn)
        if self._kind == "baseline":  # held at its length: the tokens of a sample are removed before the next one
            return Side(run, ready=lambda: self.steps.rewind(self.seen))
        if self._kind == "static" or turn > 1:
            return Side(run)
        states: list[DebugState] = [self.steps.cache.debug_state()]

        def event() -> str:
            states.append(self.steps.cache.debug_state())
            return happened(states.pop(0), states[0])

        return Side(run, event=event)

    def step(self) -> None:
        """Decode one token."""
        self._token = self.steps.session.feed(self._token, last_only=True).argmax(dim=-1)


Steps = Decoder | Callable[[], object]


def timed(
    place: Place,
    metric: str,
    sides: Mapping[str, Steps],
    model: PreTrainedModel,
    plan: Plan,
    *,
    batch: int = 1,
    close: bool = True,
) -> list[Measurement]:
    """Time decoders and other steps, interleaved; return their times and the bytes of the decoders' caches."""
    ready = {
        side: one.side(metric, plan.turn) if isinstance(one, Decoder) else Side(repeated(one, plan.turn))
        for side, one in sides.items()
    }
    found = place.times(metric, ready, plan.samples[batch], model.device, turn=plan.turn)
    for side, one in sides.items():
        if isinstance(one, Decoder) and close:
            found.append(place.one(side, "cache", "bytes", [one.steps.session.cache_bytes]))
            one.steps.close()
    return found


def attention(model: PreTrainedModel, name: str, batch: int, plan: Plan) -> list[Measurement]:
    """Time attention and cache update of one token, all layers, with bare SDPA of the same lengths."""
    lengths = [mean_length(plan.limit), mean_length(plan.limit, 0)]
    bare = {f"{BARE}, {length:,} tokens": bare_attention(model, length, batch=batch).step for length in lengths}
    sides: dict[str, Steps] = {
        "ours, B = 64": Decoder(lazy(plan.limit), model, batch, plan.limit),
        "ours, B = 0": Decoder(lazy(plan.limit, 0), model, batch, plan.limit),
        **bare,
        STOCK: Decoder(DENSE, model, batch, lengths[1] - 1),
    }
    return timed(Place("attention", name, batch), "attention", sides, model, plan, batch=batch)


def tokens(model: PreTrainedModel, name: str, batch: int, plan: Plan) -> list[Measurement]:
    """Time output tokens: first full, late, without a buffer, `DynamicCache` of the same length, lower bounds."""
    place, length = Place("tpot", name, batch), mean_length(plan.limit)
    late = Decoder(lazy(plan.limit), model, batch, plan.late[batch])
    paper = Decoder(lazy(plan.limit, 0), model, batch, plan.limit)
    for decoder in (late, paper):
        decoder.approach_rebase()
    sides: dict[str, Steps] = {
        "ours": Decoder(lazy(plan.limit), model, batch, plan.limit),
        "ours, late": late,
        "ours, B = 0": paper,
        STOCK: Decoder(DENSE, model, batch, length - 1),
        BARE: bare_attention(model, length, batch=batch).step,
        SHORT: short_step(model, batch),
    }
    found = timed(place, "TPOT", sides, model, plan, batch=batch)
    return [*found, place.one("ours, late", "seen", "tokens", [late.seen]), *bytes_read(place, model, length, batch)]


def compiled(model: PreTrainedModel, name: str, batch: int, plan: Plan) -> list[Measurement]:
    """Time the compiled steps of a static cache with the dynamic cache of its sizes and with `DynamicCache`."""
    torch.compiler.reset()  # otherwise a graph for another number of rows would be generalized
    place, length = Place("compiled", name, batch), mean_length(plan.limit)
    sides = {
        "static, compiled": Decoder(static(plan.limit), model, batch, plan.limit, plan.compile),
        "ours": Decoder(lazy(plan.limit), model, batch, plan.limit),
        STOCK: Decoder(DENSE, model, batch, length - 1),
    }
    return timed(place, "TPOT", sides, model, plan, batch=batch) + bytes_read(place, model, length, batch)


def at_limit(model: PreTrainedModel, name: str, limit: int, plan: Plan) -> list[Measurement]:
    """Time tokens, and attention alone, when first full and dense held at the same length; `limit` is S + W."""
    place, length = Place("tpot", name, limit), mean_length(limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lists beyond the trained length do not change the speed
        sides = {
            DENSE.name: Decoder(DENSE, model, 1, length - 1 - plan.turn // 2),
            lazy(limit).name: Decoder(lazy(limit), model, 1, limit),
        }
    for _ in range(plan.warm_up):
        sides[lazy(limit).name].step()
    found = timed(place, "TPOT", {**sides, SHORT: short_step(model, 1)}, model, plan, close=False)
    found += timed(place, "attention", {**sides, BARE: bare_attention(model, length).step}, model, plan)
    return found + bytes_read(place, model, length, 1)


def growing(model: PreTrainedModel, name: str, plan: Plan) -> list[Measurement]:
    """Time tokens of a dense cache that grows, as in a generation: each length is new."""
    place, decoder = Place("growing", name, plan.limit), Decoder(DENSE, model, 1, plan.limit)
    sides: dict[str, Steps] = {DENSE.name: decoder.step, SHORT: short_step(model, 1)}
    found = timed(place, "TPOT", sides, model, plan)
    found.append(place.one(DENSE.name, "cache", "bytes", [decoder.steps.session.cache_bytes]))
    decoder.steps.close()
    return found + bytes_read(place, model, mean_length(plan.limit), 1)


def after(model: PreTrainedModel, name: str, way: Configuration, streamed: int, plan: Plan) -> list[Measurement]:
    """Time tokens after so many were streamed, whole steps alone."""
    place, decoder = Place(way.kind, name, streamed), Decoder(way, model, 1, streamed)
    found = timed(place, "TPOT", {way.name: decoder, SHORT: short_step(model, 1)}, model, plan)
    context = min(mean_length(plan.limit), streamed + plan.turn * plan.samples[1] // 2)
    return found + bytes_read(place, model, context, 1)


def static_steps(model: PreTrainedModel, name: str, plan: Plan) -> list[Measurement]:
    """Time compiled steps, and profile their kernels."""
    torch.compiler.reset()
    (how,), way = plan.compile.values(), static(plan.limit)
    place, kernel_place = Place(how, name, plan.limit), Place(f"{KERNELS}, step, {how}", name, plan.limit)
    decoder = Decoder(way, model, 1, plan.limit, plan.compile)
    sides: dict[str, Steps] = {way.name: decoder, SHORT: short_step(model, 1)}
    found = timed(place, "TPOT", sides, model, plan, close=False)
    found += profiled(kernel_place, decoder.step, PROFILED, model.device)
    found.append(place.one(way.name, "cache", "bytes", [decoder.steps.session.cache_bytes]))
    decoder.steps.close()
    return found + bytes_read(place, model, mean_length(plan.limit), 1)


def recomputed(model: PreTrainedModel, name: str, window: int, plan: Plan) -> list[Measurement]:
    """Time tokens of sliding windows with re-computation: what the paper compares with (figure 10)."""
    way, place = parse(f"recompute_{window}"), Place("recomputed", name, window)
    with open_session(way, model) as session:
        session.read(token_ids(model, window))
        one = token_ids(model, 1)
        sides = {way.name: Side(lambda: session.feed(one, last_only=True).argmax(dim=-1))}
        return place.times("TPOT", sides, plan.samples[1], model.device)


def generated(model: PreTrainedModel, name: str, plan: Plan) -> list[Measurement]:
    """Time `generate`, steps and all that it does between them: dense, ours, and ours with static steps.

    A static cache is compiled by `generate` itself, in the untimed first call, where transformers does that: on a GPU.
    """
    place, ids, found = Place("generate", name, plan.generated), token_ids(model, plan.limit), list[Measurement]()
    torch.compiler.reset()
    generating = cast("GenerationMixin", model)
    limits = SINKS, plan.limit - SINKS, BUFFER
    streams = {kind: StreamingCache(model, *limits, static=kind == "static") for kind in ("streaming", "static")}

    def tokens(kind: str) -> None:
        cache = DynamicCache(config=model.config) if kind == DENSE.kind else streams[kind]
        cache.reset()
        more: dict[str, Any] = {cache_keyword(model): cache}
        generating.generate(ids, do_sample=False, max_new_tokens=plan.generated, min_new_tokens=plan.generated, **more)

    kinds = (DENSE.kind, *streams)
    timed = interleave({kind: Side(partial(tokens, kind)) for kind in kinds}, 3, model.device, warm_up=1)
    for kind, one in timed.items():
        found.append(place.one(kind, "time", "ms/token", [ms / plan.generated for ms in one.ms]))
    for cache in streams.values():
        cache.detach()
    return found
