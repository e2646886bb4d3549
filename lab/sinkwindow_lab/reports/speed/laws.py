"""Laws on a device: logits equal the reference's within the error of the dtype, retained tokens exactly.

The reference's own mathematics in a dtype (`upcast=False`) is measured against the reference in float64 on the same
weights: the largest error of the cache may be twice that, plus one rounding step.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkwindow import StreamingCache
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.records import Measurement
from sinkwindow_lab.reports.speed.floors import Place
from sinkwindow_lab.ways.sessions import cache_keyword

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ("tiny", "tiny-pythia")
RULES = ((4, 8, 3), (2, 8, 0), (0, 9, 2), (4, 60, 16))  # S, W, B [tokens]
TOKENS, PADDING, PROMPT = 150, 7, 40


def laws(device: torch.device) -> Iterator[Measurement]:
    """Check every dtype, shape and rule with calls of random lengths, and with a row padded on the left.

    Yields the errors of each law; those of a broken law too.
    """
    for dtype in DTYPES:
        for shape in SHAPES:
            model = random_model(shape, device=device, dtype=dtype)
            exact = copy.deepcopy(model)
            for parameter in exact.parameters():  # buffers such as rotary frequencies keep their dtype
                parameter.data = parameter.data.double()
            place = Place("laws", f"{shape}, {str(dtype).removeprefix('torch.')} on {device}")
            for seed, rule in enumerate(RULES):
                source = random.Random(seed)  # noqa: S311 - a test's choice
                lengths = [source.choice((1, 1, 1, 2, 5, 13, 40)) for _ in range(TOKENS)]
                yield from check(place, f"calls of any length, S, W, B = {rule}", model, exact, rule, lengths, seed)
            lengths = [PROMPT] + [1] * TOKENS
            yield from check(
                place, "a padded row equals that row alone", model, exact, RULES[0], lengths, padding=PADDING
            )


@torch.inference_mode()
def check(
    place: Place,
    law: str,
    model: PreTrainedModel,
    exact: PreTrainedModel,
    rule: tuple[int, int, int],
    lengths: list[int],
    seed: int = 0,
    *,
    padding: int = 0,
) -> list[Measurement]:
    """Feed two rows in calls of some lengths and compare logits and retained tokens with the reference's.

    `exact` has the model's weights in float64. With padding on the left of the second row, that row alone is compared.
    """
    from sinkwindow_reference import reference_logits, retained_after

    sizes: dict[str, Any] = dict(zip(("num_sinks", "window", "buffer"), rule, strict=True))
    generator = torch.Generator().manual_seed(seed)
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
    kept = retained_after(TOKENS - padding, **sizes)
    right = reference_logits(exact, alone, **sizes).double()
    plain = reference_logits(model, alone, **sizes, upcast=False).double()
    found = {
        "error": float((ours.double() - right).abs().max()),
        "plain error": float((plain - right).abs().max()),
        "rounding step": torch.finfo(model.dtype).eps * float(right.abs().max()),
        "retained equal": float(all(row == kept for row in cache.retained_tokens[rows])),
    }
    return [place.one(law, metric, "", [value]) for metric, value in found.items()]
