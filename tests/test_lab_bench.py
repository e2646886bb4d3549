"""Finished measurements are stored under everything they depend on, and a text is read once for all tables."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from lab_tiny import ORIGIN, TINY, listen, loaded_tiny, tiny_bench, tiny_model
from sinkwindow_lab import store
from sinkwindow_lab.inputs import models
from sinkwindow_lab.records import Measurement, measured
from sinkwindow_lab.reports.tables import collect
from sinkwindow_lab.reports.tables.bench import Bench, model_digest
from sinkwindow_lab.ways.configurations import parse

if TYPE_CHECKING:
    from pathlib import Path

    from sinkwindow_lab.inputs.corpora import Corpus
    from sinkwindow_lab.measure.perplexity import Score
    from sinkwindow_lab.records import Configuration

# -- stored -----------------------------------------------------------------------------------------------------------


def test_another_key_is_another_measurement(tmp_path: Path) -> None:
    """Configuration, text, model and code are all in the key."""
    keeper = store.Store(tmp_path)
    one = tiny_bench(keeper)
    first = one.score(parse("baseline"), one.corpora[0], 40)
    keeper = store.Store(tmp_path)
    again = tiny_bench(keeper)
    found = again.score(parse("baseline"), one.corpora[0], 40)
    assert torch.equal(found.nll, first.nll)
    assert found.facts == first.facts
    assert keeper.reused == 1
    again.score(parse("baseline"), one.corpora[0], 41)
    again.score(parse("streaming_2_6_3"), one.corpora[0], 40)
    assert keeper.reused == 1
    key = {"a": 1, "model": "m", "code": store.code_version("measure.perplexity")}
    assert store.code_version("measure.perplexity") != store.code_version("measure.perplexity", "ways.sessions")
    assert keeper._path("x", key) != keeper._path("x", {**key, "a": 2})


@pytest.mark.parametrize("lacking", ORIGIN)
def test_a_key_names_code_and_model(lacking: str, tmp_path: Path) -> None:
    """Without them a number of other code would be taken for one of this code."""
    key = {name: "x" for name in ORIGIN if name != lacking}
    with pytest.raises(ValueError, match="needs code and model"):
        store.Store(tmp_path).measurements("x", key, list)


def test_broken_files_are_measured_again(tmp_path: Path) -> None:
    """A truncated file, or one of another version, is not a measurement."""

    def measure() -> list[Measurement]:
        return measured("p", "s", "c", None, {"m": ("ms", [1.0])})

    for attempt in range(2):
        keeper = store.Store(tmp_path)
        one = tiny_bench(keeper)
        one.score(parse("baseline"), one.corpora[0], 40)
        assert keeper.measurements("hits", ORIGIN, measure) == measure()
        assert keeper.reused == 0, attempt
        for path in tmp_path.iterdir():
            path.write_bytes(b'{"value": {"old": 1}}')


def test_a_fresh_store_measures_again_once(tmp_path: Path) -> None:
    """What an earlier run has finished is replaced; what this run has finished is used."""
    made: list[int] = []

    def measure() -> list[Measurement]:
        made.append(1)
        return measured("p", "s", "c", len(made), {"m": ("ms", [1.0])})

    for fresh, places in ((False, [1, 1]), (False, [1, 1]), (True, [2, 2])):
        keeper = store.Store(tmp_path, fresh=fresh)
        assert [keeper.measurements("x", ORIGIN, measure)[0].at for _ in range(2)] == places


def test_models_are_distinguished_by_their_weights() -> None:
    """And by their configurations; a folder has no digest of its own, so the digest is that of its weights."""
    first = loaded_tiny()
    other = models.LoadedModel(tiny_model(torch.float32), first.tokenizer, first.record)
    assert model_digest(first) == model_digest(loaded_tiny())
    assert model_digest(first) != model_digest(other)
    named = models.describe(tiny_model(), "tiny", "test", sha256="abc")
    digest = model_digest(models.LoadedModel(tiny_model(), first.tokenizer, named))
    assert digest.startswith("tiny abc ")
    turned = copy.deepcopy(tiny_model())  # equal weights
    turned.config.rope_parameters["rope_theta"] = 500.0
    for record in (first.record, named):
        pair = [model_digest(models.LoadedModel(one, first.tokenizer, record)) for one in (tiny_model(), turned)]
        assert pair[0] != pair[1]
    moved = copy.deepcopy(tiny_model())
    moved.config._name_or_path = "elsewhere"
    assert model_digest(models.LoadedModel(moved, first.tokenizer, named)) == digest


# -- read once --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the number of tokens of every call of a session."""
    counts: list[int] = []
    listen(monkeypatch, lambda _, ids, **__: counts.append(ids.shape[1]))
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
    for count in (80, 30, 50):
        one.announce(row, corpus, count)
    found = [one.score(row, corpus, count) for count in (30, 50, 80, 30)]
    assert sum(fed) == read
    for count, score in zip((30, 50, 80, 30), found, strict=True):
        plain = tiny_bench()
        alone = plain.score(row, plain.corpora[0], count)
        assert (score.nll - alone.nll).abs().max() < 1e-9
        assert score.text.record() == alone.text.record()


