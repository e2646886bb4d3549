"""docs/gpu.md says what the report beside it measured: each of its figures is computed here from the JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Final

import pytest

from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.reports.speed.compare import best_rate, least_ms, places
from sinkwindow_lab.reports.speed.floors import Place

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
RESULTS: Final = DOCS / "results" / "gpu"
REPORT: Final = read_report(RESULTS / "h200" / "gpu_report.json")
FOUND: Final = places(REPORT.measurements)
FIRST: Final = places(read_report(RESULTS / "h200-2026-11-27" / "gpu_report.json").measurements)  # of the day before
SINGLE: Final = json.loads((RESULTS / "h200" / "single_steps.json").read_text(encoding="utf-8"))
MODEL, LLAMA = (one.name for one in REPORT.models)
EAGER, STATIC = "streaming_4_1020_64", "static_4_1020_64"
WAITS: Final = 65  # steps of a cycle, B + 1: each has a length that the process has not seen
# What the kernels of a compiled step belong to, by words in their names; the first one that fits.
PARTS: Final = {
    "linear layers": ("nvjet", "splitKreduce"),
    "attention": ("cudnn",),
    "rotated sinks": ("addcmul", "index_put", "arange_copy"),
    "rotation of queries": ("",),
}


def of(part: str, at: int | None, side: str, metric: str, model: str = MODEL) -> float:
    """Return a median."""
    return FOUND[Place(part, model, at)][side][metric].median


def over_least(model: str) -> float:
    """Return a compiled step's time over that of reading everything once."""
    steps = FOUND[Place("reduce-overhead", model, 1024)]
    return steps[STATIC]["TPOT"].median / least_ms(steps, best_rate(FOUND))


def kernels(model: str) -> dict[str, float]:
    """Return what the parts of a compiled step take [ms], and what no kernel explains."""
    sums = dict.fromkeys(PARTS, 0.0)
    for kernel, metrics in FOUND[Place("kernels, step, reduce-overhead", model, 1024)].items():
        part = next(part for part, words in PARTS.items() if any(word in kernel for word in words))
        sums[part] += metrics["time"].median
    return sums | {"between kernels": of("reduce-overhead", 1024, STATIC, "TPOT", model) - sum(sums.values())}


