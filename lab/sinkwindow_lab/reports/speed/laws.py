"""Laws on a device: logits equal the reference's within the error of the dtype, retained tokens exactly.

The comparison is that of `measure/verify.py`, here of two rows in calls of any length, of a padded row, and of compiled
steps. `generate` has to choose the same tokens with static steps, which it compiles on a GPU, as without.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

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
GENERATED = ("tiny", torch.float32)
COMPILED = (("tiny-pythia", torch.float16), ("tiny", torch.bfloat16))  # each takes the compiler's time


def laws(device: torch.device, compile_with: Mapping[str, str]) -> Iterator[Measurement]:
    """Check every dtype, shape and rule; yield the errors of each law, those of a broken law too.

    `compile_with` are the options of `torch.compile` for static steps.
    """
    lengths = [PROMPT] + [1] * TOKENS
    for dtype in DTYPES:
        for shape in SHAPES:
            model = random_model(shape, device=device, dtype=dtype)
            models = model, wide_copy(model)
            place = Place("laws", f"{shape}, {str(dtype).removeprefix('torch.')} on {device}")
            for seed, rule in enumerate(RULES):
                source = random.Random(seed)  # noqa: S311 - a test's choice
                drawn = [source.choice((1, 1, 1, 2, 5, 13, 40)) for _ in range(TOKENS)]
                yield from check(place, f"calls of any length, S, W, B = {rule}", models, rule, drawn)
            yield from check(place, "a padded row equals that row alone", models, RULES[0], lengths, padding=PADDING)
            if (shape, dtype) in COMPILED:
                torch.compiler.reset()
                options: dict[str, Any] = {"fullgraph": True, **compile_with}
                step = torch.compile(model, **options)
                yield from check(place, "compiled steps", models, RULES[0], lengths, step=step)
            if (shape, dtype) == GENERATED:
                torch.compiler.reset()
                yield from same_tokens(place, model)


@torch.inference_mode()
def check(
    place: Place,
    law: str,
    models: tuple[PreTrainedModel, PreTrainedModel],
    rule: tuple[int, int, int],
    lengths: list[int],
    *,
    padding: int = 0,
    step: Callable[..., Any] | None = None,
) -> list[Measurement]:
    """Feed two rows in calls of some lengths and compare logits and retained tokens with the reference's.

    `models` are a model and its copy in float64. With padding on the left of the second row, that row alone is
    compared. With `step`, the compiled model, calls of one token are steps of a static cache.
    """
    from sinkwindow_reference import reference_logits, retained_after

    model, exact = models
    sizes: dict[str, Any] = dict(zip(("num_sinks", "window", "buffer"), rule, strict=True))
    generator = torch.Generator().manual_seed(rule[1])
    ids = torch.randint(0, int(model.config.vocab_size), (2, TOKENS), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache, parts, start = StreamingCache(model, *rule, static=step is not None), [], 0
    for length in lengths:
        stop = min(start + length, TOKENS)
        if start < stop:
            padded = {"attention_mask": mask[:, :stop]} if padding else {}
            call = step if step is not None and length == 1 else model
            parts.append(call(input_ids=ids[:, start:stop], **{cache_keyword(model): cache}, **padded).logits.clone())
        start = stop
    cache.detach()
    rows = slice(1 if padding else 0, None)
    alone, ours = ids[rows, padding:], torch.cat(parts, 1)[rows, padding:]
    right = reference_logits(exact, alone, **sizes, upcast=False)
    plain = largest_error(reference_logits(model, alone, **sizes, upcast=False), right)
    equal = cache.retained_tokens[rows] == [retained_after(TOKENS - padding, **sizes)] * len(alone)
    return errors(place, law, largest_error(ours, right), plain, rounding_step(right, model.dtype), equal=equal)


def same_tokens(place: Place, model: PreTrainedModel) -> list[Measurement]:
    """Compare what `generate` chooses with and without static steps; the error counts different tokens."""
    ids = torch.arange(2 * PROMPT, device=model.device).reshape(2, PROMPT) % int(model.config.vocab_size)
    chosen, kept, generating = [], [], cast("GenerationMixin", model)
    for static in (False, True):
        cache = StreamingCache(model, *RULES[0], static=static)
        more: dict[str, Any] = {cache_keyword(model): cache, "attention_mask": torch.ones_like(ids)}
        chosen.append(generating.generate(ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **more))
        kept.append(cache.retained_tokens)
        cache.detach()
    different = float((chosen[0] != chosen[1]).sum())
    return errors(place, "generate, static steps", different, 0.0, 0.0, equal=kept[0] == kept[1])


def errors(place: Place, law: str, error: float, plain: float, step: float, *, equal: bool) -> list[Measurement]:
    """Return what was found of a law."""
    found = {"error": error, "plain error": plain, "rounding step": step, "retained equal": float(equal)}
    return place.all(law, {metric: ("", [value]) for metric, value in found.items()})
