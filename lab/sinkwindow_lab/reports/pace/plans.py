"""How much of everything a run measures, and the bars."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_BAR = 1.15  # attention and cache update over bare SDPA
TPOT_BARS = {1: 0.85, 8: 0.7}  # over DynamicCache held at the same length, by batch size
COMPILED_BAR = 1.0  # a compiled step over an eager one of the same cache
LATE_BAR = 1.02  # after 100,000 tokens over when first full
LONGEST_BAR = 3.0  # longest step with an eviction, compaction or rebase over the median step
PREFILL_BAR = 0.7  # of a dense chunked pass's tokens per second
FLAT_BAR = 1.1  # peak memory at 20 limits over that at 5
BY_TOKEN_BAR = 15.0  # tokens per second of exact scoring in blocks over token by token
LATE = 100_000  # [tokens]


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        shapes: models with random weights, by their shape.
        embedded: whether the embedded model runs as well, first.
        sinks: S [tokens].
        window: W [tokens].
        batches: rows.
        samples: steps per side, by batch size: over B + 1, so that all contain an eviction.
        late: tokens streamed before the late steps, by batch size [tokens].
        prompt_window: W of the prefill, where a prompt is 20 limits [tokens].
        chunk: tokens per call of a prefill [tokens].
        prefills: how often a prompt is read.
        scored: blocks of text scored.
        block: tokens per scored block [tokens].
        singles: tokens scored one by one after each block [tokens].
        megabytes: tensor for the bandwidth [MB].
        tricks: samples per side of a single trick.
        compiled: rows with which steps are compiled.
        backend: what compiles them.
    """

    shapes: tuple[str, ...]
    embedded: bool
    sinks: int
    window: int
    batches: tuple[int, ...]
    samples: dict[int, int]
    late: dict[int, int]
    prompt_window: int
    chunk: int
    prefills: int
    scored: int
    block: int
    singles: int
    megabytes: float
    tricks: int
    compiled: tuple[int, ...]
    backend: str

    @property
    def limit(self) -> int:
        """S + W [tokens]."""
        return self.sinks + self.window


FULL = Plan(
    shapes=("pythia-160m",),
    embedded=True,
    sinks=4,
    window=1020,
    batches=(1, 8),
    samples={1: 132, 8: 67},
    late={1: LATE, 8: 1024},
    prompt_window=252,
    chunk=512,
    prefills=1,
    scored=10,
    block=256,
    singles=6,
    megabytes=512.0,
    tricks=40,
    compiled=(1, 8),
    backend="inductor",
)
QUICK = Plan(
    shapes=("tiny", "tiny-pythia"),
    embedded=False,
    sinks=4,
    window=60,
    batches=(1, 8),
    samples={1: 67, 8: 67},
    late={1: 1000, 8: 64},
    prompt_window=12,
    chunk=32,
    prefills=1,
    scored=3,
    block=32,
    singles=2,
    megabytes=1.0,
    tricks=3,
    compiled=(1, 8),
    backend="eager",  # the graph is captured nevertheless
)
BUFFER = 64  # the cache's default; 0 is the paper [tokens]
