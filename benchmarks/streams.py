"""Streams that go on for a long time, and what must not grow in them: memory, time per token, numerical error.

Errors are measured against a fresh run in float64. The logits of a token depend on the sinks and on as many lists of
tokens as the model has layers, so a fresh cache that reads only those must give what the long stream gives.
"""

from __future__ import annotations

import copy
import gc
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import psutil
import torch

from sinkwindow_lab.measure.clock import Side, clock_for, interleave
from sinkwindow_lab.measure.memory import give_back
from sinkwindow_lab.measure.micro import AttentionSteps
from sinkwindow_lab.ways.configurations import streaming
from sinkwindow_lab.ways.sessions import StaticSession, StreamingSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkwindow_lab.progress import Reporter

PROBE: Final = 64  # tokens whose logits are compared
FILL: Final = 512  # tokens of a call that brings positions far without a model


@dataclass(frozen=True)
class Subject:
    """A model, its float64 copy, and tokens [1, tokens] to read."""

    title: str
    model: PreTrainedModel
    twin: PreTrainedModel
    ids: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """How much to stream."""

    tokens: int
    rule: tuple[int, int, int]  # S, W, B
    checkpoints: int
    early: int  # tokens read before the copy is made whose steps are compared with those at the end
    timed: int  # steps of each
    compiled: bool  # whether static steps are


@dataclass(frozen=True)
class Drift:
    """Largest errors of the last logits against a fresh run in float64."""

    error: float  # of the stream
    plain: float  # of a fresh run in the stream's dtype
    step: float  # one rounding of the largest logit


@dataclass(frozen=True)
class Checkpoint:
    """What is measured on the way."""

    tokens: int  # read so far
    evictions: int
    nbytes: int  # of the cache
    tensors: int  # alive in the process
    tensor_bytes: int  # their storages
    resident: int  # [bytes]
    ms_per_token: float  # since the checkpoint before
    drift: Drift


@dataclass(frozen=True)
class Found:
    """All of one stream."""

    title: str
    checkpoints: list[Checkpoint]
    early_ms: list[float]  # steps of the copy
    late_ms: list[float]  # steps at the end, interleaved with those


@dataclass
class Stream:
    """A session that reads the tokens of a subject, one per call."""

    session: StreamingSession
    ids: torch.Tensor
    read: int = 0
    last: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=PROBE))  # logits of the last tokens

    def step(self) -> None:
        """Read one token; the text is read again from its start when it ends."""
        place = self.read % self.ids.shape[1]
        self.last.append(self.session.feed(self.ids[:, place : place + 1]))
        self.read += 1

    def copy(self) -> Stream:
        """Return a copy with a cache of its own."""
        session = copy.copy(self.session)
        session.cache = copy.deepcopy(self.session.cache)
        return Stream(session, self.ids, self.read)


def open_stream(subject: Subject, plan: Plan, kind: str) -> Stream:
    """Return a stream that has read its sinks: a static cache takes its shapes from a first call."""
    if kind == "static" and plan.compiled:
        session: StreamingSession = StaticSession(subject.model, *plan.rule)
    else:
        session = StreamingSession(subject.model, *plan.rule, static=kind == "static")
    stream = Stream(session, subject.ids)
    for _ in range(max(plan.rule[0], 1)):
        stream.step()
    return stream


