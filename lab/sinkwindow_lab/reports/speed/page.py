"""The pages of the speed and the GPU report: pure functions of their measurements, no number is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sinkwindow_lab.records import Measurement, Report
from sinkwindow_lab.render.markdown import NOT_MEASURED, Page, bullets, join, name, numbers, table
from sinkwindow_lab.render.origins import head, machine_line
from sinkwindow_lab.reports.speed.compare import READ, Comparison, Sides, best_rate, comparisons, least_ms, places
from sinkwindow_lab.reports.speed.floors import KERNELS, Place
from sinkwindow_lab.reports.speed.plan import BARE, DENSE, SAME_CHUNKS, SHORT, STOCK
from sinkwindow_lab.ways.configurations import parse

VERDICT = "speed-verdict"  # the place that a page with tables of a run must have
PARTS = {
    "attention": "Attention and cache update over bare SDPA",
    "tpot": "Time per output token",
    "compiled": "Time per output token, compiled (`static=True`)",
    "longest": "The longest step with an eviction, compaction or rebase, over the median step",
    "prefill": "Prefill of 20 limits",
    "memory": "Peak memory of a prefill",
    "perplexity": "Exact streaming perplexity",
    "tricks": "What each trick is worth",
}
MISS = (
    "A target is the ratio that the cache was designed to reach on an idle machine. A miss means that it is slower than"
    " intended, by the numbers given, not that its output is wrong: that is checked before anything is timed."
)
IMPOSSIBLE = "No cache can meet these here, since the lower bound itself misses the target:"
WORDS = (
    "Both sides of a ratio ran interleaved in one process; medians, quartiles in brackets, raw samples in the JSON.",
    "**Ratio** is our time over the other side's; for prefill and perplexity our tokens/s over the other side's.",
    "**Over floor**, attention: ours over bare SDPA on ready-made contiguous keys and values of the same length.",
    "**Over floor**, steps: ours over the same model's step with 8 tokens of context plus that bare SDPA.",
    "**Over floor**, compiled steps: ours over reading weights, keys and values once at the best bandwidth measured.",
    "**Over floor**, prefill and perplexity: ours over the same calls with nothing before them, each alone.",
    "A cache is brought to where it has seen N tokens with made-up keys and values; then the model itself decodes.",
)
GPU_WORDS = (
    "Weights are random: speed and memory are those of the real shapes, what the models say means nothing.",
    "**TPOT / bytes**: time per output token over (weight + cache bytes) / the best bandwidth measured here.",
    "**TPOT / short**: over the same model's step with 8 tokens of context in the stock cache.",
    "**Attention**: cache work plus attention of one token, all layers; **/ bare**: over SDPA on ready-made tensors.",
    "Dense is `DynamicCache` held at the mean length of the streaming cache, or growing; a sample is several steps.",
    "Where SDPA builds a plan for each length that it has not seen, as cuDNN does, a growing cache pays at each step.",
    "**Grown**: the highest sum of tensors, without the weights, while a prompt is read; **Peak**: weights included.",
    "A law allows twice the error of the reference's own mathematics in the dtype, plus one rounding step.",
)
WAYS = {"baseline": "dense", "streaming": "streaming, eager", "static": "streaming, static and compiled"}
SLOWER = {"perplexity": ("single", "single tokens"), "generate": (DENSE.kind, WAYS[DENSE.kind])}  # compared with
LONGEST_NAME = 60  # of a kernel [characters]
PROSE = ("Kernel", "Of", "What", "Compared with", "Note", "Way", "Checked on")
Row = dict[str, str]


def page(report: Report) -> Page:
    """Return the page of a speed or a GPU report."""
    lead, tables, words = _gpu(report) if report.kind == "gpu" else _speed(report)
    state = "" if report.finished else "Unfinished: this is what was there when it stopped."
    failed, skipped = ("\n".join(map("- {}".format, map(name, parts))) for parts in (report.failed, report.skipped))
    tables |= {"Failed": failed, "Not measured, for want of time or memory": skipped}
    tables |= {"What the words mean": bullets(words)}
    return Page(join([lead, state, *(f"## {title}\n\n{text}" for title, text in tables.items() if text)]))


def _table(rows: Sequence[Row]) -> str:
    return table(list(rows[0]), [list(row.values()) for row in rows], words=PROSE) if rows else ""


def _cell(one: Measurement, digits: int = 3) -> str:
    return numbers(one.samples, digits, one.unit)


def _times(ratio: float, digits: int = 2) -> str:
    return NOT_MEASURED if math.isnan(ratio) else f"{ratio:.{digits}f}x"


# -- the speed report -------------------------------------------------------------------------------------------------


def _speed(report: Report) -> tuple[str, dict[str, str], Sequence[str]]:
    first = {
        "What ran": head(report, [("Took", f"{report.seconds:.0f} s")]),
        "Floors": floor_tables(places(report.measurements)).rstrip(),
    }
    tables = {PARTS[part]: own for part, own in _comparison_tables(report).items()}
    return join(["# Speed", gain(report), verdict(report)]).rstrip(), first | tables, WORDS


def gain(report: Report) -> str:
    """Return in one sentence what a user gains with the first model; nothing if it is not there or a quick run."""
    found = [] if report.quick else comparisons(report)
    own = [one for one in found if one.place.subject == found[0].place.subject]
    late = [one for one in own if one.place.part == "tpot" and one.ours.configuration == "ours, late"]
    said = [
        f"{one.what.rpartition(', over ')[0]}, a token takes {one.ours.median:.1f} ms, {_times(first.ratio)} of its "
        f"time when the cache was first full, and {_times(one.ratio)} of that with a {STOCK} of the same length"
        for one, first in zip(late[::2], late[1::2], strict=True)  # as `COMPARED` has them
    ]
    said += [
        f"{one.what.partition(', S + W')[0]} are read {_times(one.ratio)} as fast as by the dense model"
        for one in own
        if one.place.part == "prefill" and one.other.configuration == SAME_CHUNKS
    ]
    return f"What you gain with {name(own[0].place.subject)}: {'; '.join(said)}." if said else ""


def verdict(report: Report) -> str:
    """Return what was missed, after what that means, or that nothing was."""
    if report.quick:
        return "**A quick run** on tiny models: it shows that everything is measured, its numbers are not judged."
    judged = [one for one in comparisons(report) if one.target is not None]
    missed, beyond = (
        [name(one.complaint()) for one in judged if not one.met and one.possible is can] for can in (True, False)
    )
    if missed or beyond:
        count = f"{len(missed + beyond)} of {len(judged)} targets are missed, in {report.seconds:.0f} s."
        return join([f"{count} {MISS}", bullets(missed), *([IMPOSSIBLE, bullets(beyond)] if beyond else [])]).rstrip()
    all_of = "All" if report.finished and not report.skipped else "So far all"
    met = f"{all_of} {len(judged)} targets are met, in {report.seconds:.0f} s."
    return met if judged else "Nothing is judged yet."


def sections(report: Report) -> dict[str, str]:
    """Return the Markdown of a run for the marked places of a hand-written page, by the place's name."""
    own = {f"speed-{part}": text for part, text in _comparison_tables(report).items()}
    first = {"speed-gain": join([gain(report), machine_line(report.machine, "Software", "Commit")])}
    first |= {VERDICT: verdict(report), "speed-floors": floor_tables(places(report.measurements))}
    return first | own


