"""docs/gpu.md says what the report beside it measured: each of its figures is computed here from the JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.reports.speed.compare import best_rate, least_ms, places
from sinkwindow_lab.reports.speed.floors import Place

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
REPORT: Final = read_report(DOCS / "results" / "gpu" / "h200" / "gpu_report.json")
FOUND: Final = places(REPORT.measurements)
(MODEL,) = (one.name for one in REPORT.models)
EAGER, STATIC = "streaming_4_1020_64", "static_4_1020_64"
# What the kernels of a compiled step belong to, by words in their names; the first one that fits.
PARTS: Final = {
    "linear layers": ("nvjet", "splitKreduce"),
    "attention": ("_attend_to_part", "amax_exp", "to_copy_div_exp", "bitwise_and"),
    "rotated sinks": ("addcmul", "index_put", "arange_copy"),
    "rotation of queries": ("",),
}


def of(part: str, at: int, side: str, metric: str) -> float:
    """Return a median."""
    return FOUND[Place(part, MODEL, at)][side][metric].median


def figures() -> dict[str, str]:
    """Return what the page has to say, by what it is about."""
    late, early = (of("streaming", tokens, EAGER, "TPOT") for tokens in (64_000, 1000))
    steps = FOUND[Place("reduce-overhead", MODEL, 1024)]
    compiled, least = steps[STATIC]["TPOT"].median, least_ms(steps, best_rate(FOUND))
    again, scored = of("recomputed", 1024, "recompute_1024", "TPOT"), FOUND[Place("perplexity", MODEL)]
    peaks = {
        (side, tokens): (of("prompt", tokens, side, "peak") + of("prompt", tokens, side, "weights")) / 1e9
        for side in (EAGER, "baseline")
        for tokens in (5120, 20_480)
    }
    speeds = {key: 1e3 / of("prompt", key[1], key[0], "time") for key in peaks}
    first = of("prompt", 5120, EAGER, "time") * 5120
    chunk = (of("prompt", 20_480, EAGER, "time") * 20_480 - first) / 15
    blocks = scored["blocks"]["time"].median
    laws = sum(len(sides) for place, sides in FOUND.items() if place.part == "laws")
    tpot = [FOUND[Place("tpot", MODEL, limit)][way(limit)]["TPOT"].samples for limit in (256, 1024, 4096)]
    new, repeated = [one for samples in tpot for one in samples[:-1]], [samples[-1] for samples in tpot]
    dense = [round(speeds["baseline", tokens], -3) for tokens in (20_480, 5120)]
    return {
        "laws": f"{laws} laws in",
        "late": f"{late:.1f} ms after 64,000 tokens and {early:.1f} ms after 1,000",
        "short": f"{of('streaming', 64_000, 'short', 'TPOT'):.1f} ms. Uncompiled",
        "compiled": f"{late / compiled:.1f} times faster**: {compiled:.2f} ms with",
        "least": f"takes {least:.2f} ms here",
        "over least": f"at {compiled / least:.1f} times the lower bound",
        "rate": f"the {best_rate(FOUND) / 1e3:.1f} TB/s of a copy",
        "peak": f"takes {peaks[EAGER, 20_480]:.1f} GB, weights included, as one of 5,120",
        "constant": f"{peaks[EAGER, 5120]:.1f} GB, weights included",
        "dense peak": f"dense takes {peaks['baseline', 20_480]:.1f} GB",
        "blocks": f"{scored['single']['time'].median / blocks:.0f} times as fast as token by token",
        "dense pass": f"{scored['dense']['time'].median / blocks:.2f} times as fast as a dense pass",
        "again": f"take {again:.1f} ms a token, {again / compiled:.1f} times a compiled step",
        "tuned": f"{of('max-autotune', 1024, STATIC, 'TPOT'):.2f} ms instead of {compiled:.2f}",
        "new lengths": f"took {round(min(new)):.0f} to {round(max(new)):.0f} ms",
        "repeated lengths": f"took {min(repeated):.0f} to {max(repeated):.0f} ms",
        "prompts": f"{speeds[EAGER, 20_480] // 100 * 100:,.0f} to {speeds[EAGER, 5120] // 100 * 100:,.0f} tokens/s",
        "dense prompts": f"dense at {dense[0]:,.0f} to {dense[1]:,.0f}",
        "chunk": f"{chunk:.0f} ms, {chunk / 4:.0f} ms\na piece",
    }


def way(limit: int) -> str:
    """Return the name of the streaming cache of S + W tokens."""
    return f"streaming_4_{limit - 4}_64"


@pytest.mark.parametrize("about", figures())
def test_the_page_says_what_was_measured(about: str) -> None:
    """Each figure, with its words, is on the page."""
    text = " ".join((DOCS / "gpu.md").read_text(encoding="utf-8").split())
    assert " ".join(figures()[about].split()) in text


def test_the_table_has_the_kernels_of_the_profile() -> None:
    """Each kernel is in one row, and what no kernel explains in the last one; shares are of the step."""
    step = of("reduce-overhead", 1024, STATIC, "TPOT")
    sums = dict.fromkeys(PARTS, 0.0)
    for kernel, metrics in FOUND[Place("kernels, reduce-overhead", MODEL, 1024)].items():
        part = next(part for part, words in PARTS.items() if any(word in kernel for word in words))
        sums[part] += metrics["time"].median
    sums["between kernels"] = step - sum(sums.values())
    lines = (DOCS / "gpu.md").read_text(encoding="utf-8").splitlines()
    for part, took in sums.items():
        (row,) = [line for line in lines if line.startswith(f"| {part}")]
        assert row.split(" | ")[1:] == [f"{took:.2f}", f"{took / step:.0%} |"]
