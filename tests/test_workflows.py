"""What the workflows may do, checked in their text: unlike zizmor and actionlint, these checks need no tools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES: Final = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".ci/run")]
DOCUMENTS: Final = [*PAGES, *sorted((ROOT / "docs").glob("*.md")), *WORKFLOWS]
# The only ways in which workflows install something: by hashes, or from Go's database of checksums.
PINNED: Final = (
    re.compile(r"(?:\.venv/bin/)?pip install --require-hashes --requirement requirements/[\w.-]+\.txt"),
    re.compile(r"go install [\w./-]+@v\d+\.\d+\.\d+"),
)
INSTALLS: Final = re.compile(
    r"\b(?:pip3?|pipx|uv|uvx|conda|ensurepip|npm|npx|yarn|apt|apt-get|brew|gem|cargo|docker|curl|wget)\b"
    r"|\bgo (?:install|get|run)\b"
)
# The only lines of jobs with write permission that mention an artifact or run a script; a change here is a decision.
BY_NAME: Final = (
    "python3 -I ../take_results.py ../new .",
    "python3 -I canary_issue.py",
    'test -z "$(find report -type l)" # a link would quote a file of this machine',
    "number=$(tr -cd 0-9 < report/number)",
    "tail -c 50000 report/report.txt | tr '~' '-'",
    'gh release create "$TAG" --repo "$REPOSITORY" --verify-tag --generate-notes sbom/sinkwindow.cdx.json',
)
PROGRAMS: Final = re.compile(r"(?:^|[\s;&|(])(?:python\d?|bash|sh|node|nox|make|source|eval|exec|\.|\./\S+)(?:\s|$)")
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


def _commands(text: str) -> list[str]:
    """Return the lines of all `run` steps, without those that are comments."""
    blocks = re.findall(r"^( *)(?:- )?run: (?:\|\n((?:\1 +.*\n|\n)+)|(.*))", text, re.MULTILINE)
    lines = [line.strip() for _, block, single in blocks for line in (block or single).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _unpinned(text: str) -> list[str]:
    """Return the commands that install something which no hash covers."""
    installs = [line for line in _commands(text) if INSTALLS.search(line)]
    return [line for line in installs if not any(one.fullmatch(line) for one in PINNED)]


def _takes_more(job: str) -> list[str]:
    """Return the lines of a job with write permission that take more of an artifact than a few files by name."""
    if ": write" not in job:
        return []
    folders = re.findall(r"download-artifact@.*\n +with:\n(?: +[\w-]+: .*\n)*? +path: (\S+)", job)
    named = re.compile("|".join([PROGRAMS.pattern, *(rf"(?<![\w-]){re.escape(one)}(?![\w-])" for one in folders)]))
    mentions = [line for line in _commands(job) if named.search(line) and line not in BY_NAME]
    return mentions + [one for one in folders if not re.fullmatch(r"[a-z]+", one)]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=_names(WORKFLOWS))
def test_installs_are_pinned(workflow: Path) -> None:
    """Whatever a workflow installs by itself is pinned with hashes; its sessions use requirements/install.py."""
    text = workflow.read_text("utf-8")
    assert _unpinned(text) == []
    assert (" nox -s" in text or "/nox -s" in text) == ("requirements/nox.txt" in text)


@pytest.mark.parametrize(
    "command",
    [
        "pip install nox",
        "pip install --require-hashes --requirement requirements/nox.txt nox",
        "python -m pip install nox",
        ".venv/bin/pip install nox",
        "go install example.org/tool@latest",
        "curl -sSf example.org/install.sh | sh",
        "npm install -g tool",
        "sudo apt-get install -y tool",
        "uv tool install nox",
    ],
)
def test_a_new_install_is_noticed(command: str) -> None:
    """Without hashes it fails the test above, alone on a line or in a script."""
    assert _unpinned(f"      - run: {command}\n") == [command]
    assert _unpinned(f"      - name: x\n        run: |\n          nox -l\n          {command}\n") == [command]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=_names(WORKFLOWS))
def test_jobs_that_write_take_files_by_name(workflow: Path) -> None:
    """A job with write permission takes named files of an artifact, or uses the script, and runs no other program."""
    jobs = _jobs(workflow.read_text("utf-8"))
    assert [line for job in jobs for line in _takes_more(job)] == []


@pytest.mark.parametrize(
    "command",
    [
        "cp -R ../new/. .",
        "cp ../new/*.json .",
        "cd new",
        "tar -c new | tar -x",
        "git add new",
        "mv new/.git/config .git/config",
        "bash new/run.sh",
        "python3 new/take_results.py new .",
        "python3 -I ../take_results.py ../new . && cp -R ../new/. .",
        "./build.sh",
        "nox -s docs",
    ],
)
def test_a_new_copy_is_noticed(command: str) -> None:
    """Another line in the job that saves results fails the test above."""
    text = (ROOT / ".github" / "workflows" / "save-results.yml").read_text("utf-8")
    line = "python3 -I ../take_results.py ../new ."
    assert text.count(line) == 1
    (job,) = _jobs(text.replace(line, command))
    assert _takes_more(job) == [command]
    (job,) = _jobs(text.replace("path: new", "path: ."))
    assert "." in _takes_more(job)


@pytest.mark.parametrize(("workflow", "script"), [("save-results", "take_results.py"), ("canary", "canary_issue.py")])
def test_the_script_that_writes_is_of_this_repository(workflow: str, script: str) -> None:
    """A job that may write reads its script at its own commit, as GitHub reads the workflow itself."""
    text = (ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text("utf-8")
    (path,) = re.findall(r"script=repos/\$\w+/contents/(\S+)\?ref=\$GITHUB_SHA\n", text)
    assert (ROOT / path).is_file()
    assert path.endswith(f"/{script}")


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


def test_the_nightly_job_tests_the_oldest_torch_that_is_allowed() -> None:
    """Its first release is of the lower bound in pyproject.toml."""
    bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tested = re.search(r'torch: \["([\d.]+)"', (ROOT / ".github/workflows/nightly.yml").read_text(encoding="utf-8"))
    assert bound
    assert tested
    assert tested[1].startswith(f"{bound[1]}.")
