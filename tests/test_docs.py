"""The pages of docs/: their code runs word for word, and their pictures show what the rule does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree as ET

import pytest

import documents
from releases import UNPAGED, tomllib
from sinkwindow import Retention

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs"
GUIDES: Final = sorted((DOCS / "guides").glob("*.md"))
TO_RUN: Final = [
    ROOT / "README.md",
    *(DOCS / name for name in ("start.md", "migration.md", "lm-eval.md", "sinks.md")),
    *GUIDES,
]
STREAMS: Final = ("README", "batches", "compiled", "start", "transcripts")  # pages whose last cache must have evicted
SVG: Final = "{http://www.w3.org/2000/svg}"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # from torch
@pytest.mark.parametrize("page", TO_RUN, ids=lambda page: page.stem)
def test_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each Python block and each command does, in order, and shows the lines that the page quotes."""
    if page.stem == "compiled" and not which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler, which torch.compile needs")
    if page.stem == "streams" and UNPAGED:  # it imports `sinkwindow.continuous`
        pytest.skip(UNPAGED)
    if page.stem not in {"README", "start"}:  # those pages make the model
        documents.save_stand_in(tmp_path / "smollm2")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "sinkwindow").symlink_to(ROOT)
    names = documents.run(page, tmp_path, monkeypatch)
    if page.stem in STREAMS:
        assert names["cache"].num_evictions > 0
    shown = capsys.readouterr().out
    quoted = [line for block in documents.blocks(page) if block.language == "text" for line in block.text.splitlines()]
    assert [line for line in quoted if line not in shown.splitlines()] == []


@pytest.mark.parametrize("code", ["```python\nraise KeyError\n```\n", "```sh\nsinkwindow nothing\n```\n"])
def test_a_page_that_fails_is_noticed(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the code, or an exit status of a command that is not 0, fails the test above."""
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{code}", encoding="utf-8")
    with pytest.raises((KeyError, AssertionError)):
        documents.run(page, tmp_path, monkeypatch)


def _by_hand() -> Iterator[list[str]]:
    """Yield the commands of all pages that a reader runs around the examples."""
    for page in DOCS.rglob("*.md"):
        for block in documents.blocks(page):
            if block.language == "sh":
                yield from (words for words in documents.commands(block) if words[0] in documents.BY_HAND)


def test_commands_by_hand_are_of_this_project() -> None:
    """The sessions of nox that pages name exist, and so do the extras that they install."""
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text("utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    commands = [" ".join(words) for words in _by_hand()]
    used = {name for one in commands for name in re.findall(r"^nox -s (\w+)", one)}
    extras = {name for one in commands for name in re.findall(r"^pip install \S+\[(\w+)\]", one)}
    assert len(used) > 3
    assert used <= sessions
    assert {"lab"} <= extras <= set(project["optional-dependencies"])


def _groups(name: str, kind: str) -> list[ET.Element]:
    """Return the groups of a picture that have this class."""
    groups = ET.parse(DOCS / "figures" / name).iter(f"{SVG}g")  # noqa: S314 - a file of this repository
    return [one for one in groups if one.get("class") == kind]


def test_the_picture_of_the_rule_is_right() -> None:
    """Each list is the one that the rule retains, and the ranks below it count from 0."""
    rule, lists = Retention(num_sinks=2, window=4, buffer=1), _groups("rule.svg", "list")
    numbers = [(int(one.attrib["data-seen"]), int(one.attrib["data-evicted"])) for one in lists]
    assert numbers == [(7, 0), (8, 0), (8, rule.evicted_after(8, 0)), (9, rule.evicted_before(8))]
    for one in lists:
        texts = [(text.get("class"), text.text) for text in one.iter(f"{SVG}text")]
        tokens = [int(text or "") for kind, text in texts if kind == "cell token"]
        assert tokens == rule.retained(int(one.attrib["data-seen"]), int(one.attrib["data-evicted"]))
        assert [int(text or "") for kind, text in texts if kind == "rank"] == list(range(len(tokens)))


def test_the_picture_of_a_call_is_right() -> None:
    """Each query sees what the rule retains at its time: its own token, and sinks of as many copies as tokens left."""
    rule, queries = Retention(num_sinks=2, window=3, buffer=0), _groups("call.svg", "query")
    assert [int(one.attrib["data-token"]) for one in queries] == [4, 5, 6, 7]
    for one in queries:
        token = int(one.attrib["data-token"])
        evicted = rule.evicted_before(token)
        sees = [cell.attrib["data-sees"] for cell in one.iter(f"{SVG}rect") if "data-sees" in cell.attrib]
        assert sees == [f"{seen}{chr(39) * (evicted if seen < 2 else 0)}" for seen in rule.retained(token + 1, evicted)]


def test_the_notebook_was_run_as_it_is() -> None:
    """Its cells ran once, in order and without an error, and what they printed is what the text says of it."""
    cells: list[dict[str, Any]] = json.loads((DOCS / "notebook.ipynb").read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 2
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    seen, evictions = map(int, re.findall(r"seen (\d+), evictions (\d+)", printed)[0])
    rule = Retention(num_sinks=4, window=60, buffer=16)
    assert json.loads(re.findall(r"retained (.*)", printed)[0]) == rule.retained(seen, rule.evicted_before(seen))
    assert printed.count("Eviction(") == evictions > 1
    dense, window, streaming = (float(one) for one in re.findall(r"PPL +([\d.]+)", printed))
    assert dense < streaming < 1.2 * dense < window
