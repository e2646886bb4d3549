"""What the project says about itself is true: commands, versions, pins, packages, and the checks of the checks."""

from __future__ import annotations

import graphlib
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from packaging.requirements import Requirement

from releases import tomllib
from sinkwindow import StreamingCache
from strategies import ModelSpec, call, tokens

if TYPE_CHECKING:
    from types import CodeType, FrameType

ROOT: Final = Path(__file__).resolve().parent.parent
OURS: Final = ("sinkwindow", "sinkwindow_reference", "sinkwindow_lab")
PYPROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: Final = (
    "optimized",
    "reference",
    "lab",
    "tests",
    "docs",
    "asv_benches",
    "benchmarks",
    "examples",
    "peers",
    "requirements",
    ".ci",
    ".github",
)
SUFFIXES: Final = {"", ".cfg", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
CACHES: Final = re.compile(r"(^|/)(\.\w+_cache|\.coverage|__pycache__|node_modules)")


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _section(name: str, title: str) -> str:
    """Give what stands below a page's second-level heading that begins like this."""
    return _read(name).partition(f"\n## {title}")[2].partition("\n## ")[0]


def _tracked() -> list[Path] | None:
    """Return the files that git tracks; None where there is no clone or no git, as in a source distribution."""
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [ROOT / name for name in run.stdout.split("\0") if name]


def _text_files() -> list[Path]:
    """Return the project's own text files: what git tracks, or what is there, caches of tools left out."""
    there = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    tracked = _tracked()
    candidates = [*ROOT.iterdir(), *there] if tracked is None else tracked
    ours = [path for path in candidates if not CACHES.search(path.relative_to(ROOT).as_posix())]
    return [path for path in ours if path.is_file() and path.suffix in SUFFIXES]


def _build(target: str, folder: Path) -> Path:
    """Build an archive of this checkout; return its path."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


def _probe(module: str, call: str) -> torch.Tensor:
    """Evaluates a call as if it stood in the named module."""
    result = eval(call, {"__name__": module, "torch": torch})  # noqa: S307 - a literal of this file
    assert isinstance(result, torch.Tensor)
    return result


def test_ci_runs_the_words_of_the_readme() -> None:
    """Each command that the README marks for CI stands in .ci/run, and .ci/run invokes no other tool of ours."""
    block = re.search(r"^```sh ci\n(.*?)^```", _read("README.md"), re.MULTILINE | re.DOTALL)
    assert block is not None
    commands = block[1].strip().splitlines()
    script = [line for line in _read(".ci/run").splitlines() if line.startswith(("pip ", "nox "))]
    assert commands == script


def test_ci_is_executable() -> None:
    """A fresh clone can start .ci/run as it is."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_versions_agree() -> None:
    """The installed distribution and the changelog speak of the version in pyproject.toml."""
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("sinkwindow") == version
    assert re.search(rf"^## \[.*\b{re.escape(version)}\b", _read("CHANGELOG.md"), re.MULTILINE)


def test_pages_name_the_same_versions_of_python() -> None:
    """Those of pyproject.toml, from the oldest to the newest."""
    classifiers = [line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if "Python :: 3." in line]
    named = {page: re.findall(r"Python (3\.\d+ to 3\.\d+)", _read(page)) for page in ("README.md", "SECURITY.md")}
    assert PYPROJECT["project"]["requires-python"] == f">={classifiers[0]}"
    assert all(found == [f"{classifiers[0]} to {classifiers[-1]}"] for found in named.values()), named


def test_pins_lie_within_the_ranges() -> None:
    """What the sessions install is something that the library's own ranges allow."""
    project = PYPROJECT["project"]
    ranges = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["lab"])]
    pins = [Requirement(line) for line in _read("constraints.txt").splitlines() if line and not line.startswith("#")]
    allowed = {requirement.name: requirement.specifier for requirement in ranges}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert pin.name not in allowed or exact.version in allowed[pin.name], pin.name


def test_session_runs_the_pinned_torch() -> None:
    """The pin reached this environment: nothing replaced the torch that was installed first."""
    pinned = re.search(r"^torch==(\S+)", _read("constraints.txt"), re.MULTILINE)
    assert pinned is not None
    assert torch.__version__.partition("+")[0] == pinned[1]


