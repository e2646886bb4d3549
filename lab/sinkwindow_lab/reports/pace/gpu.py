"""What the GPU report measures for one model: decoding against S + W and tokens streamed, prompts, memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.measure.memory import tensor_peak, weight_bytes
from sinkwindow_lab.measure.micro import BareAttention
from sinkwindow_lab.measure.timing import clock_for, milliseconds
from sinkwindow_lab.reports.pace.decode import Decoder, mean_length
from sinkwindow_lab.reports.pace.floors import kept_bytes, read_weight_bytes, short_step
from sinkwindow_lab.reports.pace.gpu_records import PointRecord, PromptRecord
from sinkwindow_lab.reports.pace.plans import BUFFER
from sinkwindow_lab.reports.pace.records import Series
from sinkwindow_lab.reports.pace.sampling import Side, in_turns
from sinkwindow_lab.reports.pace.texts import token_ids
from sinkwindow_lab.ways.configurations import Configuration, parse, streaming
from sinkwindow_lab.ways.sessions import open_session

SINKS = 4
DENSE, STREAMING, STATIC = "dense", "streaming, eager", "streaming, static and compiled"


@dataclass(frozen=True)
class Scale:
    """Sizes of a report.

    Attributes:
        models: shape and dtype of each model, the more important one first.
        limits: S + W [tokens].
        streamed: tokens streamed before decoding, at `middle` [tokens].
        middle: the S + W of everything that has only one [tokens].
        prompts: prompt lengths, in multiples of `middle`.
        chunk: tokens per call of a prompt [tokens].
        turn: steps of one sample: enough that a step's own time outweighs the clock's.
        samples: turns per side.
        megabytes: tensor for the bandwidth [MB].
        compile: how static steps are compiled, options of `torch.compile`.
    """

    models: tuple[tuple[str, torch.dtype], ...]
    limits: tuple[int, ...]
    streamed: tuple[int, ...]
    middle: int
    prompts: tuple[int, ...]
    chunk: int
    turn: int
    samples: int
    megabytes: float
    compile: dict[str, str]


LARGE = Scale(
    models=(("pythia-2.8b", torch.float16), ("llama-7b", torch.bfloat16)),
    limits=(1024, 256, 4096, 512, 2048),
    streamed=(1000, 4000, 16_000, 64_000),
    middle=1024,
    prompts=(5, 20),
    chunk=1024,
    turn=13,  # a fifth of the 65 steps between two evictions: five turns cover every length once
    samples=5,
    megabytes=2048.0,
    compile={"mode": "reduce-overhead"},  # CUDA graphs
)
TINY = Scale(
    models=(("tiny-pythia", torch.float16), ("tiny", torch.bfloat16)),
    limits=(32, 16),
    streamed=(100, 400),
    middle=32,
    prompts=(2, 4),
    chunk=32,
    turn=3,
    samples=2,
    megabytes=1.0,
    compile={"backend": "eager"},  # captured and guarded nevertheless
)


def lazy(limit: int) -> Configuration:
    """Return the default cache of S + W tokens."""
    return streaming(SINKS, limit - SINKS, BUFFER)


def decode_points(model: PreTrainedModel, name: str, limit: int, scale: Scale) -> list[PointRecord]:
    """Measure dense held at the same length, and streaming when first full; attention of both with bare SDPA.

    `limit` is S + W [tokens]. Returns one point per way.
    """
    length = mean_length(limit, BUFFER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lists beyond the trained length do not change the speed
        ways = {
            DENSE: Decoder(parse("baseline"), model, 1, length - 1 - scale.turn // 2),
            STREAMING: Decoder(lazy(limit), model, 1, limit),
        }
    tpot = {way: repeated(one.token_side(), scale.turn) for way, one in ways.items()}
    tpot["short"] = repeated(Side(short_step(model, 1)), scale.turn)
    tokens = per_step(in_turns(tpot, scale.samples, model.device, warm_up=1), scale.turn)
    attention = {way: repeated(one.attention_side(), scale.turn) for way, one in ways.items()}
    attention["bare"] = repeated(Side(BareAttention(model, length).step), scale.turn)
    parts = per_step(in_turns(attention, scale.samples, model.device, warm_up=1), scale.turn)
    points = [
        PointRecord(
            model=name,
            way=way,
            limit=limit,
            streamed=limit,
            context=length,
            read_bytes=read_weight_bytes(model) + kept_bytes(model, length, 1),
            cache_bytes=one.steps.session.cache_bytes,
            tpot=tokens[way],
            short=tokens["short"],
            attention=parts[way],
            bare=parts["bare"],
        )
        for way, one in ways.items()
    ]
    for one in ways.values():
        one.close()
    return points


def streamed_point(model: PreTrainedModel, name: str, streamed: int, scale: Scale, way: str = STREAMING) -> PointRecord:
    """Measure streaming after so many tokens; before the cache is full, its length is the number of tokens seen.

    `way` is `STREAMING` or `STATIC`. Static steps are compiled; their attention is part of the graph and has no time of
    its own.
    """
    eager = lazy(scale.middle)
    decoder = Decoder(
        eager if way == STREAMING else parse(eager.name.replace("streaming", "static")), model, 1, streamed
    )
    if way == STATIC:
        decoder.compile_with(**scale.compile)
    sides = {
        way: repeated(decoder.token_side(), scale.turn),
        "short": repeated(Side(short_step(model, 1)), scale.turn),
    }
    tokens = per_step(in_turns(sides, scale.samples, model.device, warm_up=1), scale.turn)
    context = min(mean_length(scale.middle, BUFFER), streamed + scale.turn * scale.samples // 2)
    point = PointRecord(
        model=name,
        way=way,
        limit=scale.middle,
        streamed=streamed,
        context=context,
        read_bytes=read_weight_bytes(model) + kept_bytes(model, context, 1),
        cache_bytes=decoder.steps.session.cache_bytes,
        tpot=tokens[way],
        short=tokens["short"],
    )
    decoder.close()
    return point


def prompt_point(model: PreTrainedModel, name: str, way: str, multiple: int, scale: Scale) -> PromptRecord:
    """Measure a prompt read in chunks, twice: the first run counts its tensors, the second, warm one is timed.

    `way` is `DENSE` or `STREAMING`; the prompt has `multiple` times S + W tokens.
    """
    configuration = parse("baseline") if way == DENSE else lazy(scale.middle)
    ids, clock = token_ids(model, multiple * scale.middle), clock_for(model.device)

    def read(part: torch.Tensor) -> None:
        session = open_session(configuration, model)
        for chunk in torch.split(part, scale.chunk, dim=1):
            session.feed(chunk, last_only=True)
        session.close()

    peak = tensor_peak(model.device, lambda: read(ids))
    took = milliseconds(lambda: read(ids), clock) / ids.shape[1]
    return PromptRecord(
        model=name,
        way=way,
        tokens=ids.shape[1],
        chunk=scale.chunk,
        series=Series(name=way, unit="ms/token", values=[took]),
        weight_bytes=weight_bytes(model),
        tensor_bytes=peak,
    )


def repeated(side: Side, count: int) -> Side:
    """Return a side with samples of several consecutive steps."""

    def run() -> None:
        for _ in range(count):
            side.run()

    return Side(run, ready=side.ready)


def per_step(found: dict[str, Series], count: int) -> dict[str, Series]:
    """Return the same series, per step."""
    return {
        name: one.model_copy(update={"values": [value / count for value in one.values]}) for name, one in found.items()
    }