def figures() -> dict[str, str]:
    """Return what the page has to say, by what it is about."""
    compiled, llama = (of("reduce-overhead", 1024, STATIC, "TPOT", model) for model in (MODEL, LLAMA))
    rate = best_rate(FOUND)
    at_1024, at_4096 = (of("tpot", limit, f"streaming_4_{limit - 4}_64", "TPOT") for limit in (1024, 4096))
    late, early = ([of("streaming", tokens, side, "TPOT") for side in (EAGER, "short")] for tokens in (64_000, 1000))
    peaks = {
        (side, tokens): (of("prompt", tokens, side, "peak") + of("prompt", tokens, side, "weights")) / 1e9
        for side in (EAGER, "baseline")
        for tokens in (5120, 20_480)
    }
    generated = {kind: of("generate", 64, kind, "time") for kind in ("baseline", "streaming", "static")}
    again, again_4096 = (of("recomputed", window, f"recompute_{window}", "TPOT") for window in (1024, 4096))
    laws = [place for place in FOUND if place.part == "laws"]
    block = {model: of("perplexity", None, "blocks", "time", model) for model in (MODEL, LLAMA)}
    single = {model: of("perplexity", None, "single", "time", model) / block[model] for model in block}
    dense = {model: of("perplexity", None, "dense", "time", model) / block[model] for model in block}
    first, later = (
        {way: statistics.median(times[part]) for way, times in SINGLE["steps"].items() if "streaming" in way}
        for part in (slice(WAITS), slice(WAITS, None))
    )
    growing = {way: statistics.median(times) for way, times in SINGLE["steps"].items() if "dense" in way}
    read = {way: round(20_480 / min(times), -2) for way, times in SINGLE["prompt"].items()}
    rows = {name: statistics.median(found) for name, found in SINGLE["rows"].items()}
    least_16 = (rows["weights"] + rows["keys and values"]) / 1e6 / rate
    without, linear = ", without cuDNN", kernels(MODEL)["linear layers"]
    plans = first["streaming"] - later["streaming"], growing["dense"] - growing["dense" + without]
    return {
        "laws": f"{sum(len(FOUND[place]) for place in laws)} laws in",
        "late": f"after 64,000 tokens {late[0]:.1f} ms beside {late[1]:.1f}",
        "early": f"after 1,000 tokens {early[0]:.1f} ms beside {early[1]:.1f}",
        "compiled": f"{at_1024 / compiled:.1f} times faster**: {compiled:.2f} ms instead of {at_1024:.1f}",
        "least": f"to {compiled / over_least(MODEL):.2f} ms here",
        "over least": f"at {over_least(MODEL):.1f} times the lower bound",
        "llama": f"{llama:.2f} ms, {over_least(LLAMA):.1f} times",
        "rate": f"the {rate / 1e3:.1f} TB/s of a copy",
        "linear": f"take {linear:.2f} ms, {linear * over_least(MODEL) / compiled:.1f} times the lower bound",
        "bandwidth": f"weights at {rows['weights'] / 1e6 / linear / rate:.0%} of the copy's",
        "rows": f"{rows['compiled']:.2f} ms ({rows['compiled'] / least_16:.1f} times the lower bound)",
        "rows, dense": f"dense {rows['dense']:.1f} uncompiled",
        "generate": f"{generated['static']:.1f} ms a token instead of {generated['baseline']:.1f} dense",
        "between steps": f"{generated['static'] - compiled:.1f} ms of these",
        "generate, eager": f"{generated['streaming']:.1f} with uncompiled steps",
        "peak": f"takes {peaks[EAGER, 20_480]:.1f} GB, weights included, as one of 5,120",
        "constant": f"{peaks[EAGER, 5120]:.1f} GB, weights included",
        "dense peak": f"dense takes {peaks['baseline', 20_480]:.1f} GB",
        "blocks": f"{single[MODEL]:.0f} times as fast as token by token ({single[LLAMA]:.0f} times with Llama)",
        "dense pass": f"{dense[MODEL]:.2f} times as fast as a dense pass ({dense[LLAMA]:.2f})",
        "again": f"take {again:.1f} ms a token, {again / compiled:.1f} times a compiled step",
        "again, uncompiled": f"and {again / at_1024:.1f} times an uncompiled one",
        "again at 4,096": f"take {again_4096 / at_4096:.1f} times an uncompiled step",
        "tuned": f"{FIRST[Place('max-autotune', MODEL, 1024)][STATIC]['TPOT'].median:.2f} ms instead of "
        f"{FIRST[Place('reduce-overhead', MODEL, 1024)][STATIC]['TPOT'].median:.2f}",
        "new lengths": f"{first['streaming']:.0f} ms in the first cycle and {later['streaming']:.1f} from then on",
        "growing": f"takes {growing['dense']:.0f} ms at each",
        "without cuDNN": f"{first['streaming' + without]:.1f} ms in the first cycle, "
        f"{later['streaming' + without]:.1f} later, and {growing['dense' + without]:.1f} for the growing cache",
        "plan": f"about {statistics.mean(plans):.0f} ms here",
        "prompts": f"{read['1,024']:,.0f} tokens/s",
        "pieces": f"{read['256']:,.0f} tokens/s with 256 columns and {read['512']:,.0f} with 512",
        "larger": f"{read['1,024, one call']:,.0f} at 1,024 columns, "
        f"{read['2,048, one call']:,.0f} at 2,048 and {read['4,096, one call']:,.0f} at 4,096",
        "dense prompts": f"dense {read['dense']:,.0f} in the same calls and {read['dense, one call']:,.0f} in one call",
        "first prompts": f"{round(20_480 / SINGLE['prompt']['1,024'][0], -2):,.0f} tokens/s, "
        f"dense {round(20_480 / SINGLE['prompt']['dense'][0], -2):,.0f}",
        "prompts of the report": f"{round(1e3 / of('prompt', 20_480, EAGER, 'time'), -2):,.0f} tokens/s, "
        f"dense {round(1e3 / of('prompt', 20_480, 'baseline', 'time'), -2):,.0f}",
        "memory of a prompt": f"{SINGLE['peak']['1,024, one call']:.1f} GB, dense "
        f"{SINGLE['peak']['dense, one call']:.1f}",
    }


@pytest.mark.parametrize("about", figures())
def test_the_page_says_what_was_measured(about: str) -> None:
    """Each figure, with its words, is on the page."""
    text = " ".join((DOCS / "gpu.md").read_text(encoding="utf-8").split())
    assert " ".join(figures()[about].split()) in text


def test_the_table_has_the_kernels_of_the_profile() -> None:
    """Each kernel is in one row, and what no kernel explains in the last one; shares are of the step."""
    lines = (DOCS / "gpu.md").read_text(encoding="utf-8").splitlines()
    both = [(kernels(model), of("reduce-overhead", 1024, STATIC, "TPOT", model)) for model in (MODEL, LLAMA)]
    for part in both[0][0]:
        (row,) = [line for line in lines if line.startswith(f"| {part}")]
        cells = [cell for sums, step in both for cell in (f"{sums[part]:.2f}", f"{sums[part] / step:.0%}")]
        assert row.strip("| ").split(" | ")[1:] == cells
