"""Ranks as real processes: the same bytes from any number of them, killed and continued; one that hangs is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ranks_inputs import ROWS, UNITS, command, save_inputs
from sinkwindow_lab import ranks

pytestmark = pytest.mark.distributed
CHILD = Path(__file__).parent / "ranks_child.py"
PATHS = os.pathsep.join([str(CHILD.parent), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and texts."""
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(inputs: Path) -> str:
    """Return the result of one process."""
    return alone(command(inputs))


def launched(
    arguments: list[str], processes: int, fault: str = "- none 0", launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start ranks by torchrun, or by another launcher."""
    by = launcher or ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    environment = {**ENVIRONMENT, "FAULT": fault, ranks.PATIENCE: "20"}
    call = [sys.executable, "-m", *by, str(CHILD), *arguments]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end; return exit status, standard output and standard error."""
    out, err = process.communicate()
    return process.returncode, out, err


def alone(arguments: list[str]) -> str:
    """Return the standard output of one process with one thread."""
    call = [sys.executable, str(CHILD), *arguments]
    return subprocess.run(call, env=ENVIRONMENT, check=True, text=True, capture_output=True).stdout


def stamps(folder: Path) -> dict[str, int]:
    """Return when each finished measurement was written [ns]."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("nll-*.json")}


def test_one_two_and_three_processes_write_the_same_bytes(inputs: Path, expected: str, tmp_path: Path) -> None:
    """Each reading is done once; one rank prints the result, and what all are doing."""
    for processes in (2, 3):
        keep = tmp_path / f"{processes}"
        status, out, err = finished(launched(command(inputs, "--keep", keep), processes))
        assert status == 0, err
        assert out == expected
        assert len(stamps(keep)) == len(list(keep.iterdir())) == UNITS
        assert f"/{UNITS}] rank 0 (" in err
        assert err.count("[1/2] PPL baseline") == 1


def test_accelerate_shares_as_well(inputs: Path, expected: str, tmp_path: Path) -> None:
    """It sets the same environment."""
    pytest.importorskip("accelerate")
    options = ("--cpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
    by = ("accelerate.commands.launch", *options, "--mixed_precision", "no", "--dynamo_backend", "no")
    status, out, err = finished(launched(command(inputs, "--keep", tmp_path / "kept"), 2, launcher=by))
    assert (status, out == expected) == (0, True), err


def test_tables_of_two_processes(inputs: Path, tmp_path: Path) -> None:
    """Numbers are those of one process; times are measured by rank 0 alone, and of shared readings not at all."""
    reports = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        options = ["--model", inputs / "model", "--corpus", inputs / "lines.txt", "--configs", ROWS, "--out", out]
        arguments = [str(one) for one in ("tables", *options, "--quick")]
        if processes == 1:
            alone(arguments)
        else:
            status, _, err = finished(launched(arguments, processes))
            assert status == 0, err
            assert "are from an earlier run" not in err
        reports.append(json.loads((out / "paper_tables.json").read_text(encoding="utf-8")))
    timed = [{one["metric"] for one in report["measurements"]} for report in reports]
    assert timed[0] - timed[1] == {"seconds"}
    assert {"TPOT", "TTFT", "peak memory", "answered"} <= timed[1]
    assert untimed(reports[0]) == untimed(reports[1])


def untimed(report: dict[str, Any]) -> str:
    """Return a report without what the clock gives."""
    kept = [one for one in report["measurements"] if one["unit"] not in ("s", "ms", "tok/s")]
    machine = {**report["machine"], "date": ""}
    return json.dumps({**report, "seconds": 0, "machine": machine, "measurements": kept})


@pytest.mark.parametrize("fault", ["1 kill 4", "0 kill 4", "1 raise 4"])
def test_a_dead_rank_is_named_and_the_next_run_continues(
    inputs: Path, expected: str, tmp_path: Path, fault: str
) -> None:
    """What was finished is not measured again, and the result is that of one process."""
    keep, rank = tmp_path / "kept", fault[0]
    status, out, err = finished(launched(command(inputs, "--keep", keep), 2, fault))
    assert (status != 0, out) == (True, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank {rank} (host ")
    assert "), at 'PPL " in line
    assert ("ZeroDivisionError: a mistake in the code" if "raise" in fault else "is dead") in line
    before = stamps(keep)
    assert 3 <= len(before) < UNITS
    status, out, err = finished(launched(command(inputs, "--keep", keep), 2))
    assert (status, out) == (0, expected), err
    after = stamps(keep)
    assert (len(after), {name: after[name] for name in before}) == (UNITS, before)


def test_ranks_that_the_launcher_starts_again_continue(inputs: Path, expected: str, tmp_path: Path) -> None:
    """They share what is missing, and do not take what the first ones wrote about themselves for their own."""
    by = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    status, out, err = finished(launched(command(inputs, "--keep", tmp_path / "kept"), 2, "1 kill 4", by))
    assert (status, out) == (0, expected), err
    assert "readings are from an earlier run" in err


@pytest.mark.parametrize("fault", ["1 sleep 3", "0 stop 3"])
def test_a_hanging_rank_is_named(inputs: Path, tmp_path: Path, fault: str) -> None:
    """Also rank 0, which watches the others, and one that is stopped as a whole."""
    status, _, err = finished(launched(command(inputs, "--keep", tmp_path / "kept"), 2, fault))
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank {fault[0]} (host ")
    assert ("hangs" if "sleep" in fault else "was not heard") in line


def test_all_killed_at_once(inputs: Path, expected: str, tmp_path: Path) -> None:
    """The launcher and all ranks die; other numbers of processes continue."""
    keep = tmp_path / "kept"
    process = launched(command(inputs, "--keep", keep), 2, "9 slow 0")
    while not stamps(keep):
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        one.kill()
    process.communicate()
    psutil.wait_procs(family)
    before = stamps(keep)
    assert 1 <= len(before) < UNITS
    status, out, err = finished(launched(command(inputs, "--keep", keep), 3))
    assert (status, out) == (0, expected), err
    after = stamps(keep)
    assert (len(after), {name: after[name] for name in before}) == (UNITS, before)
