"""What memory and bandwidth allow on machines that nobody here has: arithmetic, no measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sinkwindow_lab.render.markdown import join, table

USABLE: Final = 0.9  # of a GPU's memory, for weights and caches
WINDOWS: Final = (1024, 4096, 16384)  # S + W + B + 1 [tokens]
GPUS: Final = 8  # of a machine
MACHINES: Final = 1000


@dataclass(frozen=True)
class Shape:
    """What a model's step reads; sizes as in its published configuration, weights and caches in two bytes."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def weights(self) -> float:
        """Bytes of the weights."""
        return 2 * self.parameters

    def stream(self, window: int) -> float:
        """Return the bytes of a stream's keys and values."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim * window


@dataclass(frozen=True)
class Gpu:
    """What its maker says: memory [bytes], bandwidth [bytes/s], dense 16-bit arithmetic [operations/s]."""

    name: str
    memory: float
    bandwidth: float
    arithmetic: float

    def streams(self, shape: Shape, window: int, gpus: int = 1) -> int:
        """Return how many streams fit, the weights split over some GPUs."""
        return max(0, int((USABLE * self.memory * gpus - shape.weights) // shape.stream(window)))

    def rate(self, shape: Shape, window: int, streams: int, gpus: int = 1) -> float:
        """Return the most tokens/s of all streams: each step reads the weights once and each stream's cache."""
        read = (shape.weights + streams * shape.stream(window)) / (self.bandwidth * gpus)
        computed = 2 * shape.parameters * streams / (self.arithmetic * gpus)
        return streams / max(read, computed)


SHAPES: Final = (
    Shape("SmolLM2-135M", 0.135e9, 30, 3, 64),
    Shape("Pythia-2.8B", 2.78e9, 32, 32, 80),
    Shape("Llama-2-7B", 6.74e9, 32, 32, 128),
    Shape("Llama-3.1-8B", 8.03e9, 32, 8, 128),
    Shape("Llama-3.1-70B", 70.6e9, 80, 8, 128),
)
GPU_TYPES: Final = (
    Gpu("L4", 24e9, 300e9, 121e12),
    Gpu("A100 80 GB", 80e9, 2039e9, 312e12),
    Gpu("H100 SXM", 80e9, 3350e9, 989e12),
    Gpu("H200", 141e9, 4800e9, 989e12),
)
ON_PAPER: Final = f"""\
## On paper: larger machines

Arithmetic, not measured here. A step reads the weights once and the keys and values of every stream, and takes two
operations per weight and stream; the slower of memory and arithmetic is the least time. Published steps of one stream
reach 27% (H100) to 81% (L4) of that rate (arXiv 2605.30571). Weights and caches have two bytes per number, and
{USABLE:.0%} of the memory is used. Memory and rates of GPUs are their makers'."""
STOPS: Final = """\
**Batching stops paying** at the number of streams whose caches weigh as much as the weights: there a GPU gives half the
rate that any number of streams can reach, and each further doubling gains less."""
HOME: Final = """\
A stream's cache is on the GPUs that run it: a text has to come back to them, and a session that moves takes its bytes
along (`save`, `load`). Between machines nothing else is shared, so their number multiplies."""
LIMITS: Final = """\
### Limits of engines

- **The continuous batching of transformers, and so ours**: one process with one model; batches are prepared in Python,
  which takes longer the more streams there are; with sinks, CUDA graphs and asynchronous batches are off.
- **vLLM** has sinks that are fixed when the model loads, and no eviction inside a request (PR 3515 closed in 2024;
  issues 43374, 51948 and 53876 open in November 2026).
- **SGLang** evicts what has left a window during decode (PR 17220); no sinks with new positions were found.
- **TensorRT-LLM** dropped StreamingLLM in May 2026 (issue 14275).
- **MLC-LLM** has sinks and a window in its paged cache (tvm PR 16729); **llama.cpp** shifts half a window at a time,
  off by default since August 2025.

Up to some dozens of streams on a GPU ours is enough; beyond, an engine is, once it has sinks."""


def extrapolation() -> str:
    """Return the part of the page about larger machines."""
    sizes = [[shape.name, *(f"{shape.stream(window) / 1e6:,.1f}" for window in WINDOWS)] for shape in SHAPES]
    middle = WINDOWS[1]
    blocks = [ON_PAPER, "### Bytes per stream (MB), by S + W + B + 1"]
    blocks += [table(("model", *(f"{window:,}" for window in WINDOWS)), sizes)]
    blocks += [f"### One GPU, {middle:,} tokens per stream", _one_gpu(middle), STOPS]
    blocks += [f"### {GPUS} GPUs, and {MACHINES:,} machines with {GPUS} each", _many(middle), HOME, LIMITS]
    return join(blocks)


def _one_gpu(window: int) -> str:
    rows = []
    for shape in SHAPES:
        for gpu in GPU_TYPES:
            most, even = gpu.streams(shape, window), round(shape.weights / shape.stream(window))
            if most == 0:
                rows.append([shape.name, gpu.name, "0", "-", "-", f"{even:,}"])
                continue
            rates = [f"{gpu.rate(shape, window, streams):,.0f}" for streams in (1, most)]
            rows.append([shape.name, gpu.name, f"{most:,}", *rates, f"{even:,}"])
    columns = ("model", "GPU", "streams that fit", "tokens/s of one", "tokens/s of all", "stops paying at")
    return table(columns, rows, words=("GPU",))


def _many(window: int) -> str:
    """Weights on every GPU against weights split over all of a machine, which leaves more room and costs exchanges."""
    gpu, rows = GPU_TYPES[2], []
    for shape in SHAPES:
        for way, split, copies in (("copies", 1, GPUS), ("split", GPUS, 1)):
            streams = gpu.streams(shape, window, split)
            rate = gpu.rate(shape, window, streams, split) * copies if streams else 0.0
            numbers = [f"{one * copies:,.0f}" for one in (streams, streams * MACHINES)]
            rows.append([shape.name, way, numbers[0], f"{rate:,.0f}", numbers[1], f"{rate * MACHINES / 1e6:,.1f}"])
    columns = ("model", f"weights on {GPUS} H100", "streams", "tokens/s", "streams, all machines", "million tokens/s")
    return table(columns, rows, words=(columns[1],))
