"""The page of the tables is a function of its measurements, and files are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from calling import raising
from lab_tiny import TINY, machine_record
from sinkwindow_lab import files, records
from sinkwindow_lab.records import Measurement, Report, measured
from sinkwindow_lab.render import chart
from sinkwindow_lab.reports import output
from sinkwindow_lab.reports.tables import plan, studies_page
from sinkwindow_lab.reports.tables.page import page
from sinkwindow_lab.ways.configurations import parse

EXPERIMENTS = (plan.Experiment("experiment 1", 101, 5, 3),)
STUDIES = ("mistakes", "sinks", "sizes", "along", "steps", "where", "recall")
PICTURES = ("along", "mistakes", "sinks", "sizes", "step-time", "step-memory", "step-sizes", "where", "recall")


def score(part: str, configuration: str, text: str, perplexity: float, nll: float = 2.5) -> list[Measurement]:
    """Return the measurements of a reading."""
    figures: dict[str, tuple[str, list[float]]] = {
        "PPL": ("", [perplexity]),
        "NLL": ("nat", [nll]),
        "standard error": ("nat", [0.125]),
        "bits per byte": ("bit", [1.25]),
        "targets": ("tokens", [100]),
        "seconds": ("s", [4.0]),
        "evictions": ("", [3]),
        "kept": ("tokens", [64]),
        "cache": ("bytes", [4096]),
    }
    return measured(part, text, configuration, 101, figures)


def generation(configuration: str, steps: list[float]) -> list[Measurement]:
    """Return the measurements of a generation whose prompt took a second in the median."""
    total = 1.0 + sum(steps) / 1e3
    figures: dict[str, tuple[str, list[float]]] = {
        "TTFT": ("s", [0.5, 1.0, 1.5]),
        "TPOT": ("ms", steps),
        "total": ("s", [total]),
        "throughput": ("tok/s", [(len(steps) + 1) / total]),
        "generation: kept": ("tokens", [7]),
        "generation: cache": ("bytes", [1_000_000]),
        "generation: evictions": ("", [1]),
        "peak memory": ("bytes", [550_000_000]),
    }
    return measured("experiment 1", "a-model", configuration, len(steps) + 1, figures)


def corpus(name: str) -> records.CorpusRecord:
    """Return the record of a text."""
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


def report(
    measurements: list[Measurement], parts: tuple[str, ...], *, quick: bool = False, texts: tuple[str, ...] = ()
) -> Report:
    """Return a report of these measurements."""
    lengths = dataclasses.asdict(dataclasses.replace(TINY, experiments=EXPERIMENTS))
    return Report(
        kind="tables",
        quick=quick,
        plan=json.loads(json.dumps({**lengths, "parts": parts})),
        machine=machine_record(),
        models=[
            records.ModelRecord(
                name="a-model",
                source="folder",
                revision=None,
                sha256="d" * 64,
                model_type="llama",
                parameters=1_500_000,
                weight_bytes=6_000_000,
                dtype="float32",
                device="cpu",
                max_positions=64,
                attention="sdpa",
            )
        ],
        corpora=[corpus(name) for name in texts or ("plays", "docs")],
        configurations=[parse(name) for name in dict.fromkeys(one.configuration for one in measurements)],
        measurements=measurements,
        notes={"bos": "none", "recall example": "The number of the <bell> is 123.", "recall tokens": "101"},
        seconds=1.0,
    )


def experiments(*, quick: bool = False, plays: float = 20.125) -> Report:
    """Return a report of three rows: measured in full, cut short, and an ablation."""
    attention = [
        one.model_copy(update={"at": place, "samples": [value]})
        for one in measured("experiment 1", "a-model", "baseline", 5, {"attention": ("ms", [0.0])})
        for place, value in ((5, 2.0), (6, 3.0))
    ]
    found = score("experiment 1", "baseline", "plays", plays) + score("experiment 1", "baseline", "docs", 9.5)
    found += generation("baseline", [250.0, 250.0]) + attention + generation("recompute_8", [500.0])
    found += score("experiment 1", "stale_ranks_2_6", "plays", 177.5)
    found += score("experiment 1", "stale_ranks_2_6", "docs", 9.5)
    return report(found, ("experiments",), quick=quick)


def steps() -> list[Measurement]:
    """Return times and memory of single tokens."""
    found: list[Measurement] = []
    for seen in (10, 100):
        figures = {"TPOT": ("ms", [2.0, 9.0, 1.0]), "cache": ("bytes", [seen * 1e5])}
        found += measured("steps", "a-model", "baseline", seen, figures)
    for size, factor in ((8, 1.0), (16, 2.0)):
        for way, took in ((f"streaming_4_{size - 4}", 4.0), (f"recompute_{size}", 10.0 * factor)):
            found += measured("step sizes", "a-model", way, size, {"TPOT": ("ms", [took]), "cache": ("bytes", [1.0])})
    return found


def where() -> list[Measurement]:
    """Return the loss by distance."""
    found: list[Measurement] = []
    for metric, nearest, mean, error, targets in (
        ("NLL minus dense, all", None, 0.3125, 0.1, 12),
        ("NLL minus dense", 1, 0.5, 0.125, 9),
        ("NLL minus dense", None, -0.25, 0.0625, 3),
    ):
        figures = {metric: ("nat", [mean]), f"{metric}: standard error": ("nat", [error])}
        figures[f"{metric}: targets"] = ("tokens", [targets])
        found += measured("where", "plays", "streaming_4_12_0", nearest, figures)
    return found


def studies() -> Report:
    """Return a report with one study of each kind."""
    ways = ("baseline", "window_0_8", "streaming_4_12_0", "stale_ranks_2_6")
    pair = ("baseline", "streaming_4_12_0")
    found: list[Measurement] = []
    for part in ("mistakes", "sinks", "sizes"):
        for text in ("plays", "docs"):
            for index, way in enumerate(ways):
                found += score(part, way, text, 10.0 + index)
    for way in pair:
        found += score("along", way, "plays", 12.5)
        for end, nll in ((25, 2.0), (50, 2.5), (60, 9.0)):
            found += measured("along", "plays", way, end, {"NLL of a bin": ("nat", [nll])})
    found += steps() + where()
    for way in pair:
        for back in (1, 8):
            hits = {"answered": ("", [1.0, 0.0, 1.0, 1.0]), "tokens back": ("tokens", [back, back + 2.0] * 2)}
            found += measured("recall", "plays", way, back, hits)
    return report(found, STUDIES)


def cells(page: str, start: str) -> list[str]:
    """Return the cells of the first table line that starts with this text."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in line.strip("|").split("|")]


