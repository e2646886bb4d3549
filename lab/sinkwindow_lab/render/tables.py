"""The page of a report: pure functions of its records, so that no number is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence

from sinkwindow_lab.measure.timing import spread
from sinkwindow_lab.records import (
    ExperimentRecord,
    GenerationRecord,
    PerplexityRecord,
    RowRecord,
    SpeedRecord,
)
from sinkwindow_lab.render.origins import corpus_line, machine_rows, model_line
from sinkwindow_lab.render.page import Block, Bullets, Heading, Table, Text, html_page, markdown, markdown_table
from sinkwindow_lab.render.study_tables import meaning, shown_name, study_blocks
from sinkwindow_lab.reports.report import Report

__all__ = ["markdown_table", "page", "render", "render_html"]

NOT_MEASURED = "-"
FACTS = ("Total Time (s)", "Avg Attn (ms)", "TTFT (s)", "TPOT (ms)", "Throughput (tok/s)", "Peak Mem (GB)")
WORDS = (
    "**PPL**: exp of the mean loss over all targets, each scored once, the text read once from its start.",
    "**Total Time**: prefill and generation. **Throughput**: new tokens over that time.",
    "**Avg Attn**: cache work plus attention of one token, all layers, averaged over a generation of its own.",
    "**TTFT**: prefill and the first token, the median of several prompts.",
    "**TPOT**: (last - first) / (tokens - 1), the first token excluded.",
    "Rows are interleaved, a token each: a slow minute of the machine affects all of them equally.",
    f"**{NOT_MEASURED}**: not measured. The speed of a mistake is of no interest, re-computation is slow to score.",
    "Generations from one prompt are one: a shorter one is the start of a longer one.",
    "**Peak Mem**: weights plus the most that a generation's tensors take at once, counted; 1 GB = 10^9 bytes.",
)


def render(report: Report) -> str:
    """Return the whole page as Markdown, with its pictures in `figures/`."""
    return markdown(page(report))


def render_html(report: Report) -> str:
    """Return the whole page as one self-contained HTML file, pictures included."""
    return html_page(f"Paper tables, {report.model.name}", page(report))


def page(report: Report) -> list[Block]:
    """Return the blocks of the whole page."""
    names = [corpus.name for corpus in report.corpora]
    blocks: list[Block] = [Heading(1, "Paper tables"), *_lead(report), Heading(2, "What ran"), _head(report)]
    for experiment in report.experiments:
        blocks += [Heading(2, _title(experiment)), _main_table(experiment, names), *_short_runs(experiment)]
    if report.experiments:
        blocks += [Heading(2, "What the words mean"), _legend(report)]
    blocks += study_blocks(report.studies, names)
    if report.experiments:
        blocks.append(Heading(2, "Behind the tables"))
    for experiment in report.experiments:
        blocks.append(Heading(3, f"Behind {_title(experiment)}"))
        blocks += [*_score_table(experiment), *_speed_table(experiment)]
    return blocks


def _lead(report: Report) -> list[Block]:
    gone = "Evicted text is gone: streaming bounds memory and keeps text fluent, but nothing evicted can be recalled."
    if not report.quick:
        return [Text(gone)]
    return [Text(gone), Text("**A quick run**: the same questions over far fewer tokens, as each title says.")]


def _head(report: Report) -> Table:
    rows = [("Model", model_line(report.model)), *(("Corpus", corpus_line(one)) for one in report.corpora)]
    bos = "added in front of each text" if report.bos == "add" else "none added"
    rows += [("BOS", bos), *machine_rows(report.machine)]
    return Table(("", "value"), tuple(rows), facts=True)


def _title(experiment: ExperimentRecord) -> str:
    name = experiment.name[:1].upper() + experiment.name[1:]
    lengths = f"prompt {experiment.prompt_tokens:,}, generation {experiment.generated_tokens:,}"
    return f"{name}: PPL over {experiment.perplexity_tokens:,} tokens, {lengths}"


def _main_table(experiment: ExperimentRecord, corpora: Sequence[str]) -> Table:
    rows = [
        (_name(row), *(_perplexity(row, name) for name in corpora), *_facts(row, experiment)) for row in experiment.rows
    ]
    return Table(("Configuration", *(f"PPL {name}" for name in corpora), *FACTS), tuple(rows))


def _name(row: RowRecord) -> str:
    return shown_name(row.configuration)


def _perplexity(row: RowRecord, corpus: str) -> str:
    found = [one.perplexity for one in row.perplexities if one.corpus == corpus]
    return f"{found[0]:.3f}" if found else NOT_MEASURED


def _facts(row: RowRecord, experiment: ExperimentRecord) -> list[str]:
    attention = f"{row.attention.milliseconds:.3f}" if row.attention else NOT_MEASURED
    if row.speed is None:
        return [NOT_MEASURED, attention, *[NOT_MEASURED] * 4]
    whole = row.speed.rounds[0].generated_tokens == experiment.generated_tokens
    total = f"{row.speed.median('total_s'):.2f}" if whole else NOT_MEASURED
    throughput = f"{row.speed.median('throughput'):.2f}" if whole else NOT_MEASURED
    times = [f"{row.speed.median('ttft_s'):.3f}", f"{row.speed.median('tpot_ms'):.2f}"]
    peak = row.speed.peak_gb
    return [total, attention, *times, throughput, NOT_MEASURED if peak is None else f"{peak:.3f}"]


def _short_runs(experiment: ExperimentRecord) -> list[Text]:
    """Describe which rows generated fewer tokens than the title promises."""
    short = [
        f"{row.configuration.name} generated {row.speed.rounds[0].generated_tokens:,} tokens only: its TPOT is per "
        "token as everywhere, a total time of so few tokens would not compare."
        for row in experiment.rows
        if row.speed and row.speed.rounds[0].generated_tokens < experiment.generated_tokens
    ]
    targets = sorted({(one.corpus, one.targets) for row in experiment.rows for one in row.perplexities})
    scored = ", ".join(f"{count:,} of {corpus}" for corpus, count in targets)
    return [Text(one) for one in short] + (
        [Text(f"Targets scored, the same in every row: {scored}.")] if targets else []
    )


def _legend(report: Report) -> Bullets:
    seen = {row.configuration.name: row.configuration for one in report.experiments for row in one.rows}
    return Bullets((*map(meaning, seen.values()), *WORDS))


def _score_table(experiment: ExperimentRecord) -> list[Block]:
    header = (
        "Configuration", "Corpus", "Tokens", "Targets", "NLL", "Std. error", "Bits/byte", "tok/s", "Evictions", "Kept",
    )  # fmt: skip
    rows = tuple(_score_row(row, one) for row in experiment.rows for one in row.perplexities)
    return [Table(header, rows)] if rows else []


def _score_row(row: RowRecord, one: PerplexityRecord) -> tuple[str, ...]:
    counts = [f"{one.tokens:,}", f"{one.targets:,}"]
    losses = [f"{one.mean_nll:.4f}", f"{one.standard_error:.4f}", f"{one.bits_per_byte:.4f}"]
    memory = [f"{one.evictions:,}", f"{one.kept_tokens:,}"]
    return (_name(row), one.corpus, *counts, *losses, f"{one.tokens_per_second:.1f}", *memory)


def _speed_table(experiment: ExperimentRecord) -> list[Block]:
    header = ("Configuration", "Rounds", "Step median (ms)", "Quartiles (ms)", "Cache (MB)", "Kept", "Evictions")
    rows = tuple(_speed_row(row, row.speed) for row in experiment.rows if row.speed)
    return [Table(header, rows)] if rows else []


def _speed_row(row: RowRecord, speed: SpeedRecord) -> tuple[str, ...]:
    steps = spread([step for one in speed.rounds for step in one.step_ms])
    last: GenerationRecord = speed.rounds[-1]
    quartiles = f"{steps.lower:.2f} .. {steps.upper:.2f}"
    sizes = [f"{last.cache_bytes / 1e6:.2f}", f"{last.kept_tokens:,}", f"{last.evictions:,}"]
    return (_name(row), str(len(speed.rounds)), f"{steps.median:.2f}", quartiles, *sizes)
