"""Finished measurements are stored under everything they depend on, and a text is read once for all tables."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from lab_tiny import loaded_tiny, tiny_bench, tiny_model
from sinkwindow_lab import store
from sinkwindow_lab.inputs import models
from sinkwindow_lab.reports import experiments
from sinkwindow_lab.reports.bench import Bench, model_digest
from sinkwindow_lab.reports.studies import plans, recall
from sinkwindow_lab.ways.configurations import parse
from sinkwindow_lab.ways.sessions import Session

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sinkwindow_lab.inputs.corpora import Corpus
    from sinkwindow_lab.inputs.tokens import TokenText
    from sinkwindow_lab.measure.perplexity import Perplexity
    from sinkwindow_lab.ways.configurations import Configuration

# -- stored -----------------------------------------------------------------------------------------------------------


def test_another_key_is_another_measurement(tmp_path: Path) -> None:
    """Configuration, text, model and code are all in the key."""
    keeper = store.Store(tmp_path)
    one = tiny_bench(keeper)
    text = one.text(one.corpora[0], 40)
    first = one.losses("x", parse("baseline"), text)
    again = tiny_bench(keeper)
    assert torch.equal(again.losses("x", parse("baseline"), text).nll, first.nll)
    assert keeper.reused == 1
    again.losses("x", parse("baseline"), one.text(one.corpora[0], 41))
    again.losses("x", parse("streaming_2_6_3"), text)
    assert keeper.reused == 1
    key = {"a": 1, "code": store.code_version("measure.perplexity")}
    assert store.code_version("measure.perplexity") != store.code_version("measure.perplexity", "ways.sessions")
    assert keeper._path("x", key, "json") != keeper._path("x", {**key, "a": 2}, "json")


def test_broken_files_are_measured_again(tmp_path: Path) -> None:
    """A truncated file, or one of another version, is not a measurement."""
    for attempt in range(2):
        keeper = store.Store(tmp_path)
        one = tiny_bench(keeper)
        one.losses("x", parse("baseline"), one.text(one.corpora[0], 40))
        keeper.record("hits", {"a": 1}, recall.Hits, lambda: recall.Hits(found=[True]))
        assert keeper.reused == 0, attempt
        for path in tmp_path.iterdir():
            path.write_bytes(b'{"value": {"old": 1}}')


def test_models_are_distinguished_by_their_weights() -> None:
    """A folder has no digest of its own, so the digest is that of its weights."""
    first = loaded_tiny()
    other = models.LoadedModel(tiny_model(torch.float32), first.tokenizer, first.record)
    assert model_digest(first) == model_digest(loaded_tiny())
    assert model_digest(first) != model_digest(other)
    named = models.describe(tiny_model(), "tiny", "test", sha256="abc")
    assert model_digest(models.LoadedModel(tiny_model(), first.tokenizer, named)) == "tiny abc"


# -- read once --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the number of tokens of every call of a session."""
    counts: list[int] = []
    feed = Session.feed

    def counted(self: Session, ids: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        counts.append(ids.shape[1])
        return feed(self, ids, last_only=last_only)

    monkeypatch.setattr(Session, "feed", counted)
    return counts


@pytest.mark.parametrize("folder", ["kept", None])
@pytest.mark.parametrize(
    ("name", "read"), [("baseline", 79), ("streaming_2_6_3", 79), ("stale_ranks_2_6_3", 79), ("call_2_6", 29 + 49 + 79)]
)
def test_lengths_that_are_announced_are_read_once(
    name: str, read: int, folder: str | None, tmp_path: Path, fed: list[int]
) -> None:
    """Three lengths for three tables take one reading, except by the chunk-wise rule, which depends on the calls."""
    one, row = tiny_bench(store.Store(None if folder is None else tmp_path / folder)), parse(name)
    corpus = one.corpora[0]
    one.foresee((row, corpus, count) for count in (80, 30, 50))
    found = [one.losses("x", row, one.text(corpus, count)) for count in (30, 50, 80, 30)]
    assert sum(fed) == read
    for count, losses in zip((30, 50, 80, 30), found, strict=True):
        plain = tiny_bench()
        alone = plain.losses("x", row, plain.text(plain.corpora[0], count))
        assert (losses.nll - alone.nll).abs().max() < 1e-9
        assert losses.record.targets_sha256 == alone.record.targets_sha256


def test_an_interrupted_run_reads_what_is_missing(tmp_path: Path, fed: list[int]) -> None:
    """One reading stores all lengths; the text is read again if one of them is broken."""
    row, keeper = parse("baseline"), store.Store(tmp_path)
    for counts, read in (((30,), 79), ((50, 30, 80), 79), ((30,), 2 * 79), ((80,), 2 * 79)):
        one = tiny_bench(keeper)
        one.foresee((row, one.corpora[0], count) for count in (30, 50, 80))
        found = [one.losses("x", row, one.text(one.corpora[0], count)).record.tokens for count in counts]
        assert (found, sum(fed)) == (list(counts), read)
        if counts == (50, 30, 80):
            next(tmp_path.iterdir()).write_bytes(b"cut off")


def test_all_that_a_report_scores_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a text would be read again for every table."""
    lengths = {"mistakes_tokens": 60, "sinks_tokens": 50, "sizes_tokens": 80, "along_tokens": 101, "along_bin": 25}
    rows = {"mistakes": ("baseline", "call_2_6"), "where": ("streaming_4_12_0",), "along": ("streaming_4_12_0",)}
    studies = replace(plans.QUICK, **lengths, **rows, sinks=(0, 2), sinks_cache=8, sizes=(8, 16))  # type: ignore[arg-type]
    table = experiments.Experiment("experiment 1", 40, 12, 6)
    plan = experiments.Plan((table, replace(table, perplexity_tokens=70)), 2, 2, quick=True, studies=studies)
    asked: set[tuple[str, int]] = set()
    foreseen: set[tuple[str, int]] = set()
    losses, foresee = Bench.losses, Bench.foresee

    def noted(self: Bench, label: str, row: Configuration, text: TokenText) -> Perplexity:
        if not row.depends_on_calls:
            asked.add((row.name, text.ids.shape[1]))
        return losses(self, label, row, text)

    def named(self: Bench, readings: Iterable[tuple[Configuration, Corpus, int]]) -> None:
        kept = [one for one in readings if not one[0].depends_on_calls]
        foreseen.update((row.name, count) for row, _, count in kept)
        foresee(self, kept)

    monkeypatch.setattr(Bench, "losses", noted)
    monkeypatch.setattr(Bench, "foresee", named)
    one = tiny_bench()
    tables = [parse(name) for name in ("baseline", "recompute_8", "streaming_4_12_0")]
    parts = ("experiments", "mistakes", "sinks", "sizes", "along", "where")
    experiments.run(one.loaded, one.corpora, tables, plan, parts=parts)
    assert asked == foreseen
    assert {count for name, count in asked if name == "baseline"} == {40, 50, 60, 70, 80}
