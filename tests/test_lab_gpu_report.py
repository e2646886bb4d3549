"""The GPU report end to end on a CPU with tiny shapes: budget, memory, laws. CUDA paths do not run here."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.records import Measurement, Report
from sinkwindow_lab.reports.speed import collect, laws, plan
from sinkwindow_lab.reports.speed.floors import Place
from sinkwindow_lab.reports.speed.page import broken, page
from test_lab_speed_report import report, run, steps

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
SMALL = replace(plan.TINY, streamed=(100,), prompts=(2,), samples={1: 1})


def budget(seconds: float) -> tuple[collect.Run, list[float], list[Report]]:
    """Return a run with a clock that is set by hand, and what it saves."""
    now, saved = [0.0], list[Report]()
    return collect.Run("gpu", SMALL, CPU, saved.append, lambda _: None, seconds, lambda: now[0]), now, saved


@pytest.mark.parametrize(
    ("seconds", "begin", "took", "allowed"),
    [
        (120.0, 100.0, 0.0, True),  # a first part is taken for a tenth of all: 118 s fit in 120 s
        (115.0, 100.0, 0.0, False),  # 117.25 s do not fit in 115 s
        (36.0, 20.0, 10.0, True),  # the longest of its kind took 10 s, so it needs 15 s; 16 s are left
        (34.0, 20.0, 10.0, False),
    ],
)
def test_a_part_starts_if_one_and_a_half_times_its_estimate_fits(
    seconds: float, begin: float, took: float, *, allowed: bool
) -> None:
    """The estimate is the longest time of the part's kind, and that of the first part a tenth of all."""
    found, now, _ = budget(seconds)

    def first() -> list[Measurement]:
        now[0] = took
        return []

    if took:
        found.part("first", first, "prompt")
    now[0] = begin
    found.part("second", list, "prompt")
    assert found.report.skipped == ([] if allowed else ["second"])


def test_a_part_that_does_not_fit_into_memory_is_named() -> None:
    """The parts after it run; each is saved."""
    found, _, saved = budget(math.inf)

    def too_large() -> list[Measurement]:
        raise torch.cuda.OutOfMemoryError

    found.part("large", too_large)
    found.part("small", lambda: [steps("ours", 1.0)])
    assert found.report.skipped == ["large (out of memory)"]
    assert [len(one.measurements) for one in saved] == [3, 3, 4]
    assert not saved[-1].finished


def test_without_time_all_parts_are_skipped_by_name() -> None:
    """If the time is too short for anything, the report names each skipped part."""
    found = collect.gpu(minutes=1e-9, save=lambda _: None, say=lambda _: None, device="cpu")
    assert (found.measurements, found.models) == ([], [])
    assert found.skipped == ["memory bandwidth", "laws", "tiny-pythia: build", "tiny: build"]
    assert "Not measured, for want of time or memory" in page(found).markdown


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fewer laws and lengths than the command."""
    monkeypatch.setattr(laws, "DTYPES", (torch.float32,))
    monkeypatch.setattr(laws, "RULES", ((2, 8, 3),))
    monkeypatch.setattr(laws, "TOKENS", 60)
    monkeypatch.setattr(collect, "TINY", SMALL)


@pytest.mark.usefixtures("small")
def test_the_gpu_command_runs_end_to_end_without_a_gpu(tmp_path: Path) -> None:
    """Every point of both models is measured; the page is rendered from the JSON and says that there was no GPU."""
    assert run("gpu-report", "--out", tmp_path, "--minutes", 9) == 0
    found = Report.model_validate_json((tmp_path / "gpu_report.json").read_text(encoding="utf-8"))
    text = page(found).markdown
    assert text == (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    assert "There is no GPU here: tiny shapes on the CPU" in text
    assert "4 laws checked, 0 broken" in text
    assert (found.finished, found.skipped) == (True, [])
    lines = [line.split(" | ") for line in text.splitlines() if " | " in line]
    expected = [
        ["dense", "32", "32"],
        ["streaming, eager", "32", "32"],
        ["streaming, static and compiled", "32", "32"],
        ["streaming, eager", "32", "100"],
        ["dense", "16", "16"],
        ["streaming, eager", "16", "16"],
        ["streaming, eager", "64", "32"],  # prompts
        ["dense", "64", "32"],
    ]
    for model in ("| tiny-pythia shape, float16", "| tiny shape, bfloat16"):
        rows = [line for line in lines if line[0] == model]
        assert [line[1:4] for line in rows] == expected
        assert [line[7] == "-" for line in rows[:6]] == [False, False, True, True, False, False]  # attention alone


def test_the_gpu_command_needs_no_pandas(tmp_path: Path) -> None:
    """It writes JSON and page on a machine that has torch and transformers, but none of the lab's larger packages."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['pandas', 'pyarrow', 'datasets', 'matplotlib']);"
        f"from sinkwindow_lab.cli import main; main(['gpu-report', '--out', {str(tmp_path)!r}, '--minutes', '0.02'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {one.name for one in tmp_path.iterdir()} == {"gpu_report.json", "gpu_report.md"}


def law(error: float, *, equal: bool = True) -> list[Measurement]:
    """Return the measurements of a law with an allowed error of 2 x 0.25 + 0.5 = 1."""
    values = {"error": error, "plain error": 0.25, "rounding step": 0.5, "retained equal": float(equal)}
    place = Place("laws", "tiny, float32 on cpu")
    return [place.one("a law", metric, "", [value]) for metric, value in values.items()]


@pytest.mark.parametrize(
    ("found", "holds"), [(law(1.0), True), (law(1.01), False), (law(math.nan), False), (law(0.0, equal=False), False)]
)
def test_what_a_law_allows(found: list[Measurement], *, holds: bool) -> None:
    """A law allows twice the plain error and a rounding step, but no NaN and no other retained list."""
    one = report(*found, kind="gpu")
    assert (broken(one) == []) is holds
    assert (page(Report.model_validate_json(one.model_dump_json())).markdown.count("| NO |") == 0) is holds


@pytest.mark.usefixtures("small")
def test_a_wrong_rotation_breaks_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """If sinks are not rotated, the error is far above what the dtype explains."""
    monkeypatch.setattr(Rotary, "rotate_by", lambda _self, states, _distance: states)
    assert len(broken(report(*laws.laws(CPU, plan.TINY.compile), kind="gpu"))) == 4


@pytest.mark.usefixtures("small")
def test_a_broken_law_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is still written, and the error names the law."""
    monkeypatch.setattr(laws, "laws", lambda _: law(2.0))
    monkeypatch.setattr(collect, "_gpu_parts", lambda *_: None)
    assert run("gpu-report", "--out", tmp_path, "--minutes", 9) == 1
    assert "law 'a law', tiny, float32 on cpu: 2.00e+00" in capsys.readouterr().err
    assert "| NO |" in (tmp_path / "gpu_report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "option", "least"),
    [("gpu-report --out .", "minutes 0.0", "above 0"), ("floors", "batch 0", "1 or more")],
)
def test_errors_name_the_option(command: str, option: str, least: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the option and its value, before anything is measured."""
    assert run(*command.split(), *f"--{option}".split()) == 2
    assert f"--{option} must be {least}" in capsys.readouterr().err
