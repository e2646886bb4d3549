"""What an index gets: a source archive from which the tests run, and a page whose links lead somewhere."""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest
import yaml
from hatch_build import absolute

from test_project import PYPROJECT, ROOT, _build, _tracked

if TYPE_CHECKING:
    from email.message import Message
    from pathlib import Path

PLACE = "https://example.org/owner/name"
VERSION = PYPROJECT["project"]["version"]


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_string(archive.read(f"sinkwindow-{VERSION}.dist-info/METADATA").decode())


def test_source_archive_is_complete(tmp_path: Path) -> None:
    """It holds every file that git tracks, so that sessions and tests run from it, and nothing of one desk."""
    tracked = _tracked()
    with tarfile.open(_build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"noxfile.py", "tests/conftest.py", "docs/speed.md", "requirements/lock.txt", ".ci/run"} <= names
    assert not [name for name in names if re.search(r"__pycache__|^(\.nox|\.asv|\.cache|build|results/p)", name)]
    if tracked is None:
        pytest.skip("not a git clone, or no git: nobody can say which files it should hold")
    there = {path.relative_to(ROOT).as_posix() for path in tracked if path.exists()}
    assert there - names == set()


from_checkout = pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="an unpacked source archive keeps the metadata that it was built with"
)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](docs/speed.md)", f"[a]({PLACE}/blob/v1/docs/speed.md)"),
        ("![a](docs/a.svg)", f"![a]({PLACE}/raw/v1/docs/a.svg)"),
        ("[a](docs/a.md#part) [b](LICENSE)", f"[a]({PLACE}/blob/v1/docs/a.md#part) [b]({PLACE}/blob/v1/LICENSE)"),
        ("[![a](../../actions/b.svg)](../../actions)", f"[![a]({PLACE}/actions/b.svg)]({PLACE}/actions)"),
        ("[![a](docs/a.svg)](docs/a.md)", f"[![a]({PLACE}/raw/v1/docs/a.svg)]({PLACE}/blob/v1/docs/a.md)"),
        ('<img src="docs/a.svg" alt="b">', f'<img src="{PLACE}/raw/v1/docs/a.svg" alt="b">'),
        ("[a](https://arxiv.org/abs/2309.17453)", "[a](https://arxiv.org/abs/2309.17453)"),
        ("[a](#results)", "[a](#results)"),
        ("cache[0](docs)", f"cache[0]({PLACE}/blob/v1/docs)"),
    ],
)
def test_links_of_the_page_are_absolute(link: str, expected: str) -> None:
    """Files, pictures and badges lead to the release's files; others stay as they are."""
    assert absolute(link, PLACE, "v1") == expected


@from_checkout
def test_a_release_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CI names the repository, the package lists its addresses, and no link of its page is relative."""
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.org")
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    found = _metadata(_build("wheel", tmp_path))
    page = found.get_payload()
    assert isinstance(page, str)
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)|src=\"(?!https?:)", page) == []
    assert f"{PLACE}/raw/v{VERSION}/docs/" in page
    urls = dict(url.split(", ") for url in found.get_all("Project-URL", []))
    assert urls["Source"] == PLACE
    assert urls["Changelog"] == f"{PLACE}/blob/v{VERSION}/CHANGELOG.md"


@from_checkout
def test_a_build_at_a_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a repository the page is README.md, and no address is made up."""
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    found = _metadata(_build("wheel", tmp_path))
    assert str(found.get_payload()).strip() == (ROOT / "README.md").read_text("utf-8").strip()
    assert [url.split(", ")[0] for url in found.get_all("Project-URL", [])] == ["Paper"]


def test_citation_is_of_this_version() -> None:
    """It is valid YAML with the version of pyproject.toml, and names the paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (VERSION, PYPROJECT["project"]["license"])
    (paper,) = citation["references"]
    assert [one["family-names"] for one in paper["authors"]] == ["Xiao", "Tian", "Chen", "Han", "Lewis"]
    assert citation["authors"][0]["name"] == PYPROJECT["project"]["authors"][0]["name"]


@pytest.mark.parametrize("name", ["wrong_result", "model_family", "config"])
def test_issue_forms_are_complete(name: str) -> None:
    """Every form has what GitHub requires of it, and asks for things by unique names."""
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text("utf-8"))
    if name == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) > 0
    assert all(part["attributes"]["label"] for part in asked)