def _comparison_tables(report: Report) -> dict[str, str]:
    found = comparisons(report)
    rows = {part: [_row(one, report) for one in found if one.place.part == part] for part in PARTS}
    return {part: _table(own) for part, own in rows.items() if own}


def _row(one: Comparison, report: Report) -> Row:
    state = "not judged" if report.quick else "met" if one.met else "missed"
    sign = ">=" if one.speed else "<="
    return {
        "Model": name(one.place.subject),
        "What": one.what,
        "Ours": _cell(one.ours),
        "Compared with": f"{one.other.configuration}: {_cell(one.other)}",
        "Ratio": _times(one.ratio, 3),
        "Target": NOT_MEASURED if one.target is None else f"{sign} {one.target:.2f}x, {state}",
        "Over floor": NOT_MEASURED if one.floor is None else _times(one.ours.median / one.floor),
        "Note": one.note,
    }


def floor_tables(found: Mapping[Place, Sides]) -> str:
    """Return the tables of the lower bounds of a decode step, and of memory bandwidth."""
    steps = [
        {
            "Model": name(place.subject),
            "Batch": str(place.at),
            "Context": f"{sides[SHORT]['context'].median:,.0f}",
            "Bare SDPA": _cell(sides[BARE]["TPOT"]),
            "Step, 8 tokens of context": _cell(sides[SHORT]["TPOT"]),
            "Bytes read": " + ".join(f"{sides[SHORT][one].median / 1e9:.3f} GB" for one in READ),
            "Bytes / bandwidth": f"{least_ms(sides, best_rate(found)):.2f} ms",
        }
        for place, sides in found.items()
        if place.part == "tpot"
    ]
    return join([_table(steps), bandwidth_table(found)])


