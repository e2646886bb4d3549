"""Sessions for all of the project's tools; each installs everything that it needs, including data."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import nox
from packaging.version import Version

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types"]

PYPROJECT: Final = nox.project.load_toml("pyproject.toml")
LOCK: Final = "requirements/lock.txt"
# Test workers share the cores: one thread each, in libraries that read the environment before conftest.py runs.
ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# With more than four workers, importing torch in each of them takes most of the time.
PARALLEL: Final = ("-n", "logical", "--maxprocesses", "4")
# The oldest release that pyproject.toml allows, some in between, and the newest that the tests run on.
COMPAT: Final = ("4.57.6", "5.0.0", "5.5.4", "5.8.1", "5.14.1", "5.20.2", "5.24.0")
NEED_PYTHON_311: Final = [one for one in COMPAT if Version(one) >= Version("5.21")]
OLDEST_PYTHON: Final = PYPROJECT["project"]["requires-python"].removeprefix(">=")
LEAST_CAUGHT: Final = "95"  # [%] of the mutants
VERSIONS: Final = (
    "import platform, torch, transformers;"
    "print('python', platform.python_version(), 'torch', torch.__version__, 'transformers', transformers.__version__)"
)
# The project itself, so that changes need no new installation.
EDITABLE: Final = ("install", "--no-deps", "--no-build-isolation", "--editable", ".")
Run = Callable[..., Any]


def install_group(session: nox.Session, group: str) -> None:
    """Install one dependency group of pyproject.toml as locked."""
    session.run_install("python", "requirements/install.py", group)


def project(session: nox.Session, *groups: str) -> Run:
    """Install the project with its lab, the named groups and the embedded data as locked; return what runs a command.

    All sessions that need torch, which takes 1.4 GB (5 GB with CUDA), share one environment per version of Python.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = Path(session.cache_dir.parent, f"project-{version}").absolute()
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    path = os.pathsep.join((str(programs), os.environ["PATH"]))

    def run(command: str, *arguments: str, env: Mapping[str, str] = MappingProxyType({}), **options: Any) -> Any:
        """Run a command of the shared environment, as `session.run` does one of the session's own."""
        found = shutil.which(command, path=path) or command
        return session.run(found, *arguments, env={**env, "PATH": path}, external=True, **options)

    if not any(programs.glob("pip*")):  # there is none, or making it was interrupted
        session.run_install(sys.executable, "-m", "virtualenv", "--quiet", str(place), external=True)
    python = str(programs / "python")
    session.run_install(python, "requirements/install.py", "--lab", *groups, external=True)
    session.run_install(python, "-m", "pip", "--quiet", *EDITABLE, external=True)
    run("python", "-c", VERSIONS)
    return run


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run all tests, including property tests: `nox -s tests -- tests/test_x.py -k name`."""
    run = project(session, "test")
    run("pytest", *PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and formatting with ruff, workflows with zizmor and actionlint; `-- --fix` applies ruff's fixes."""
    install_group(session, "lint")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("zizmor", "--offline", "--no-progress", ".github")
    if shutil.which("actionlint") is None:  # not on a package index for all machines; the workflow installs it
        session.warn("actionlint is not installed: the workflows were only checked with zizmor")
    else:
        session.run("actionlint", external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check types with mypy, in strict mode."""
    run = project(session, "types")
    run("mypy", *session.posargs)


@nox.session(venv_backend="none", default=False)
def paper_tables(session: nox.Session) -> None:
    """Measure perplexity, speed and memory; write results/paper_tables.md and .json; `-- --quick` measures less."""
    run = project(session)
    run("python", "-m", "sinkwindow_lab", "tables", "--out", "results", *session.posargs)


@nox.session(venv_backend="none", default=False)
def mechanics(session: nox.Session) -> None:
    """Show how the cache changes, step by step, with each eviction."""
    run = project(session)
    run("python", "-m", "sinkwindow_lab", "mechanics", *session.posargs)


@nox.session(venv_backend="none", default=False)
def coverage(session: nox.Session) -> None:
    """Run the tests in one process and report lines and branches that no test reaches."""
    run = project(session, "coverage")
    run("coverage", "run", "-m", "pytest", *session.posargs, env=ONE_THREAD)
    run("coverage", "report")


@nox.session(venv_backend="none", default=False)
def mutation(session: nox.Session) -> None:
    """Change the code in small ways, one at a time, and list changes that no test notices: `-- lanes storage.ring`."""
    run = project(session, "mutation")
    # mutmut takes packages from src/ alone, and copies them, with what it makes of them, and the tests to mutants/.
    place = Path("build", "mutation")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ("src", "tests", "pyproject.toml"):
        (place / name).symlink_to(Path("..", "..", "optimized" if name == "src" else name))
    with session.chdir(place):
        modules = [f"sinkwindow.{module}.*" for module in session.posargs or ["*"]]
        run("mutmut", "run", *modules, env={**ONE_THREAD, "HYPOTHESIS_PROFILE": "mutation", "MYPYPATH": "src"})
        run("mutmut", "results")
        run("python", "tests/mutants.py", "mutants/src/sinkwindow", LEAST_CAUGHT)


@nox.session(venv_backend="none", default=False)
def distributed(session: nox.Session) -> None:
    """Run the tests that start several processes, on a CPU; docs/results/parallel.json keeps what families do."""
    run = project(session, "test")
    report = "build/distributed.xml"
    run("pytest", "-m", "distributed", "--junit-xml", report, *session.posargs, env=ONE_THREAD)
    run("python", "tests/support.py", "--parallel", report)


@nox.session(venv_backend="none", default=False)
@nox.parametrize("transformers", COMPAT)
def compat(session: nox.Session, transformers: str) -> None:
    """Run the cache's tests on the oldest supported transformers, some in between, and the newest.

    A release lies in a folder in front of the locked one. docs/results/releases.json keeps what was found.
    """
    run = project(session, "test")
    if sys.version_info < (3, 11) and transformers in NEED_PYTHON_311:
        session.skip(f"transformers {transformers} needs Python 3.11")
    place = Path(session.cache_dir.parent, f"transformers-{transformers}").absolute()
    report = Path("build", "compat", f"{transformers}.xml")
    hashed = ("--no-deps", "--require-hashes", "--target", str(place))
    if not any(place.glob("transformers-*.dist-info")):
        lock = f"requirements/transformers-{transformers}.txt"
        run("python", "-m", "pip", "--quiet", "install", *hashed, "--requirement", lock)
    env = {**ONE_THREAD, "PYTHONPATH": str(place)}
    run("pytest", *PARALLEL, "@tests/laws.txt", "--junit-xml", str(report), *session.posargs, env=env)
    if not session.posargs:
        run("python", "tests/support.py", str(report), env=env)
        run("python", "tests/support.py", "--page")  # with the locked release


@nox.session(default=False)
def canary(session: nox.Session) -> None:
    """Run the cache's tests on what pip is told to install: `-- --pre torch`, `-- "transformers @ git+ADDRESS"`."""
    session.run_install("python", "requirements/install.py", "--lab", "test")
    session.install(*EDITABLE[1:])
    session.install("--upgrade", *session.posargs)
    session.run("python", "-c", VERSIONS)
    # Left out is what holds for the locked releases alone, and the warning of a transformers that no test has run on.
    session.run("pytest", *PARALLEL, "@tests/laws.txt", "@tests/canary.txt", env=ONE_THREAD)


@nox.session(venv_backend="none", default=False)
def nightly(session: nox.Session) -> None:
    """Run all tests, with many more examples of the properties, which are new in each run."""
    run = project(session, "test")
    run("pytest", *PARALLEL, *session.posargs, env={**ONE_THREAD, "HYPOTHESIS_PROFILE": "nightly"})


def started() -> str:
    """Touch a stamp file and return its path; result files newer than it belong to the run that follows."""
    stamp = Path(".asv", "started")
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()
    return str(stamp)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Run every benchmark once; fail if one fails or none ran. `nox -s bench -- HEAD~5..HEAD` measures a history."""
    run = project(session, "bench")
    run("asv", "machine", "--yes", silent=True)
    run("asv", "check", "--python=same")
    head = str(run("git", "rev-parse", "HEAD", silent=True)).strip()
    history = bool(session.posargs) and not session.posargs[0].startswith("-")
    here = ["--python=same", "--set-commit-hash", head, "--quick", "--show-stderr"]
    stamp = started()
    # asv exits with 2 if a benchmark failed; the gate reports which ones.
    run("asv", "run", *([] if history else here), *session.posargs, env=ONE_THREAD, success_codes=[0, 2])
    selected = session.posargs[1:2] if session.posargs[:1] in (["--bench"], ["-b"]) else []
    only = ("--selected", selected[0]) if selected else ()
    run("python", "asv_benches/gate.py", "--newer-than", stamp, "--complete", head, *only)


@nox.session(venv_backend="none", default=False)
def bench_history(session: nox.Session) -> None:
    """Measure the last commits that can be built and have no numbers, and name the others: `-- 10`, `-- 5 --quick`."""
    run = project(session, "bench")
    run("python", "asv_benches/history.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def bench_html(session: nox.Session) -> None:
    """Write the measured results as pages to .asv/html and open them; `-- --no-preview` only writes them."""
    install_group(session, "bench")
    session.run("asv", "publish", "--no-pull")
    if session.interactive and "--no-preview" not in session.posargs:
        session.run("asv", "preview", "--browser")


@nox.session(venv_backend="none", default=False)
def microbench(session: nox.Session) -> None:
    """Time the parts of a step with pytest-benchmark, save the times and compare them with the previous ones."""
    run = project(session, "microbench")
    compare = ["--benchmark-compare"] if any(Path(".benchmarks").glob("*/*.json")) else []
    save = ["--benchmark-autosave", "--benchmark-storage", "file://.benchmarks"]
    found = ["-o", "python_files=bench_*.py", "benchmarks"]  # a separate name, so that no other session times anything
    run("pytest", *found, *save, *compare, *session.posargs, env=ONE_THREAD)


@nox.session(venv_backend="none", default=False)
def gpu(session: nox.Session) -> None:
    """Compare two commits on a GPU: `nox -s gpu -- origin/main HEAD`; measure a single one: `-- HEAD^!`."""
    run = project(session, "bench")
    run("python", "-c", "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no GPU found')")
    run("asv", "machine", "--yes", silent=True)
    if len(session.posargs) == 1:
        stamp = started()
        run("asv", "run", "--show-stderr", *session.posargs, success_codes=[0, 2])
        run("python", "asv_benches/gate.py", "--newer-than", stamp, "--gpu")
    else:
        run("python", "asv_benches/compare.py", "--gpu", *(session.posargs or ("origin/main", "HEAD")))


@nox.session(venv_backend="none", default=False)
def planted_regressions(session: nox.Session) -> None:
    """Make a scratch clone slower, larger and wrong, and test that the gate reports it; write docs/benchmarks.md."""
    run = project(session, "bench")
    run("asv", "machine", "--yes", silent=True)
    run("python", "asv_benches/planted.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def bench_site(session: nox.Session) -> None:
    """Publish the measured results and look at their pages in a headless Chromium (needs npm and chromium)."""
    install_group(session, "bench_site")
    session.run("pytest", "--noconftest", "benchmarks/check_site.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def peers(session: nox.Session) -> None:
    """Compare the cache with others, each in its own environment; write docs/peers.md, unless `-- --quick`."""
    run = project(session)
    run("python", "-m", "peers", *session.posargs)


@nox.session(venv_backend="none", default=False)
def speed(session: nox.Session) -> None:
    """Compare the cache with lower bounds; fail if a target is missed. `-- --quick` does not write docs/speed.md."""
    run = project(session)
    docs = [] if "--quick" in session.posargs else ["--docs", "docs/speed.md"]
    run("python", "-m", "sinkwindow_lab", "speed-report", "--out", "results", *docs, *session.posargs)


@nox.session(venv_backend="none", default=False)
def soak(session: nox.Session) -> None:
    """Stream a million tokens; fail if memory, time or errors grow. Write docs/soak.md, unless `-- --quick`."""
    run = project(session)
    run("python", "-m", "benchmarks.soak", *session.posargs, env=ONE_THREAD)


@nox.session(venv_backend="none", default=False)
def scale(session: nox.Session) -> None:
    """Measure many streams at once, and predict their steps. Write docs/scale.md, unless `-- --quick`."""
    run = project(session)
    run("python", "-m", "benchmarks.scale", *session.posargs, env=ONE_THREAD)


@nox.session(default=False, reuse_venv=False)
def first_hour(session: nox.Session) -> None:
    """Follow README.md and docs/start.md word for word in an empty environment, without a hub or caches."""
    session.run_install("python", "requirements/install.py", "--torch")  # as the pages advise where there is no GPU
    copy = Path(session.create_tmp(), "copy")
    shutil.rmtree(copy, ignore_errors=True)
    session.run("git", "clone", "--quiet", ".", str(copy), external=True)
    session.run("python", "tests/first_hour.py", str(copy), *(session.posargs or ("README.md", "docs/start.md")))


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build dist/*.tar.gz and dist/*.whl and check how a package index would show them."""
    install_group(session, "build")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))


