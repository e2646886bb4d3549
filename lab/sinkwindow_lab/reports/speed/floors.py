"""Sides timed interleaved, as measurements; and lower bounds: what the machine needs however the cache is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.measure.clock import Side, interleave
from sinkwindow_lab.measure.kernels import kernels
from sinkwindow_lab.measure.micro import AttentionSteps, bare_attention, geometry
from sinkwindow_lab.records import Figures, Measurement, measured
from sinkwindow_lab.reports.speed.plan import BARE, DENSE, SHORT, SHORT_CONTEXT

WIDTH = 4096  # of the matrix that is read
KERNELS = "kernels"  # how the parts of a profile begin


@dataclass(frozen=True)
class Place:
    """What the measurements of interleaved sides have in common; `at` is the batch size or a number of tokens."""

    part: str
    subject: str
    at: int | None = None

    def one(self, side: str, metric: str, unit: str, samples: Sequence[float]) -> Measurement:
        """Return a measurement of a side here."""
        return self.all(side, {metric: (unit, samples)})[0]

    def all(self, side: str, figures: Figures) -> list[Measurement]:
        """Return the measurements of a side here."""
        return measured(self.part, self.subject, side, self.at, figures)

    def times(
        self, metric: str, sides: Mapping[str, Side], samples: int, device: torch.device, *, turn: int = 1
    ) -> list[Measurement]:
        """Time sides interleaved, `turn` steps per sample; return [ms] per step, and those of each event once more."""
        result = []
        for side, found in interleave(sides, samples, device, warm_up=2 if turn == 1 else 1).items():
            values = [took / turn for took in found.ms]
            result.append(self.one(side, metric, "ms", values))
            for event in dict.fromkeys(found.events.values()):
                own = [values[number] for number, what in found.events.items() if what == event]
                result.append(self.one(side, f"{metric}, {event}", "ms", own))
        return result


def profiled(place: Place, step: Callable[[], object], steps: int, device: torch.device) -> list[Measurement]:
    """Profile steps; return their kernels as measurements of a place."""
    return [one for name, found in kernels(step, steps, device).items() for one in place.all(name, found)]


def bandwidth(device: torch.device, *, megabytes: float = 512.0, samples: int = 7) -> list[Measurement]:
    """Measure how fast a tensor far above every cache is copied, summed and multiplied [GB/s, read and written]."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    source = torch.ones((max(1, int(megabytes * 1e6) // (WIDTH * dtype.itemsize)), WIDTH), device=device, dtype=dtype)
    target, vector = torch.zeros_like(source), torch.ones(WIDTH, device=device, dtype=dtype)
    sides = {
        "copy": Side(lambda: target.copy_(source)),
        "sum": Side(source.sum),
        "matrix times vector": Side(lambda: source @ vector),
    }
    with torch.inference_mode():
        found = interleave(sides, samples, device)
    place, moved = Place("bandwidth", str(device), round(source.nbytes / 1e6)), {"copy": 2 * source.nbytes}
    return [
        place.one(way, "rate", "GB/s", [moved.get(way, source.nbytes) / took / 1e6 for took in timed.ms])
        for way, timed in found.items()
    ]


def short_step(model: PreTrainedModel, batch: int) -> Callable[[], object]:
    """Return a step of the model with eight tokens of context in the stock cache, which is cropped first."""
    steps = AttentionSteps(DENSE, model, batch=batch)
    steps.fill(SHORT_CONTEXT)
    token = torch.zeros((batch, 1), dtype=torch.long, device=model.device)

    def step() -> torch.Tensor:
        steps.rewind(SHORT_CONTEXT)
        return steps.session.feed(token, last_only=True).argmax(dim=-1)

    return step


def bytes_read(place: Place, model: PreTrainedModel, context: int, batch: int) -> list[Measurement]:
    """Return what a step has to read once: weights, and keys and values of `context` tokens.

    Of an input embedding that is not tied, a step reads one row per token, which is not counted.
    """
    sizes = geometry(model)
    kept = 2 * batch * sizes.layers * sizes.kv_heads * sizes.head_dim * context * model.dtype.itemsize
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = sum(one.nbytes for one in model.parameters()) - (embedding.nbytes if head.weight is not embedding else 0)
    found = {"context": ("tokens", [context]), "weights": ("bytes", [weights]), "keys and values": ("bytes", [kept])}
    return place.all(SHORT, found)


def floors(model: PreTrainedModel, name: str, context: int, batch: int, *, samples: int = 20) -> list[Measurement]:
    """Measure bare attention over `context` keys, the query's own included, and a step with almost no context."""
    place = Place("tpot", name, batch)
    sides = {BARE: Side(bare_attention(model, context, batch=batch).step), SHORT: Side(short_step(model, batch))}
    return place.times("TPOT", sides, samples, model.device) + bytes_read(place, model, context, batch)
