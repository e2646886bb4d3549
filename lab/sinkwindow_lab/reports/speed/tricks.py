"""The cost of each design choice against the obvious alternative: the same work, interleaved."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.measure.clock import Side, repeated
from sinkwindow_lab.measure.micro import AttentionSteps, attend, bare_attention, draw, geometry, relocation
from sinkwindow_lab.records import Configuration, Measurement
from sinkwindow_lab.reports.speed.floors import Place
from sinkwindow_lab.reports.speed.plan import BUFFER, DENSE, SINKS, Plan, lazy

CYCLE = BUFFER + 1  # steps that hold one eviction with a buffer [tokens]


def tricks(model: PreTrainedModel, name: str, plan: Plan) -> list[Measurement]:
    """Time every trick (the first side) against what it replaces, on one row of text; the metric names the trick."""
    place, pairs = Place("tricks", name), rotations(model, plan) | cache_work(model, plan) | grouped_heads(model, plan)
    with torch.inference_mode():
        found = [place.times(what, sides, plan.tricks, model.device) for what, sides in pairs.items()]
    return [one for pair in found for one in pair]


def rotations(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, Side]]:
    """Return the sides for rotated keys: which, in how many operations, and whether a rebase moves them as well."""
    window, sizes = plan.limit - SINKS, geometry(model)
    rotary = Rotary(next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")))
    sinks, keys = (
        torch.stack([draw(sizes.kv_heads, model, tokens) for _ in range(sizes.layers)]) for tokens in (SINKS, window)
    )
    together = Side(lambda: rotary.rotate_by(sinks, CYCLE))
    return {
        "an eviction rotates": {
            f"the {SINKS} sinks, forwards": together,
            f"the {window:,} window keys, back": Side(lambda: rotary.rotate_by(keys, -CYCLE)),
        },
        "sinks are rotated": {
            "all layers at once": together,
            "layer by layer": Side(lambda: [rotary.rotate_by(layer, CYCLE) for layer in sinks]),
        },
        "where positions start again": {
            "keys are rotated in their slots": Side(relocation(lazy(plan.limit), model, stay=True)),
            "the window moves to the front as well": Side(relocation(lazy(plan.limit), model, stay=False)),
        },
    }


def cache_work(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, Side]]:
    """Return the sides for a token's cache work: written in place or joined by `cat`, evicting rarely or each time."""

    def filled(way: Configuration, seen: int) -> AttentionSteps:
        steps = AttentionSteps(way, model)
        steps.fill(seen)
        return steps

    length = plan.limit + BUFFER // 2
    often, held = filled(lazy(plan.limit), plan.limit), filled(lazy(plan.limit), plan.limit)
    paper, stock = filled(lazy(plan.limit, 0), plan.limit), filled(DENSE, length)
    held.hold()
    return {
        "a token's key and value are": {
            "written into slots": Side(often.update),
            "joined by cat (DynamicCache)": Side(stock.update, ready=lambda: stock.rewind(length)),
        },
        f"cache work of {CYCLE} tokens, evicting": {
            f"once in {CYCLE} tokens": Side(repeated(often.update, CYCLE)),
            "with each token (the paper)": Side(repeated(paper.update, CYCLE)),
        },
        "attention over": {
            "a slice of the slots": Side(held.attention_alone),
            "contiguous copies, ready made": Side(bare_attention(model, plan.limit + 1).step),
        },
    }


def grouped_heads(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, Side]]:
    """Return the sides for attention of grouped heads: by the kernel, or over keys repeated for each query head."""
    sizes = geometry(model)
    group = sizes.heads // sizes.kv_heads
    if group == 1:
        return {}
    bare = bare_attention(model, plan.limit + 1)

    def repeat(states: torch.Tensor) -> torch.Tensor:
        return states.repeat_interleave(group, dim=1)

    return {
        f"{sizes.heads} query heads on {sizes.kv_heads} key heads": {
            "enable_gqa": Side(bare.step),
            "keys and values repeated": Side(
                lambda: [attend(bare.query, repeat(keys), repeat(values)) for keys, values in bare.layers]
            ),
        }
    }
