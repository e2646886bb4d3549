"""Laws on a device: logits equal the reference's within the error of the dtype, retained tokens exactly.

The comparison is that of `measure/verify.py`, here of two rows in calls of any length, and of a padded row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkwindow import StreamingCache
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.inputs.wide import wide_copy
from sinkwindow_lab.measure.verify import largest_error, rounding_step
from sinkwindow_lab.records import Measurement
from sinkwindow_lab.reports.speed.floors import Place
from sinkwindow_lab.ways.sessions import cache_keyword

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ("tiny", "tiny-pythia")
RULES = ((4, 8, 3), (2, 8, 0), (0, 9, 2), (4, 60, 16))  # S, W, B [tokens]
TOKENS, PADDING, PROMPT = 150, 7, 40


def laws(device: torch.device) -> Iterator[Measurement]:
    """Check every dtype, shape and rule; yield the errors of each law, those of a broken law too."""
    for dtype in DTYPES:
        for shape in SHAPES:
            model = random_model(shape, device=device, dtype=dtype)
            models = model, wide_copy(model)
            place = Place("laws", f"{shape}, {str(dtype).removeprefix('torch.')} on {device}")
            for seed, rule in enumerate(RULES):
                source = random.Random(seed)  # noqa: S311 - a test's choice
                lengths = [source.choice((1, 1, 1, 2, 5, 13, 40)) for _ in range(TOKENS)]
                yield from check(place, f"calls of any length, S, W, B = {rule}", models, rule, lengths)
            lengths = [PROMPT] + [1] * TOKENS
            yield from check(place, "a padded row equals that row alone", models, RULES[0], lengths, padding=PADDING)


@torch.inference_mode()
def check(
    place: Place,
    law: str,
    models: tuple[PreTrainedModel, PreTrainedModel],
    rule: tuple[int, int, int],
    lengths: list[int],
    *,
    padding: int = 0,
) -> list[Measurement]:
    """Feed two rows in calls of some lengths and compare logits and retained tokens with the reference's.

    `models` are a model and its copy in float64. With padding on the left of the second row, that row alone is
    compared.
    """
    from sinkwindow_reference import reference_logits, retained_after

    model, exact = models
    sizes: dict[str, Any] = dict(zip(("num_sinks", "window", "buffer"), rule, strict=True))
    generator = torch.Generator().manual_seed(rule[1])
    ids = torch.randint(0, int(model.config.vocab_size), (2, TOKENS), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache, parts, start = StreamingCache(model, *rule), [], 0
    for length in lengths:
        stop = min(start + length, TOKENS)
        if start < stop:
            padded = {"attention_mask": mask[:, :stop]} if padding else {}
            parts.append(model(input_ids=ids[:, start:stop], **{cache_keyword(model): cache}, **padded).logits)
        start = stop
    cache.detach()
    rows = slice(1 if padding else 0, None)
    alone, ours = ids[rows, padding:], torch.cat(parts, 1)[rows, padding:]
    right = reference_logits(exact, alone, **sizes, upcast=False)
    found = {
        "error": largest_error(ours, right),
        "plain error": largest_error(reference_logits(model, alone, **sizes, upcast=False), right),
        "rounding step": rounding_step(right, model.dtype),
        "retained equal": float(
            cache.retained_tokens[rows] == [retained_after(TOKENS - padding, **sizes)] * len(alone)
        ),
    }
    return [place.one(law, metric, "", [value]) for metric, value in found.items()]
