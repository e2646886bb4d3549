"""The page of the GPU report: pure functions of its records."""

from __future__ import annotations

from sinkwindow_lab.render.origins import machine_rows, model_line
from sinkwindow_lab.render.page import Block, Bullets, Heading, Table, Text, markdown
from sinkwindow_lab.reports.pace.gpu_records import GpuReport, LawRecord, PointRecord, PromptRecord
from sinkwindow_lab.reports.pace.records import Series
from sinkwindow_lab.reports.pace.speed_page import bandwidth_table

NOT_MEASURED = "-"
WORDS = (
    "Weights are random: speed and memory are those of the real shapes, what the models say means nothing.",
    "**TPOT / bytes**: time per output token over (weight + cache bytes) / the best bandwidth measured here.",
    "**TPOT / short**: over the same model's step with 8 tokens of context in the stock cache.",
    "**Attention**: cache work plus attention of one token, all layers; **/ bare**: over SDPA on ready-made tensors.",
    "Dense is `DynamicCache` held at the mean length of the streaming cache; a sample is several steps on end.",
    "**Grown**: the highest sum of tensors, without the weights, while a prompt is read; **Peak**: weights included.",
    "A law allows twice the error of the reference's own mathematics in the dtype, plus one rounding step.",
)


def render(report: GpuReport) -> str:
    """Return the page as Markdown."""
    return markdown(page(report))


def page(report: GpuReport) -> list[Block]:
    """Return the blocks of the page."""
    blocks: list[Block] = [Heading(1, "GPU report"), Text(lead(report)), Heading(2, "What ran"), _head(report)]
    blocks += [bandwidth_table(report.bandwidth)]
    if report.points:
        blocks += [Heading(2, "Decoding"), decode_table(report)]
    if report.prompts:
        blocks += [Heading(2, "Exact prefill"), Table(PROMPT_HEADER, tuple(map(_prompt, report.prompts)))]
    if report.laws:
        blocks += [Heading(2, "Laws"), Table(LAW_HEADER, tuple(map(_law, report.laws)))]
    if report.skipped:
        blocks += [Heading(2, "Not measured, for want of time or memory"), Bullets(tuple(report.skipped))]
    return [*blocks, Heading(2, "What the words mean"), Bullets(WORDS)]


def lead(report: GpuReport) -> str:
    """Return the first paragraph: the machine, and how the run ended."""
    place = f"On {report.machine.gpu}" if report.on_gpu else "**There is no GPU here: tiny shapes on the CPU**"
    broken = sum(not one.holds for one in report.laws)
    state = "" if report.finished else " Unfinished: this is what was there when it stopped."
    laws = f"{len(report.laws)} laws checked, {broken} broken."
    return f"{place}, in {report.seconds:.0f} s. {laws}{state}"


def _head(report: GpuReport) -> Table:
    rows = [("Model", model_line(one)) for one in report.models] + machine_rows(report.machine)
    return Table(("", "value"), tuple(rows), facts=True)


def decode_table(report: GpuReport) -> Table:
    """Return the table of TPOT and attention, point by point."""
    header = (
        "Model", "Way", "S + W", "Streamed", "TPOT (ms)", "TPOT / bytes", "TPOT / short", "Attention (ms)", "/ bare",
        "Cache (MB)",
    )  # fmt: skip
    return Table(header, tuple(_point(one, report.bandwidth.best) for one in report.points))


def _point(one: PointRecord, rate: float) -> tuple[str, ...]:
    attention, over = NOT_MEASURED, NOT_MEASURED
    if one.attention is not None and one.bare is not None:
        attention, over = _ms(one.attention), f"{one.attention.median / one.bare.median:.2f}x"
    return (
        one.model,
        one.way,
        f"{one.limit:,}",
        f"{one.streamed:,}",
        _ms(one.tpot),
        f"{one.over_bandwidth(rate):.2f}x",
        f"{one.tpot.median / one.short.median:.2f}x",
        attention,
        over,
        f"{one.cache_bytes / 1e6:.1f}",
    )


def _ms(series: Series) -> str:
    found = series.spread
    return f"{found.median:.3f} [{found.lower:.3f}, {found.upper:.3f}]"


PROMPT_HEADER = ("Model", "Way", "Prompt", "Chunk", "ms/token", "tok/s", "Peak (GB)", "Grown (GB)")


def _prompt(one: PromptRecord) -> tuple[str, ...]:
    took = one.series.median
    sizes = [f"{(one.weight_bytes + one.tensor_bytes) / 1e9:.3f}", f"{one.tensor_bytes / 1e9:.3f}"]
    return (one.model, one.way, f"{one.tokens:,}", f"{one.chunk:,}", f"{took:.4f}", f"{1e3 / took:,.0f}", *sizes)


LAW_HEADER = ("Law", "Shape", "Dtype", "Device", "Largest error", "Allowed", "Retained", "Holds")


def _law(one: LawRecord) -> tuple[str, ...]:
    kept = "equal" if one.retained_equal else "DIFFERENT"
    numbers = (f"{one.error:.2e}", f"{one.allowed:.2e}", kept)
    return (one.law, one.shape, one.dtype, one.device, *numbers, "yes" if one.holds else "NO")