def bandwidth_table(found: Mapping[Place, Sides]) -> str:
    """Return the table of memory bandwidth by way of moving bytes."""
    rows = [
        {f"Memory bandwidth, {place.at:,} MB on {place.subject}": way, "rate": _cell(metrics["rate"], 1)}
        for place, sides in found.items()
        if place.part == "bandwidth"
        for way, metrics in sides.items()
    ]
    return _table(rows)


# -- the GPU report ---------------------------------------------------------------------------------------------------


def _gpu(report: Report) -> tuple[str, dict[str, str], Sequence[str]]:
    found, laws = places(report.measurements), _law_rows(report)
    where = f"On {report.machine.gpu}" if report.machine.gpu else "**There is no GPU here: tiny shapes on the CPU**"
    where += ", **tiny shapes**" if report.machine.gpu and report.quick else ""
    wrong = sum(row["Holds"] == "NO" for row in laws)
    lead = f"{where}, in {report.seconds:.0f} s. {len(laws)} laws checked, {wrong} broken."
    decoded, prompts, kernels, again = list[Row](), list[Row](), list[Row](), list[Row]()
    texts: dict[str, list[Row]] = {"perplexity": [], "generate": []}
    for place, sides in found.items():
        for way, metrics in sides.items():
            if place.part == "prompt":
                prompts.append(_prompt_row(place, way, metrics, report.plan["chunk"]))
            elif place.part.startswith(KERNELS) and metrics["time"].median >= _all_kernels(sides) / 100:
                kernels.append(_kernel_row(place, way, metrics, sides))
            elif place.part == "recomputed":
                again.append(_recomputed_row(place, metrics, found))
            elif place.part in ("perplexity", "generate"):
                texts[place.part].append(_text_row(place, way, metrics, sides))
            elif "cache" in metrics:
                decoded.append(_decode_row(place, way, sides, best_rate(found)))
    tables = {
        "Decoding": _table(decoded),
        "Sliding windows with re-computation": _table(again),
        "Kernels": _table(kernels),
        "`generate`": _table(texts["generate"]),
        "Exact streaming perplexity": _table(texts["perplexity"]),
        "Exact prefill": _table(prompts),
        "Laws": _table(laws),
    }
    return (
        f"# GPU report\n\n{lead}",
        {"What ran": join([head(report), bandwidth_table(found)]).rstrip(), **tables},
        GPU_WORDS,
    )


def _decode_row(place: Place, way: str, sides: Sides, rate: float) -> Row:
    metrics, chosen, tpot = sides[way], parse(way), sides[way]["TPOT"].median
    alone = metrics.get("attention")
    return {
        "Model": name(place.subject),
        "Way": WAYS[chosen.kind] + ("" if place.part in ("tpot", chosen.kind) else f", {place.part}"),
        "S + W": f"{place.at if chosen.kind == 'baseline' else sum(chosen.limits[:2]):,}",
        "Streamed": f"{place.at:,}",
        "TPOT (ms)": numbers(metrics["TPOT"].samples, 3),
        "TPOT / bytes": _times(tpot / least_ms(sides, rate)),
        "TPOT / short": _times(tpot / sides[SHORT]["TPOT"].median),
        "Attention (ms)": NOT_MEASURED if alone is None else numbers(alone.samples, 3),
        "/ bare": NOT_MEASURED if alone is None else _times(alone.median / sides[BARE]["attention"].median),
        "Cache (MB)": f"{metrics['cache'].median / 1e6:.1f}",
    }


