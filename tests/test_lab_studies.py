"""The tables end to end on a tiny model, their arithmetic by hand, and finished measurements that are reused."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
import torch

from lab_tiny import TINY, listen, loaded_tiny, refused, save_tiny, succeeded, text_of_lines, tiny_bench, tiny_tokenizer
from sinkwindow_lab import store
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.measure import steps
from sinkwindow_lab.reports.output import as_json, read_report
from sinkwindow_lab.reports.tables import collect, plan, recall, where
from sinkwindow_lab.reports.tables.collect import jobs
from sinkwindow_lab.reports.tables.page import page
from sinkwindow_lab.ways.configurations import parse, parse_list
from test_lab_tables import PICTURES

if TYPE_CHECKING:
    from pathlib import Path

    from sinkwindow_lab.records import Report
    from sinkwindow_lab.ways.sessions import Session

ROWS = "baseline,streaming_2_6_3,window_0_8,recompute_8,stale_ranks_2_6_3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and two texts."""
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    (path / "long.txt").write_text(text_of_lines(80), encoding="utf-8")
    (path / "other.txt").write_text(text_of_lines(70), encoding="utf-8")
    return path


def collected(rows: str = ROWS, parts: tuple[str, ...] = plan.PARTS, keeper: store.Store | None = None) -> Report:
    """Return what a run of the tiny plan finds."""
    corpora = [Corpus("words", (text_of_lines(60),), "test")]
    return collect.collect(loaded_tiny(), corpora, parse_list(rows), TINY, parts=parts, store=keeper)


def found(report: Report, part: str, metric: str) -> dict[tuple[str, int | None], list[float]]:
    """Return the samples of a metric by configuration and place."""
    chosen = [one for one in report.measurements if (one.part, one.metric) == (part, metric)]
    return {(one.configuration, one.at): one.samples for one in chosen}


# -- end to end -------------------------------------------------------------------------------------------------------


