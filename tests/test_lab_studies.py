"""Studies end to end on a tiny model, their arithmetic by hand, and finished measurements that are reused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from lab_tiny import save_tiny, text_of_lines, tiny_bench, tiny_tokenizer
from sinkwindow_lab import store
from sinkwindow_lab.cli import main
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.render import study_tables
from sinkwindow_lab.reports import experiments
from sinkwindow_lab.reports.bench import Bench
from sinkwindow_lab.reports.report import Report
from sinkwindow_lab.reports.studies import collect, lines, plans, recall, scores, steps, where
from sinkwindow_lab.ways.configurations import parse
from sinkwindow_lab.ways.sessions import Session

if TYPE_CHECKING:
    from pathlib import Path

TINY = plans.StudyPlan(
    mistakes=("baseline", "streaming_2_6_3", "call_2_6", "absolute_2_6_3", "stale_ranks_2_6_3"),
    mistakes_tokens=60,
    sinks=(0, 2),
    sinks_cache=8,
    sinks_tokens=50,
    sizes=(8, 16),
    sizes_tokens=80,
    where=("streaming_4_12_0",),
    along=("baseline", "streaming_4_12_0"),
    along_tokens=101,
    along_bin=25,
    places=(20, 40),
    step_cache=12,
    step_sizes=(8, 12),
    step_repeats=2,
    recompute_repeats=1,
    recall=("baseline", "streaming_4_12_0"),
    recall_seeds=(0, 1),
    recall_lines=(1, 3),
)
STUDIES = ("mistakes", "sinks", "sizes", "along", "steps", "where", "recall")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and two texts."""
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    (path / "long.txt").write_text(text_of_lines(80), encoding="utf-8")
    (path / "other.txt").write_text(text_of_lines(70), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command; return exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


# -- end to end -------------------------------------------------------------------------------------------------------


def test_all_parts_are_measured_rendered_and_reused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes all files; the next one measures nothing unless `--fresh`; `render` needs no model."""
    table = experiments.Experiment("experiment 1", 40, 12, 6)
    monkeypatch.setattr(experiments, "QUICK", experiments.Plan((table,), 2, 2, rounds=1, quick=True, studies=TINY))
    texts = ("--corpus", folder / "long.txt", "--corpus", folder / "other.txt")
    command = (
        "tables",
        "--model",
        folder,
        *texts,
        "--configs",
        "baseline,streaming_2_6_3",
        "--quick",
        "--out",
        tmp_path,
    )
    status, out, err = run(capsys, *command)
    assert status == 0, err
    names = {line.removeprefix("wrote ").removeprefix(f"{tmp_path}/") for line in out.splitlines()}
    pictures = ("mistakes", "sinks", "sizes", "along", "step-time", "step-memory", "step-sizes", "where", "recall")
    assert names == {"paper_tables.json", "paper_tables.md", "report.html", *(f"figures/{one}.svg" for one in pictures)}
    before = {name: (tmp_path / name).read_text(encoding="utf-8") for name in names}
    report = Report.model_validate_json(before["paper_tables.json"])
    assert [name for name in STUDIES if getattr(report.studies, name) is None] == []

    _, _, err = run(capsys, *command)
    again = Report.model_validate_json((tmp_path / "paper_tables.json").read_text(encoding="utf-8"))
    assert "measurements are from an earlier run" in err
    assert (again.studies, again.experiments) == (report.studies, report.experiments)
    assert again.studies.steps == report.studies.steps  # times too: nothing ran

    _, _, err = run(capsys, *command, "--fresh", "--only", "steps")
    fresh = Report.model_validate_json((tmp_path / "paper_tables.json").read_text(encoding="utf-8"))
    assert "from an earlier run" not in err
    assert fresh.studies.steps != report.studies.steps
    assert (fresh.experiments, fresh.studies.sinks) == ([], None)

    (tmp_path / "old.json").write_text(before["paper_tables.json"], encoding="utf-8")
    status, _, err = run(capsys, "render", tmp_path / "old.json", "--out", tmp_path / "again")
    assert status == 0, err
    assert {name: (tmp_path / "again" / name).read_text(encoding="utf-8") for name in names} == before


def test_each_experiment_shows_a_generation_of_its_own_length() -> None:
    """One generation is used for both; recomputation is cut short in both."""
    tables = (experiments.Experiment("short", 40, 12, 6), experiments.Experiment("long", 60, 12, 15))
    one = tiny_bench()
    rows = [parse("baseline"), parse("recompute_8")]
    report = experiments.run(one.loaded, one.corpora, rows, experiments.Plan(tables, 2, 4, rounds=1))
    found = {
        (table.name, row.configuration.name): [each.generated_tokens for each in row.speed.rounds]
        for table in report.experiments
        for row in table.rows
        if row.speed is not None
    }
    assert found == {
        ("short", "baseline"): [6],
        ("short", "recompute_8"): [4],
        ("long", "baseline"): [15],
        ("long", "recompute_8"): [4],
    }


def test_mistakes_alone_are_scored_and_not_timed() -> None:
    """An ablation alone needs no timed generation."""
    one = tiny_bench()
    tables = (experiments.Experiment("short", 40, 12, 6),)
    report = experiments.run(one.loaded, one.corpora, [parse("stale_ranks_2_6_3")], experiments.Plan(tables, 2, 4))
    (row,) = report.experiments[0].rows
    assert (len(row.perplexities), row.speed, row.attention) == (1, None, None)


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before Ctrl-C is not measured again."""
    rows = [parse(name) for name in ("baseline", "window_0_8", "streaming_4_4_0")]
    calls: list[str] = []
    real = Bench.losses

    def losses(self: Bench, label: str, configuration: object, text: object) -> object:
        calls.append(str(getattr(configuration, "name", "")))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, label, configuration, text)  # type: ignore[arg-type]

    monkeypatch.setattr(Bench, "losses", losses)
    with pytest.raises(KeyboardInterrupt):
        scores.score_study(tiny_bench(store.Store(tmp_path)), "sinks", rows, 40)
    assert len(list(tmp_path.iterdir())) == 2
    keeper = store.Store(tmp_path)
    found = scores.score_study(tiny_bench(keeper), "sinks", rows, 40)
    assert (keeper.reused, len(found.scores)) == (2, 3)


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
    status, out, err = run(capsys, *(one.format(folder=folder) for one in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_last_occurrences_by_hand() -> None:
    """A token's number is the distance to the end of the nearest earlier n-gram that equals the token's own."""
    assert where.last_occurrence([1, 2, 3, 1, 2, 3, 2, 3], 2) == [None, None, None, None, 3, 3, None, 2]
    assert where.last_occurrence([7], 4) == [None]


def test_distance_bins_hold_every_target_once() -> None:
    """Bins are from near to far, then for targets that never occurred; empty bins are left out."""
    distances = [1, 64, 65, 1024, 1025, None, None]
    bins = where.distance_bins(torch.arange(7, dtype=torch.float64), distances)
    assert [(one.nearest, one.farthest, one.targets) for one in bins] == [
        (1, 64, 2),
        (65, 256, 1),
        (257, 1024, 1),
        (1025, None, 1),
        (None, None, 2),
    ]
    assert [one.mean_difference for one in bins] == [0.5, 2.0, 3.0, 4.0, 5.5]
    assert bins[0].standard_error == pytest.approx(0.5)
    assert [one.targets for one in where.distance_bins(torch.ones(1), [None])] == [1]


def test_before_the_first_eviction_nothing_is_lost() -> None:
    """The targets that the comparison leaves out have equal losses, the next ones do not."""
    one = tiny_bench()
    text = one.text(one.corpora[0], 60)
    dense, streaming = (one.losses("x", parse(name), text).nll for name in ("baseline", "streaming_4_12_0"))
    assert (dense - streaming)[:17].abs().max() < 1e-5
    assert (dense - streaming)[17:].abs().max() > 1e-3
    curve = where.where(one, ["streaming_4_12_0"], 60).curves[0]
    assert sum(cell.targets for cell in curve.bins) == 59 - 17
    assert curve.mean_difference == pytest.approx(float((streaming - dense)[17:].mean()))


def test_bins_along_a_text() -> None:
    """The last bin has the remaining targets."""
    assert scores.bin_means(torch.tensor([1.0, 3.0, 5.0]), 2) == [2.0, 5.0]
    with pytest.raises(LabError, match="bin_tokens=0"):
        scores.bin_means(torch.ones(3), 0)


def test_sinks_share_one_size_of_cache() -> None:
    """S + W is the same in every row; without sinks it is the plain window."""
    study = scores.sinks(tiny_bench(), (0, 1, 4), 8, 40)
    assert [one.name for one in study.configurations] == [
        "baseline",
        "window_0_8",
        "streaming_1_7_0",
        "streaming_4_4_0",
    ]


def test_steps_are_timed_where_they_say() -> None:
    """Steps have the requested places and sizes, and their memory; recomputation stores nothing."""
    study = steps.steps(tiny_bench(), places=(10, 30), cache=8, sizes=(6, 8), repeats=3, recompute_repeats=1)
    assert [(one.configuration, one.tokens_seen, len(one.step_ms)) for one in study.along] == [
        ("baseline", 10, 3),
        ("baseline", 30, 3),
        ("streaming_4_4", 10, 3),
        ("streaming_4_4", 30, 3),
        ("recompute_8", 10, 1),
        ("recompute_8", 30, 1),
    ]
    assert [one.cache_tokens for one in study.sizes] == [6, 6, 8, 8]
    assert study.along[0].cache_bytes == 2 * 2 * 2 * 4 * 8 * 14  # ten tokens, one to warm up, three timed
    assert study.along[2].cache_bytes == study.along[3].cache_bytes
    assert study.along[4].cache_bytes == 0


def test_steps_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each place all configurations decode a token, then all another one, so that all see the same machine."""
    fed: list[str] = []
    feed = Session.feed

    def noted(self: Session, ids: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        if ids.shape[1] == 1:
            fed.append(type(self).__name__[0])
        return feed(self, ids, last_only=last_only)

    monkeypatch.setattr(Session, "feed", noted)
    steps.steps(tiny_bench(), places=(10, 30), cache=8, sizes=(6, 8), repeats=3, recompute_repeats=1)
    along, sizes = "DSR DSR DS DS", "SRSR SRSR SS SS"
    assert "".join(fed) == f"{along}{along}{sizes}".replace(" ", "")


# -- recall -----------------------------------------------------------------------------------------------------------


def test_lines_ask_for_every_fact_once() -> None:
    """The answer is the number in the fact, which is as many lines before the question as the record says."""
    made = lines.make_lines([f"line {number}" for number in range(40)], (1, 5, 9), seed=3)
    assert sorted(one.lines_back for one in made.questions) == [1, 5, 9]
    for one in made.questions:
        number = made.text[one.start : one.end]
        assert made.text[one.fact_end - 4 : one.fact_end] == number
        between = made.text[one.fact_end : one.start].splitlines()
        assert sum(line.startswith("line ") for line in between) == one.lines_back
    assert lines.make_lines(["x"] * 40, (1, 5), seed=3) == lines.make_lines(["x"] * 40, (1, 5), seed=3)
    assert lines.make_lines(["x"] * 40, (1, 5), seed=3) != lines.make_lines(["x"] * 40, (1, 5), seed=4)


@pytest.mark.parametrize("distances", [(), (5, 5), (1,) * 49])
def test_too_few_lines_are_an_error(distances: tuple[int, ...]) -> None:
    """No question, and more questions than there are names, are errors too."""
    with pytest.raises(LabError, match="lines of text"):
        lines.make_lines(["x"] * 13, distances, seed=0)


def test_answers_in_tokens() -> None:
    """An answer has the places of its tokens and the distance from the fact."""
    made = lines.Lines("w1 w2 w3 w4 w2 .", (lines.Question(1, 5, 11, 14),))
    ids, (answer,) = lines.in_tokens(made, tiny_tokenizer())
    assert (answer.places, answer.tokens_back) == ((4,), 3)
    assert ids[4] == ids[1]
    with pytest.raises(LabError, match="fast tokenizer"):
        lines.in_tokens(made, object())


def test_an_answer_counts_when_every_token_was_the_first_choice() -> None:
    """One wrong digit is a wrong answer."""
    answers = [lines.Answer(1, 3, (2, 3)), lines.Answer(2, 3, (5,))]
    ids = torch.tensor([9, 8, 1, 2, 7, 3])
    assert recall.answered(torch.tensor([0, 1, 2, 0, 3, 0]), ids, answers) == [True, True]
    assert recall.answered(torch.tensor([0, 1, 9, 0, 3, 0]), ids, answers) == [False, True]


def test_recall_counts_all_questions() -> None:
    """There is a point for each configuration and distance, with the questions of all texts."""
    study = recall.recall(tiny_bench(), ("baseline", "streaming_4_12_0"), (0, 1, 2), (1, 3))
    assert [(one.configuration, one.lines_back, one.asked) for one in study.points] == [
        ("baseline", 1, 3),
        ("baseline", 3, 3),
        ("streaming_4_12_0", 1, 3),
        ("streaming_4_12_0", 3, 3),
    ]
    fact, between, question = study.example.splitlines()
    assert fact == question, "the example must show the right answer"
    assert fact.startswith("The number of the ")
    assert between == "... 3 lines of the text ...", "a report quotes no corpus"


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [plans.FULL, plans.QUICK, TINY])
def test_plans_fit_together(plan: plans.StudyPlan) -> None:
    """All names parse, and the caches that are studied token by token are among the sizes that are scored."""
    assert set(collect.COLLECTORS) == set(STUDIES)
    for name in (*plan.mistakes, *plan.along, *plan.where, *plan.recall):
        assert parse(name).name == name
    assert {sum(parse(name).limits[:2]) for name in plan.where} <= set(plan.sizes)
    assert max(plan.sizes) < plan.sizes_tokens


def test_the_full_plan_is_the_required_one() -> None:
    """It has the paper's numbers of sinks and sizes, and more than 16,000 tokens along a text."""
    assert plans.FULL.sinks == plans.QUICK.sinks == (0, 1, 2, 4, 8)
    assert (min(plans.FULL.sizes), max(plans.FULL.sizes)) == (256, 2048)
    assert plans.FULL.along_tokens > 16_000


def test_the_number_of_measurements_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress bar ends exactly when all measurements are done."""
    begun: list[str] = []
    one = tiny_bench()
    monkeypatch.setattr(one.reporter, "begin", lambda label, _: begun.append(label))
    found = collect.collect(one, TINY, STUDIES)
    assert len(begun) == collect.count_measurements(TINY, STUDIES, 1)
    assert json.loads(found.model_dump_json())["recall"]["seeds"] == [0, 1]
    assert study_tables.study_blocks(found, ["words"])
