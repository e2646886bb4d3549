"""Pages and pictures are the same bytes every time and self-contained, and their ids are unique."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from lab_tiny import score
from sinkwindow_lab.render import canvas, figures, page, study_tables, tables
from sinkwindow_lab.reports.study_records import (
    AlongStudy,
    Curve,
    DistanceBin,
    RecallPoint,
    RecallStudy,
    ScoreStudy,
    StepsRecord,
    StepsStudy,
    Studies,
    WhereCurve,
    WhereStudy,
)
from sinkwindow_lab.ways.configurations import parse
from test_lab_tables import make_report

VOID = {"meta", "br", "hr", "img", "link", "input"}


def score_study() -> ScoreStudy:
    """Return scores of two rules, an ablation and a dense model on two texts."""
    names = ("baseline", "window_0_8", "streaming_4_12_0", "stale_ranks_2_6")
    return ScoreStudy(
        tokens=101,
        configurations=[parse(name).record() for name in names],
        scores=[score(name, corpus, 10.0 + index) for index, name in enumerate(names) for corpus in ("plays", "docs")],
    )


def step(name: str, kind: str, cache: int | None, seen: int, time: float) -> StepsRecord:
    """Return a record of timed steps at one place."""
    return StepsRecord(
        configuration=name, kind=kind, cache_tokens=cache, tokens_seen=seen, cache_bytes=seen * 1000, step_ms=[time]
    )


def studies() -> Studies:
    """Return one study of each kind."""
    rules = [parse(name).record() for name in ("baseline", "streaming_4_12_0")]
    bins = [
        DistanceBin(nearest=1, farthest=64, targets=9, mean_difference=0.5, standard_error=0.125),
        DistanceBin(nearest=None, farthest=None, targets=3, mean_difference=-0.25, standard_error=0.0625),
    ]
    return Studies(
        mistakes=score_study(),
        sinks=score_study(),
        sizes=score_study(),
        along=AlongStudy(
            corpus="plays",
            tokens=101,
            bin_tokens=40,
            trained_length=64,
            configurations=rules,
            curves=[Curve(configuration=one.name, mean_nll=[2.0, 2.5, 9.0]) for one in rules],
            scores=[score(one.name, "plays", 12.5) for one in rules],
        ),
        steps=StepsStudy(
            configurations=[parse(name).record() for name in ("baseline", "streaming_4_4", "recompute_8")],
            along=[step("baseline", "baseline", None, seen, 2.0) for seen in (10, 100)],
            sizes=[
                step(f"streaming_4_{size - 4}" if kind == "streaming" else f"recompute_{size}", kind, size, 80, time)
                for size, factor in ((8, 1.0), (16, 2.0))
                for kind, time in (("streaming", 4.0), ("recompute", 10.0 * factor))
            ],
        ),
        where=WhereStudy(
            ngram=4,
            tokens=101,
            configurations=rules[1:],
            curves=[WhereCurve(configuration=rules[1].name, corpus="plays", mean_difference=0.3125, bins=bins)],
        ),
        recall=RecallStudy(
            seeds=[0],
            corpus="plays",
            tokens=101,
            example="The number of the <bell> is 123.",
            configurations=rules,
            points=[
                RecallPoint(
                    configuration=one.name, lines_back=back, nearest_tokens=back, farthest_tokens=back, asked=4, found=3
                )
                for one in rules
                for back in (1, 8)
            ],
        ),
    )


def report_html() -> str:
    """Return a whole page."""
    report = make_report().model_copy(update={"studies": studies()})
    return tables.render_html(report)


class Checker(HTMLParser):
    """Collects tags, ids and links, which must match or be unique."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the tag, its id and its links."""
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in {"href", "src", "xlink:href"}]

    def handle_endtag(self, tag: str) -> None:
        """Check that the tag ends the last one that was opened."""
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_self_contained() -> None:
    """Tags match, ids are unique, links point into the page or to a source, and nothing is loaded."""
    text = report_html()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    for link in checker.links:
        assert link.startswith("https://") or link.removeprefix("#") in checker.ids, link
    assert not re.search(r"<script|<link|<img|@import|src=|url\((?!#)", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_pages_and_pictures_are_the_same_every_time() -> None:
    """They have no date, no random id and no path."""
    assert report_html() == report_html()


@pytest.mark.parametrize("name", ["mistakes", "sinks", "sizes", "along", "step-time", "step-memory", "step-sizes"])
def test_pictures_take_the_color_of_the_page(name: str) -> None:
    """A picture has the page's text color and a text alternative, can be parsed, and has nothing random or dated."""
    found = next(
        block
        for block in study_tables.study_blocks(studies(), ["plays", "docs"])
        if isinstance(block, page.Figure) and block.name == name
    )
    svg = found.draw()
    ET.fromstring(svg)  # noqa: S314 - we wrote it
    assert "currentColor" in svg
    assert canvas.INK not in svg
    assert 'role="img"' in svg
    assert 'aria-label="' in svg
    assert "metadata" not in svg
    alone = canvas.standalone(svg)
    ET.fromstring(alone)  # noqa: S314 - we wrote it
    assert "prefers-color-scheme" in alone


def test_every_study_has_a_table_a_picture_and_its_numbers() -> None:
    """All are rendered from the record, with published numbers in a table of their own."""
    text = page.markdown(study_tables.study_blocks(studies(), ["plays", "docs"]))
    for fact in (
        "| stale_ranks_2_6 (ablation) | 13.000 (1.30x) | 2.5000 | 0.1250 |",
        "| streaming_4_12_0 | 7.389 | 12.182 | 12.500 | 3 | 64 |",
        "| 16 | 4.00 | 20.00 | 5.0x |",
        "| streaming_4_12_0, plays | +0.3125 | +0.500 ± 0.125 (9) | -0.250 ± 0.062 (3) |",
        "| 8 | 8-8 | 75% (3/4) | 75% (3/4) |",
        "| MPT-7B | 460.29 | 14.99 | 15.00 | 14.99 | 14.98 |",
        "The number of the <bell> is 123.",
        "![PPL along the text.](figures/along.svg)",
    ):
        assert fact in text, fact
    assert study_tables.study_blocks(Studies(), ["plays"]) == []


def test_words_are_escaped_and_marked() -> None:
    """Text that comes from a file name or a corpus cannot become markup."""
    assert page.inline("a < b & **c** `<d>` [e](https://x.y)") == (
        'a &lt; b &amp; <strong>c</strong> <code>&lt;d&gt;</code> <a href="https://x.y">e</a>'
    )
    assert "<bell>" not in report_html()


def test_facts_in_words_are_left_aligned() -> None:
    """Only numbers are right-aligned."""
    table = page.Table(("", "value"), (("a", "b"),), facts=True)
    assert page.markdown([table]) == "|  | value |\n| --- | --- |\n| a | b |\n"
    assert 'class="facts"' in page.html_page("t", [table])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([7.0, 60.0], [5, 10, 20, 50, 100]), ([3.0, 3.0], [2, 5]), ([0.3], [0.2, 0.5]), ([2.0], [2, 4])],
)
def test_ticks_enclose_all_values(values: list[float], expected: list[float]) -> None:
    """Ticks are 1, 2 and 5 times a power of ten."""
    assert canvas.nice_ticks(values) == pytest.approx(expected)


