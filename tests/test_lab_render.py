"""Markdown is the only source of a page: names are text in it, and its HTML is well formed and self-contained."""

from __future__ import annotations

import itertools
import math
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
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "h1",
            "nav",
            "details",
            "summary",
            "ul",
            "li",
            "p",
            "img",
            "span",
        ),
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


@pytest.mark.parametrize("high", [1e8, 1e10, 1e40, 1e200, float("inf")])
def test_values_that_are_far_apart_have_a_picture(high: float) -> None:
    """However many powers of ten an axis has, it encloses them; what is infinite is left out."""
    frame = drawn(x=[12.1, high], y=[12.1, high])
    assert "<svg" in chart.points(frame, "x", "series", label="PPL")
    assert "<svg" in chart.lines(frame, "x", "y", labels=("x", "PPL"), logarithmic="y")


def test_dollars_in_names_are_no_formulas() -> None:
    """A name in a legend is drawn letter by letter."""
    assert "<svg" in chart.lines(drawn(series="a$\\frac$b"), "x", "y", labels=("x", "y"))


def drawn(**columns: object) -> pd.DataFrame:
    """Return two points of a streaming way."""
    return pd.DataFrame({"x": [1.0, 4.0], "y": [1.0, 2.0], "kind": "streaming", "series": "ours", **columns})


def luminance(color: str) -> float:
    """Return the relative luminance of a color, after WCAG 2."""
    return 0.2126 * linear(color)[0] + 0.7152 * linear(color)[1] + 0.0722 * linear(color)[2]


def linear(color: str) -> list[float]:
    """Return the linear parts of a color from #000000 to #ffffff."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colors, after WCAG 2: 1 to 21."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_pictures_are_readable_on_every_page() -> None:
    """Letters have a contrast of 4.5 with the page, or with their edge on a page that the setting does not fit.

    Lines and marks, which are the same on all pages, have 3.
    """
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    pages = {chart.LIGHT: ["#ffffff"], chart.DARK: ["#0d1117", "#000000", "#17181a"]}
    for (ink, edge), backgrounds in pages.items():
        assert all(contrast(ink, page) >= 4.5 for page in (edge, *backgrounds))
    for color in {chart.GREY, chart.OTHER[0], *(color for color, _, _ in chart.LOOKS.values())}:
        assert all(contrast(color, page) >= 3 for pages_of in pages.values() for page in pages_of), color
    svg = chart.lines(drawn(), "x", "y", labels=("x", "y"))
    assert all(word in svg for word in (*chart.LIGHT, *chart.DARK, "stroke: var(--edge)"))


# What people without one kind of cone see, from and to linear red, green and blue: Vienot, Brettel and Mollon, 1999.
NO_RED = ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1))
NO_GREEN = ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1))


def lab(color: str, sight: tuple[tuple[float, ...], ...]) -> list[float]:
    """Return a color in CIE L*a*b*, seen in one way."""
    seen = [sum(weight * part for weight, part in zip(row, linear(color), strict=True)) for row in sight]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(weight * max(part, 0) for weight, part in zip(row, seen, strict=True)) for row in to_xyz]
    x, y, z = (
        part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116
        for part in (one / white for one, white in zip(xyz, (0.95047, 1, 1.08883), strict=True))
    )
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


@pytest.mark.parametrize("sight", [NO_RED, NO_GREEN, ((1, 0, 0), (0, 1, 0), (0, 0, 1))], ids=["red", "green", "all"])
def test_kinds_differ_for_everybody(sight: tuple[tuple[float, ...], ...]) -> None:
    """Two kinds differ by 30 in CIE L*a*b*, where 2 can just be seen, in their line, and in all their marks."""
    looks = [chart.LOOKS[kind] for kind in ("baseline", "streaming", "window", "recompute")]
    for (one, line, marks), (other, dashes, shapes) in itertools.combinations(looks, 2):
        assert math.dist(lab(one, sight), lab(other, sight)) >= 30
        assert line != dashes
        assert marks[0] != shapes[0]


KINDS = {
    "along": {"baseline", "streaming"},
    "mistakes": {"baseline", "streaming", "window", "another"},
    "sizes": {"baseline", "streaming", "window", "another"},
    "step-sizes": {"streaming", "recompute"},
    "where": {"streaming"},
    "recall": {"baseline", "streaming"},
}


@pytest.mark.parametrize(("name_of", "kinds"), KINDS.items())
def test_a_kind_has_one_color_everywhere(name_of: str, kinds: set[str]) -> None:
    """A picture has the colors of its kinds, grey, and those of its letters; and no other."""
    expected = {chart.LOOKS.get(kind, chart.OTHER)[0] for kind in kinds}
    found = set(re.findall("#[0-9a-f]{6}(?![0-9a-f])", page(studies()).figures[name_of]))
    assert found - {*chart.LIGHT, *chart.DARK, chart.GREY} == expected


LINE = f'style="fill: none; stroke: {chart.LOOKS["streaming"][0]}; stroke-width: 1.6'


def test_few_samples_are_counted_and_not_joined() -> None:
    """Below five samples at one of its points, a series has no line, and its name in the legend says how many."""
    for counts, joined in (([5, 5], True), ([9, 3], False)):
        svg = chart.lines(drawn(n=counts), "x", "y", labels=("x", "y"))
        assert (LINE in svg) is joined
        assert ("<!-- ours (n = 3) -->" in svg) is not joined
    assert LINE in chart.lines(drawn(), "x", "y", labels=("x", "y"))


def test_a_long_legend_makes_a_picture_taller() -> None:
    """A picture of twenty series keeps the place for its lines, which a warning would call too small."""
    many = pd.concat([drawn(series=f"series {number}") for number in range(20)])
    one, other = (
        re.search(r'height="([\d.]+)pt"', chart.lines(of, "x", "y", labels=("x", "y"))) for of in (drawn(), many)
    )
    assert one is not None
    assert other is not None
    assert float(other[1]) > float(one[1]) + 72


def test_an_axis_says_that_it_is_logarithmic() -> None:
    """The label of a logarithmic axis says so, of one that is not does not; numbers too near are left out."""
    svg = chart.lines(drawn(), "x", "y", labels=("a (s)", "b (s)"), logarithmic="x")
    assert all(f"<!-- {words} -->" in svg for words in ("a (s), logarithmic", "b (s)", "1", "4"))
    svg = chart.lines(drawn(x=[10.0, 11.0]), "x", "y", labels=("a", "b"), logarithmic="xy")
    assert all(f"<!-- {words} -->" in svg for words in ("a, logarithmic", "b, logarithmic", "10", "20"))
    assert "<!-- 11 -->" not in svg
