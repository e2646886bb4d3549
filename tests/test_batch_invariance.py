"""A row of a left-padded batch has the logits of that row alone; padding is never a sink, retained or counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkwindow_reference import reference_logits, retained_after
from strategies import (
    BOTH,
    CACHE_NAME,
    EXACT,
    ModelSpec,
    Rule,
    budget,
    call,
    model_specs,
    padding_mask,
    real_per_call,
    rules,
    seeds,
    splits,
    stepwise,
    stream,
    tokens,
    worst,
)

BATCHES = st.integers(1, 3)


@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), batch=BATCHES, lengths=splits(), holes=st.booleans())
def test_each_row_is_as_if_alone(
    spec: ModelSpec, rule: Rule, seed: int, batch: int, lengths: list[int], *, holes: bool
) -> None:
    """Logits, retained tokens and counts of each row are those of a cache that was fed this row only."""
    model, ids = spec.model(), tokens(seed, batch, sum(lengths))
    mask = padding_mask(seed, batch, lengths, holes=holes)
    cache = rule.cache(model)
    together = stream(model, cache, ids, lengths, mask)
    evictions = 0
    for row, real in enumerate(mask.bool()):
        alone = rule.cache(model)
        logits = stream(model, alone, ids[row : row + 1, real], real_per_call(real, lengths))
        assert worst(together[row, real] - logits[0]) < EXACT
        assert cache.retained_tokens[row] == alone.retained_tokens[0]
        assert cache.seen_tokens[row] == alone.seen_tokens[0]
        evictions += alone.num_evictions
    assert cache.num_evictions == evictions


@given(spec=model_specs(), rule=rules(BOTH), seed=seeds(), batch=BATCHES, lengths=splits(), holes=st.booleans())
def test_padded_batches_equal_the_reference_after_every_call(
    spec: ModelSpec, rule: Rule, seed: int, batch: int, lengths: list[int], *, holes: bool
) -> None:
    """Real columns are within 1e-9, retained tokens identical, and not even a padding column is NaN or infinite."""
    model, ids = spec.model(), tokens(seed, batch, sum(lengths))
    mask = padding_mask(seed, batch, lengths, holes=holes)
    expected = reference_logits(model, ids, mask, chunks=lengths, **rule.arguments)
    cache = rule.cache(model)
    for step, (end, logits) in enumerate(stepwise(model, cache, ids, lengths, mask)):
        columns = slice(end - lengths[step], end)
        assert bool(logits.isfinite().all())
        assert worst((logits - expected[:, columns])[mask[:, columns].bool()]) < EXACT
        for row, real in enumerate(mask[:, :end]):
            calls = real_per_call(real, lengths[: step + 1])
            assert cache.retained_tokens[row] == retained_after(sum(calls), chunks=calls, **rule.arguments)
        assert cache.seen_tokens == mask[:, :end].sum(dim=1).tolist()
        assert cache.get_seq_length() == end


@given(rule=rules(BOTH), seed=seeds(), batch=BATCHES, lengths=splits(most=50))
@budget(0.3)
def test_a_mask_of_the_new_columns_is_enough(rule: Rule, seed: int, batch: int, lengths: list[int]) -> None:
    """The mask may cover all columns so far or only those of the call; a call without padding needs no mask."""
    model, ids = ModelSpec().model(), tokens(seed, batch, sum(lengths))
    mask = padding_mask(seed, batch, lengths, holes=False)
    expected = stream(model, rule.cache(model), ids, lengths, mask)
    new, none = rule.cache(model), rule.cache(model)
    parts = list(zip(torch.split(ids, lengths, dim=1), torch.split(mask, lengths, dim=1), strict=True))
    by_new = [call(model, new, part, part_mask) for part, part_mask in parts]
    by_none = [call(model, none, part, None if part_mask.all() else part_mask) for part, part_mask in parts]
    assert torch.equal(torch.cat(by_new, dim=1), expected)
    assert torch.equal(torch.cat(by_none, dim=1), expected)


def test_generate_takes_a_padded_batch() -> None:
    """`generate` with rows of different lengths continues each row as if it were alone."""
    rule, model, ids = Rule(2, 6, 3), ModelSpec().model(), tokens(3, 3, 9)
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, :3] = 0, 0
    kwargs = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **kwargs, **{CACHE_NAME: rule.cache(model)})  # type: ignore[operator]
    for row, real in enumerate(mask.bool()):
        prompt = ids[row : row + 1, real]
        own = {"attention_mask": torch.ones_like(prompt), CACHE_NAME: rule.cache(model)}
        alone = model.generate(prompt, **kwargs, **own)  # type: ignore[operator]
        assert torch.equal(together[row, 9:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("mask_row", [[1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0]])
def test_padding_on_the_right_is_refused(mask_row: list[int]) -> None:
    """The error names the row and the fix, and the cache is unchanged: the next valid call is exact."""
    rule, model, ids = Rule(1, 4, 1), ModelSpec().model(), tokens(0, 2, 30)
    cache = rule.cache(model)
    first = stream(model, cache, ids, [11])
    before = repr(cache), cache.retained_tokens
    with pytest.raises(ValueError, match=r"pads row 1 on the right.*left"):
        call(model, cache, ids[:, 11:15], torch.tensor([[1, 1, 1, 1], mask_row]))
    assert (repr(cache), cache.retained_tokens) == before
    rest = call(model, cache, ids[:, 11:])
    assert worst(torch.cat([first, rest], dim=1) - reference_logits(model, ids, **rule.arguments)) < EXACT
