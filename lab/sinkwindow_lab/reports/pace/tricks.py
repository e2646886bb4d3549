"""The cost of each design choice against the obvious alternative: the same work, interleaved."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from sinkwindow.attention.rotation import Rotary
from sinkwindow.lanes import Lane
from sinkwindow.storage.slots import Slots
from sinkwindow_lab.measure.micro import AttentionSteps, BareAttention, attend, geometry
from sinkwindow_lab.reports.pace.plans import BUFFER, Plan
from sinkwindow_lab.reports.pace.records import Comparison
from sinkwindow_lab.reports.pace.sampling import Side, in_turns
from sinkwindow_lab.ways.configurations import parse, streaming

CYCLE = BUFFER + 1  # steps that hold one eviction with a buffer [tokens]


def tricks(model: PreTrainedModel, name: str, plan: Plan) -> list[Comparison]:
    """Time every trick against what it replaces, on one row of text; return one comparison per trick, without bars."""
    pairs = {
        **_moves(model, plan),
        **_restarts(model, plan),
        **_slots(model, plan),
        **_grouped(model, plan),
    }
    rows = []
    with torch.inference_mode():
        for what, sides in pairs.items():
            ours, other = in_turns(sides, plan.tricks, model.device).values()
            rows.append(Comparison(part="tricks", model=name, what=what, ratio_kind="cost", ours=ours, other=other))
    return rows


def _moves(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, Side]]:
    """Return the sides for an eviction's rotation: which keys move, and in how many operations."""
    sizes = geometry(model)
    rotary = Rotary(next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")))
    shape = (sizes.layers, 1, sizes.kv_heads)
    sinks = torch.randn((*shape, plan.sinks, sizes.head_dim), device=model.device, dtype=model.dtype)
    window = torch.randn((*shape, plan.window, sizes.head_dim), device=model.device, dtype=model.dtype)
    together = Side(lambda: rotary.rotate_by(sinks, CYCLE))
    return {
        "an eviction rotates": {
            f"the {plan.sinks} sinks, forwards": together,
            f"the {plan.window:,} window keys, back": Side(lambda: rotary.rotate_by(window, -CYCLE)),
        },
        "sinks are rotated": {
            "all layers at once": together,
            "layer by layer": Side(lambda: [rotary.rotate_by(layer, CYCLE) for layer in sinks]),
        },
    }


def _restarts(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, Side]]:
    """Return the sides for moving positions below their bound: keys only, or keys and values while they are moved."""
    filled = _filled(streaming(plan.sinks, plan.window, BUFFER).name, model, plan.limit)
    stream = filled.cache._stream  # noqa: SLF001 - the part, not the whole
    (pool,), before = stream.pools, stream.state
    full: Slots = replace(before.pools[0], end=before.pools[0].banks[0].slots.keys.shape[3])
    lanes = [Lane(lane.seen, lane.offset + CYCLE) for lane in before.lanes]

    def restart(*, stay: bool) -> Side:
        return Side(lambda: pool.relocation(full, lanes, stay=stay)[0].finish())  # noqa: PLW0108 - planned each time

    return {
        "where positions start again": {
            "keys turn where they stand": restart(stay=True),
            "the window moves to the front as well": restart(stay=False),
        }
    }


def _slots(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, Side]]:
    """Return the sides for a token's cache work: written in place or joined by `cat`, evicting rarely or each time."""
    length = plan.limit + BUFFER // 2
    lazy, eager, stock = (
        _filled(name, model, seen)
        for name, seen in (
            (streaming(plan.sinks, plan.window, BUFFER).name, plan.limit),
            (streaming(plan.sinks, plan.window, 0).name, plan.limit),
            ("baseline", length),
        )
    )
    held = _filled(streaming(plan.sinks, plan.window, BUFFER).name, model, plan.limit)
    held.hold()
    bare = BareAttention(model, plan.limit + 1)
    return {
        "a token's key and value are": {
            "written into slots": Side(lazy.update),
            "joined by cat (DynamicCache)": Side(stock.update, ready=lambda: stock.rewind(length)),
        },
        f"cache work of {CYCLE} tokens, evicting": {
            f"once in {CYCLE} tokens": Side(lambda: [lazy.update() for _ in range(CYCLE)]),
            "with each token (the paper)": Side(lambda: [eager.update() for _ in range(CYCLE)]),
        },
        "attention over": {
            "a slice of the slots": Side(held.attention_alone),
            "contiguous copies, ready made": Side(bare.step),
        },
    }


def _filled(name: str, model: PreTrainedModel, seen: int) -> AttentionSteps:
    steps = AttentionSteps(parse(name), model)
    steps.fill(seen)
    return steps


def _grouped(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, Side]]:
    """Return the sides for attention of grouped heads: by the kernel, or over keys repeated for each query head."""
    sizes = geometry(model)
    group = sizes.heads // sizes.kv_heads
    if group == 1:
        return {}
    shape = (1, sizes.kv_heads, plan.limit + 1, sizes.head_dim)
    query = torch.randn((1, sizes.heads, 1, sizes.head_dim), device=model.device, dtype=model.dtype)
    layers = [
        (
            torch.randn(shape, device=model.device, dtype=model.dtype),
            torch.randn(shape, device=model.device, dtype=model.dtype),
        )
        for _ in range(sizes.layers)
    ]

    def repeated() -> list[torch.Tensor]:
        return [
            attend(query, keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1))
            for keys, values in layers
        ]

    return {
        f"{sizes.heads} query heads on {sizes.kv_heads} key heads": {
            "enable_gqa": Side(lambda: [attend(query, keys, values) for keys, values in layers]),
            "keys and values repeated": Side(repeated),
        }
    }
