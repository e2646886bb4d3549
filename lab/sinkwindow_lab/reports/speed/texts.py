"""Long inputs: a prompt of 20 limits over a dense chunked pass, its peak memory, and exact scoring of a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.inputs.shapes import token_ids
from sinkwindow_lab.measure.clock import Side, interleave
from sinkwindow_lab.measure.memory import tensor_peak, weight_bytes
from sinkwindow_lab.measure.perplexity import token_losses
from sinkwindow_lab.records import Configuration, Measurement
from sinkwindow_lab.reports.speed.floors import KERNELS, Place, profiled
from sinkwindow_lab.reports.speed.plan import ALONE, DENSE, INEXACT, LONG, SAME_CHUNKS, SHORTER, Plan, lazy
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import Session


def prefill(model: PreTrainedModel, name: str, plan: Plan) -> list[Measurement]:
    """Time a prompt of 20 limits in chunks, all sides interleaved, chunk by chunk; return times per token.

    One dense cache is cropped to S + W before each chunk; the floor is the same chunks with nothing before them.
    """
    ids = token_ids(model, LONG * plan.prompt_limit)
    read_chunks(model, ids[:, : 2 * plan.chunk], plan)  # warm-up
    found, place = read_chunks(model, ids, plan), Place("prefill", name)
    return [place.one(side, "time", "ms/token", [sum(times) / ids.shape[1]]) for side, times in found.items()]


def read_chunks(model: PreTrainedModel, ids: torch.Tensor, plan: Plan) -> dict[str, list[float]]:
    """Feed a prompt ([1, tokens]) to interleaved sessions, one per side; return the times of chunks by side [ms]."""
    ways = {"ours": lazy(plan.prompt_limit), SAME_CHUNKS: DENSE, INEXACT: DENSE, ALONE: DENSE}
    cuts, chunks = {INEXACT: plan.prompt_limit, ALONE: 0}, torch.split(ids, plan.chunk, dim=1)
    sessions = {side: open_session(way, model) for side, way in ways.items()}
    rest = {side: iter(chunks) for side in sessions}
    sides = {
        side: Side(lambda s=side: sessions[s].feed(next(rest[s]), last_only=True), partial(cut, one, cuts.get(side)))  # type: ignore[misc]
        for side, one in sessions.items()
    }
    found = interleave(sides, len(chunks), model.device, warm_up=0)
    for session in sessions.values():
        session.close()
    return {side: one.ms for side, one in found.items()}


def cut(session: Session, kept: int | None) -> None:
    """Crop a stock cache to its first tokens if it has more; None leaves it."""
    if kept is not None and session.kept_tokens > kept:
        session.cache.crop(kept - session.kept_tokens)


def reading(model: PreTrainedModel, way: Configuration, ids: torch.Tensor, chunk: int) -> Callable[[], None]:
    """Return the work of reading a prompt ([1, tokens]) in chunks, by a fresh session."""

    def read() -> None:
        with open_session(way, model) as session:
            for part in torch.split(ids, chunk, dim=1):
                session.feed(part, last_only=True)

    return read


def memory(model: PreTrainedModel, name: str, plan: Plan) -> list[Measurement]:
    """Count the peak memory above the weights, cache included, of prompts of 20 and of 5 limits."""
    place, found = Place("memory", name), []
    for tokens in (LONG * plan.prompt_limit, SHORTER * plan.prompt_limit):
        read = reading(model, lazy(plan.prompt_limit), token_ids(model, tokens), plan.chunk)
        found.append(place.one(f"ours, {tokens:,} tokens", "peak", "MB", [tensor_peak(model.device, read) / 1e6]))
    return found


def prompt(model: PreTrainedModel, name: str, way: Configuration, tokens: int, plan: Plan) -> list[Measurement]:
    """Measure a prompt read in chunks, twice: the first run counts its tensors, the second, warm one is timed."""
    place, read = Place("prompt", name, tokens), reading(model, way, token_ids(model, tokens), plan.chunk)
    peak = tensor_peak(model.device, read)
    took = interleave({"": Side(read)}, 1, model.device, warm_up=0)[""].ms[0]
    sizes = {"peak": ("bytes", [peak]), "weights": ("bytes", [weight_bytes(model)])}
    return place.all(way.name, {"time": ("ms/token", [took / tokens])}) + place.all(way.name, sizes)


def chunk_kernels(model: PreTrainedModel, name: str, way: Configuration, plan: Plan) -> list[Measurement]:
    """Profile the kernels of one chunk of a prompt, the fourth one."""
    *first, last = torch.split(token_ids(model, 4 * plan.chunk), plan.chunk, dim=1)
    with open_session(way, model) as session:
        for part in first:
            session.feed(part, last_only=True)
        place = Place(f"{KERNELS}, chunk, {way.kind}", name, plan.chunk)
        return profiled(place, lambda: session.feed(last, last_only=True), 1, model.device)


def scoring(model: PreTrainedModel, name: str, plan: Plan) -> list[Measurement]:
    """Time exact losses of a text in blocks, ours and dense interleaved, and some single tokens after each block.

    Times are per token, logits and losses included, from when the cache is full; the floor is the same blocks with
    nothing before them.
    """
    block, singles = plan.block, plan.singles
    ids = token_ids(model, plan.limit + plan.scored * (block + singles) + 1)
    ours, dense, alone = (open_session(way, model) for way in (lazy(plan.limit), DENSE, DENSE))
    seen = {ours: 0, dense: 0, alone: 0}

    def score(session: Session, count: int, size: int) -> None:
        token_losses(session, ids[:, seen[session] : seen[session] + count + 1], block=size)
        seen[session] += count

    for one in (ours, dense):
        score(one, plan.limit, block)
    sides = {
        "blocks": Side(lambda: score(ours, block, block)),
        "dense": Side(lambda: score(dense, block, block)),
        ALONE: Side(lambda: score(alone, block, block), ready=lambda: cut(alone, 0)),
        "single": Side(lambda: score(ours, singles, 1), ready=lambda: score(dense, singles, singles)),
    }
    found = interleave(sides, plan.scored, model.device, warm_up=0)
    for one in seen:
        one.close()
    place, counts = Place("perplexity", name), {"single": singles}
    return [
        place.one(side, "time", "ms/token", [took / counts.get(side, block) for took in timed.ms])
        for side, timed in found.items()
    ]