# -- experiments ------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_original_reproduction() -> None:
    """Names, units and order are the same, with one PPL column per corpus."""
    assert cells(page(experiments()).markdown, "Configuration") == [
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


def test_cells_come_from_measurements() -> None:
    """Every figure of a complete row is that of its measurements, with the spread of what has samples."""
    row = cells(page(experiments()).markdown, "baseline")
    times = ["1.50", "2.500", "1.000 [0.750, 1.250]", "250.00 [250.00, 250.00]", "2.00", "0.550"]
    assert row == ["baseline", "20.125", "9.500", *times]


def test_what_was_not_measured_is_a_dash() -> None:
    """A shorter generation has a TPOT but no total time; an ablation has a PPL and no speed."""
    text = page(experiments()).markdown
    assert cells(text, "recompute_8")[1:] == [*["-"] * 4, "1.000 [0.750, 1.250]", "500.00", "-", "0.550"]
    assert "recompute_8 generated 2 tokens only" in text
    assert cells(text, "stale_ranks_2_6 (ablation)")[1:] == ["177.500", "9.500", *["-"] * 6]
    bare = experiments()
    kept = [one for one in bare.measurements if one.metric != "peak memory"]
    assert cells(page(bare.model_copy(update={"measurements": kept})).markdown, "baseline")[-1] == "-"


def test_the_tables_behind_have_the_details() -> None:
    """Losses with their error and speed, and the samples of each generation."""
    behind = page(experiments()).markdown.partition("## Behind the tables")[2]
    losses = ["2.5000", "0.1250", "1.2500", "25.0", "3", "64"]
    assert cells(behind, "baseline | plays") == ["baseline", "plays", "101", "100", *losses]
    generated = behind.partition("| Configuration | Prompts")[2]
    assert cells(generated, "baseline") == ["baseline", "3", "2", "250.00", "1.00", "7", "1"]


def test_no_number_is_typed_by_hand() -> None:
    """Another number in the record is another number in the table, and every number of a table is in a record."""
    first, second = page(experiments()).markdown, page(experiments(plays=31.75)).markdown
    assert "20.125" in first
    assert "20.125" not in second
    assert "31.750" in second
    shown = set(re.findall(r"\d+\.\d{2,}", "\n".join(line for line in first.splitlines() if line.startswith("|"))))
    values = [value for one in experiments().measurements for value in (*one.samples, one.median)]
    values += [0.75, 1.25, 2.5, 0.55, 6e6 / 1e9, 1.0]  # quartiles, the mean of attention, gigabytes and megabytes
    known = {f"{value:.{digits}f}" for value in values for digits in (2, 3, 4)} | {"3.11", "2.13"}  # and versions
    assert shown <= known, "a table shows a number that is in no measurement"


def test_head_names_what_ran() -> None:
    """The head has model, texts with digests, machine, versions, commit with local changes, and date."""
    text = page(experiments()).markdown
    for fact in ("a-model", "sha256 " + "d" * 16, "plays: a source", "sha256 " + "c" * 16, "1,234 characters"):
        assert fact in text
    for fact in ("a CPU, 2 core(s)", "torch 2.13.0; 1 thread(s)", "abc123 with local changes", "2026-01-02T03:04:05"):
        assert fact in text
    assert "Evicted text is gone" in text
    assert "Targets scored, the same in every row: 100 of docs, 100 of plays." in text
    assert "A quick run" not in text
    assert "A quick run" in page(experiments(quick=True)).markdown


# -- studies ----------------------------------------------------------------------------------------------------------


def test_every_study_has_a_table_a_picture_and_its_numbers() -> None:
    """All are rendered from the measurements, with published numbers in a table of their own."""
    made = page(studies())
    for fact in (
        "| stale_ranks_2_6 (ablation) | 13.000 (1.30x) | 2.5000 | 0.1250 |",
        "| streaming_4_12_0 | 7.389 | 12.182 | 12.500 | 3 | 64 |",
        "| baseline | 100 | 2.00 | 10.00 |",
        "| 16 | 4.00 | 20.00 | 5.0x |",
        "| Configuration, text | All | 1-64 | never |",
        "| streaming_4_12_0, plays | +0.3125 | +0.500 ± 0.125 (9) | -0.250 ± 0.062 (3) |",
        "| 8 | 8-10 | 75% (3/4) | 75% (3/4) |",
        "| MPT-7B | 460.29 | 14.99 | 15.00 | 14.99 | 14.98 |",
        "The number of the <bell> is 123.",
        "![PPL along the text.](figures/along.svg)",
    ):
        assert fact in made.markdown, fact
    assert tuple(made.figures) == PICTURES
    assert page(report([], ())).figures == {}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_take_the_color_of_the_page(name: str) -> None:
    """A picture follows the reader's setting, can be parsed, and has nothing random or dated."""
    svg = page(studies()).figures[name]
    ET.fromstring(svg)  # noqa: S314 - we wrote it
    assert "currentColor" in svg
    assert chart.INK not in svg
    assert "prefers-color-scheme: dark" in svg
    assert "metadata" not in svg


def test_distances_have_names() -> None:
    """The names are those in the tables."""
    assert [studies_page.distance_name(one) for one in (1, 257, 1025, float("nan"))] == [
        "1-64",
        "257-1,024",
        "> 1,024",
        "never",
    ]


def test_the_page_says_what_caused_the_published_jump() -> None:
    """With the same tokens kept, the loss from evictions and from stale positions is separate, for each text."""
    losses = {"baseline": 2.0, "streaming_2_6": 2.25, "stale_ranks_2_6": 4.0, "streaming_2_12": 2.125}
    found = [one for way, nll in losses.items() for one in score("mistakes", way, "plays", 8.0, nll)]
    text = page(report(found, ("mistakes",))).markdown
    assert "A jump from 7.97 to 71.67 (9.0x)" in text
    assert "repaired, 1.56x was left" in text
    assert [line for line in text.splitlines() if line.startswith("- **plays**")] == [
        (
            "- **plays**: PPL 7.389 dense, 9.488 with streaming_2_6 (+0.250 nats a token: what was evicted), "
            "54.598 with stale ranks (+1.750 more: their positions)."
        )
    ]
    without = [one for one in found if one.configuration != "stale_ranks_2_6"]
    assert "What went wrong" not in page(report(without, ("mistakes",))).markdown


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_report_is_unchanged_by_its_json(tmp_path: Path) -> None:
    """A page can be rendered again, identically, from its JSON file, which has a line per measurement.

    So it has no date of its own, no random id and no path.
    """
    made = studies()
    for path in output.write_report(made, tmp_path):
        assert path.is_file()
    again = output.read_report(tmp_path / "paper_tables.json")
    assert again == made
    assert page(again) == page(made)
    lines = (tmp_path / "paper_tables.json").read_text(encoding="utf-8").splitlines()
    assert sum('"metric"' in line for line in lines) == len(made.measurements)
    nothing = report([], ())
    assert Report.model_validate_json(output.as_json(nothing)) == nothing


def test_the_kept_page_is_that_of_its_measurements() -> None:
    """The page in `docs/results` is made from the JSON beside it, by the renderer of today."""
    folder = Path(__file__).resolve().parent.parent / "docs" / "results"
    made = page(output.read_report(folder / "paper_tables.json"))
    assert made.markdown == (folder / "paper_tables.md").read_text(encoding="utf-8")
    assert set(made.figures) == {path.stem for path in (folder / "figures").glob("*.svg")}


def test_quick_and_full_are_the_experiments_of_the_original_reproduction() -> None:
    """PPL over 1,000 and 2,000 tokens, prompt 500, generation 1,000 and 2,000; quick has the same rows and prompts."""
    lengths = [(one.perplexity_tokens, one.prompt_tokens, one.generated_tokens) for one in plan.FULL.experiments]
    assert lengths == [(1000, 500, 1000), (2000, 500, 2000)]
    assert all(one.prompt_tokens == 500 for one in plan.QUICK.experiments)


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
    target = tmp_path / "a.md"
    target.write_text("old", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(target, "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
