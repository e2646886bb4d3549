"""The job that may write to the repository takes the results of asv from an artifact, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT: Final = Path(__file__).resolve().parent.parent / ".github" / "scripts" / "take_results.py"
COMMIT: Final = "0123456789" * 4
RESULT: Final = f"vm/{COMMIT[:8]}-virtualenv-py3.11.json"
SAVED: Final[dict[str, Any]] = {
    "commit_hash": COMMIT,
    "params": {"machine": "vm"},
    "results": {"bench_text.Text.time_call": [[1.5, float("nan")], [["'cpu'"]], "1"]},
    "durations": {"<build>": 2.5},
}
HONEST: Final = {
    "benchmarks.json": json.dumps({"a.b": {"name": "a.b", "code": "x < y"}, "version": 2}),
    "vm/machine.json": json.dumps({"machine": "vm", "version": 1}),
    RESULT: json.dumps(SAVED),
    "unmeasured.txt": f"{COMMIT}\terror: no such *backend*\n",
}


def _script() -> Any:
    specification = importlib.util.spec_from_file_location("take_results", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


SCRIPTED: Final = _script()


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact with one result of each kind."""
    folder = tmp_path / "artifact"
    _write(folder, HONEST)
    return folder


def test_results_are_taken_as_they_are(artifact: Path, tmp_path: Path) -> None:
    """What asv writes arrives byte for byte, over what was there, and other results stay."""
    _write(tmp_path / "branch", {RESULT: "old", "other/machine.json": "{}"})
    assert SCRIPTED.take(artifact, tmp_path / "branch") == []
    assert _below(tmp_path / "branch") == {*HONEST, "other/machine.json"}
    assert all((tmp_path / "branch" / name).read_text("utf-8") == text for name, text in HONEST.items())


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        "vm/.git/machine.json",
        ".git/machine.json",
        ".gitattributes",
        "index.html",
        "history.md",
        "vm/graph.json",
        f"vm/deeper/{COMMIT[:8]}-x.json",
        f"vm/{COMMIT[:8]}-x.json.html",
        f"vm/{COMMIT[:8]}-x.json\n",
        ".github/workflows/tests.yml",
    ],
)
def test_other_names_are_left(artifact: Path, tmp_path: Path, name: str) -> None:
    """A file with any other name is listed and stays where it is."""
    _write(artifact, {name: "<script>alert(1)</script>"})
    assert SCRIPTED.take(artifact, tmp_path / "branch") == [name]
    assert _below(tmp_path / "branch") == set(HONEST)


@pytest.mark.parametrize(
    "name", ["../machine.json", "../x.json", "/vm/machine.json", "..\\x.json", "vm/../machine.json"]
)
def test_a_name_leads_nowhere_else(name: str) -> None:
    """No result has a name that leaves the folder."""
    assert not SCRIPTED.named(name)


def _link(artifact: Path) -> None:
    (artifact / "linked").mkdir()
    (artifact / "linked" / "machine.json").symlink_to(artifact.parent / "secret.json")


def _linked_folder(artifact: Path) -> None:
    (artifact / "linked").symlink_to(artifact.parent, target_is_directory=True)


def _huge(artifact: Path) -> None:
    with (artifact / RESULT).open("wb") as file:
        file.truncate(2**30)


def _many(artifact: Path) -> None:
    for number in range(5):
        (artifact / f"{number}.html").touch()


def _as(name: str, content: Any) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda artifact: _write(artifact, {name: text})


BAD: Final[dict[str, Callable[[Path], None]]] = {
    "a link": _link,
    "a linked folder": _linked_folder,
    "a file of 1 GiB": _huge,
    "too many files": _many,
    "HTML": _as(RESULT, "<html>"),
    "a list": _as(RESULT, []),
    "JSON too deep to read": _as(RESULT, "[" * 200_000),
    "another commit": _as(RESULT, {**SAVED, "commit_hash": "f" * 40}),
    "a short commit": _as(RESULT, {**SAVED, "commit_hash": COMMIT[:8]}),
    "another machine": _as(RESULT, {**SAVED, "params": {"machine": "gpu"}}),
    "no results": _as(RESULT, {**SAVED, "results": None}),
    "markup in a name": _as(RESULT, {**SAVED, "results": {"<img src=x onerror=alert(1)>": []}}),
    "a machine with markup": _as("vm/machine.json", {"machine": "vm", "cpu": "<b>"}),
    "a machine with another name": _as("vm/machine.json", {"machine": "gpu"}),
    "a benchmark with another name": _as("benchmarks.json", {"a": {"name": "b"}}),
    "a reason without a commit": _as("unmeasured.txt", "error\n"),
    "a reason with control characters": _as("unmeasured.txt", f"{COMMIT}\t\x1b[2J\n"),
}


@pytest.mark.parametrize("plant", BAD.values(), ids=BAD)
def test_nothing_is_taken_if_one_file_is_bad(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None]
) -> None:
    """A link, or wrong content under the name of a result, refuses the whole artifact before anything is written."""
    monkeypatch.setattr(SCRIPTED, "MOST", len(HONEST) + 2)
    (tmp_path / "secret.json").write_text('{"machine": "linked"}', encoding="utf-8")
    plant(artifact)
    with pytest.raises(SCRIPTED.RefusedError):
        SCRIPTED.take(artifact, tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


def test_no_link_of_the_branch_is_followed(artifact: Path, tmp_path: Path) -> None:
    """A link that an earlier night has left in the branch does not lead a file out of it."""
    (tmp_path / "branch").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "branch" / "vm").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(SCRIPTED.RefusedError, match="link"):
        SCRIPTED.take(artifact, tmp_path / "branch")
    assert not list((tmp_path / "outside").iterdir())


def test_command_names_what_is_refused(artifact: Path, tmp_path: Path) -> None:
    """The step of the workflow fails with the name of the file, and its output has no line that the file chose."""
    command = [sys.executable, "-I", str(SCRIPT), str(artifact), str(tmp_path / "branch")]
    _write(artifact, {"x\n::error::planted": ""})
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout == "left: 'x\\n::error::planted'\n"
    )
    _write(artifact, {"vm/machine.json": "{"})
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert "vm/machine.json" in run.stderr
