"""The findings of a report: sentences with numbers that are computed by hand here, or left out."""

from __future__ import annotations

import math

import pytest

from sinkwindow_lab.records import Measurement, measured
from sinkwindow_lab.reports.tables.page import page
from test_lab_tables import STUDIES, report, score, studies


def findings(measurements: list[Measurement]) -> list[str]:
    """Return the findings of these measurements; text and model are called plays and a-model."""
    text = page(report(measurements, ())).markdown.replace("\N{NO-BREAK SPACE}", " ")
    return [line for line in text.partition("## What ran")[0].splitlines() if line.startswith("- ")]


def test_a_report_opens_with_its_findings() -> None:
    """Machine and date, five sentences and the one picture are before what ran and the tables."""
    found = [*studies().measurements, *step("streaming_4_12_0", 100, 1.0, 1.0)]
    found += [one for way in ("baseline", "streaming_4_12_0") for one in answers(way, 9, [0], [99])]
    text = page(report(found, STUDIES)).markdown
    head = text.partition("## What ran")[0]
    assert "\nMeasured on a CPU, 2 core(s)," in head.partition("## Findings")[0]
    starts = [line.partition("**:")[0] for line in head.splitlines() if line.startswith("- ")]
    assert starts == ["- **Perplexity", "- **A long text", "- **Time and memory", "- **Recall", "- **Cost"]
    assert text.count("](figures/along.svg)") == head.count("](figures/along.svg)") == 1
    assert "| --- |" not in head


def test_nothing_measured_is_nothing_found() -> None:
    """Without measurements there is no such section, and no sentence for half of a comparison."""
    assert "Findings" not in page(report([], ())).markdown
    assert findings(score("mistakes", "streaming_2_6", "plays", 8.0)) == []
    assert findings(step("streaming_4_12", 100, 1.0, 1.0)) == []


def test_perplexity_by_hand() -> None:
    """15 is 1.5 x 10; what was not read on all texts is no comparison; without window and mistake neither is named."""
    found = score("mistakes", "baseline", "plays", 10.0) + score("mistakes", "streaming_2_6", "plays", 15.0)
    found += score("mistakes", "baseline", "docs", 4.0) + score("mistakes", "streaming_2_6", "docs", 5.0)
    assert findings(found) == [
        (
            "- **Perplexity**: over 101 tokens of plays the dense model has PPL 10.000, streaming_2_6 15.000 (1.50x); "
            "on docs 1.25x."
        )
    ]
    longer = [one.model_copy(update={"at": 999}) if one.subject == "docs" else one for one in found]
    assert findings(longer) == findings(found)  # the number of tokens is that of the text that is named
    found = [one for one in found if one.subject == "plays"]
    found += score("mistakes", "window_0_8", "plays", 20.0) + score("mistakes", "stale_ranks_2_6", "plays", 45.0)
    found += score("mistakes", "window_0_9", "plays", 7.0)  # of another size
    assert findings(found) == [
        (
            "- **Perplexity**: over 101 tokens of plays the dense model has PPL 10.000, streaming_2_6 15.000 (1.50x), "
            "window_0_8 (as many tokens, no sinks) 20.000 (2.00x), "
            "stale_ranks_2_6 (the same tokens at stale positions) 45.000 (4.50x)."
        )
    ]


@pytest.mark.parametrize(
    ("last", "words"), [(100, ", beyond the 64 positions that the model was trained on"), (50, "")]
)
def test_a_long_text_by_hand(last: int, words: str) -> None:
    """The last whole bin counts, of 25 tokens here, and is beyond the trained length if it begins there."""
    found: list[Measurement] = []
    for way, nll in (("baseline", 3.0), ("streaming_4_12_0", 2.0)):
        for end, value in ((25, 9.0), (last, nll), (last + 10, 5.0)):
            found += measured("along", "plays", way, end, {"NLL of a bin": ("nat", [value])})
    assert findings(found) == [
        (
            f"- **A long text**: PPL of tokens {last - 24} to {last} of plays{words}: "
            f"dense {math.exp(3):.3f}, streaming_4_12_0 {math.exp(2):.3f}."
        )
    ]


def step(way: str, at: int, took: float, kept: float) -> list[Measurement]:
    """Return time [ms] and memory [bytes] of a token behind others."""
    return measured("steps", "a-model", way, at, {"TPOT": ("ms", [took]), "cache": ("bytes", [kept])})


