"""The canary: what it installs can only read, and its script keeps one issue, tried with a `gh` that records calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
SCRIPT: Final = ROOT / ".github" / "scripts" / "canary_issue.py"
WORKFLOW: Final = (ROOT / ".github" / "workflows" / "canary.yml").read_text("utf-8")
RUN: Final = "https://example.org/runs/7"
# Records its arguments, a line of JSON each, and lists the issues of a file.
GH: Final = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1:3] == ["issue", "list"]:
    print((here / "issues").read_text())
sys.exit({status} if sys.argv[1:3] == ["issue", "create"] else 0)
"""


def calls(folder: Path, opened: list[int], status: int = 0, **results: str) -> list[list[str]]:
    """Run the script with these open issues and results of jobs; return the calls that change something."""
    (folder / "gh").write_text(GH.format(python=sys.executable, status=status), encoding="utf-8")
    (folder / "gh").chmod(0o755)
    (folder / "issues").write_text(json.dumps([{"number": one} for one in opened]), encoding="utf-8")
    (folder / "calls").unlink(missing_ok=True)
    jobs = {name: {"result": result, "outputs": {}} for name, result in results.items()}
    path = os.pathsep.join((str(folder), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "JOBS": json.dumps(jobs), "RUN": RUN}
    subprocess.run([sys.executable, "-I", str(SCRIPT)], env=environment, check=True)
    listed, *changes = [json.loads(line) for line in (folder / "calls").read_text("utf-8").splitlines()]
    assert listed == ["issue", "list", "--label", "canary", "--state", "open", "--json", "number"]
    return changes


def option(call: list[str], name: str) -> str:
    """Return the value of an option."""
    return call[call.index(name) + 1]


@pytest.mark.parametrize("result", ["failure", "cancelled"])
def test_a_red_canary_opens_an_issue(result: str, tmp_path: Path) -> None:
    """It names the job and the run, and has the label by which the next run finds it."""
    label, created = calls(tmp_path, [], transformers="success", torch=result)
    assert label[:4] == ["label", "create", "canary", "--force"]
    assert created[:2] == ["issue", "create"]
    assert option(created, "--label") == "canary"
    assert f"**torch**. See [the last red run]({RUN})" in option(created, "--body")


def test_an_open_issue_is_brought_up_to_date(tmp_path: Path) -> None:
    """There is no second one, however many are open; the text names what is red now."""
    (edited,) = calls(tmp_path, [12, 9], transformers="failure", torch="failure")
    assert edited[:3] == ["issue", "edit", "9"]
    assert "**torch, transformers**" in option(edited, "--body")


def test_a_green_canary_closes_what_is_open(tmp_path: Path) -> None:
    """With a link to the run; with nothing open, nothing is done."""
    closed = calls(tmp_path, [12, 9], transformers="success", torch="success")
    assert [one[:3] for one in closed] == [["issue", "close", "9"], ["issue", "close", "12"]]
    assert RUN in option(closed[0], "--comment")
    assert calls(tmp_path, [], transformers="success", torch="success") == []


@pytest.mark.parametrize("opened", [[], [9]])
def test_a_job_that_did_not_run_decides_nothing(opened: list[int], tmp_path: Path) -> None:
    """Where one is green and the other was skipped, no issue is opened or closed."""
    assert calls(tmp_path, opened, transformers="success", torch="skipped") == []


def test_an_issue_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """The job of the workflow fails, so that somebody sees it."""
    with pytest.raises(subprocess.CalledProcessError):
        calls(tmp_path, [], status=1, torch="failure")


def test_what_no_hash_covers_can_only_read() -> None:
    """Each job that runs the session may read the repository; the one that may write comes after both of them."""
    jobs = re.split(r"^  (?=[\w-]+:$)", WORKFLOW.partition("\njobs:\n")[2], flags=re.MULTILINE)[1:]
    running = [job for job in jobs if " nox -s canary -- " in job]
    assert [re.findall(r"^      (\w+: (?:read|write))", job, re.MULTILINE) for job in running] == [
        ["contents: read"]
    ] * 2
    (issue,) = [job for job in jobs if job not in running]
    assert re.findall(r"^      (\w+: write)", issue, re.MULTILINE) == ["issues: write"]
    names = [job.partition(":")[0] for job in running]
    assert f"needs: [{', '.join(names)}]" in issue


def test_expressions_are_only_in_the_environment() -> None:
    """A script gets what GitHub says as variables, never as its own text."""
    scripts = re.findall(r"run: (?:\|\n((?: {10}.*\n)+)|(.*))", WORKFLOW)
    assert len(scripts) == 5
    assert not any("${{" in text for pair in scripts for text in pair)


def test_what_the_session_leaves_out_is_there() -> None:
    """Tests that are left out by name or pattern exist: of an old name pytest would say nothing."""
    lines = [(ROOT / "tests" / name).read_text("utf-8").splitlines() for name in ("laws.txt", "canary.txt")]
    options = dict[str, list[str]]()
    for key, _, value in (line.partition("=") for own in lines for line in own):
        options.setdefault(key, []).append(value)
    assert {key: len(values) for key, values in options.items()} == {
        "--ignore-glob": 2,
        "--ignore": 8,
        "--deselect": 3,
        "-Wignore:transformers": 1,
    }
    assert all(any(ROOT.glob(f"{pattern}.py")) for pattern in options["--ignore-glob"])
    assert all((ROOT / file).is_file() for file in options["--ignore"])
    for file, test in (one.split("::") for one in options["--deselect"]):
        assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8")