@pytest.mark.parametrize("git", [True, False])
def test_our_files_are_those_that_git_tracks(git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """A file that is there on one desk only is not read; without git all files are."""
    (tmp_path / "lab" / "__pycache__").mkdir(parents=True)
    for name in ("README.md", "a.log.txt", "lab/kept.py", "lab/lost.py", "lab/__pycache__/x.py"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    if git:
        if _tracked() is None:
            pytest.skip("not a git clone, or no git")
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run(["git", "add", "README.md", "lab/kept.py"], cwd=tmp_path, check=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in _text_files()}
    assert names == {"README.md", "lab/kept.py"} | (set() if git else {"a.log.txt", "lab/lost.py"})


def test_no_file_names_a_path_of_one_machine() -> None:
    """A clone works anywhere: no absolute path of a home, a workplace or a private mirror."""
    pattern = re.compile(r"(?<![\w.~$}])/(?:home|root|work|Users|opt|mnt|tmp)/\w|\b[A-Z]:\\\\?\w")
    found = [f"{path.name}: {hit[0]}" for path in _text_files() for hit in pattern.finditer(path.read_text("utf-8"))]
    assert found == []


def test_links_lead_to_files_that_git_keeps() -> None:
    """A page that is there on one desk only, being ignored, is a dead link in every clone."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(listed, cwd=ROOT, check=False, capture_output=True, text=True)
    if run.returncode:  # an unpacked source distribution: what is there is all there is
        pytest.skip("not a git clone: nobody can say which files are kept")
    kept = set(run.stdout.splitlines())
    pages = sorted(name for name in kept if name.endswith(".md"))
    found = ((page, link) for page in pages for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", _read(page)))
    links = [(page, link) for page, link in found if not link.startswith("../../actions/")]  # of the repository's page
    assert len(links) > 10
    targets = {(page, link): os.path.normpath(Path(page).parent / link) for page, link in links}
    folders = {str(parent) for name in kept for parent in Path(name).parents}
    assert not [pair for pair, target in targets.items() if target not in kept | folders]


def test_numbers_in_the_readme_are_those_of_a_run() -> None:
    """Its rows and bullets stand, word for word, where runs have written them; the next run's are copied again."""
    results = _section("README.md", "Results").splitlines()
    table, findings = (_section("docs/results/paper_tables.md", title) for title in ("Experiment 2", "Findings"))
    for mark, page in (("|", table), ("- ", f"{findings}\n{_read('docs/peers.md')}")):
        lines = [line for line in results if line.startswith(mark)]
        assert len(lines) > 1
        assert [line for line in lines if line not in page.splitlines()] == []


def test_files_stay_short() -> None:
    """A Python file can be read in one sitting: under 400 lines."""
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in _text_files() if path.suffix == ".py"}
    assert {name: lines for name, lines in lengths.items() if lines >= 400} == {}


def test_wheel_holds_all_packages(tmp_path: Path) -> None:
    """One wheel installs three import packages at its top, typed, with the licence and the command."""
    names = set(zipfile.ZipFile(_build("wheel", tmp_path)).namelist())
    assert {f"{package}/py.typed" for package in OURS} <= names
    assert {f"{package}/__init__.py" for package in OURS} <= names
    assert {name.partition("/")[0] for name in names} == {
        *OURS,
        f"sinkwindow-{PYPROJECT['project']['version']}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("package", OURS[:2])
def test_importing_a_package_needs_no_lab(package: str) -> None:
    """The core imports without the lab and without what only the lab asks for."""
    lab = ("sinkwindow_lab", "typer", "datasets", "pydantic")
    code = f"import sys, {package}; print([name for name in {lab} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [*OURS, "sinkwindow.storage"])
@pytest.mark.parametrize("call", ["torch.empty(3)", "torch.empty_like(torch.ones(3))", "torch.ones(1).new_empty(3)"])
def test_our_fresh_memory_is_poisoned(module: str, call: str) -> None:
    """Memory that our packages ask for uninitialised is NaN until it is written."""
    assert _probe(module, call).isnan().all()


def test_fresh_indices_are_poisoned() -> None:
    """An index that nobody wrote points outside of every tensor."""
    assert (_probe("sinkwindow", "torch.empty(3, dtype=torch.long)") == torch.iinfo(torch.long).max).all()


def test_memory_of_others_is_left_alone() -> None:
    """Only our own calls are poisoned: a module of torch or transformers allocates as ever."""
    before = _probe("sinkwindow", "torch.empty(3)").clone()
    other = _probe("sinkwindow_elsewhere", "torch.empty(3).zero_()")
    assert before.isnan().all()
    assert not other.isnan().any()


def test_readme_warns_before_it_shows() -> None:
    """A reader learns that evicted text is gone before the first line of code."""
    readme = _read("README.md")
    assert 0 < readme.index("Evicted text is gone") < readme.index("```")


# The floors of the core and of the lab, from the ground up; a module imports from its own floor and those below it.
FLOORS: Final = {
    "optimized/sinkwindow": (
        ("arguments", "retention", "lanes"),
        ("attention",),
        ("storage",),
        ("stream",),
        ("model", "saving"),
        ("fit", "copies"),
        ("cache", "chat_template"),
        ("chat", "continuous"),
        ("__init__", "__main__"),
    ),
    "lab/sinkwindow_lab": (
        ("records", "errors", "files", "progress", "store", "pulse", "ranks", "__init__"),
        ("inputs",),
        ("ways",),
        ("measure",),
        ("render",),
        ("reports",),
        ("chatting", "evaluation"),
        ("commands",),
        ("cli",),
        ("__main__",),
    ),
}


def _imports(folder: str) -> dict[str, set[str]]:
    """Return for every module of a package those of it that it imports, for types alone too."""
    root = ROOT / folder
    paths = {".".join((root.name, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    pattern = re.compile(rf"^\s*from ({root.name}[\w.]*) import (\(.*?\)|[^\n]*)", re.MULTILINE | re.DOTALL)
    found: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        for source, names in pattern.findall(path.read_text("utf-8")):
            wanted = {f"{source}.{name}" for name in re.findall(r"\w+", names)}
            found[module] |= (wanted & paths.keys()) or {source}
    return found


@pytest.mark.parametrize("folder", FLOORS)
def test_packages_have_floors_and_no_circles(folder: str) -> None:
    """No module imports one of a floor above it, and none imports itself by a detour."""
    imports = _imports(folder)
    floor = {room: number for number, rooms in enumerate(FLOORS[folder]) for room in rooms}
    upwards = [
        (module, other)
        for module, others in imports.items()
        for other in others
        if "." in other and floor[module.split(".")[1]] < floor[other.split(".")[1]]
    ]
    assert upwards == []
    assert len(list(graphlib.TopologicalSorter(imports).static_order())) >= len(imports) > 20


@pytest.mark.parametrize(
    ("folder", "banned"),
    [("reference", "sinkwindow(?:_lab)?"), ("optimized", "sinkwindow_(?:reference|lab)")],
    ids=["reference", "optimized"],
)
def test_packages_may_not_import_each_other(folder: str, banned: str) -> None:
    """The judge does not know the judged nor the other way round, and neither knows the lab."""
    pattern = re.compile(rf"^\s*(?:from|import)\s+{banned}(?:\.|\s|$)", re.MULTILINE)
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    assert [path.name for path in files if pattern.search(path.read_text("utf-8"))] == []


MOST_CALLS, MOST_FUNCTIONS = 97, 60  # Python calls of the package in a decode step, and the functions that they are of


def test_a_decode_step_is_short_to_read() -> None:
    """A newcomer can follow one token: it passes through few functions, few times.

    Four layers, a full list, angles in float64, no eviction. Comprehensions are no functions to look up.
    """
    package, steps = str(Path(sys.modules["sinkwindow"].__file__ or "").parent), []
    model = ModelSpec(layers=4).model(torch.float64)
    cache = StreamingCache(model, num_sinks=2, window=8, buffer=3)
    ids = tokens(0, 1, 30)
    call(model, cache, ids[:, :20])
    for column in range(20, 30):
        made: list[CodeType] = []

        def count(frame: FrameType, event: str, _: object, made: list[CodeType] = made) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(package):
                made.append(frame.f_code)

        before = cache.num_evictions
        sys.setprofile(count)
        try:
            call(model, cache, ids[:, column : column + 1])
        finally:
            sys.setprofile(None)
        if cache.num_evictions == before:
            steps.append((len(made), len({code for code in made if "comp>" not in code.co_name})))
    assert len(steps) >= 5
    # Most steps; one of them also moves the window to the front, and one places sinks after an eviction.
    calls, functions = sorted(steps)[len(steps) // 4]
    assert MOST_CALLS // 2 < calls <= MOST_CALLS
    assert MOST_FUNCTIONS // 2 < functions <= MOST_FUNCTIONS
