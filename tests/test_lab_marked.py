"""Marked places of a page: a run rewrites them, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.render import marked

if TYPE_CHECKING:
    from pathlib import Path


def page_with(folder: Path, text: str) -> Path:
    """Write a page with this text; return its path."""
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_words_around_a_place_stay(tmp_path: Path) -> None:
    """Old numbers are replaced, places with other names stay, and a second run changes nothing."""
    (begin, end), (other, last) = marked.marks("one"), marked.marks("two")
    page = page_with(tmp_path, f"before\n{begin}\nold\n{end}\nbetween\n{other}\nkept\n{last}\nafter\n")
    for _ in range(2):
        marked.fill(page, {"one": "new\n", "three": "no place"})
        assert page.read_text(encoding="utf-8") == (
            f"before\n{begin}\n\nnew\n\n{end}\nbetween\n{other}\nkept\n{last}\nafter\n"
        )


@pytest.mark.parametrize("text", ["words", "<!-- one: begin -->", "<!-- one: end -->\n<!-- one: begin -->"])
def test_a_page_without_the_place_is_refused(text: str, tmp_path: Path) -> None:
    """No mark, a beginning without an end, and an end before the beginning are errors."""
    page = page_with(tmp_path, text)
    with pytest.raises(LabError, match="has no <!-- one: begin --> with <!-- one: end --> after it"):
        marked.check(page, "one")


def test_a_place_without_end_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """If the second place cannot be written, the first is not written either."""
    text = "\n".join((*marked.marks("one"), marked.marks("two")[0]))
    page = page_with(tmp_path, text)
    with pytest.raises(LabError, match="two: begin"):
        marked.fill(page, {"one": "new", "two": "new"})
    assert page.read_text(encoding="utf-8") == text


def test_a_missing_page_is_named(tmp_path: Path) -> None:
    """The error says what to give instead."""
    with pytest.raises(LabError, match=r"none\.md cannot be read: give a Markdown file"):
        marked.check(tmp_path / "none.md", "one")