def test_all_parts_are_measured_rendered_and_reused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes all files; the next one measures nothing unless `--fresh`; `render` needs no model."""
    monkeypatch.setattr(plan, "QUICK", TINY)
    texts = ("--corpus", folder / "long.txt", "--corpus", folder / "other.txt")
    options = ("--configs", "baseline,streaming_2_6_3", "--quick", "--out", tmp_path)
    command = ("tables", "--model", folder, *texts, *options)
    out, err = succeeded(capsys, *command)
    assert "PPL " in err.splitlines()[1], "the first number is shown when it is there, not when a text has been read"
    names = {line.removeprefix("wrote ").removeprefix(f"{tmp_path}/") for line in out.splitlines()}
    assert names == {"paper_tables.json", "paper_tables.md", "report.html", *(f"figures/{one}.svg" for one in PICTURES)}
    before = {name: (tmp_path / name).read_text(encoding="utf-8") for name in names}
    report = read_report(tmp_path / "paper_tables.json")
    assert {one.part for one in report.measurements} == {*plan.PARTS[1:], "experiment 1", "experiment 2", "step sizes"}
    assert {text.targets for text in report.texts} >= {39, 49, 59, 120}

    _, err = succeeded(capsys, *command)
    again = read_report(tmp_path / "paper_tables.json")
    assert "measurements are from an earlier run" in err
    assert again.measurements == report.measurements  # times too: nothing ran

    _, err = succeeded(capsys, *command, "--fresh", "--only", "steps")
    fresh = read_report(tmp_path / "paper_tables.json")
    assert "from an earlier run" not in err
    assert found(fresh, "steps", "TPOT") != found(report, "steps", "TPOT")
    assert {one.part for one in fresh.measurements} == {"steps", "step sizes"}

    (tmp_path / "old.json").write_text(before["paper_tables.json"], encoding="utf-8")
    succeeded(capsys, "render", tmp_path / "old.json", "--out", tmp_path / "again")
    assert {name: (tmp_path / "again" / name).read_text(encoding="utf-8") for name in names} == before


def test_each_experiment_shows_a_generation_of_its_own_length() -> None:
    """One generation is used for both; recomputation is cut short in both; mistakes are scored and not timed."""
    report = collected(parts=("experiments",))
    for part, tokens, probed in (("experiment 1", 6, {12, 19}), ("experiment 2", 15, {12, 19})):
        steps_of = found(report, part, "TPOT")
        assert {(way, at): len(samples) + 1 for (way, at), samples in steps_of.items()} == {
            ("baseline", tokens): tokens,
            ("streaming_2_6_3", tokens): tokens,
            ("recompute_8", 4): 4,
        }
        assert {way for way, _ in found(report, part, "PPL")} == {*ROWS.split(",")} - {"recompute_8"}
        places = {at for _, at in found(report, part, "attention")}
        assert places == {place for place in probed if place < 12 + tokens}
    short, long = (found(report, part, "TPOT") for part in ("experiment 1", "experiment 2"))
    assert short["baseline", 6] == long["baseline", 15][:5]


def test_an_ablation_alone_is_scored_and_not_timed() -> None:
    """Nothing generates."""
    report = collected("stale_ranks_2_6_3", ("experiments",))
    assert found(report, "experiment 1", "PPL")
    assert not found(report, "experiment 1", "TPOT")


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before Ctrl-C is not measured again."""
    calls = list[object]()

    def interrupted(*call: object, **_: object) -> None:
        calls.append(call)
        if len(calls) == 3:
            raise KeyboardInterrupt

    listen(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        collected(parts=("sinks",), keeper=store.Store(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    keeper = store.Store(tmp_path)
    report = collected(parts=("sinks",), keeper=keeper)
    assert (keeper.reused, len(found(report, "sinks", "PPL"))) == (2, 4)


@pytest.mark.parametrize("part", plan.PARTS)
def test_each_part_alone_has_a_page(part: str) -> None:
    """Also with texts of any number and any name, and where the only distance is that of what never occurred."""
    corpora = [Corpus(f"_{name}", (text_of_lines(60),), "test") for name in "abcdefg"]
    small = dataclasses.replace(TINY, where=plan.Readings(("streaming_4_12_0",), 21))
    report = collect.collect(loaded_tiny(), corpora, parse_list("baseline,stale_ranks_2_6_3"), small, parts=(part,))
    assert "| never |" in page(report).markdown or part != "where"


def test_another_text_is_another_recall(tmp_path: Path) -> None:
    """What was answered in other tokens, or in a text of another name, is not used again."""
    for name, count, reused in (("a", 60, 0), ("a", 60, 2), ("b", 60, 0), ("a", 70, 0)):
        keeper, corpora = store.Store(tmp_path), [Corpus(name, (text_of_lines(count),), "test")]
        report = collect.collect(loaded_tiny(), corpora, [], TINY, parts=("recall",), store=keeper)
        assert {one.subject for one in report.measurements} == {name}
        assert keeper.reused == reused


def test_the_number_of_jobs_is_known_before() -> None:
    """The progress bars end exactly when all is measured, and every job has a name of its own."""
    one = tiny_bench()
    for job in jobs(one, parse_list(ROWS), TINY, plan.PARTS):
        left = [job.steps()]
        one.reporter.advance = lambda steps=1, left=left: left.append(left[-1] - steps)  # type: ignore[method-assign, misc]
        assert job.run()
        assert left[-1] == 0 or len(left) == 1, job.label
    labels = [job.label for job in jobs(one, parse_list(ROWS), TINY, plan.PARTS)]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tables", "--only", "sinks,nothing"), "parts are experiments, mistakes"),
        (("tables", "--only", ","), "parts are experiments"),
        (("render", "{folder}/nothing.json"), "cannot be read"),
        (("render", "{folder}/config.json"), "not a report of this version"),
    ],
)
def test_user_errors_are_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before anything is loaded."""
    assert message in refused(capsys, *(one.format(folder=folder) for one in arguments))


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_last_occurrences_by_hand() -> None:
    """A token's number is the distance to the end of the nearest earlier n-gram that equals the token's own."""
    assert where.last_occurrence([1, 2, 3, 1, 2, 3, 2, 3], 2) == [None, None, None, None, 3, 3, None, 2]
    assert where.last_occurrence([7], 4) == [None]


def test_distance_bins_hold_every_target_once() -> None:
    """Bins are from near to far, then for targets that never occurred; empty bins are left out."""
    distances = [1, 64, 65, 1024, 1025, None, None]
    bins = where.distance_bins(torch.arange(7, dtype=torch.float64), distances)
    assert [(nearest, values.tolist()) for nearest, values in bins] == [
        (1, [0.0, 1.0]),
        (65, [2.0]),
        (257, [3.0]),
        (1025, [4.0]),
        (None, [5.0, 6.0]),
    ]
    assert [nearest for nearest, _ in where.distance_bins(torch.ones(1), [None])] == [None]


def test_before_the_first_eviction_nothing_is_lost() -> None:
    """The targets that the comparison leaves out have equal losses, the next ones do not."""
    one = tiny_bench()
    dense, streaming = (one.score(parse(name), one.corpora[0], 60) for name in ("baseline", "streaming_4_12_0"))
    assert (dense.nll - streaming.nll)[:17].abs().max() < 1e-5
    assert (dense.nll - streaming.nll)[17:].abs().max() > 1e-3
    report = collected(parts=("where",))
    everything = found(report, "where", "NLL minus dense, all")["streaming_4_12_0", None]
    assert everything == [pytest.approx(float((streaming.nll - dense.nll)[17:].mean()))]
    targets = found(report, "where", "NLL minus dense: targets")
    assert sum(count for (count,) in targets.values()) == 59 - 17


def test_bins_along_a_text() -> None:
    """The last bin has the remaining targets, and each bin is at its last one."""
    report, one = collected(parts=("along",)), tiny_bench()
    nll = one.score(parse("baseline"), one.corpora[0], 121).nll
    bins = {at: value for (way, at), (value,) in found(report, "along", "NLL of a bin").items() if way == "baseline"}
    assert list(bins) == [25, 50, 75, 100, 120]
    assert bins[50] == pytest.approx(float(nll[25:50].mean()))
    assert bins[120] == pytest.approx(float(nll[100:].mean()))


def test_sinks_share_one_size_of_cache() -> None:
    """S + W is the same in every row; without sinks it is the plain window."""
    names = ("baseline", "window_0_8", "streaming_1_7_0", "streaming_4_4_0")
    assert plan.sink_ways((0, 1, 4), 8) == names
    assert plan.size_ways((8, 16)) == ("baseline", "streaming_4_4_0", "streaming_4_12_0")


def test_steps_are_timed_where_they_say() -> None:
    """Steps have the requested places and sizes, and their memory; recomputation stores nothing."""
    report = collected(parts=("steps",))
    timed, cache = found(report, "steps", "TPOT"), found(report, "steps", "cache")
    assert {key: len(samples) for key, samples in timed.items()} == {
        (way, place): 1 if way == "recompute_12" else 2
        for way in ("baseline", "streaming_4_8", "recompute_12")
        for place in (20, 40)
    }
    assert list(found(report, "step sizes", "TPOT")) == [
        (way, size) for size in (8, 12) for way in (f"streaming_4_{size - 4}", f"recompute_{size}")
    ]
    assert cache["baseline", 20] == [2 * 2 * 2 * 4 * 8 * 23]  # twenty tokens, one to warm up, two timed
    assert cache["streaming_4_8", 20] == cache["streaming_4_8", 40]
    assert cache["recompute_12", 20] == [0]


def test_steps_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each place all configurations decode a token, then all another one, so that all see the same machine."""
    fed: list[str] = []

    def noted(session: Session, ids: torch.Tensor, **_: object) -> None:
        if ids.shape[1] == 1:
            fed.append(type(session).__name__[0])

    listen(monkeypatch, noted)
    one, names = tiny_bench(), ("baseline", *plan.step_pair(8))
    rows: list[steps.Row] = [(parse(name), (10, 30), 1 if "recompute" in name else 3) for name in names]
    steps.measure("steps", "tiny", rows, one.loaded.model, one.text(one.corpora[0], 40).ids)
    assert "".join(fed) == 2 * "DSRDSRDSDS"


# -- recall -----------------------------------------------------------------------------------------------------------


def test_lines_ask_for_every_fact_once() -> None:
    """The answer is the number in the fact, which is as many lines before the question as the record says."""
    made = recall.make_lines([f"line {number}" for number in range(40)], (1, 5, 9), seed=3)
    assert sorted(one.lines_back for one in made.questions) == [1, 5, 9]
    for one in made.questions:
        number = made.text[one.start : one.end]
        assert made.text[one.fact_end - 4 : one.fact_end] == number
        between = made.text[one.fact_end : one.start].splitlines()
        assert sum(line.startswith("line ") for line in between) == one.lines_back
    assert recall.make_lines(["x"] * 40, (1, 5), seed=3) == recall.make_lines(["x"] * 40, (1, 5), seed=3)
    assert recall.make_lines(["x"] * 40, (1, 5), seed=3) != recall.make_lines(["x"] * 40, (1, 5), seed=4)


@pytest.mark.parametrize("distances", [(), (5, 5), (1,) * 49])
def test_too_few_lines_are_an_error(distances: tuple[int, ...]) -> None:
    """No question, and more questions than there are names, are errors too."""
    with pytest.raises(LabError, match="lines of text"):
        recall.make_lines(["x"] * 13, distances, seed=0)


def test_answers_in_tokens() -> None:
    """An answer has the places of its tokens and the distance from the fact."""
    made = recall.Lines("w1 w2 w3 w4 w2 .", (recall.Question(1, 5, 11, 14),))
    _, (ids,), (answer,) = recall.in_tokens(made, tiny_tokenizer())
    assert (answer.places, answer.tokens_back) == ((4,), 3)
    assert ids[4] == ids[1]
    with pytest.raises(LabError, match="fast tokenizer"):
        recall.in_tokens(made, object())


def test_an_answer_counts_when_every_token_was_the_first_choice() -> None:
    """One wrong digit is a wrong answer."""
    answers = [recall.Answer(1, 3, (2, 3)), recall.Answer(2, 3, (5,))]
    ids = torch.tensor([9, 8, 1, 2, 7, 3])
    assert recall.answered(torch.tensor([0, 1, 2, 0, 3, 0]), ids, answers) == [True, True]
    assert recall.answered(torch.tensor([0, 1, 9, 0, 3, 0]), ids, answers) == [False, True]


def test_recall_counts_all_questions() -> None:
    """There is a point for each configuration and distance, with the questions of all texts."""
    report = collected(parts=("recall",))
    ways = ("baseline", "streaming_4_12_0")
    asked = found(report, "recall", "answered")
    assert {key: len(samples) for key, samples in asked.items()} == {(way, back): 2 for way in ways for back in (1, 3)}
    assert all(set(samples) <= {0.0, 1.0} for samples in asked.values())
    fact, between, question = report.notes["recall example"].splitlines()
    assert fact == question, "the example must show the right answer"
    assert fact.startswith("The number of the ")
    assert between == "... 3 lines of the text ...", "a report quotes no corpus"


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [plan.FULL, plan.QUICK, TINY], ids=["full", "quick", "tiny"])
def test_plans_fit_together(chosen: plan.Plan) -> None:
    """All names parse, and what is studied token by token has been read for the sizes."""
    readings = (chosen.mistakes, chosen.sinks, chosen.sizes, chosen.along, chosen.where)
    for name in (*(way for one in readings for way in one.ways), *chosen.recall):
        assert parse(name).name == name
    assert set(chosen.where.ways) <= set(chosen.sizes.ways)
    assert chosen.where.tokens == chosen.sizes.tokens > max(sum(parse(way).limits) for way in chosen.sizes.ways[1:])
    assert [chosen.quick, json.loads(as_json(collected(parts=())))["measurements"]] == [chosen is not plan.FULL, []]


def test_the_full_plan_is_the_required_one() -> None:
    """It has the paper's numbers of sinks and sizes, and more than 16,000 tokens along a text."""
    assert plan.FULL.sinks.ways == plan.QUICK.sinks.ways == plan.sink_ways((0, 1, 2, 4, 8), 264)
    assert plan.FULL.sizes.ways == plan.size_ways((256, 512, 1024, 2048))
    assert plan.FULL.along.tokens > 16_000
