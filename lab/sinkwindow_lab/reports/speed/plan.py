"""How much a run measures, which side is compared with which, and the targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sinkwindow_lab.records import Configuration
from sinkwindow_lab.ways.configurations import parse, streaming

SINKS, BUFFER = 4, 64  # the cache's defaults [tokens]
SHORT_CONTEXT = 8  # of a step with almost no time in attention [tokens]
LONG, SHORTER = 20, 5  # prompts, in limits
EMBEDDED = "embedded"
DENSE = parse("baseline")
BARE, SHORT, STOCK, ALONE = "bare SDPA", "short", "DynamicCache", "each call alone"  # sides that several parts have
SAME_CHUNKS, INEXACT = "dense, same chunks", "dense, cut to S + W before each chunk (inexact)"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run, in tokens if they do not say otherwise; by default as small as possible."""

    models: tuple[tuple[str, str], ...]  # shape and dtype, the more important one first
    limit: int  # S + W of everything that has only one
    samples: dict[int, int]  # samples per side, by batch size
    late: dict[int, int] = field(default_factory=dict)  # streamed before the late steps, by batch size
    chunk: int = 32  # tokens per call of a prompt
    prompt_limit: int = 16  # S + W of the prefill
    scored: int = 3  # blocks of text scored
    block: int = 32  # tokens per scored block
    singles: int = 2  # tokens scored one by one after each block
    tricks: int = 3  # samples per side of a single trick
    megabytes: float = 1.0  # tensor for the bandwidth [MB]
    # Options of `torch.compile` for static steps; the eager backend captures and guards the graph nevertheless.
    compile: dict[str, str] = field(default_factory=lambda: {"backend": "eager"})
    turn: int = 1  # steps of one sample: enough on a GPU that a step's own time outweighs the clock's
    warm_up: int = 0  # steps before those that are timed, of whole steps on a GPU
    limits: tuple[int, ...] = ()  # further S + W
    streamed: tuple[int, ...] = ()  # before decoding
    prompts: tuple[int, ...] = ()  # prompt lengths, in limits
    recomputed: tuple[int, ...] = ()  # windows that are computed anew for each token
    generated: int = 8  # new tokens of a call of `generate`


FULL = Plan(
    models=((EMBEDDED, "float32"), ("pythia-160m", "float32")),
    limit=1024,
    samples={1: 132, 8: 67},  # over B + 1, so that all sides contain an eviction
    late={1: 100_000, 8: 1024},
    chunk=512,
    prompt_limit=256,
    scored=10,
    block=256,
    singles=6,
    tricks=40,
    megabytes=512.0,
    compile={"backend": "inductor"},
)
QUICK = Plan((("tiny", "float32"), ("tiny-pythia", "float32")), 64, {1: 67, 8: 67}, {1: 1000, 8: 64})
LARGE = Plan(
    models=(("pythia-2.8b", "float16"), ("llama-7b", "bfloat16")),
    limit=1024,
    samples={1: 5},
    chunk=1024,
    megabytes=2048.0,
    compile={"mode": "reduce-overhead"},  # CUDA graphs
    turn=13,  # a fifth of the 65 steps between two evictions: five samples cover every length once
    warm_up=BUFFER + 1,  # every length once before: cuDNN builds a plan for each that it has not seen
    limits=(4096, 256),
    streamed=(64_000, 1000),
    prompts=(SHORTER, LONG),
    recomputed=(1024, 4096),
    generated=64,
    scored=8,
    block=256,
    singles=13,
)
TINY = Plan(
    models=(("tiny-pythia", "float16"), ("tiny", "bfloat16")),
    limit=32,
    samples={1: 2},
    turn=3,
    limits=(16,),
    streamed=(100, 400),
    prompts=(2, 4),
    recomputed=(32,),
)
TINY_ON_GPU = replace(TINY, compile=LARGE.compile)


def lazy(limit: int, buffer: int = BUFFER) -> Configuration:
    """Return the streaming configuration of S + W tokens."""
    return streaming(SINKS, limit - SINKS, buffer)


def static(limit: int) -> Configuration:
    """Return the static configuration of S + W tokens."""
    return parse(f"static_{SINKS}_{limit - SINKS}_{BUFFER}")


def mean_length(limit: int, buffer: int = BUFFER) -> int:
    """Return the mean number of keys per step, its own included, over a cycle of B + 1 steps, rounded down [tokens]."""
    return limit + 1 + buffer // 2


@dataclass(frozen=True)
class Compared:
    """Which side of a part is compared with which; braces in the texts are filled in from the plan."""

    part: str
    what: str  # describes the row, after the batch size
    ours: str
    other: str
    target: float | Mapping[int, float] | None = None  # by batch size if it differs; None if it is only shown
    speed: bool = False  # the ratio is the other's time over ours and at least the target; else ours over the other's
    since: int = 0  # the target applies from so many tokens streamed on


TPOT = {1: 0.85, 8: 0.7}
LONGEST = {"ours, late": 3.0, "ours, B = 0": 3.0}  # longest step with an event over the median step
PROMPT = "{prompt:,} tokens in chunks of {chunk}, S + W = {prompt_limit}, over "
BLOCKS = "S + W = {limit:,}, blocks of {block}, over "
PEAK = "tensors above the weights, prompt of 20 limits over 5, chunks of {chunk}, S + W = {prompt_limit}"
COMPARED = (
    Compared("attention", "B = 64", "ours, B = 64", BARE + ", {lazy:,} tokens", 1.15),
    Compared("attention", "B = 0", "ours, B = 0", BARE + ", {paper:,} tokens", 1.15),
    Compared("attention", "DynamicCache, for comparison", STOCK, BARE + ", {paper:,} tokens"),
    Compared("tpot", "when first full, over DynamicCache at the same length", "ours", STOCK, TPOT),
    Compared("tpot", "after {seen:,} tokens, over DynamicCache at the same length", "ours, late", STOCK, TPOT),
    Compared("tpot", "B = 0, over DynamicCache at {longer} more tokens", "ours, B = 0", STOCK),
    Compared("tpot", "after {seen:,} tokens, over when first full", "ours, late", "ours", 1.02, since=100_000),
    Compared("compiled", "over ours, eager", "static, compiled", "ours", 1.0),
    Compared("compiled", "over DynamicCache at the same length", "static, compiled", STOCK, TPOT),
    Compared("prefill", PROMPT + SAME_CHUNKS, "ours", SAME_CHUNKS, 0.7, speed=True),
    Compared("prefill", PROMPT + INEXACT, "ours", INEXACT, speed=True),
    Compared("memory", PEAK, "ours, {prompt:,} tokens", "ours, {shorter:,} tokens", 1.1),
    Compared("perplexity", BLOCKS + "token by token", "blocks", "single", 15.0, speed=True),
    Compared("perplexity", BLOCKS + "a dense pass in the same blocks", "blocks", "dense", 0.7, speed=True),
)
