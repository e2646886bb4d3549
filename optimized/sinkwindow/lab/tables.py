"""Markdown of a report: pure functions of its records, so that no number in a table was ever typed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sinkwindow.lab.records import (
    ConfigurationRecord,
    CorpusRecord,
    ExperimentRecord,
    GenerationRecord,
    MachineRecord,
    PerplexityRecord,
    Report,
    RowRecord,
    SpeedRecord,
)
from sinkwindow.lab.timing import spread

NOT_MEASURED = "-"
FACTS = ("Total Time (s)", "Avg Attn (ms)", "TTFT (s)", "TPOT (ms)", "Throughput (tok/s)", "Peak Mem (GB)")
WORDS = (
    "- **PPL**: exp of the mean loss over all targets, each scored once, the text read once from its start.",
    "- **Total Time**: prefill and generation. **Throughput**: new tokens over that time.",
    "- **Avg Attn**: cache work plus attention of one token, all layers, the mean over places of the generation.",
    "  It is measured in a run of its own, the device idle around each part.",
    "- **TTFT**: prefill and the first token. **TPOT**: (last - first) / (tokens - 1), the first token excluded.",
    f"- **{NOT_MEASURED}**: not measured. The speed of an ablation is of no interest.",
    "  Re-computation runs its window for every token: scoring a text with it is left to `sinkwindow perplexity`.",
)
MEMORY = {
    "cpu": "exact weight bytes plus the growth of the process's resident set during the run, sampled (CPU)",
    "cuda": "the allocator's peak during the run, weights included (GPU)",
}


def render(report: Report) -> str:
    """The whole page.

    Args:
        report: what was measured.

    Returns:
        Markdown.
    """
    parts = ["# Paper tables", _lead(report), "## What ran", _head(report)]
    for experiment in report.experiments:
        names = [corpus.name for corpus in report.corpora]
        parts += [f"## {_title(experiment)}", _main_table(experiment, names), _short_runs(experiment)]
    parts += ["## What the words mean", _legend(report), "## Behind the tables"]
    for experiment in report.experiments:
        parts += [f"### {_title(experiment)}", _score_table(experiment), _speed_table(experiment)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right.

    Args:
        header: titles.
        rows: cells, as many per row as titles.

    Returns:
        The table's lines.

    Raises:
        ValueError: if a row has another number of cells.
    """
    if any(len(row) != len(header) for row in rows):
        message = f"every row needs {len(header)} cells, one per title"
        raise ValueError(message)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows)
    )


def _lead(report: Report) -> str:
    gone = "Evicted text is gone: streaming bounds memory and keeps text fluent, but nothing evicted can be recalled."
    if not report.quick:
        return gone
    return f"{gone}\n\n**A quick run**: the same configurations over far fewer tokens, as each title says."


def _head(report: Report) -> str:
    rows = [("Model", _model(report)), *(("Corpus", _corpus(one)) for one in report.corpora)]
    bos = "added in front of each text" if report.bos == "add" else "none added"
    rows += [("BOS", bos), *_machine(report.machine)]
    return markdown_table(("", "value"), rows).replace("---:", "---")


def _model(report: Report) -> str:
    model = report.model
    origin = ", ".join(part for part in (model.source, model.revision, _digest(model.sha256)) if part)
    size = f"{model.parameters / 1e6:,.1f}M parameters, {model.weight_bytes / 1e9:.3f} GB"
    return f"{model.name} ({origin}); {model.model_type}, {size}, {model.dtype} on {model.device}, {model.attention}"


def _corpus(corpus: CorpusRecord) -> str:
    parts = (corpus.config, corpus.split, corpus.revision, _digest(corpus.sha256))
    origin = ", ".join([corpus.source, *(part for part in parts if part)])
    return f"{corpus.name}: {origin}; {corpus.documents:,} document(s), {corpus.characters:,} characters"


def _digest(sha256: str | None) -> str:
    return f"sha256 {sha256[:16]}" if sha256 else ""


def _machine(machine: MachineRecord) -> Iterator[tuple[str, str]]:
    yield "Machine", f"{machine.cpu}, {machine.cores} core(s), {machine.memory_gb:.1f} GB, {machine.gpu or 'no GPU'}"
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield "Software", f"Python {machine.python}, {packages}; {machine.threads} thread(s); {machine.system}"
    changed = " with local changes" if machine.dirty else ""
    yield "Commit", f"{machine.commit}{changed}" if machine.commit else "not run from a checkout"
    yield "Date", machine.date


