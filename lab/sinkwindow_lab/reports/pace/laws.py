"""Laws on a device: logits equal the reference's within the error of the dtype, retained tokens exactly.

The reference's own mathematics in a dtype (`upcast=False`) is measured against the reference in float64 on the same
weights: the largest error of the cache may be twice that, plus one rounding step.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.reports.pace.gpu_records import LawRecord
from sinkwindow_lab.ways.sessions import cache_keyword

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ("tiny", "tiny-pythia")
RULES = ((4, 8, 3), (2, 8, 0), (0, 9, 2), (4, 60, 16))
TOKENS = 150


def laws(device: torch.device, *, seed: int = 0) -> Iterator[LawRecord]:
    """Check every dtype, shape and rule with calls of random lengths, and with rows padded on the left.

    Yields one record per law; a broken law is a record too.
    """
    for dtype in DTYPES:
        for shape in SHAPES:
            model = random_model(shape, device=device, dtype=dtype)
            exact = widened(model)
            for number, rule in enumerate(RULES):
                yield calls_law(model, exact, shape, rule, seed + number)
            yield padding_law(model, exact, shape, RULES[0], seed)


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """Return a float64 copy of a model; buffers such as rotary frequencies keep their dtype."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.double()
    return twin


@torch.inference_mode()
def calls_law(
    model: PreTrainedModel, exact: PreTrainedModel, shape: str, rule: tuple[int, int, int], seed: int
) -> LawRecord:
    """Check that calls of random lengths give the reference's logits and retained tokens.

    `exact` has the same weights in float64; `rule` is S, W and B [tokens].
    """
    from sinkwindow import StreamingCache
    from sinkwindow_reference import retained_after

    ids = _ids(model, 2, TOKENS, seed)
    cache, parts, start = StreamingCache(model, *rule), [], 0
    for length in _lengths(TOKENS, seed):
        part = ids[:, start : start + length]
        parts.append(model(input_ids=part, **{cache_keyword(model): cache}).logits)
        start += length
    kept = retained_after(TOKENS, num_sinks=rule[0], window=rule[1], buffer=rule[2])
    same = all(row == kept for row in cache.retained_tokens)
    cache.detach()
    return _record(model, exact, shape, f"calls of any length, S, W, B = {rule}", ids, torch.cat(parts, 1), rule, same)


@torch.inference_mode()
def padding_law(
    model: PreTrainedModel, exact: PreTrainedModel, shape: str, rule: tuple[int, int, int], seed: int
) -> LawRecord:
    """Check that a row padded on the left gives the logits of that row alone.

    `exact` has the same weights in float64; `rule` is S, W and B [tokens].
    """
    from sinkwindow import StreamingCache

    padding, prompt = 7, 40
    ids = _ids(model, 2, TOKENS, seed)
    mask = torch.ones((2, TOKENS), dtype=torch.long, device=model.device)
    mask[1, :padding] = 0
    cache, parts = StreamingCache(model, *rule), []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, TOKENS))]:
        keywords = {cache_keyword(model): cache, "attention_mask": mask[:, :stop]}
        parts.append(model(input_ids=ids[:, start:stop], **keywords).logits)
    cache.detach()
    alone, ours = ids[1:, padding:], torch.cat(parts, 1)[1:, padding:]
    return _record(model, exact, shape, "a padded row equals that row alone", alone, ours, rule, same=True)


def _record(
    model: PreTrainedModel,
    exact: PreTrainedModel,
    shape: str,
    law: str,
    ids: torch.Tensor,
    ours: torch.Tensor,
    rule: tuple[int, int, int],
    same: bool,  # noqa: FBT001 - private
) -> LawRecord:
    from sinkwindow_reference import reference_logits

    sinks, window, buffer = rule
    right = reference_logits(exact, ids, num_sinks=sinks, window=window, buffer=buffer).double()
    plain = reference_logits(model, ids, num_sinks=sinks, window=window, buffer=buffer, upcast=False).double()
    step = torch.finfo(model.dtype).eps * float(right.abs().max())
    return LawRecord(
        law=law,
        shape=shape,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        error=float((ours.double() - right).abs().max()),
        plain_error=float((plain - right).abs().max()),
        rounding_step=step,
        retained_equal=same,
    )


def _ids(model: PreTrainedModel, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, int(model.config.vocab_size), (rows, columns), generator=generator).to(model.device)


def _lengths(total: int, seed: int) -> Iterator[int]:
    """Return random lengths of calls: long ones, single tokens, and all between."""
    source = random.Random(seed)  # noqa: S311 - a test's choice
    while total > 0:
        length = min(total, source.choice((1, 1, 1, 2, 5, 13, 40)))
        total -= length
        yield length
