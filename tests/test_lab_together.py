"""Two runs into one folder: the second one waits, and the results of both are right."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from lab_tiny import TINY, exit_status, save_tiny, text_of_lines
from sinkwindow_lab import commands, files
from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.reports.tables import plan
from sinkwindow_lab.reports.tables.page import page

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from sinkwindow_lab.files import alone_in
with alone_in(Path(sys.argv[1]), print):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_another_process_is_waited_for(tmp_path: Path, *, killed: bool) -> None:
    """The other one is named at once; when it ends, also by a kill, the folder is free, and has no file more."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "inside\n"
        said: list[str] = []

        def end(words: str) -> None:
            assert other.poll() is None
            said.append(words)
            if killed:
                other.kill()
            other.stdin.close()  # type: ignore[union-attr]

        with files.alone_in(tmp_path, end):
            assert said == [f"note: another run writes into {tmp_path}; this one waits until it ends"]
            assert list(tmp_path.iterdir()) == []


def test_nobody_waits_in_an_empty_folder(tmp_path: Path) -> None:
    """Neither the first time nor after another run has ended."""
    for _ in range(2):
        with files.alone_in(tmp_path, pytest.fail):
            pass


def test_folders_that_cannot_be_locked_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no such lock, some network disks refuse it."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with files.alone_in(tmp_path, pytest.fail), files.alone_in(tmp_path, pytest.fail):
        files.write_text(tmp_path / "a", "text")


def test_two_runs_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both begin while a third holds the folder; then each writes a whole report, and the pages are of one of them."""
    monkeypatch.setattr(plan, "QUICK", TINY)
    save_tiny(tmp_path / "model")
    waiting = threading.Semaphore(0)
    monkeypatch.setattr(
        commands.measure, "say", lambda words, **_: waiting.release() if words.startswith("note") else None
    )
    out, reports = tmp_path / "out", []
    write_text = files.write_text

    def run(name: str) -> int:
        (tmp_path / f"{name}.txt").write_text(text_of_lines(60), encoding="utf-8")
        options = ("--model", tmp_path / "model", "--corpus", tmp_path / f"{name}.txt", "--out", out)
        return exit_status("tables", *options, "--quick", "--only", "mistakes,sinks")

    def watched(path: Path, text: str) -> None:
        write_text(path, text)
        reports.append((threading.get_ident(), path.name))

    monkeypatch.setattr("sinkwindow_lab.reports.output.write_text", watched)
    out.mkdir()
    with ThreadPoolExecutor(2) as pool:
        with files.alone_in(out, pytest.fail):
            runs = [pool.submit(run, name) for name in ("first", "second")]
            for _ in runs:
                waiting.acquire()
            assert {one.name for one in out.iterdir()} <= {"figures"}
        assert [one.result() for one in runs] == [0, 0]
    names = [name for _, name in reports]
    half = len(names) // 2
    assert names[:half] == names[half:]  # one after the other, never file by file
    assert len({who for who, _ in reports[:half]}) == 1
    found = read_report(out / "paper_tables.json")
    assert (out / "paper_tables.md").read_text(encoding="utf-8") == page(found).markdown
    assert {one.subject for one in found.measurements} == {found.corpora[0].name}
    readings = len(list((out / "measurements").iterdir()))
    assert readings == 2 * len({(one.configuration, one.at) for one in found.measurements})