def _title(experiment: ExperimentRecord) -> str:
    name = experiment.name[:1].upper() + experiment.name[1:]
    lengths = f"prompt {experiment.prompt_tokens:,}, generation {experiment.generated_tokens:,}"
    return f"{name}: PPL over {experiment.perplexity_tokens:,} tokens, {lengths}"


def _main_table(experiment: ExperimentRecord, corpora: Sequence[str]) -> str:
    header = ["Configuration", *(f"PPL {name}" for name in corpora), *FACTS]
    rows = [
        [_name(row), *(_perplexity(row, name) for name in corpora), *_facts(row, experiment)] for row in experiment.rows
    ]
    return markdown_table(header, rows)


def _name(row: RowRecord) -> str:
    return f"{row.configuration.name} (ablation)" if row.configuration.ablation else row.configuration.name


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
    return [total, attention, *times, throughput, f"{row.speed.peak_gb:.3f}"]


def _short_runs(experiment: ExperimentRecord) -> str:
    """Says which rows generated fewer tokens than the title promises."""
    short = [
        f"{row.configuration.name} generated {row.speed.rounds[0].generated_tokens:,} tokens only: its TPOT is per "
        "token as everywhere, a total time of so few tokens would not compare."
        for row in experiment.rows
        if row.speed and row.speed.rounds[0].generated_tokens < experiment.generated_tokens
    ]
    targets = sorted({(one.corpus, one.targets) for row in experiment.rows for one in row.perplexities})
    scored = ", ".join(f"{count:,} of {corpus}" for corpus, count in targets)
    return "\n\n".join([*short, f"Targets scored, the same in every row: {scored}."] if targets else short)


def _legend(report: Report) -> str:
    seen = {row.configuration.name: row.configuration for one in report.experiments for row in one.rows}
    kinds = sorted({row.speed.rounds[0].memory.device for one in report.experiments for row in one.rows if row.speed})
    lines = [f"- **{one.name}**: {one.meaning}{_limits(one)}." for one in seen.values()]
    lines += [*WORDS, *(f"- **Peak Mem**: {MEMORY[kind]}; 1 GB = 10^9 bytes." for kind in kinds)]
    return "\n".join(lines)


def _limits(one: ConfigurationRecord) -> str:
    named = (("S", one.num_sinks), ("W", one.window), ("B", one.buffer))
    shown = ", ".join(f"{name}={value}" for name, value in named if value is not None)
    return f" ({shown})" if shown else ""


def _score_table(experiment: ExperimentRecord) -> str:
    header = (
        "Configuration", "Corpus", "Tokens", "Targets", "NLL", "Std. error", "Bits/byte", "tok/s", "Evictions", "Kept",
    )  # fmt: skip
    rows = [_score_row(row, one) for row in experiment.rows for one in row.perplexities]
    return markdown_table(header, rows) if rows else ""


def _score_row(row: RowRecord, one: PerplexityRecord) -> list[str]:
    counts = [f"{one.tokens:,}", f"{one.targets:,}"]
    losses = [f"{one.mean_nll:.4f}", f"{one.standard_error:.4f}", f"{one.bits_per_byte:.4f}"]
    memory = [f"{one.evictions:,}", f"{one.kept_tokens:,}"]
    return [_name(row), one.corpus, *counts, *losses, f"{one.tokens_per_second:.1f}", *memory]


def _speed_table(experiment: ExperimentRecord) -> str:
    header = ("Configuration", "Rounds", "Step median (ms)", "Quartiles (ms)", "Cache (MB)", "Kept", "Evictions")
    rows = [_speed_row(row, row.speed) for row in experiment.rows if row.speed]
    return markdown_table(header, rows) if rows else ""


def _speed_row(row: RowRecord, speed: SpeedRecord) -> list[str]:
    steps = spread([step for one in speed.rounds for step in one.step_ms])
    last: GenerationRecord = speed.rounds[-1]
    quartiles = f"{steps.lower:.2f} .. {steps.upper:.2f}"
    sizes = [f"{last.cache_bytes / 1e6:.2f}", f"{last.kept_tokens:,}", f"{last.evictions:,}"]
    return [_name(row), str(len(speed.rounds)), f"{steps.median:.2f}", quartiles, *sizes]
