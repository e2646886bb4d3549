"""A run without measurements fails, a history names what is missing, and a comparison hides no regression."""

from __future__ import annotations

import json
import math
import os
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
from asv_benches import compare, gate, history

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS: Final = ["result", "params", "version"]


def _saved(folder: Path, values: list[float | None] | None, commit: str = "a" * 40) -> Path:
    """Write what asv writes for one benchmark with two devices."""
    (folder / "machine").mkdir(parents=True, exist_ok=True)
    benchmark = {"name": "Suite.time_it", "params": [["'cpu'", "'cuda'"]]}
    (folder / "benchmarks.json").write_text(json.dumps({"Suite.time_it": benchmark, "version": 2}))
    entry = {"Suite.time_it": [values, [], "1"]} if values != [] else {}
    results = {"commit_hash": commit, "result_columns": COLUMNS, "results": entry}
    (folder / "machine" / f"{commit[:8]}.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize(
    ("values", "gpu", "code"),
    [
        ([1.0, math.nan], False, gate.OK),
        ([1.0, 2.0], True, gate.OK),
        ([1.0, math.nan], True, gate.MISSING),
        ([math.nan, math.nan], False, gate.NOTHING_RAN),
        ([1.0, None], True, gate.FAILED),
        (None, False, gate.FAILED),
        ([], False, gate.NOTHING_RAN),
    ],
)
def test_gate_distinguishes_failures(tmp_path: Path, values: list[float | None], code: int, *, gpu: bool) -> None:
    """Measured, skipped without a GPU, missing, failed, and nothing measured are different results."""
    assert gate.judge(_saved(tmp_path, values), None, gpu=gpu).code == code


def test_gate_detects_that_nothing_ran(tmp_path: Path) -> None:
    """An empty folder and results that are older than the run do not count."""
    assert gate.judge(tmp_path, None).code == gate.NOTHING_RAN
    _saved(tmp_path, [1.0, 2.0])
    stamp = tmp_path / "started"
    stamp.touch()
    later = stamp.stat().st_mtime_ns + 10**9
    os.utime(stamp, ns=(later, later))
    assert gate.judge(tmp_path, stamp).code == gate.NOTHING_RAN
    assert gate.main(["--results", str(tmp_path), "--newer-than", str(stamp)]) == gate.NOTHING_RAN


def test_gate_allows_missing_numbers_of_old_commits(tmp_path: Path) -> None:
    """Only the commit that must be complete needs results of all benchmarks."""
    _saved(tmp_path, [1.0, 2.0], "a" * 40)
    _saved(tmp_path, [], "b" * 40)
    assert gate.judge(tmp_path, None, gpu=True, complete="a" * 40).code == gate.OK
    assert gate.judge(tmp_path, None, gpu=True, complete="b" * 40).code == gate.MISSING
    assert gate.judge(tmp_path, None, gpu=True, complete="b" * 40, selected="Other").code == gate.NOTHING_RAN


def test_history_goes_back_to_commits_that_can_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit without numbers is named with its reason, is not built again, and is not one of those asked for."""
    ran: list[str] = []

    def run(_machine: str, commit: str, _arguments: list[str]) -> str:
        ran.append(commit[0])
        _saved(tmp_path, None if commit[0] == "b" else [1.0, math.nan], commit)
        return "error: no such *backend*"

    monkeypatch.setattr(history, "RESULTS", tmp_path)
    monkeypatch.setattr(history, "run", run)
    monkeypatch.setattr(history, "commits", lambda _: [(letter * 40, "2026-01-01", f"{letter}_x") for letter in "abcd"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    for _ in range(2):
        assert history.main(["2", "--machine", "machine", "--quick"]) == 0
        assert ran == ["a", "b", "c"]
        rows = [line.split(" | ")[-1] for line in (tmp_path / "history.md").read_text("utf-8").splitlines()[-3:]]
        assert rows == ["1 |", r"none: error: no such \*backend\* |", "1 |"]


def test_history_is_listed_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--list`, the page names what saved results have, and a commit that has none yet is no error."""
    monkeypatch.setattr(history, "RESULTS", tmp_path)
    monkeypatch.setattr(history, "run", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(history, "commits", lambda _: [(letter * 40, "2026-01-01", letter) for letter in "ab"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    assert history.main(["2", "--machine", "machine", "--list"]) == 0
    _saved(tmp_path, [1.0], "b" * 40)
    assert history.main(["2", "--machine", "machine", "--list"]) == 0
    rows = [line.split(" | ")[-1] for line in (tmp_path / "history.md").read_text("utf-8").splitlines()[-2:]]
    assert rows == ["none: not measured yet |", "1 |"]
    assert not (tmp_path / "unmeasured.txt").exists()


def test_comparison_runs_exact_figures_and_times_separately() -> None:
    """Every benchmark is in one of two passes; the factor for exact figures allows no change."""
    exact, timed = compare.passes("base", "head", 1.2, None)
    assert exact[exact.index("--factor") + 1] == "1.0001"
    assert exact[exact.index("--bench") + 1] == compare.EXACT
    assert timed[timed.index("--bench") + 1] == f"^(?!.*({compare.EXACT}))"
    assert all("--interleave-rounds" in command for command in (exact, timed))


def test_a_failed_benchmark_hides_no_other_regression(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If asv stops because a benchmark failed, the other results are still compared, and the status is a failure."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 2 if "continuous" in command else 0, stdout="0123\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gate, "judge", lambda *_, **__: gate.Findings(failed=["CacheBytes"]))
    code = compare.compare("base", "head", factor=1.2, bench=None, gpu=False, root=tmp_path)
    assert code == gate.FAILED
    shown = [command for command in ran if command[1] == "compare"]
    assert [command[command.index("--factor") + 1] for command in shown] == [str(compare.EXACT_FACTOR), "1.2"]
    assert all(command[-2:] == ["base", "head"] for command in shown)
