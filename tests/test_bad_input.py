"""Bad input is refused before anything changes, and odd input works as its plain form does."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import bad_input
from bad_input import FED, LINES, Bench, Line
from releases import CROP, NEWEST
from strategies import call

EVERY = [line for lines in LINES.values() for line in lines]


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=line.call, marks=[CROP] if line.call.endswith(".crop(1)") else []) for line in EVERY]
)
@pytest.mark.filterwarnings("ignore:num_sinks")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # by torch itself
def test_a_line_is_refused_or_works_as_said(line: Line, tmp_path: Path) -> None:
    """A refusal is one short error, after which all caches are as before; what works equals its plain form."""
    bench, plain = Bench(tmp_path), Bench(tmp_path)
    before, result = bench.observed(), bench.result(line.call)
    if not line.like:
        assert isinstance(result, bad_input.ERRORS), result
        assert str(result).strip()
        assert bench.observed() == before
    else:
        assert not isinstance(result, Exception), result
        wanted = plain.result(line.like)
        if isinstance(wanted, torch.Tensor) and isinstance(result, torch.Tensor):
            assert torch.equal(result, wanted)
        elif wanted is not None:
            assert result == wanted
    assert bench.observed() == plain.observed()
    for name in ("cache", "wide", "ring"):  # they go on as if nothing else had been tried
        cache, other = bench.caches[name], plain.caches[name]
        ids = bench.ids[:1, FED:].expand(cache.batch_size, -1)
        assert torch.equal(call(bench.model, cache, ids), call(bench.model, other, ids))


@NEWEST
def test_the_page_is_what_the_script_prints() -> None:
    """docs/bad-input.md is generated, so that no message in it is out of date."""
    written = Path(__file__).parents[1] / "docs" / "bad-input.md"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert written.read_text() == bad_input.page()
