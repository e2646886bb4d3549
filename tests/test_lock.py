"""Everything that a session installs is pinned to a release and to the hashes of its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from releases import tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
FILES: Final = sorted((ROOT / "requirements").glob("*.txt"))
PYPROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NOXFILE: Final = (ROOT / "noxfile.py").read_text("utf-8")
STALE: Final = "run nox -s lock"
SUPPORTED: Final = ("3.10", "3.11", "3.12", "3.13", "3.14")


def _entries(path: Path) -> list[str]:
    """Return the entries of a requirements file, each with its hashes on one line."""
    lines = path.read_text("utf-8").replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _pins(path: Path) -> list[Requirement]:
    return [Requirement(entry.partition(" --hash")[0]) for entry in _entries(path)]


def _version(name: str, python: str) -> str | None:
    """Return the locked release of a package for a version of Python on Linux."""
    linux = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment = {**linux, "platform_system": "Linux", "platform_machine": "x86_64"}
    found = [
        one.specifier
        for one in _pins(ROOT / "requirements" / "lock.txt")
        if one.name == canonicalize_name(name) and (one.marker is None or one.marker.evaluate(environment))
    ]
    return str(found[0]).removeprefix("==") if len(found) == 1 else None


def _asked() -> Iterator[str]:
    """Yield everything that pyproject.toml asks for."""
    yield from PYPROJECT["project"]["dependencies"]
    yield from PYPROJECT["project"]["optional-dependencies"]["lab"]
    yield from PYPROJECT["build-system"]["requires"]
    for group in PYPROJECT["dependency-groups"].values():
        yield from (one for one in group if isinstance(one, str))


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_every_entry_has_one_release_and_hashes(path: Path) -> None:
    """No range, no address of an index or a file, and at least one hash of an archive."""
    assert "://" not in path.read_text("utf-8")
    for entry in _entries(path):
        assert re.fullmatch(r"[\w.-]+==[^\s;@]+( ; [^@]+?)?( +--hash=sha256:[0-9a-f]{64})+", entry), entry


@pytest.mark.parametrize("asked", sorted(set(_asked())))
def test_what_is_asked_for_is_locked(asked: str) -> None:
    """Each requirement of pyproject.toml is met by one release of the lock on each supported Python."""
    requirement = Requirement(asked)
    for python in SUPPORTED:
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        version = _version(requirement.name, python)
        assert version is not None, STALE
        assert version in requirement.specifier, STALE


def test_locked_versions_are_those_chosen_by_hand() -> None:
    """The lock follows constraints.txt, and so do the files beside it."""
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            chosen = Requirement(line)
            for python in SUPPORTED:
                if chosen.marker is None or chosen.marker.evaluate({"python_version": python}):
                    assert _version(chosen.name, python) == str(chosen.specifier).removeprefix("=="), STALE
    (torch,) = _pins(ROOT / "requirements" / "torch-cpu.txt")
    assert str(torch.specifier) == f"=={_version('torch', '3.11')}+cpu"
    for pin in _pins(ROOT / "requirements" / "nox.txt"):
        assert pin.marker is not None or str(pin.specifier) == f"=={_version(pin.name, '3.12')}", STALE


def test_supported_versions_are_those_of_the_project() -> None:
    """The classifiers name the versions of Python that the lock is checked for; CI runs the tests on all of them."""
    python = "Programming Language :: Python :: 3."
    named = [one.rpartition(" ")[2] for one in PYPROJECT["project"]["classifiers"] if one.startswith(python)]
    assert tuple(named) == SUPPORTED
    assert PYPROJECT["project"]["requires-python"] == f">={SUPPORTED[0]}"
    assert f"python: {json.dumps(SUPPORTED)}" in (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8")


def test_every_release_of_transformers_is_locked() -> None:
    """The session `compat` installs each of its releases by hashes."""
    tested = re.search(r"^COMPAT: Final = \((.*)\)", NOXFILE, re.MULTILINE)
    assert tested is not None
    releases = sorted(re.findall(r'"([\d.]+)"', tested[1]))
    assert [f"transformers-{one}.txt" for one in releases] == [
        path.name for path in FILES if "transformers" in path.name
    ]


def test_sessions_install_nothing_else() -> None:
    """A session installs with hashes, or the project itself; asv uses the same script, or a wheel that it built."""
    installs = re.findall(r"session\.install\((.*)\)", NOXFILE)
    assert installs
    assert [one for one in installs if '"--require-hashes"' not in one] == [
        "*EDITABLE[1:]",
        '"--upgrade", *session.posargs',  # what a user of `nox -s canary` names
    ]
    assert 'EDITABLE: Final = ("install", "--no-deps", "--no-build-isolation", "--editable", ".")' in NOXFILE
    assert [one for one in re.findall(r'"pip", ([^)]*)', NOXFILE) if "compile" not in one] == [
        '"--quiet", *EDITABLE, external=True',
        '"--quiet", "install", *hashed, "--requirement", lock',
    ]
    assert 'hashed = ("--no-deps", "--require-hashes", ' in NOXFILE
    asv = (ROOT / "asv.conf.json").read_text("utf-8")
    commands = re.findall(r"(?:pip|install\.py)[^\"]*", asv.partition('"build_command"')[2].partition('"uninstall_')[0])
    assert commands == [
        "install.py backend",
        "pip wheel --no-deps --no-build-isolation --wheel-dir {build_cache_dir} {build_dir}",
        "install.py --lab",
        "pip install --no-deps {wheel_file}",
    ]