def soak(subject: Subject, plan: Plan, kind: str, progress: Reporter) -> Found:
    """Stream, measure at checkpoints, and time a copy made early against the end; `kind` is dynamic or static."""
    title = f"{subject.title}, {kind}"
    progress.begin(title, plan.tokens)
    clock = clock_for(subject.model.device)
    stream = open_stream(subject, plan, kind)

    def read_to(tokens: int) -> float:
        """Read on, and return the time per token [ms]."""
        before, begin = stream.read, clock.mark()
        for _ in range(before, tokens):
            stream.step()
            progress.advance()
        return 1e3 * clock.seconds(begin, clock.mark()) / (tokens - before)

    read_to(plan.early)
    early, checkpoints = stream.copy(), []
    for number in range(1, plan.checkpoints + 1):
        ms = read_to(plan.tokens * number // plan.checkpoints)
        checkpoints.append(look(stream, subject, plan, ms))
    # Each comes first once, since a step takes longer or shorter behind another one.
    sides = {name: Side(one.step) for name, one in zip("abcd", (early, stream, stream, early), strict=True)}
    timed = {name: one.ms for name, one in interleave(sides, plan.timed // 2, subject.model.device).items()}
    early.session.close()
    stream.session.close()
    return Found(title, checkpoints, timed["a"] + timed["d"], timed["b"] + timed["c"])


def look(stream: Stream, subject: Subject, plan: Plan, ms: float) -> Checkpoint:
    """Measure drift, and then memory: also at the first checkpoint, fresh runs have been made before."""
    cache = stream.session.cache
    ids = subject.ids[:, torch.arange(stream.read) % subject.ids.shape[1]]
    found = drift(subject, plan.rule, ids, torch.cat([*stream.last], dim=1))
    del ids
    give_back()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return Checkpoint(
        tokens=stream.read,
        evictions=cache.num_evictions,
        nbytes=cache.nbytes,
        tensors=len(tensors),
        tensor_bytes=sum(dict(map(extent, tensors)).values()),
        resident=psutil.Process().memory_info().rss,
        ms_per_token=ms,
        drift=found,
    )


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return address and size [bytes] of a tensor's storage; a wrapper (of `vmap`, left by other code) has none."""
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # what torch raises for a wrapper, and for nothing else here
        return id(tensor), 0
    return storage.data_ptr(), storage.nbytes()


def drift(subject: Subject, rule: tuple[int, int, int], ids: torch.Tensor, logits: torch.Tensor) -> Drift:
    """Compare the logits of the last tokens of `ids` with those of a fresh run."""
    exact, plain = (fresh_logits(model, rule, ids) for model in (subject.twin, subject.model))
    error, of_fresh = (float((one.double() - exact).abs().max()) for one in (logits, plain))
    return Drift(error, of_fresh, torch.finfo(logits.dtype).eps * float(exact.abs().max()))


def fresh_logits(model: PreTrainedModel, rule: tuple[int, int, int], ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the last tokens of `ids` from a cache that reads no more than they depend on, in long calls.

    Tokens are left out behind the sinks, as many as whole evictions remove: then lists are the same from there on.
    """
    sinks, _, buffer = rule
    reach = dependence(model, rule) + PROBE
    left_out = max(0, ids.shape[1] - sinks - reach) // (buffer + 1) * (buffer + 1)
    text = torch.cat((ids[:, :sinks], ids[:, sinks + left_out :]), dim=1)
    session = StreamingSession(model, *rule)
    try:
        session.read(text[:, :-PROBE])
        return session.feed(text[:, -PROBE:])
    finally:
        session.close()


def dependence(model: PreTrainedModel, rule: tuple[int, int, int]) -> int:
    """Return how many tokens before a token its logits can depend on, sinks not counted: a list in every layer."""
    return int(model.config.num_hidden_layers) * (sum(rule) + 1)


# -- positions far away -----------------------------------------------------------------------------------------------


def far(subject: Subject, rule: tuple[int, int, int], kind: str, target: int, *, real: bool) -> Drift:
    """Take a cache past position `target`, and compare its logits there with those of a fresh run.

    `real` feeds it all the way, without a model; otherwise its counters are set. The tokens that the logits depend on
    are then read by the model; the position is passed in the middle of the compared ones.
    """
    steps = AttentionSteps(streaming(*rule), subject.model)
    steps.close()
    steps.session = session = StreamingSession(subject.model, *rule, static=kind == "static")
    steps.cache = cache = session.cache
    ids = subject.ids[:, : rule[0] + dependence(subject.model, rule) + PROBE]
    session.read(ids[:, : rule[0]])
    whole = rule[2] + 1
    junk = (target - ids.shape[1] + PROBE // 2) // whole * whole
    short = junk if real else (4 * sum(rule)) // whole * whole  # enough to fill the slots
    _, key, value = steps.draw(FILL)
    for start in range(0, short, FILL):
        columns = min(FILL, short - start)
        states = key[:, :, :columns], value[:, :, :columns]
        with torch.inference_mode():
            steps.call(columns, lambda layer, _: cache.update(*states, layer))  # noqa: B023 - runs at once
    if short < junk:
        snapshot = cache.snapshot()
        cache.restore(replace(snapshot, state=moved(snapshot.state, junk - short, bounded=kind == "dynamic")))
    session.read(ids[:, rule[0] : -PROBE])
    logits = torch.cat([session.feed(ids[:, [place]]) for place in range(ids.shape[1] - PROBE, ids.shape[1])], dim=1)
    if not cache.seen_tokens[0] - PROBE < target < cache.seen_tokens[0]:
        raise RuntimeError(f"position {target} was not passed: {cache.seen_tokens[0]} tokens were seen")
    session.close()
    return drift(subject, rule, ids, logits)


def moved(state: Any, tokens: int, *, bounded: bool) -> Any:
    """Return a cache's state as if it had seen and evicted so many tokens more; bounded positions stay as they are."""
    shift = tokens if bounded else 0
    pools = []
    for slots in state.pools:
        rows = [
            replace(row, evicted=row.evicted + tokens, floor=row.floor + tokens, offset=row.offset + shift)
            for row in slots.lanes
        ]
        rows = [replace(row, placed=row.placed + tokens) if row.placed >= 0 else row for row in rows]
        pools.append(replace(slots, lanes=tuple(rows)))
    lanes = tuple(replace(lane, seen=lane.seen + tokens, offset=lane.offset + shift) for lane in state.lanes)
    return replace(state, lanes=lanes, pools=tuple(pools), columns=state.columns + tokens)
