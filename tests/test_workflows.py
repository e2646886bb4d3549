"""What the workflows may do, checked in their text: unlike zizmor and actionlint, these checks need no tools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCUMENTS: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *WORKFLOWS]
BY_PULL_REQUEST: Final = re.compile(r"^  pull_request:", re.MULTILINE)


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def _jobs(text: str) -> list[str]:
    """Return the text of each job."""
    return re.split(r"^  (?=[\w-]+:$)", text.partition("\njobs:\n")[2], flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=_names(WORKFLOWS))
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    """A tag can be moved to other code, a commit cannot; the tag is in a comment for readers."""
    for line in re.findall(r"uses: .*", workflow.read_text("utf-8")):
        assert re.fullmatch(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_pin() -> None:
    """The same action is pinned to the same commit everywhere."""
    pins = {re.search(r"uses: (\S+)@(\w+)", line).groups() for line in _all_uses()}  # type: ignore[union-attr]
    assert len({name for name, _ in pins}) == len(pins)


def _all_uses() -> list[str]:
    return [line for path in WORKFLOWS for line in re.findall(r"uses: .*", path.read_text("utf-8"))]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=_names(WORKFLOWS))
def test_permissions_are_least(workflow: Path) -> None:
    """No permissions by default, a time limit for each job, and no token left in a checkout."""
    text = workflow.read_text("utf-8")
    assert re.search(r"^permissions: \{\}$", text, re.MULTILINE)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")
    for job in _jobs(text):
        assert "timeout-minutes:" in job
        assert "permissions:" in job


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=_names(WORKFLOWS))
def test_code_of_pull_requests_cannot_read_secrets(workflow: Path) -> None:
    """No workflow uses a secret, and a job that checks out code has no write permission."""
    text = workflow.read_text("utf-8")
    assert "secrets." not in text
    assert "pull_request_target" not in text
    for job in _jobs(text):
        if "actions/checkout@" in job:
            assert ": write" not in job
            assert "github.token" not in job


def test_own_machines_run_on_request_only() -> None:
    """A pull request runs on the GPU after a label and an approval, never because it was opened."""
    text = (ROOT / ".github" / "workflows" / "gpu-benchmarks.yml").read_text("utf-8")
    assert "types: [labeled]" in text
    assert "github.event.label.name == 'gpu-benchmarks'" in text
    assert "environment: gpu" in text
    others = [
        path for path in WORKFLOWS if "self-hosted" in path.read_text("utf-8") and path.name != "gpu-benchmarks.yml"
    ]
    assert not any(BY_PULL_REQUEST.search(path.read_text("utf-8")) for path in others)


def test_results_reach_the_pages() -> None:
    """A workflow that starts after others names existing ones, and reads an artifact that each of them saves."""
    texts = {path.stem: path.read_text("utf-8") for path in WORKFLOWS}
    started = {name: re.findall(r"workflow_run:.*\n    workflows: \[(.*)\]", text) for name, text in texts.items()}
    assert started["docs"] == ["save-results"]
    assert started["save-results"] == ["nightly, gpu-nightly"]
    for name, (before,) in ((name, found) for name, found in started.items() if found):
        read = set(re.findall(r"download-artifact@.*\n +with:\n +name: (\S+)", texts[name]))
        for other in before.split(", "):
            assert read <= set(re.findall(r"upload-artifact@.*\n +with:\n +name: (\S+)", texts[other]))


def test_no_failure_is_hidden() -> None:
    """A check that cannot fail checks nothing."""
    for path in WORKFLOWS:
        text = path.read_text("utf-8")
        assert "|| true" not in text
        assert "continue-on-error" not in text
        assert "| tee" not in text or "shell: bash" in text  # which sets pipefail


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_named_sessions_exist(document: Path) -> None:
    """Every nox session that a document names is defined."""
    defined = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text("utf-8"), re.MULTILINE))
    for named in re.findall(r"nox -s \"?((?:[a-z_]+ ?)+)", document.read_text("utf-8")):
        assert set(named.split()) <= defined, named