def test_distances_have_names() -> None:
    """The names are those in the tables."""
    assert [figures.distance_name(*one) for one in ((1, 64), (1025, None), (None, None))] == [
        "1-64",
        "> 1,024",
        "never",
    ]


def test_the_page_says_what_caused_the_published_jump() -> None:
    """With the same tokens kept, the loss from evictions and from stale positions is separate, for each text."""
    names = ("baseline", "streaming_2_6", "stale_ranks_2_6", "streaming_2_12")
    losses = {"baseline": 2.0, "streaming_2_6": 2.25, "stale_ranks_2_6": 4.0, "streaming_2_12": 2.125}
    study = ScoreStudy(
        tokens=101,
        configurations=[parse(name).record() for name in names],
        scores=[score(name, "plays", 8.0).model_copy(update={"mean_nll": losses[name]}) for name in names],
    )
    text = page.markdown(study_tables.mistakes(study, ["plays", "docs"]))
    assert "A jump from 7.97 to 71.67 (9.0x)" in text
    assert "repaired, 1.56x was left" in text
    assert [line for line in text.splitlines() if line.startswith("- **plays**")] == [
        (
            "- **plays**: PPL 8.000 dense, 8.000 with streaming_2_6 (+0.250 nats a token: what was evicted), "
            "8.000 with stale ranks (+1.750 more: their positions)."
        )
    ]
    assert "**docs**" not in text


def test_without_a_stale_row_nothing_is_said_about_its_cause() -> None:
    """Without the numbers there is no explanation."""
    study = score_study()
    kept = [one for one in study.configurations if not one.ablation]
    bare = study.model_copy(update={"configurations": kept, "scores": []})
    text = page.markdown(study_tables.mistakes(bare, ["plays"]))
    assert "What went wrong" not in text
