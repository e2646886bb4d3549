"""Tables are functions of records, and files are written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab_tiny import generation, machine_record, score
from sinkwindow_lab import files, records
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.timing import spread
from sinkwindow_lab.render import tables
from sinkwindow_lab.reports import experiments
from sinkwindow_lab.reports.report import Report
from sinkwindow_lab.ways.configurations import parse


def make_report(*, quick: bool = False, plays: float = 20.125) -> Report:
    """Return a report of three rows: measured in full, cut short, and an ablation."""
    rows = [
        _row("baseline", plays, [1.0, 1.25, 1.5], attention=2.5),
        _row("recompute_8", None, [1.0, 1.5], attention=None),
        _row("stale_ranks_2_6", 177.5, None, attention=None),
    ]
    return Report(
        quick=quick,
        bos="none",
        machine=machine_record(),
        model=records.ModelRecord(
            name="a-model",
            source="folder",
            revision=None,
            sha256="d" * 64,
            model_type="llama",
            parameters=1_500_000,
            weight_bytes=6_000_000,
            dtype="float32",
            device="cpu",
            max_positions=512,
            attention="sdpa",
        ),
        corpora=[_corpus("plays"), _corpus("docs")],
        experiments=[
            records.ExperimentRecord(
                name="experiment 1", perplexity_tokens=101, prompt_tokens=5, generated_tokens=3, rows=rows
            )
        ],
    )


def _corpus(name: str) -> records.CorpusRecord:
    return records.CorpusRecord(
        name=name,
        source="a source",
        revision=None,
        config=None,
        split=None,
        documents=2,
        joiner="\n\n",
        characters=1234,
        sha256="c" * 64,
    )


def _row(
    name: str, perplexity: float | None, times: list[float] | None, *, attention: float | None
) -> records.RowRecord:
    probes = [records.AttentionProbe(tokens_seen=5, step_ms=[attention])] if attention else []
    return records.RowRecord(
        configuration=parse(name).record(),
        perplexities=[] if perplexity is None else [score(name, "plays", perplexity), score(name, "docs", 9.5)],
        speed=records.SpeedRecord(configuration=name, rounds=[generation(times)]) if times else None,
        attention=records.AttentionRecord(
            configuration=name, prompt_tokens=5, generated_tokens=3, layers=2, probes=probes
        )
        if probes
        else None,
    )


def cells(page: str, start: str) -> list[str]:
    """Return the cells of the first table line that starts with this text."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_columns_are_those_of_the_original_reproduction() -> None:
    """Names, units and order are the same, with one PPL column per corpus."""
    assert cells(tables.render(make_report()), "Configuration") == [
        "Configuration",
        "PPL plays",
        "PPL docs",
        "Total Time (s)",
        "Avg Attn (ms)",
        "TTFT (s)",
        "TPOT (ms)",
        "Throughput (tok/s)",
        "Peak Mem (GB)",
    ]


def test_cells_come_from_records() -> None:
    """Every figure of a complete row is that of its record."""
    row = cells(tables.render(make_report()), "baseline")
    assert row == ["baseline", "20.125", "9.500", "1.50", "2.500", "1.000", "250.00", "2.00", "0.550"]


def test_what_was_not_measured_is_a_dash() -> None:
    """A shorter generation has a TPOT but no total time; an ablation has a PPL and no speed."""
    page = tables.render(make_report())
    assert cells(page, "recompute_8") == ["recompute_8", "-", "-", "-", "-", "1.000", "500.00", "-", "0.550"]
    assert "recompute_8 generated 2 tokens only" in page
    assert cells(page, "stale_ranks_2_6 (ablation)")[1:] == ["177.500", "9.500", *["-"] * 6]


def test_no_number_is_typed_by_hand() -> None:
    """Another number in the record is another number in the table, and every number of a table is in a record."""
    first, second = tables.render(make_report()), tables.render(make_report(plays=31.75))
    assert "20.125" in first
    assert "20.125" not in second
    assert "31.750" in second
    measured = set(re.findall(r"\d+\.\d{2,}", "\n".join(line for line in first.splitlines() if line.startswith("|"))))
    known = {f"{value:.{digits}f}" for value in _numbers(make_report()) for digits in (2, 3, 4)}
    known |= {"3.11", "2.13"}  # versions of Python and torch
    assert measured <= known, "a table shows a number that is in no record"