def test_time_and_memory_by_hand() -> None:
    """3 / 4 is 0.75; from 10 to 110 tokens, 2 MB more are 20 kB each; a place that only one side has is left out."""
    found = step("baseline", 10, 2.0, 1e6) + step("baseline", 110, 4.0, 3e6)
    found += step("streaming_4_12", 10, 2.0, 6e5) + step("streaming_4_12", 110, 3.0, 6e5)
    found += step("streaming_4_12", 500, 9.0, 6e5)
    times = (
        "- **Time and memory**: after 110 tokens a token takes 3.00 ms with streaming_4_12, 0.75x of the dense model's "
    )
    memory = "4.00 ms; keys and values take 0.60 MB, 0.20x of the dense model's 3.00 MB"
    assert findings(found) == [f"{times}{memory}, and grow by 0.0 kB a token, the dense model's by 20.0 kB."]
    one_place = [one for one in found if one.at == 110]
    assert findings(one_place) == [f"{times}{memory}."]


def answers(way: str, at: int, hits: list[float], back: list[float]) -> list[Measurement]:
    """Return the answers to questions about facts so many tokens back."""
    return measured("recall", "plays", way, at, {"answered": ("", hits), "tokens back": ("tokens", back)})


def test_recall_by_hand() -> None:
    """12 tokens back is still inside a window of 12, 13 is not, although both are as many lines back."""
    found = answers("baseline", 1, [1, 1, 0], [5, 12, 13]) + answers("baseline", 9, [1, 1], [90, 91])
    found += answers("streaming_4_12_0", 1, [1, 0, 1], [5, 12, 13]) + answers("streaming_4_12_0", 9, [0, 0], [90, 91])
    start = "streaming_4_12_0 answered 1 of 2 questions about facts at most 12 tokens back, its window, and"
    assert findings(found) == [f"- **Recall**: {start} 1 of 3 about older ones, the dense model 2 of them."]
    none = [one.model_copy(update={"samples": [0.0] * len(one.samples)}) for one in found if one.metric == "answered"]
    rest = [one for one in found if one.metric != "answered"]
    gone = f"what is evicted is gone: {start.replace('1 of 2', '0 of 2')} 0 of 3 about older ones"
    assert findings(rest + none) == [f"- **Recall**: {gone}, the dense model 0 of them."]
    assert findings([one for one in found if one.configuration != "baseline"]) == []
    assert findings([one for one in found if one.at == 9]) == []  # nothing inside the window


def loss(text: str, metric: str, nearest: int | None, mean: float, targets: float) -> list[Measurement]:
    """Return a loss over dense with a standard error of 0.125."""
    figures = {metric: ("nat", [mean]), f"{metric}: standard error": ("nat", [0.125])}
    return measured("where", text, "streaming_4_12_0", nearest, figures | {f"{metric}: targets": ("tokens", [targets])})


def test_recall_with_a_buffer() -> None:
    """A token of the buffer is not evicted yet."""
    found = [*answers("baseline", 1, [1, 1], [15, 19]), *answers("streaming_4_12_6", 1, [1, 0], [15, 19])]
    shown = "streaming_4_12_6 answered 1 of 1 questions about facts at most 18 tokens back, its window and buffer"
    assert findings(found) == [
        f"- **Recall**: what is evicted is gone: {shown}, and 0 of 1 about older ones, the dense model 1 of them."
    ]


def test_a_cost_without_its_sum_is_left_out() -> None:
    """As in a report that was cut."""
    assert findings(loss("plays", "NLL minus dense", 1, 0.5, 4)) == []


def test_cost_by_hand() -> None:
    """The distance with the largest loss is named, and what never occurred, on the first text."""
    found = loss("plays", "NLL minus dense, all", None, 0.25, 20) + loss("plays", "NLL minus dense", 1, 0.5, 4)
    found += loss("plays", "NLL minus dense", 257, 2.0, 3) + loss("docs", "NLL minus dense, all", None, 0.75, 9)
    found += loss("docs", "NLL minus dense", 1, 7.0, 9)
    start = (
        "- **Cost**: on plays streaming_4_12_0 has a loss of +0.2500 nat a token over dense, +2.000 ± 0.125 (n = 3) "
    )
    most = f"{start}where the same 4-gram was last seen 257-1,024 tokens ago"
    assert findings(found) == [f"{most}; on docs +0.7500."]
    found += loss("plays", "NLL minus dense", None, 0.125, 13)
    assert findings(found) == [f"{most}, +0.125 ± 0.125 (n = 13) where it never was; on docs +0.7500."]


def test_names_in_findings_are_text() -> None:
    """The name of a text is no Markdown."""
    found = [one for way in ("baseline", "streaming_2_6") for one in score("mistakes", way, "a*b<i>", 8.0)]
    assert "tokens of a\\*b\\<i\\> the dense" in findings(found)[0]
