"""`nox -s scale` in small: arithmetic by hand, ways that hold what they say, and checks that can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from releases import UNPAGED

if UNPAGED:  # what is imported below is not there
    pytest.skip(UNPAGED, allow_module_level=True)

from benchmarks import machines, scale

from sinkwindow.continuous.allocator import ring_of
from sinkwindow_lab.measure.streams import WAYS

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = machines.SHAPES[2]  # Llama-2-7B
A100 = machines.GPU_TYPES[1]


def test_arithmetic_by_hand() -> None:
    """Llama-2-7B on an A100: 2 GiB per stream of 4,096 tokens, so 27 in 72 GB; a step of one reads 15.6 GB."""
    assert LLAMA.stream(4096) == 2**31
    assert A100.streams(LLAMA, 4096) == int((72e9 - 13.48e9) / 2**31) == 27
    assert A100.rate(LLAMA, 4096, 1) == pytest.approx(2039e9 / (13.48e9 + 2**31))
    assert A100.streams(machines.SHAPES[4], 4096) == 0
    assert A100.streams(machines.SHAPES[4], 4096, gpus=8) == int((8 * 72e9 - 141.2e9) / 1_342_177_280)


def test_arithmetic_bounds_what_memory_does_not() -> None:
    """Thousands of tiny caches need more arithmetic than reading."""
    streams = 10_000
    assert A100.rate(LLAMA, 1, streams) == pytest.approx(312e12 / (2 * 6.74e9))
    assert A100.rate(LLAMA, 4096, streams) < A100.rate(LLAMA, 1, streams)


def test_half_the_rate_where_batching_stops_paying() -> None:
    """There the caches weigh as much as the weights."""
    streams = LLAMA.weights / LLAMA.stream(4096)
    most = A100.bandwidth / LLAMA.stream(4096)
    assert streams / ((LLAMA.weights + streams * LLAMA.stream(4096)) / A100.bandwidth) == pytest.approx(most / 2)


def test_every_way_holds_as_many_full_caches() -> None:
    """Separate caches and one batch hold the same bytes, continuous batching at most a page more per stream."""
    subject = scale.subjects(quick=True)[0]
    one, batch, requests = (make(subject.model, subject.rule, 3) for make in WAYS.values())
    assert one.nbytes == batch.nbytes
    tokens = subject.rule.num_sinks + ring_of(subject.rule)
    assert requests.nbytes == 3 * tokens * 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, float32
    for way in (one, batch, requests):
        way.step()


def test_the_program_reports_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes its page; what does not hold is named on standard error, and the exit status is 1."""
    few = [replace(one, samples=2) for one in scale.subjects(quick=True)]
    monkeypatch.setattr(scale, "subjects", lambda *, quick: few if quick else [])
    monkeypatch.setattr(scale, "TARGET", 0.0)  # not a timing test
    monkeypatch.setattr(scale, "CLOSE", 1e9)
    page = tmp_path / "new" / "scale.md"
    assert scale.main(["--quick", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count(": holds.") == 2
    assert text.count("| continuous batching |") == 2
    assert "2 of 2 checks hold" in capsys.readouterr().out
    monkeypatch.setattr(scale, "TARGET", 1e9)
    monkeypatch.setattr(scale, "CLOSE", 0.0)
    assert scale.main(["--quick", "--out", str(page)]) == 1
    assert capsys.readouterr().err.count("does not hold: ") == 2