def test_an_interrupted_run_reads_what_is_missing(tmp_path: Path, fed: list[int]) -> None:
    """One reading stores all lengths; the text is read again if one of them is broken."""
    row, keeper = parse("baseline"), store.Store(tmp_path)
    for counts, read in (((30,), 79), ((50, 30, 80), 79), ((30,), 2 * 79), ((80,), 2 * 79)):
        one = tiny_bench(keeper)
        for count in (30, 50, 80):
            one.announce(row, one.corpora[0], count)
        found = [len(one.score(row, one.corpora[0], count).nll) + 1 for count in counts]
        assert (found, sum(fed)) == (list(counts), read)
        if counts == (50, 30, 80):
            next(tmp_path.iterdir()).write_bytes(b"cut off")


def test_a_reading_that_ends_early_keeps_the_lengths_it_has_reached(tmp_path: Path) -> None:
    """Each length is stored, and its number shown, as soon as it is there."""
    one, row, shown = tiny_bench(store.Store(tmp_path)), parse("baseline"), list[str]()

    def found(words: str) -> None:
        shown.append(words)
        if len(shown) == 2:
            raise KeyboardInterrupt

    one.reporter.found = found  # type: ignore[method-assign]
    for count in (30, 50, 80):
        one.announce(row, one.corpora[0], count)
    with pytest.raises(KeyboardInterrupt):
        one.score(row, one.corpora[0], 80)
    assert [words.rpartition(" of ")[2] for words in shown] == ["30 tokens", "50 tokens"]
    again = tiny_bench(store.Store(tmp_path))
    assert again.score(row, again.corpora[0], 30).perplexity == pytest.approx(float(shown[0].split()[1]), abs=1e-3)
    assert again.store.reused == 1


def test_all_that_a_report_scores_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a text would be read again for every table."""
    asked: set[tuple[str, int]] = set()
    announced: set[tuple[str, int]] = set()
    score, announce = Bench.score, Bench.announce

    def noted(self: Bench, row: Configuration, corpus: Corpus, count: int) -> Score:
        asked.add((row.name, count))
        return score(self, row, corpus, count)

    def named(self: Bench, row: Configuration, corpus: Corpus, count: int) -> None:
        announced.add((row.name, count))
        announce(self, row, corpus, count)

    monkeypatch.setattr(Bench, "score", noted)
    monkeypatch.setattr(Bench, "announce", named)
    one = tiny_bench()
    rows = [parse(name) for name in ("baseline", "recompute_8", "streaming_4_12_0")]
    parts = ("experiments", "mistakes", "sinks", "sizes", "along", "where")
    collect.collect(one.loaded, one.corpora, rows, TINY, parts=parts)
    assert asked == announced
    assert {count for name, count in asked if name == "baseline"} == {40, 50, 60, 121}