def _all_kernels(sides: Sides) -> float:
    """Return the time of all kernels of a step [ms]."""
    return sum(metrics["time"].median for metrics in sides.values())


def _kernel_row(place: Place, kernel: str, metrics: Mapping[str, Measurement], sides: Sides) -> Row:
    took = metrics["time"].median
    return {
        "Model": name(place.subject),
        "Of": place.part.removeprefix(f"{KERNELS}, "),
        "Kernel": name(kernel if len(kernel) <= LONGEST_NAME else kernel[: LONGEST_NAME - 3] + "..."),
        "Times": f"{metrics['calls'].median:.0f}",
        "ms per step": f"{took:.3f}",
        "of all": f"{took / _all_kernels(sides):.0%} of {_all_kernels(sides):.3f} ms",
    }


def _recomputed_row(place: Place, metrics: Mapping[str, Measurement], found: Mapping[Place, Sides]) -> Row:
    """Return the row of a window; beside it, the fastest of our steps with a cache of that size."""
    row = {"Model": name(place.subject), "W": f"{place.at:,}", "TPOT (ms)": numbers(metrics["TPOT"].samples, 3)}
    for kind, words in list(WAYS.items())[1:]:
        ours = [
            sides[way]["TPOT"].median
            for other, sides in found.items()
            for way in sides
            if other.subject == place.subject and "cache" in sides[way]
            if parse(way).kind == kind and sum(parse(way).limits[:2]) == place.at
        ]
        row[f"over {words}"] = _times(metrics["TPOT"].median / min(ours)) if ours else NOT_MEASURED
    return row


def _text_row(place: Place, way: str, metrics: Mapping[str, Measurement], sides: Sides) -> Row:
    took, (other, words) = metrics["time"], SLOWER[place.part]
    return {
        "Model": name(place.subject),
        "Way": WAYS.get(way, way),
        "ms/token": numbers(took.samples, 4),
        f"speed over {words}": _times(sides[other]["time"].median / took.median),
    }


def _prompt_row(place: Place, way: str, metrics: Mapping[str, Measurement], chunk: int) -> Row:
    took, peak = metrics["time"].median, metrics["peak"].median
    return {
        "Model": name(place.subject),
        "Way": WAYS[parse(way).kind],
        "Prompt": f"{place.at:,}",
        "Chunk": f"{chunk:,}",
        "ms/token": f"{took:.4f}",
        "tok/s": f"{1e3 / took:,.0f}",
        "Peak (GB)": f"{(metrics['weights'].median + peak) / 1e9:.3f}",
        "Grown (GB)": f"{peak / 1e9:.3f}",
    }


def _law_rows(report: Report) -> list[Row]:
    rows = []
    for place, sides in places(report.measurements).items():
        for law, metrics in sides.items() if place.part == "laws" else ():
            error, plain, step, equal = (one.median for one in metrics.values())
            holds = error <= 2 * plain + step and equal  # an error that is NaN breaks a law
            row = {"Law": law, "Checked on": place.subject, "Largest error": f"{error:.2e}"}
            row |= {"Allowed": f"{2 * plain + step:.2e}", "Retained": "equal" if equal else "DIFFERENT"}
            rows.append(row | {"Holds": "yes" if holds else "NO"})
    return rows


def broken(report: Report) -> list[str]:
    """Name the laws that do not hold on this device, with their errors, and the parts that failed."""
    rows = [row for row in _law_rows(report) if row["Holds"] == "NO"]
    laws = [f"law {row['Law']!r}, {row['Checked on']}: {row['Largest error']}" for row in rows]
    return [*laws, *report.failed]
