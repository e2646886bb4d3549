"""The page of `nox -s speed`: pure functions of its records, so that no number is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence

from sinkwindow_lab.measure.timing import spread
from sinkwindow_lab.render.origins import machine_rows, model_line
from sinkwindow_lab.render.page import Block, Bullets, Heading, Table, Text, markdown
from sinkwindow_lab.reports.pace.records import BandwidthRecord, Comparison, FloorRecord, Series, SpeedReport

NOT_MEASURED = "-"
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
WORDS = (
    "Both sides of a ratio ran interleaved in one process; medians, quartiles in brackets, raw samples in the JSON.",
    "**Ratio** is our time over the other side's; for prefill and perplexity our tokens/s over the other side's.",
    "**Over floor**, attention: ours over bare SDPA on ready-made contiguous keys and values of the same length.",
    "**Over floor**, steps: ours over the same model's step with 8 tokens of context plus that bare SDPA.",
    "**Over floor**, compiled steps: ours over reading weights, keys and values once at the best bandwidth measured.",
    "**Over floor**, prefill and perplexity: ours over the same calls with nothing before them, each alone.",
    "A cache is brought to where it has seen N tokens with made-up keys and values; then the model itself decodes.",
)


def render(report: SpeedReport) -> str:
    """Return the page as Markdown."""
    return markdown(page(report))


def page(report: SpeedReport) -> list[Block]:
    """Return the blocks of the page."""
    blocks: list[Block] = [Heading(1, "Speed"), *verdict(report), Heading(2, "What ran"), _head(report)]
    blocks += [Heading(2, "Floors"), floor_table(report.floors, report.bandwidth), bandwidth_table(report.bandwidth)]
    for part, title in PARTS.items():
        rows = [one for one in report.comparisons if one.part == part]
        if rows:
            blocks += [Heading(2, title), comparison_table(rows, judged=not report.quick)]
    return [*blocks, Heading(2, "What the words mean"), Bullets(WORDS)]


def verdict(report: SpeedReport) -> list[Block]:
    """Return what was missed, or that nothing was."""
    judged = [one for one in report.comparisons if one.bar is not None]
    if report.quick:
        return [
            Text("**A quick run** on tiny models: it shows that everything is measured, its numbers are not judged.")
        ]
    if not report.missed:
        return [Text(f"All {len(judged)} targets are met, in {report.seconds:.0f} s.")]
    count = Text(f"{len(report.missed)} of {len(judged)} targets are missed, in {report.seconds:.0f} s:")
    return [count, Bullets(tuple(map(complaint, report.missed)))]


def complaint(one: Comparison) -> str:
    """Describe a missed bar with its number, and with the floor's number if the floor misses it too."""
    side = "at least" if one.ratio_kind == "speed" else "at most"
    missed = f"{one.model}, {one.part}, {one.what}: {one.ratio:.3f}x, target {side} {one.bar:.2f}x"
    return missed if one.attainable else f"{missed}; the lower bound itself is at {one.free:.3f}x here"


def comparison_table(rows: Sequence[Comparison], *, judged: bool = True) -> Table:
    """Return the table of one part; if `judged`, it says which bars are met."""
    header = ("Model", "What", "Ours", "Compared with", "Ratio", "Target", "Over floor", "Note")
    return Table(header, tuple(_row(one, judged=judged) for one in rows))


def _row(one: Comparison, *, judged: bool) -> tuple[str, ...]:
    if one.ratio_kind == "longest":
        worst = one.ours.values[one.ours.longest_event]
        ours, other = f"longest {worst:.2f} {one.ours.unit}", f"median {_cell(one.ours)}"
    else:
        ours, other = _cell(one.ours), f"{one.other.name}: {_cell(one.other)}"
    floor = NOT_MEASURED if one.over_floor is None else f"{one.over_floor:.2f}x"
    note = one.note or ("" if one.part != "tricks" else one.ours.name)
    return (one.model, one.what, ours, other, f"{one.ratio:.3f}x", _bar(one, judged=judged), floor, note)


def _bar(one: Comparison, *, judged: bool) -> str:
    if one.bar is None:
        return NOT_MEASURED
    sign = ">=" if one.ratio_kind == "speed" else "<="
    met = f", {'met' if one.met else 'missed'}" if judged else ", not judged"
    return f"{sign} {one.bar:.2f}x{met}"


def _cell(series: Series) -> str:
    found = series.spread
    if found.count == 1:
        return f"{found.median:.3f} {series.unit}"
    return f"{found.median:.3f} [{found.lower:.3f}, {found.upper:.3f}] {series.unit}"


def floor_table(floors: Sequence[FloorRecord], bandwidth: BandwidthRecord) -> Table:
    """Return the table of the lower bounds of a decode step."""
    header = ("Model", "Batch", "Context", "Bare SDPA", "Step, 8 tokens of context", "Bytes read", "Bytes / bandwidth")
    return Table(header, tuple(_floor_row(one, bandwidth) for one in floors))


def _floor_row(one: FloorRecord, bandwidth: BandwidthRecord) -> tuple[str, ...]:
    weights, cache = f"{one.weight_bytes / 1e9:.3f} GB", f"{one.cache_bytes / 1e9:.3f} GB"
    times = [_cell(one.bare), _cell(one.short), f"{weights} + {cache}", f"{bandwidth.least_ms(one.read_bytes):.2f} ms"]
    return (one.model, str(one.batch), f"{one.context:,}", *times)


def bandwidth_table(bandwidth: BandwidthRecord) -> Table:
    """Return the table of memory bandwidth by way of moving bytes."""
    rows = []
    for name, values in bandwidth.rates.items():
        found = spread(values)
        rows.append((name, f"{found.median:.1f} [{found.lower:.1f}, {found.upper:.1f}] GB/s"))
    return Table((f"Memory bandwidth, {bandwidth.megabytes:,.0f} MB on {bandwidth.device}", "rate"), tuple(rows))


def _head(report: SpeedReport) -> Table:
    rows = [("Model", model_line(one)) for one in report.models] + machine_rows(report.machine)
    return Table(("", "value"), (*rows, ("Took", f"{report.seconds:.0f} s")), facts=True)


def sections(report: SpeedReport) -> dict[str, str]:
    """Return the Markdown of a run for the marked places of a hand-written page, by the place's name."""
    machine = dict(machine_rows(report.machine))
    where = f"Measured on {machine['Machine']}; {machine['Software']}; commit {machine['Commit']}; {machine['Date']}."
    tables = [floor_table(report.floors, report.bandwidth), bandwidth_table(report.bandwidth)]
    found = {VERDICT: markdown([*verdict(report), Text(where)]), "speed-floors": markdown(tables)}
    for part in PARTS:
        rows = [one for one in report.comparisons if one.part == part]
        if rows:
            found[f"speed-{part}"] = markdown([comparison_table(rows, judged=not report.quick)])
    return found
