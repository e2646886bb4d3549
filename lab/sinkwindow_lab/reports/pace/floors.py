"""Lower bounds: what the machine needs however the cache is built."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.measure.micro import AttentionSteps, BareAttention, geometry
from sinkwindow_lab.reports.pace.records import BandwidthRecord, FloorRecord
from sinkwindow_lab.reports.pace.sampling import Side, in_turns
from sinkwindow_lab.ways.configurations import parse

SHORT = 8  # context of a step with almost no time in attention [tokens]


def bandwidth(device: torch.device, *, megabytes: float = 512.0, samples: int = 7) -> BandwidthRecord:
    """Measure memory bandwidth by copying a large tensor, summing it, and multiplying it with a vector as a model does.

    `megabytes` must be far above every cache of the processor [MB]. A rate is bytes read plus bytes written per second.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    width = 4096
    rows = max(1, int(megabytes * 1e6) // (width * dtype.itemsize))
    source = torch.ones((rows, width), device=device, dtype=dtype)
    target = torch.empty_like(source)
    target.zero_()
    vector = torch.ones(width, device=device, dtype=dtype)
    sides = {
        "copy": Side(lambda: target.copy_(source)),
        "sum": Side(source.sum),
        "matrix times vector": Side(lambda: source @ vector),
    }
    moved = {"copy": 2 * source.nbytes, "sum": source.nbytes, "matrix times vector": source.nbytes}
    with torch.inference_mode():
        series = in_turns(sides, samples, device)
    rates = {name: [moved[name] / took / 1e6 for took in one.values] for name, one in series.items()}
    return BandwidthRecord(device=str(device), megabytes=source.nbytes / 1e6, rates=rates)


def short_step(model: PreTrainedModel, batch: int) -> Callable[[], object]:
    """Return a function that runs a step of the model with eight tokens of context in the stock cache.

    The cache is cropped first, which takes almost no time at this length.
    """
    steps = AttentionSteps(parse("baseline"), model, batch=batch)
    steps.fill(SHORT)
    token = torch.zeros((batch, 1), dtype=torch.long, device=model.device)

    def step() -> torch.Tensor:
        steps.rewind(SHORT)
        return steps.session.feed(token, last_only=True).argmax(dim=-1)

    return step


def kept_bytes(model: PreTrainedModel, tokens: int, batch: int) -> int:
    """Return the bytes of keys and values, all layers, that one step has to read."""
    sizes = geometry(model)
    return 2 * batch * sizes.layers * sizes.kv_heads * sizes.head_dim * tokens * model.dtype.itemsize


def read_weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that one step has to read: all but an untied input embedding.

    Of the embedding a step reads one row per token.
    """
    total = sum(one.numel() * one.element_size() for one in model.parameters())
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return total - (embedding.numel() * embedding.element_size() if head.weight is not embedding else 0)


def floors(model: PreTrainedModel, name: str, context: int, batch: int, *, samples: int = 20) -> FloorRecord:
    """Measure bare attention over `context` tokens, and a step with almost no context, interleaved.

    `context` counts the keys of the attention, the query's own included.
    """
    sides = {
        "bare SDPA": Side(BareAttention(model, context, batch=batch).step),
        f"step, {SHORT} tokens of context": Side(short_step(model, batch)),
    }
    bare, short = in_turns(sides, samples, model.device).values()
    return FloorRecord(
        model=name,
        batch=batch,
        context=context,
        weight_bytes=read_weight_bytes(model),
        cache_bytes=kept_bytes(model, context, batch),
        bare=bare,
        short=short,
    )
