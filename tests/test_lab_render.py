"""Markdown is the only source of a page: names are text in it, and its HTML is well formed and self-contained."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkwindow_lab.render import chart
from sinkwindow_lab.render.html import html_page
from sinkwindow_lab.render.markdown import Page, bullets, figure, join, name, numbers, quote, table
from sinkwindow_lab.reports.tables.page import page
from test_lab_tables import studies

VOID = {"meta", "br", "hr", "img", "link", "input"}
NAMES = st.text(st.sampled_from("ab1 _*`[]()<>|~&#!$\\-+=.:;\"'\n/é"), min_size=1, max_size=16)


class Checker(HTMLParser):
    """Collects tags, ids, links and text; tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the tag, its id and its links."""
        if tag not in VOID:
            self.open.append(tag)
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.links += [value or "" for key, value in attrs if key in {"href", "src", "xlink:href"}]
        assert not any(key.startswith("on") for key, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        """Check that the tag ends the last one that was opened."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect the words inside each kind of tag."""
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_is_well_formed_and_self_contained() -> None:
    """Tags match, ids are unique, links point into the page or to a source, and nothing is loaded."""
    text = html_page(page(studies()))
    checker = Checker(text)
    assert len(checker.ids) == len(set(checker.ids))
    assert len([link for link in checker.links if link.startswith("data:image/svg+xml;base64,")]) == 9
    for link in checker.links:
        assert link.startswith(("https://", "data:image/svg+xml;base64,")) or link.removeprefix("#") in checker.ids
    assert not re.search(r"<script|<link|@import|url\((?!#)", text)
    assert text.index("<h1") < text.index("<nav") < text.index("<h2")
    for feature in ('name="viewport"', "prefers-color-scheme: dark", "@media print", "<title>Paper tables</title>"):
        assert feature in text
    assert "<bell>" not in text
    assert html_page(page(studies())) == text


@given(NAMES)
def test_a_name_is_shown_as_it_is(word: str) -> None:
    """Nothing in a name is Markdown or HTML, wherever it occurs: in a title, a cell, a list, a caption."""
    safe, shown = name(word), " ".join(word.split())
    if not shown:
        return
    blocks = [f"# Title {safe}", bullets([safe]), table(("a", "b"), [("x", safe)]), figure("f", f"of {safe}")]
    checker = Checker(html_page(Page(join(blocks), {"f": "<svg/>"})))
    assert set(checker.tags) <= {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "nav", "ul", "li", "p", "img", "span"),
        *("div", "table", "thead", "tbody", "tr", "th", "td"),
    }
    assert "".join(checker.words["h1"]) == f"Title {shown}"
    assert "".join(checker.words["li"]).strip() == shown
    assert checker.words["td"][-1] == shown
    assert "".join(checker.words["span"]) == f"of {shown}"


@pytest.mark.parametrize("address", ["javascript:document.title=1", 'x"onmouseover="location=1', "data:text/html,x"])
def test_no_link_runs_anything(address: str) -> None:
    """Even Markdown that is not escaped has no link that runs something."""
    checker = Checker(html_page(Page(f"# a\n\n[a]({address})\n")))
    assert [link for link in checker.links if not re.fullmatch(r"x%22onmouseover=%22location=1|https?:.*", link)] == []


def test_html_in_markdown_is_text() -> None:
    """Markup that reaches a page without `name` is shown, not run."""
    checker = Checker(html_page(Page("# a\n\n<script>x()</script>\n\nb <i onclick=x()>c</i>\n")))
    assert not {"script", "i"} & set(checker.tags)
    assert "<script>x()</script>" in "".join(checker.words["p"])


def test_a_quote_is_verbatim() -> None:
    """Fences inside a sample of text do not end it."""
    text = "```\n# no title\n````"
    assert "".join(Checker(html_page(Page(f"# a\n\n{quote(text)}\n"))).words["code"]) == f"{text}\n"


def test_tables_refuse_ragged_rows() -> None:
    """A missing cell would move a number under another title."""
    with pytest.raises(ValueError, match="2 cells"):
        table(("a", "b"), [("1",)])
    assert table(("", "b"), [("a", "1")]) == "|  | b |\n| --- | ---: |\n| a | 1 |"
    assert table(("", "b"), [("a", "c")], words=True).splitlines()[1] == "| --- | --- |"


def test_numbers_have_their_spread() -> None:
    """Median and quartiles, or one number alone."""
    assert numbers([1.0, 2.0, 3.0], 1, "ms").replace("\N{NO-BREAK SPACE}", " ") == "2.0 [1.5, 2.5] ms"
    assert numbers([1.25], 2) == "1.25"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([7.0, 60.0], (5, 100)), ([3.0, 3.0], (2, 5)), ([0.3], (0.2, 0.5)), ([2.0], (2, 4))],
)
def test_logarithmic_axes_enclose_all_values(values: list[float], expected: tuple[float, float]) -> None:
    """They end at 1, 2 and 5 times a power of ten."""
    with chart.picture(("x", "y")) as one:
        one.axes.plot(range(len(values)), values)
        one.logarithmic("y")
    assert one.axes.get_ylim() == pytest.approx(expected)


def test_dollars_in_names_are_no_formulas() -> None:
    """A name in a legend is drawn letter by letter."""
    frame = pd.DataFrame({"x": [1.0], "y": [1.0], "hue": ["a$\\frac$b"]})
    assert "<svg" in chart.lines(frame, "x", "y", "hue", labels=("x", "y"))