def _numbers(report: Report) -> list[float]:
    """Return all measured numbers of a report, including derived ones."""
    rows = [row for one in report.experiments for row in one.rows]
    found = [getattr(one, name) for row in rows for one in row.perplexities for name in type(one).model_fields]
    rounds = [one for row in rows if row.speed for one in row.speed.rounds]
    found += [one.memory.peak_gb for one in rounds if one.memory] + [
        value for one in rounds for value in (*one.step_ms, one.ttft_s)
    ]
    found += [getattr(one, name) for one in rounds for name in ("tpot_ms", "total_s", "throughput")]
    found += [one.cache_bytes / 1e6 for one in rounds]
    found += [value for one in rounds for value in (spread(one.step_ms).lower, spread(one.step_ms).upper)]
    found += [one.tokens_per_second for row in rows for one in row.perplexities]
    found += [row.attention.milliseconds for row in rows if row.attention]
    found += [report.model.weight_bytes / 1e9]
    return [float(one) for one in found if isinstance(one, int | float)]


def test_head_names_what_ran() -> None:
    """The head has model, texts with digests, machine, versions, commit with local changes, and date."""
    page = tables.render(make_report())
    for fact in ("a-model", "sha256 " + "d" * 16, "plays: a source", "sha256 " + "c" * 16, "1,234 characters"):
        assert fact in page
    for fact in ("a CPU, 2 core(s)", "torch 2.13.0; 1 thread(s)", "abc123 with local changes", "2026-01-02T03:04:05"):
        assert fact in page
    assert "Evicted text is gone" in page
    assert "Targets scored, the same in every row: 100 of docs, 100 of plays." in page


def test_quick_runs_say_so() -> None:
    """A reader must not mistake a quick run for a full one."""
    assert "A quick run" in tables.render(make_report(quick=True))
    assert "A quick run" not in tables.render(make_report())


def test_memory_is_explained_or_not_measured() -> None:
    """0.55 GB are 0.50 of weights and 0.05 of other tensors; without a measurement there is no number."""
    report = make_report()
    page = tables.render(report)
    assert "**Peak Mem**: weights plus" in page
    assert cells(page, "baseline")[-1] == "0.550"
    content = report.model_dump()
    for generated in content["experiments"][0]["rows"][0]["speed"]["rounds"]:
        generated["memory"] = None
    assert cells(tables.render(Report.model_validate(content)), "baseline")[-1] == "-"


def test_records_are_unchanged_by_json() -> None:
    """A page can be rendered again, identically, from its JSON file."""
    report = make_report()
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    assert tables.render(again) == tables.render(report)


def test_tables_refuse_ragged_rows() -> None:
    """A missing cell would move a number under another title."""
    with pytest.raises(ValueError, match="2 cells"):
        tables.markdown_table(("a", "b"), [("1",)])


def test_plans_count_their_measurements() -> None:
    """Recomputation is not scored, ablations are not timed; all others generate together and are probed together."""
    rows = [parse(name) for name in ("baseline", "recompute_8", "stale_ranks_2_6", "window_0_8")]
    tables, scored, corpora = 2, 3, 2
    assert (
        experiments.count_measurements(experiments.QUICK, rows, corpora, ("experiments",))
        == tables * scored * corpora + 2
    )
    mistakes = rows[2:]
    assert (
        experiments.count_measurements(experiments.QUICK, mistakes, corpora, ("experiments",)) == tables * 2 * corpora
    )


def test_quick_and_full_are_the_experiments_of_the_original_reproduction() -> None:
    """PPL over 1,000 and 2,000 tokens, prompt 500, generation 1,000 and 2,000; quick has the same rows and prompts."""
    lengths = [(one.perplexity_tokens, one.prompt_tokens, one.generated_tokens) for one in experiments.FULL.experiments]
    assert lengths == [(1000, 500, 1000), (2000, 500, 2000)]
    assert all(one.prompt_tokens == 500 for one in experiments.QUICK.experiments)


def test_writing_replaces_in_one_step(tmp_path: Path) -> None:
    """The file has the new text and can be read by all; no temporary file is left."""
    target = tmp_path / "a.md"
    target.write_text("old", encoding="utf-8")
    files.write_text(target, "new\n")
    assert target.read_bytes() == b"new\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
    assert target.stat().st_mode & 0o044 == 0o044


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash before the rename the file has the old text, and no temporary file is left."""

    def fail(*_: object) -> Path:
        raise KeyboardInterrupt

    target = tmp_path / "a.md"
    target.write_text("old", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(target, "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    """The error comes before anything is measured."""
    (tmp_path / "a").write_text("", encoding="utf-8")
    with pytest.raises(LabError, match="choose another"):
        files.output_folder(tmp_path / "a")