def compile_lock(session: nox.Session, source: str, *options: str) -> None:
    """Resolve for all supported versions of Python and all platforms, without the address of any index."""
    shown = ("--quiet", "--no-annotate", "--custom-compile-command", "nox -s lock")
    oldest = () if "--python-version" in options else ("--python-version", OLDEST_PYTHON)
    session.run("uv", "pip", "compile", *shown, "--universal", "--generate-hashes", *oldest, *options, source)


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Write requirements/*.txt from pyproject.toml and constraints.txt; `-- --upgrade` takes newer releases."""
    install_group(session, "lock")
    groups = [f"--group={name}" for name in PYPROJECT["dependency-groups"]]
    out = ("--constraint", "constraints.txt", "--output-file", LOCK)
    compile_lock(session, "pyproject.toml", "--extra=lab", *groups, *out, *session.posargs)
    for name, names in {
        "nox": PYPROJECT["dependency-groups"]["ci"],
        **{f"transformers-{one}": [f"transformers=={one}"] for one in COMPAT},
    }.items():
        source = Path(session.create_tmp(), f"{name}.in")
        source.write_text("\n".join(names), encoding="utf-8")
        options = ["--constraint", LOCK] if name == "nox" else ["--no-emit-package", "numpy"]
        if name.removeprefix("transformers-") in NEED_PYTHON_311:
            options += ["--python-version", "3.11"]
        compile_lock(session, str(source), *options, "--output-file", f"requirements/{name}.txt")


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Look the locked releases up among published vulnerabilities."""
    install_group(session, "audit")
    session.run("pip-audit", "--strict", "--disable-pip", "--require-hashes", "--requirement", LOCK, *session.posargs)


@nox.session(default=False)
def sbom(session: nox.Session) -> None:
    """Write build/sinkwindow.cdx.json, the releases that this version was tested with, in CycloneDX."""
    install_group(session, "sbom")
    Path("build").mkdir(exist_ok=True)
    tested = str(Path(session.create_tmp(), "tested.txt"))
    plain = ("--quiet", "--no-annotate", "--no-header", "--generate-hashes")
    session.run("uv", "pip", "compile", *plain, "--extra=lab", "--constraint", LOCK, "-o", tested, "pyproject.toml")
    described = ("--pyproject", "pyproject.toml", "--mc-type", "library", "--output-reproducible")
    session.run("cyclonedx-py", "requirements", *described, "-o", "build/sinkwindow.cdx.json", tested)


def build_pages(run: Run) -> None:
    """Build build/site; the page of the command line is made of the commands, the notebook's of what it has shown."""
    pages = Path("build", "docs")
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree("docs", pages / "docs")
    for page in (*map(str, Path().glob("*.md")), "CITATION.cff", "LICENSE"):
        shutil.copy(page, pages)
    overview = pages / "README.md"
    lines = overview.read_text(encoding="utf-8").splitlines(keepends=True)
    own = "".join(one for one in lines if not one.startswith("[!["))  # the badges are pictures of GitHub
    overview.write_text(own, encoding="utf-8")
    commands = ("sinkwindow_lab.commands", "utils", "docs", "--name", "sinkwindow", "--title", "Command line")
    out = ("--output", str(pages / "docs" / "command-line.md"))
    run("python", "-m", "typer", *commands, *out, env={"PYTHONPATH": os.pathsep.join(("lab", "optimized"))})
    run("jupyter", "nbconvert", "--to", "markdown", str(pages / "docs" / "notebook.ipynb"))
    run("zensical", "build", "--clean", "--strict")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the pages in build/site from README.md, docs/, docstrings and commands; a broken link is an error."""
    install_group(session, "docs")
    build_pages(session.run)


@nox.session(venv_backend="none", default=False)
def docs_site(session: nox.Session) -> None:
    """Build the pages and read them in a headless Chromium, wide and narrow, light and dark (needs chromium)."""
    run = project(session, "docs_site")
    build_pages(run)
    run("pytest", "--noconftest", "tests/site/check_pages.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def notebook(session: nox.Session) -> None:
    """Run docs/notebook.ipynb and save what it shows."""
    run = project(session, "notebook")
    # tqdm's bars would be widgets; threads that spin while they wait take minutes on a machine that is busy.
    quiet = {"PYTHONWARNINGS": "ignore:IProgress", "OMP_WAIT_POLICY": "passive"}
    # Lines of one output are joined before a notebook is run, not after it.
    for how in (("--execute", "--ExecutePreprocessor.record_timing=False"), ("--coalesce-streams",)):
        run("jupyter", "nbconvert", "--to", "notebook", "--inplace", *how, "docs/notebook.ipynb", env=quiet)
