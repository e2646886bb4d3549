"""The GPU report end to end on a CPU with tiny shapes: this machine has no GPU, so its CUDA paths do not run here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.reports.pace import gpu, gpu_collect, gpu_page, laws
from sinkwindow_lab.reports.pace.gpu_records import GpuReport, LawRecord
from test_lab_cli import run

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fewer laws and lengths than the command."""
    monkeypatch.setattr(laws, "DTYPES", (torch.float32,))
    monkeypatch.setattr(laws, "RULES", ((2, 8, 3),))
    monkeypatch.setattr(laws, "TOKENS", 60)
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, limits=(32, 16), streamed=(100,), prompts=(2,), samples=1))


def law(error: float, *, retained: bool = True) -> LawRecord:
    """Return the record of a law with an allowed error of 2 x 0.25 + 0.5 = 1."""
    return LawRecord(
        law="a law",
        shape="tiny",
        dtype="float32",
        device="cpu",
        error=error,
        plain_error=0.25,
        rounding_step=0.5,
        retained_equal=retained,
    )


@pytest.mark.usefixtures("small")
def test_the_command_runs_end_to_end_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part of both models is measured; the page is rendered from the JSON and says that there was no GPU."""
    status, _, err = run(capsys, "gpu-report", "--out", tmp_path, "--minutes", 9)
    assert status == 0, err
    found = GpuReport.model_validate_json((tmp_path / "gpu_report.json").read_text(encoding="utf-8"))
    page = (tmp_path / "gpu_report.md").read_text(encoding="utf-8")
    assert page == gpu_page.render(found)
    assert "There is no GPU here: tiny shapes on the CPU" in page
    assert (found.on_gpu, found.finished, found.skipped) == (False, True, [])
    names = [f"{shape}, {str(dtype).removeprefix('torch.')}" for shape, dtype in gpu.TINY.models]
    for name in names:
        ways = [(one.way, one.limit, one.streamed) for one in found.points if one.model == name]
        assert sorted(ways) == sorted(
            [(way, limit, limit) for way in (gpu.DENSE, gpu.STREAMING) for limit in (32, 16)]
            + [(gpu.STREAMING, 32, 100), (gpu.STATIC, 32, 32)]
        )
        assert [one.way for one in found.prompts if one.model == name] == [gpu.STREAMING, gpu.DENSE]
    assert len(found.laws) == 2 * 2
    assert all(one.holds for one in found.laws)


def test_without_time_all_parts_are_skipped_by_name() -> None:
    """If the time is too short for anything, the report names each skipped part."""
    seen: list[GpuReport] = []
    report = gpu_collect.collect(minutes=1e-6, save=seen.append, say=lambda _: None, device="cpu")
    assert (report.points, report.prompts, report.laws) == ([], [], [])
    assert report.skipped == ["laws", "tiny-pythia: build", "tiny: build"]
    assert "Not measured, for want of time or memory" in gpu_page.render(report)


@pytest.mark.parametrize(("seconds", "allowed"), [(120.0, True), (115.0, False)])
def test_a_part_starts_if_one_and_a_half_times_its_estimate_fits(seconds: float, *, allowed: bool) -> None:
    """After 100 s, with an estimate of a tenth of all: 118 s fit in 120 s, 117.25 s do not fit in 115 s."""
    times = iter((0.0, 100.0))
    assert gpu_collect.Budget(seconds, now=lambda: next(times)).allows("laws") is allowed


def test_the_estimate_of_a_part_is_the_longest_of_its_kind() -> None:
    """A part took 10 s, so the next needs 15 s; after 20 s, 16 s of 36 s are left, but only 14 s of 34 s."""
    for seconds, allowed in ((36.0, True), (34.0, False)):
        times = iter((0.0, 0.0, 10.0, 20.0))
        budget = gpu_collect.Budget(seconds, now=lambda times=times: next(times))  # type: ignore[misc]
        budget.run("prompt", lambda: None)
        assert budget.allows("prompt") is allowed


@pytest.mark.usefixtures("small")
def test_a_wrong_rotation_breaks_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """If sinks are not rotated, the error is far above what the dtype explains."""

    def stay(self: Rotary, states: Tensor, distance: int | Tensor) -> Tensor:  # noqa: ARG001
        return states

    monkeypatch.setattr(Rotary, "rotate_by", stay)
    model = random_model("tiny")
    assert not laws.calls_law(model, laws.widened(model), "tiny", (2, 8, 3), 0).holds


@pytest.mark.parametrize(
    ("found", "holds"),
    [(law(1.0), True), (law(1.01), False), (law(float("nan")), False), (law(0.0, retained=False), False)],
)
def test_what_a_law_allows(found: LawRecord, *, holds: bool) -> None:
    """A law allows twice the plain error and a rounding step, but no NaN and no other retained list."""
    assert found.holds is holds


@pytest.mark.usefixtures("small")
def test_a_broken_law_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is still written, and the error names the law."""
    monkeypatch.setattr(laws, "laws", lambda _: iter([law(2.0)]))
    status, _, err = run(capsys, "gpu-report", "--out", tmp_path, "--minutes", 9)
    assert status == 1
    assert "law 'a law', tiny, float32: 2.00e+00" in err
    assert "| NO |" in (tmp_path / "gpu_report.md").read_text(encoding="utf-8")


def test_minutes_must_be_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the option and its value."""
    status, _, err = run(capsys, "gpu-report", "--out", tmp_path, "--minutes", 0)
    assert (status, "--minutes 0.0 must be above 0" in err) == (2, True), err
