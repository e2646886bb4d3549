"""The GPU report end to end on a CPU with tiny shapes: budget, memory, laws. CUDA paths do not run here."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from lab_tiny import exit_status
from sinkwindow import StreamingCache
from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.kernels import kernels
from sinkwindow_lab.records import Measurement, Report
from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.reports.speed import collect, laws, plan
from sinkwindow_lab.reports.speed.floors import Place
from sinkwindow_lab.reports.speed.page import broken, page
from test_lab_speed_report import report, steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

CPU = torch.device("cpu")
SMALL = replace(plan.TINY, streamed=(100,), prompts=(2,), samples={1: 1})


def budget(seconds: float) -> tuple[collect.Run, list[float], list[Report]]:
    """Return a run with a clock that is set by hand, and what it saves."""
    now, saved = [0.0], list[Report]()
    return collect.Run("gpu", SMALL, CPU, saved.append, seconds, lambda: now[0]), now, saved


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
    found = collect.gpu(minutes=1e-9, save=lambda _: None, device="cpu")
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
    assert exit_status("gpu-report", "--out", tmp_path, "--minutes", 9) == 0
    found = Report.model_validate_json((tmp_path / "gpu_report.json").read_text(encoding="utf-8"))
    text = page(found).markdown
    assert text == (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    assert "There is no GPU here: tiny shapes on the CPU" in text
    assert "5 laws checked, 0 broken" in text
    assert (found.finished, found.skipped) == (True, [])
    expected = {
        "Decoding": [
            ["dense", "32", "32"],
            ["streaming, eager", "32", "32"],
            ["streaming, static and compiled, eager", "32", "32"],
            ["streaming, eager", "32", "100"],
            ["dense, growing", "32", "32"],
            ["dense", "16", "16"],
            ["streaming, eager", "16", "16"],
        ],
        "Exact prefill": [["streaming, eager", "64", "32"], ["dense", "64", "32"]],
    }
    for model in ("tiny-pythia shape, float16", "tiny shape, bfloat16"):
        for title, rows in expected.items():
            assert [row[1:4] for row in table(text, title) if row[0] == model] == rows
        alone = [row[7] != "-" for row in table(text, "Decoding") if row[0] == model]
        assert alone == [True, True, False, False, False, True, True]
        (again,) = [row for row in table(text, "Sliding windows with re-computation") if row[0] == model]
        assert [cell.endswith("x") for cell in again] == [False, False, False, True, True]
        generated = [row[1] for row in table(text, "`generate`") if row[0] == model]
        assert generated == ["dense", "streaming, eager", "streaming, static and compiled"]
        scored = [row[1] for row in table(text, "Exact streaming perplexity") if row[0] == model]
        assert scored == ["blocks", "dense", "each call alone", "single"]
        profiled = {row[1] for row in table(text, "Kernels") if row[0] == model}
        assert profiled == {"step, eager", "chunk, streaming", "chunk, baseline"}


def table(text: str, title: str) -> list[list[str]]:
    """Return the cells of the rows of the table below a title, without its head."""
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]


def test_the_kept_pages_are_those_of_their_measurements() -> None:
    """Each page of a GPU in `docs/results/gpu` is made from the JSON beside it, by the renderer of today."""
    kept = sorted((Path(__file__).resolve().parent.parent / "docs" / "results" / "gpu").glob("*/gpu_report.json"))
    assert kept
    for one in kept:
        assert page(read_report(one)).markdown == one.with_suffix(".md").read_text(encoding="utf-8")


def failing_laws(*_: object) -> Iterator[Measurement]:
    """Break a law, and fail before the next one."""
    yield from law(2.0)
    raise RuntimeError("no kernel\nfor this device")


def test_a_part_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it has measured is kept, and the parts after it run: time on a lent machine is short. The command fails."""
    monkeypatch.setattr(laws, "laws", failing_laws)
    monkeypatch.setattr(collect, "_gpu_parts", lambda run, *_: run.part("after", lambda: [steps("ours", 1.0)]))
    assert exit_status("gpu-report", "--out", tmp_path, "--minutes", 9) == 1
    said, text = capsys.readouterr().err, (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    for words in ("laws: RuntimeError: no kernel", "law 'a law', tiny, float32 on cpu: 2.00e+00"):
        assert words in said
    assert "\n- laws: RuntimeError: no kernel\n" in text
    assert "1 laws checked, 1 broken" in text
    found = read_report(tmp_path / "gpu_report.json")
    assert sum(one.configuration == "ours" for one in found.measurements) == len(SMALL.models)


def test_a_part_of_the_speed_report_that_fails_ends_it() -> None:
    """No report is made of what works of a wrong cache."""
    found = collect.Run("speed", SMALL, CPU, lambda _: None)
    with pytest.raises(RuntimeError, match="no kernel"):
        found.part("odd", failing_laws)


def test_a_quick_report_of_a_gpu_says_so() -> None:
    """Nobody takes the figures of tiny shapes for those of the card."""
    one = report(*law(0.5), kind="gpu")
    on_gpu = one.model_copy(update={"machine": one.machine.model_copy(update={"gpu": "A card"})})
    for quick, words in ((True, "On A card, **tiny shapes**, in "), (False, "On A card, in ")):
        assert words in page(on_gpu.model_copy(update={"quick": quick})).markdown
    assert [budget(1.0)[0].report.quick, collect.Run("gpu", plan.LARGE, CPU, print, 0.0).report.quick] == [
        True,
        False,
    ]


@pytest.mark.usefixtures("small")
def test_the_law_of_generate_notices_another_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static steps that keep more tokens choose other tokens, and retain others."""

    def other(model: PreTrainedModel, num_sinks: int, window: int, buffer: int, *, static: bool) -> StreamingCache:
        return StreamingCache(model, num_sinks, window + 4 * static, buffer, static=static)

    monkeypatch.setattr(laws, "StreamingCache", other)
    found = {one.metric: one.median for one in laws.same_tokens(Place("laws", "tiny"), random_model("tiny"))}
    assert found["error"] > 0
    assert found["retained equal"] == 0


def test_kernels_are_counted_per_step() -> None:
    """Times and calls are those of one step, the most expensive kernel first."""
    left, right = torch.ones(300, 300), torch.ones(3)

    def step() -> None:
        with torch.profiler.record_function("a range of the user's"):
            _ = (left @ left, right + 1, right + 2)

    found = kernels(step, 4, CPU)
    times = [one["time"][1][0] for one in found.values()]
    assert (found["aten::mm"]["calls"], found["aten::add"]["calls"]) == (("", [1]), ("", [2]))
    assert "a range of the user's" not in found
    assert next(iter(found)) == "aten::mm"
    assert times[0] == max(times) > 0


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
    monkeypatch.setattr(laws, "laws", lambda *_: law(2.0))
    monkeypatch.setattr(collect, "_gpu_parts", lambda *_: None)
    assert exit_status("gpu-report", "--out", tmp_path, "--minutes", 9) == 1
    assert "law 'a law', tiny, float32 on cpu: 2.00e+00" in capsys.readouterr().err
    assert "| NO |" in (tmp_path / "gpu_report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "option", "least"),
    [("gpu-report --out .", "minutes 0.0", "above 0"), ("floors", "batch 0", "1 or more")],
)
def test_errors_name_the_option(command: str, option: str, least: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the option and its value, before anything is measured."""
    assert exit_status(*command.split(), *f"--{option}".split()) == 2
    assert f"--{option} must be {least}" in capsys.readouterr().err
